"""Weights that others have published, brought into a study as a run of their own.

Layers are matched by order and shape, whatever the tensors are called. What degrade's nets have no place for
goes where it changes nothing: biases of convolutions into the running means of the BNs that follow, the input's
standard deviation into the stem, and channels are permuted where option A put its zeros on both sides.
"""

import csv
import hashlib
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from degrade import commit, store
from degrade.config import RunConfig
from degrade.data import Splits, Stream
from degrade.data.images import Images
from degrade.evaluate import evaluate
from degrade.log import Epoch, to_csv
from degrade.nets import Block, Net, PreActivation, make_net
from degrade.provenance import environment
from degrade.store import Run, Study
from degrade.weights import is_safetensors, read_tensors

MEASURES = ("train_loss", "train_error", "test_loss", "test_error")  # that a published log may have
# The last part of a tensor's name in PyTorch; a BN's four in their order.
PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEEPEST = 8  # how far down in what was loaded a net is looked for


def state_dict(values: Any, key: str | None = None) -> dict[str, Tensor]:
    """The one mapping of names to tensors in what was loaded, however it is wrapped, such as {"state_dict": ...}.

    A net's has tensors of two and of four dimensions; an optimizer's, one mapping a parameter, have not.

    Raises:
        ValueError: there is none, or several (name one by `key`, such as "ema.state_dict").
    """
    found = _state_dicts(values)
    if key is not None:
        found = {name: there for name, there in found.items() if name == key}
    if len(found) == 1:
        return next(iter(found.values()))
    if key is None and found:
        raise ValueError(f"it holds several nets: {', '.join(found)}; name one with --key")
    raise ValueError(f"it holds no state dict{f' called {key}' if key else ''}: no mapping of names to a net's tensors")


