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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from degrade import commit, store
from degrade.config import RunConfig
from degrade.data import Images, Splits
from degrade.errors import Failure
from degrade.evaluate import evaluate
from degrade.log import Epoch, to_csv
from degrade.nets import Block, CifarNet, PreActivation
from degrade.provenance import environment
from degrade.store import Run, Study
from degrade.weights import is_safetensors, make_net, read_tensors

MEASURES = ("train_loss", "train_error", "test_loss", "test_error")  # that a published log may have
# The last part of a tensor's name in PyTorch; a BN's four in their order.
PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def state_dict(values: Any, key: str | None = None) -> dict[str, Tensor]:
    """The one mapping of names to tensors in what was loaded, however it is wrapped, such as {"state_dict": ...}.

    Raises:
        ValueError: there is none, or several (name one by `key`, such as "ema.state_dict").
    """
    found = dict(_state_dicts(values, ""))
    if key is not None:
        found = {name: there for name, there in found.items() if name == key}
    if len(found) == 1:
        return next(iter(found.values()))
    if key is None and found:
        raise ValueError(f"it holds several nets: {', '.join(found)}; name one with --key")
    raise ValueError(f"it holds no state dict{f' called {key}' if key else ''}: no mapping of names to tensors")


def _state_dicts(values: Any, path: str) -> list[tuple[str, dict[str, Tensor]]]:
    if not isinstance(values, Mapping):
        return []
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    if any(t.ndim == 4 for t in tensors.values()):
        return [(path, tensors)]
    return [there for name, value in values.items() for there in _state_dicts(value, f"{path}.{name}".lstrip("."))]


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


def fit(config: RunConfig, tensors: Mapping[str, Tensor], *, std: Sequence[float], zero_channels: str) -> CifarNet:
    """The net of `config` with these weights, in eval mode.

    Args:
        config: of the run that they will be.
        tensors: in each kind of layer, in the order in which data passes through.
        std: what the net's input was divided by, a channel each.
        zero_channels: where option A put them: "appended", or on "both-sides".

    Raises:
        ValueError: they are not this net's.
    """
    there, net = layers(tensors), make_net(config)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    _copy(config, "convolution", there.convolutions, convolutions)
    _copy(config, "BN", there.norms, norms)
    _copy(config, "linear layer", there.linears, [net.linear])
    with torch.no_grad():
        for group, convolution in zip(there.convolutions, convolutions, strict=True):
            if "bias" in group:
                _norm_after(net, convolution).running_mean.sub_(group["bias"])  # type: ignore[union-attr]
        net.conv.weight.div_(torch.tensor(std).view(1, 3, 1, 1))
        if zero_channels == "both-sides" and config.block != "plain" and config.shortcut == "A":
            _append_zero_channels(net)
    return net.eval()


def _copy(config: RunConfig, kind: str, theirs: Sequence[dict[str, Tensor]], mine: Sequence[nn.Module]) -> None:
    if len(theirs) != len(mine):
        name = f"{config.block}-{config.depth} with shortcut {config.shortcut}"
        raise ValueError(
            f"{kind}s: {len(theirs)} there, {len(mine)} in {name}; are --block, --depth and --shortcut right?"
        )
    for number, (group, module) in enumerate(zip(theirs, mine, strict=True), start=1):
        here = module.state_dict()
        for part in here:
            if part not in group or group[part].shape != here[part].shape:
                shapes = [_shape(group.get(part)), _shape(here[part])]
                raise ValueError(f"{kind} {number}: its {part} is {shapes[0]} there, {shapes[1]} in this net")
            if not bool(torch.isfinite(group[part]).all()):
                raise ValueError(f"{kind} {number}: its {part} holds values that are not finite")
            here[part].copy_(group[part])  # the module's own memory


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape))


def _norm_after(net: CifarNet, convolution: nn.Conv2d) -> nn.BatchNorm2d:
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


def _append_zero_channels(net: CifarNet) -> None:
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
        text: CSV with a header.
        columns: which of its columns is which of `MEASURES`; "1-NAME" where NAME is an accuracy. Columns of the
            same name need not be named.
        config: whose epochs these are.
        percent: whether errors and accuracies are in percent.

    Raises:
        ValueError: a column that is not there, a value that is not a number or no error, another number of epochs.
    """
    reader = csv.DictReader(io.StringIO(text))
    header = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = header
    columns = {name: name for name in MEASURES if name in header} | dict(columns)
    for mine, theirs in columns.items():
        if mine not in MEASURES:
            raise ValueError(f"--columns: {mine} is not one of {', '.join(MEASURES)}")
        if theirs.removeprefix("1-") not in header:
            raise ValueError(
                f"--columns: the log has no column {theirs.removeprefix('1-')}; it has {', '.join(header)}"
            )
    rows = []
    for number, line in enumerate(reader, start=1):
        values = dict.fromkeys((*MEASURES, "train_error_running"), math.nan)
        for mine, theirs in columns.items():
            text = line[theirs.removeprefix("1-")]
            try:
                value = float(text)
            except (TypeError, ValueError):
                raise ValueError(f"row {number} of the log: {theirs} is {text!r}") from None
            if mine.endswith("error"):
                value = value / 100 if percent else value
                value = 1 - value if theirs.startswith("1-") else value
                if not 0 <= value <= 1:
                    raise ValueError(f"row {number} of the log: {mine} is {value:g}, not from 0 to 1; --percent?")
            values[mine] = value
        step = config.epoch_end(number)
        rows.append(Epoch(epoch=number, step=step, lr=config.lr_at(step - 1), **values))
    if len(rows) != config.epochs:
        raise ValueError(
            f"the log has {len(rows)} epochs, {config.steps:,} steps are {config.epochs}; --set steps=N says how many"
        )
    return rows


class Source(NamedTuple):
    """What is said of published weights.

    Args:
        file: their file's name.
        source: where it is from, and under which licence.
        std: of the input, a channel each, of pixels / 255; 1 where it was divided by nothing.
        zero_channels: where option A put them, of `config.ZERO_CHANNELS`.
        departures: from the protocol of the configuration, a line each.
        claimed_train_error, claimed_test_error: fractions; None where nothing is claimed.
    """

    file: str
    source: str
    std: tuple[float, ...]
    zero_channels: str
    departures: tuple[str, ...]
    claimed_train_error: float | None
    claimed_test_error: float | None


def import_weights(
    study: Study, config: RunConfig, data: bytes, source: Source, splits: Splits, *, key: str | None, log: list[Epoch]
) -> Run:
    """Bring published weights into `study` as a run of their own, and measure them.

    The last row of its log is what they measure here; the rows before are the published log's.

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
        Failure: the run is there already.
    """
    tensors = state_dict(read_tensors(data), key)
    own = list(make_net(config).state_dict())
    if set(tensors) == set(own):
        tensors = {name: tensors[name] for name in own}
    elif is_safetensors(data):
        raise ValueError("safetensors keep no order, and its names are not those of degrade export: use a state dict")
    net = fit(config, tensors, std=source.std, zero_channels=source.zero_channels)
    net.to(memory_format=torch.channels_last)
    train_loss, train_error = _measure(net, splits.train, splits.mean)
    test_loss, test_error = _measure(net, splits.test, splits.mean)
    last = Epoch(
        epoch=config.epochs,
        step=config.steps,
        lr=config.lr_at(config.steps - 1),
        train_loss=train_loss,
        train_error=train_error,
        train_error_running=math.nan,
        test_loss=test_loss,
        test_error=test_error,
    )
    file = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, file)
    weights = file.getvalue()
    about = {
        "file": source.file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "source": source.source,
        "departures": list(source.departures),
        "std": source.std,
        "zero_channels": source.zero_channels,
        "claimed": {"train_error": source.claimed_train_error, "test_error": source.claimed_test_error},
        "measured": {"train_error": train_error, "test_error": test_error},
        "log": bool(log),
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    study.create([config])
    folder = study.folder / config.run_id
    with commit.hold(folder / store.LOCK):
        if (folder / store.LOG).exists():
            raise Failure(f"{folder} is there already, and stays as it is; --seed or --study gives this one its own")
        commit.write_file(folder / store.WEIGHTS, weights)
        commit.write_file(folder / store.IMPORTED, store.to_json(about))
        commit.write_file(folder / store.ENVIRONMENT, store.to_json(environment("cpu", torch.get_num_threads(), False)))
        commit.write_file(folder / store.LOG, to_csv([*log[:-1], last], validation=False).encode())
    return Run.open(study.name, folder)


def _measure(net: CifarNet, split: Images, mean: Tensor) -> tuple[float, float]:
    return evaluate(net, split.images, split.labels, mean)