def _state_dicts(values: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()  # a mapping may hold itself
    level = [("", values)]
    for _ in range(DEEPEST):
        below = []
        for path, there in level:
            if not isinstance(there, Mapping) or id(there) in seen:
                continue
            tensors = {name: t for name, t in there.items() if isinstance(name, str) and isinstance(t, Tensor)}
            if {2, 4} <= {t.ndim for t in tensors.values()}:
                found[path] = tensors
                continue
            seen.add(id(there))
            below += [(f"{path}.{name}".lstrip("."), value) for name, value in there.items()]
        level = below
    return found


class Layers(NamedTuple):
    """The layers of a net, each kind in the order in which they are stored."""

    convolutions: list[dict[str, Tensor]]
    norms: list[dict[str, Tensor]]
    linears: list[dict[str, Tensor]]


def layers(tensors: Mapping[str, Tensor]) -> Layers:
    """Group tensors into layers, by the names' last part where these are PyTorch's, otherwise by order and shape.

    Raises:
        ValueError: they are not those of convolutions, BN and linear layers.
    """
    ours = all(name.rpartition(".")[2] in PARTS for name in tensors)
    groups = _by_name(tensors) if ours else _by_order(tensors)
    found = Layers([], [], [])
    for name, group in groups.items():
        weight = group.get("weight")
        if weight is not None and weight.ndim == 4:
            found.convolutions.append(group)
        elif weight is not None and weight.ndim == 2:
            found.linears.append(group)
        elif weight is not None and weight.ndim == 1 and {"bias", "running_mean", "running_var"} <= set(group):
            found.norms.append(group)
        else:
            raise ValueError(f"{name} is not a convolution, a BN with its running statistics, or a linear layer")
    return found


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, place = name.rpartition(".")
        groups.setdefault(layer, {})[place] = tensor
    return groups


def _by_order(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A weight starts a layer; of the vectors that follow, four are a BN's, and one before them is a bias."""
    groups: dict[str, dict[str, Tensor]] = {}
    vectors: list[Tensor] = []
    last = ""
    for name, tensor in [*((n, t) for n, t in tensors.items() if t.ndim), ("", torch.zeros(1, 1))]:
        if tensor.ndim == 1:
            vectors.append(tensor)
            continue
        if len(vectors) % 4 == 1 and last:
            groups[last]["bias"] = vectors.pop(0)
        if len(vectors) % 4:
            raise ValueError(f"{len(vectors)} vectors follow {last or 'its beginning'}; a BN has four")
        for i in range(0, len(vectors), 4):
            groups[f"{last}, BN {i // 4 + 1}"] = dict(zip(PARTS, vectors[i : i + 4], strict=False))
        vectors, last = [], name
        groups[name] = {"weight": tensor}
    del groups[""]
    return groups


def fit(config: RunConfig, tensors: Mapping[str, Tensor], *, std: Sequence[float], zero_channels: str) -> Net:
    """The net of `config` with these weights, in eval mode.

    Args:
        config: of the run that they will be.
        tensors: in each kind of layer, in the order in which data passes through.
        std: what the net's input was divided by, a channel each.
        zero_channels: where option A put them: "appended", or on "both-sides".

    Raises:
        ValueError: they are not this net's.
    """
    split = zero_channels == "both-sides" and config.block != "plain" and config.shortcut == "A"
    if split and config.width % 2:
        raise ValueError(
            f"--zero-channels both-sides: width must be even, for as many on each side; got {config.width}"
        )
    for name, tensor in tensors.items():
        _check(name, tensor)
    there, net = layers(tensors), make_net(config)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    _copy(config, "convolution", there.convolutions, convolutions)
    _copy(config, "BN", there.norms, norms)
    _copy(config, "linear layer", there.linears, [net.linear])
    with torch.no_grad():
        for group, convolution in zip(there.convolutions, convolutions, strict=True):
            if "bias" in group:
                _norm_after(net, convolution).running_mean.sub_(group["bias"].detach())  # type: ignore[union-attr]
        net.conv.weight.div_(torch.tensor(std).view(1, 3, 1, 1))
        if split:
            _append_zero_channels(net)
    for name, tensor in net.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite in float32, once biases and --std {list(std)} are in it")
    return net.eval()


def _check(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantised" if tensor.is_quantized else _word(tensor.layout)
        raise ValueError(f"{name} must be dense, and in the file; it is {kind}, on {tensor.device.type}")
    counts = name.rpartition(".")[2] == "num_batches_tracked" or tensor.ndim == 0
    if tensor.dtype not in FLOATS and not counts:
        raise ValueError(f"{name} must be of {', '.join(map(_word, FLOATS))}; it is of {_word(tensor.dtype)}")


def _word(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def _copy(config: RunConfig, kind: str, theirs: Sequence[dict[str, Tensor]], mine: Sequence[nn.Module]) -> None:
    if len(theirs) != len(mine):
        name = f"{config.block}-{config.depth} with shortcut {config.shortcut}"
        raise ValueError(
            f"{kind}s: {len(theirs)} there, {len(mine)} in {name}; are --block, --depth and --shortcut right?"
        )
    for number, (group, module) in enumerate(zip(theirs, mine, strict=True), start=1):
        here = module.state_dict()
        if isinstance(module, nn.Conv2d) and "bias" in group:
            here["bias"] = torch.empty(module.out_channels)  # it has none: only checked
        for part in here:
            if part not in group or group[part].shape != here[part].shape:
                shapes = [_shape(group.get(part)), _shape(here[part])]
                raise ValueError(f"{kind} {number}: its {part} is {shapes[0]} there, {shapes[1]} in this net")
            here[part].copy_(group[part].detach())  # the module's own memory
            if not bool(torch.isfinite(here[part]).all()):
                raise ValueError(f"{kind} {number}: its {part} holds values that are not finite in float32")
            if part == "running_var" and float(here[part].min()) < 0:
                raise ValueError(f"{kind} {number}: its {part} must be at least 0; it holds {here[part].min():g}")


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape))


def _norm_after(net: Net, convolution: nn.Conv2d) -> nn.BatchNorm2d:
    """The BN that data passes through right after this convolution.

    Raises:
        ValueError: none does, as at the end of a pre-activation block.
    """
    order = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    after = dict(itertools.pairwise(order)).get(convolution)
    added = any(isinstance(block, PreActivation) and block.conv2 is convolution for block in net.blocks)
    if added or not isinstance(after, nn.BatchNorm2d):
        raise ValueError("a convolution has a bias, and no BN follows that could take it")
    return after


def _append_zero_channels(net: Net) -> None:
    """Permute the channels of stages 2 and 3 of a net whose shortcuts put half of the zeros before the others."""
    order = torch.arange(net.conv.out_channels)  # of the channels of a stage's stream: theirs, in our order
    for stage in list(net.stages.children())[1:]:
        blocks: list[Block] = list(stage.children())  # type: ignore[arg-type]
        quarter = len(order) // 2
        before, after = torch.arange(quarter), torch.arange(3 * quarter, 4 * quarter)
        wider = torch.cat([quarter + order, before, after])
        for i, block in enumerate(blocks):
            incoming = order if i == 0 else wider
            block.conv1.weight.copy_(block.conv1.weight[:, incoming])
            block.conv2.weight.copy_(block.conv2.weight[wider])
            # The BN of the stream: before the layers of a pre-activation block, after those of the others.
            if isinstance(block, PreActivation):
                _permute(block.bn1, incoming)
            else:
                _permute(block.bn2, wider)
        order = wider
    if isinstance(net.last_bn, nn.BatchNorm2d):
        _permute(net.last_bn, order)
    net.linear.weight.copy_(net.linear.weight[:, order])


def _permute(norm: nn.BatchNorm2d | None, order: Tensor) -> None:
    if norm is not None:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None  # each BN here has them
            tensor.copy_(tensor[order])


def read_log(text: str, columns: Mapping[str, str], config: RunConfig, *, percent: bool) -> list[Epoch]:
    """A published log as rows of degrade's, an epoch a row; NaN where it says nothing.

    Args:
        text: CSV with a header. Empty cells are NaN.
        columns: which of its columns is which of `MEASURES`; "1-NAME" where NAME is an accuracy. Columns of the
            same name need not be named.
        config: whose epochs these are.
        percent: whether errors and accuracies are in percent.

    Raises:
        ValueError: no CSV, a column that is not there or says nothing, none that is known, a value that is not a
            number or no error, another number of epochs.
    """
    reader = csv.DictReader(io.StringIO(text))
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        lines = list(reader)
    except csv.Error as error:
        raise ValueError(f"the log is not CSV: {error}") from None
    known = {name: name for name in MEASURES if name in header} | dict(columns)
    for mine, theirs in known.items():
        if mine not in MEASURES:
            raise ValueError(f"--columns: {mine} is not one of {', '.join(MEASURES)}")
        if theirs.removeprefix("1-") not in header:
            raise ValueError(
                f"--columns: the log has no column {theirs.removeprefix('1-')}; it has {', '.join(header)}"
            )
    if not known:
        raise ValueError(f"the log has none of {', '.join(MEASURES)}; --columns says which of {header} is which")
    rows = []
    for number, line in enumerate(lines, start=1):
        values = dict.fromkeys((*MEASURES, "train_error_running"), math.nan)
        for mine, theirs in known.items():
            cell = line[theirs.removeprefix("1-")]
            try:
                value = float(cell) if cell is None or cell.strip() else math.nan
            except (TypeError, ValueError):
                raise ValueError(f"row {number} of the log: {theirs} is {cell!r:.60}") from None
            if mine.endswith("error"):
                value = value / 100 if percent else value
                value = 1 - value if theirs.startswith("1-") else value
                if not (0 <= value <= 1 or math.isnan(value)):
                    raise ValueError(f"row {number} of the log: {mine} is {value:g}, not from 0 to 1; --percent?")
            values[mine] = value
        step = config.epoch_end(number)
        rows.append(Epoch(epoch=number, step=step, lr=config.lr_at(step - 1), **values))
    if len(rows) != config.epochs:
        raise ValueError(
            f"the log has {len(rows)} epochs, {config.steps:,} steps are {config.epochs}; --set steps=N says how many"
        )
    for mine, theirs in columns.items():
        if all(math.isnan(getattr(row, mine)) for row in rows):
            raise ValueError(f"--columns: {theirs} must hold {mine}; it is empty or NaN in every row")
    return rows


def epoch_of(rows: Sequence[Epoch], weights_of: str) -> Epoch:
    """The row of the epoch that the weights are of: "last", "best" on test (the first, of equals), or its number.

    Raises:
        ValueError: it is none of these, or no test error is known.
    """
    if weights_of == "last":
        return rows[-1]
    if weights_of == "best":
        tested = [row for row in rows if not math.isnan(row.test_error)]
        if not tested:
            raise ValueError("--weights-of best needs the log's test_error; it has none that is a number")
        return min(tested, key=lambda row: row.test_error)
    if weights_of not in map(str, range(1, len(rows) + 1)):
        raise ValueError(f"--weights-of must be last, best, or an epoch from 1 to {len(rows)}; got {weights_of!r}")
    return rows[int(weights_of) - 1]


class Source(NamedTuple):
    """What is said of published weights.

    Args:
        file: their file's name.
        source: where it is from, and under which licence.
        std: of the input, a channel each, of pixels / 255; 1 where it was divided by nothing.
        zero_channels: where option A put them, of `config.ZERO_CHANNELS`.
        weights_of: the epoch they are of: "last", "best" on test, or its number.
        departures: from the protocol of the configuration, a line each.
        claimed_train_error, claimed_test_error: fractions; None where nothing is claimed.
    """

    file: str
    source: str
    std: tuple[float, ...]
    zero_channels: str
    weights_of: str | int
    departures: tuple[str, ...]
    claimed_train_error: float | None
    claimed_test_error: float | None


def import_weights(
    study: Study, config: RunConfig, data: bytes, source: Source, splits: Splits, *, key: str | None, log: list[Epoch]
) -> Run:
    """Bring published weights into `study` as a run of their own, and measure them.

    The last row of its log is what they measure here; the rows before are the published log's. A run that is there,
    but without its weights, as when it was published so, is given them back, if they are these very ones.

    Args:
        study: of imported runs.
        config: of the run.
        data: the file of weights.
        source: what is said of them.
        splits: the data set they are measured on.
        key: of the state dict, where the file holds several.
        log: as published; empty where there is none.

    Raises:
        ValueError: the file does not hold this net's weights, or the study is another's.
        Failure: the run is there already, with weights or of others.
    """
    tensors = state_dict(read_tensors(data), key)
    own = list(make_net(config).state_dict())
    if set(tensors) == set(own):
        tensors = {name: tensors[name] for name in own}
    elif is_safetensors(data):
        raise ValueError("safetensors keep no order, and its names are not those of degrade export: use a state dict")
    net = fit(config, tensors, std=source.std, zero_channels=source.zero_channels)
    net.to(memory_format=torch.channels_last)
    file = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, file)
    weights = file.getvalue()
    sha256 = hashlib.sha256(weights).hexdigest()
    (run,) = study.find([config])
    if (run.folder / store.LOG).exists():
        return _bring_back(run, weights, sha256)
    train_loss, train_error = _measure(net, splits.train, splits.mean)
    test_loss, test_error = _measure(net, splits.test, splits.mean)
    val_loss, val_error = _measure(net, splits.val, splits.mean) if config.val_images else (None, None)
    last = Epoch(
        epoch=config.epochs,
        step=config.steps,
        lr=config.lr_at(config.steps - 1),
        train_loss=train_loss,
        train_error=train_error,
        train_error_running=math.nan,
        test_loss=test_loss,
        test_error=test_error,
        val_loss=val_loss,
        val_error=val_error,
    )
    unknown = math.nan if config.val_images else None
    before = [replace(row, val_loss=unknown, val_error=unknown) for row in log[:-1]]
    about = {
        "file": source.file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "source": source.source,
        "weights_of": source.weights_of,
        "departures": list(source.departures),
        "std": source.std,
        "zero_channels": source.zero_channels,
        "claimed": {"train_error": source.claimed_train_error, "test_error": source.claimed_test_error},
        "measured": {"train_error": train_error, "test_error": test_error},
        "log": bool(log),
        "weights": sha256,
    }
    study.create([config])
    (run,) = study.find([config])
    folder = run.folder
    with commit.hold_or_fail(folder / store.LOCK):
        if (folder / store.LOG).exists():
            raise store.there_already(run)
        commit.write_file(folder / store.WEIGHTS, weights)
        commit.write_file(folder / store.IMPORTED, store.to_json(about))
        commit.write_file(folder / store.ENVIRONMENT, store.to_json(environment("cpu", torch.get_num_threads(), False)))
        rows = to_csv([*before, last], validation=config.val_images > 0)
        commit.write_file(folder / store.LOG, rows.encode())
    return Run.open(study.name, folder)


def _bring_back(run: Run, weights: bytes, sha256: str) -> Run:
    """Put the weights back into a run that was imported, and published without them."""
    with commit.hold_or_fail(run.folder / store.LOCK):
        if (run.folder / store.WEIGHTS).exists() or store.weights_sha256(run.folder) != sha256:
            raise store.there_already(run)
        commit.write_file(run.folder / store.WEIGHTS, weights)
    return run


def _measure(net: Net, split: Images | Stream, mean: Tensor) -> tuple[float, float]:
    assert isinstance(split, Images)  # the command refuses what is on the disk
    return evaluate(net, split.images, split.labels, mean)
