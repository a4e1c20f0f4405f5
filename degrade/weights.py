"""A run's weights: found, loaded, and written for others."""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from degrade import commit, store
from degrade.config import RunConfig
from degrade.errors import Failure
from degrade.nets import Net, make_net
from degrade.store import Run
from degrade.train import read_state

SAFETENSORS = "safetensors is not installed; pip install safetensors brings it"


class Trained(NamedTuple):
    """A run's net and what it takes to use it.

    Args:
        net: in eval mode.
        config: of the run.
        step: updates that made the weights.
        sha256: of the file they are from.
        mean: (3, H, W); the net takes images / 255 - mean.
    """

    net: Net
    config: RunConfig
    step: int
    sha256: str
    mean: Tensor


def recorded(run: Run) -> list[tuple[int, Path]]:
    """The files with weights of this run, each with its step, the oldest first; none where there are none.

    Of one step's the last is the checkpoint: weights.pt may be rounded.
    """
    paths = [path for part in (store.SNAPSHOTS, store.CHECKPOINTS) for path in commit.checkpoints(run.folder / part)]
    found = sorted((int(path.name.partition("-")[0]), path) for path in paths)
    if (run.folder / store.WEIGHTS).exists():
        found.append((run.config.steps, run.folder / store.WEIGHTS))
    return sorted(found, key=lambda item: (item[0], item[1].name != store.WEIGHTS))


def load_weights(run: Run, mean: Tensor, path: Path | None = None) -> Trained:
    """The net of a run, in eval mode, on the device of `mean`.

    Args:
        run: trained here, or imported.
        mean: (3, H, W), as `load_splits` gives it for the run's configuration.
        path: one of `recorded`; otherwise the last step's where the run is finished, else the newest that is sound.

    Raises:
        Failure: it has no weights, or they are damaged or another net's.
    """
    paths = [path] if path else [there for _, there in reversed(recorded(run))]
    if not paths:
        again = "import it again, which puts them back" if run.imported else "make it again with another --out"
        raise Failure(f"{run.folder} has no weights ({run.status}): no checkpoint and no {store.WEIGHTS}; {again}")
    problems = []
    for there in paths:
        try:
            trained = _load(run, mean, there)
            if path is None and run.outcome and trained.step != run.epochs[-1].step:
                raise ValueError(f"the weights of its last step, {run.epochs[-1].step:,}, are damaged or missing")
            return trained
        except (OSError, ValueError) as error:
            problems.append(f"{there}: {error.strerror if isinstance(error, OSError) else error}")
    raise Failure(problems[0])


def _load(run: Run, mean: Tensor, path: Path) -> Trained:
    if path.name == store.WEIGHTS:
        data = path.read_bytes()
        tensors, step, sha256 = read_tensors(data), run.config.steps, hashlib.sha256(data).hexdigest()
        if sha256 != store.weights_sha256(run.folder):
            how = "imported; import them again" if run.imported else "exported; export them again"
            raise ValueError(f"its bytes are not those that were {how}")
    else:
        state = read_state(commit.read_checkpoint(path))
        if state.config != run.config:
            raise ValueError(f"it is of {state.config.run_id}, not of {run.config.run_id}")
        tensors, step, sha256 = state.net, state.step, path.stem.rpartition("-")[2]
    net = make_net(run.config)
    mine = net.state_dict()
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in mine.items()}:
        raise ValueError(f"its tensors are not those of {run.config.block}-{run.config.depth}")
    for name, tensor in mine.items():  # the net's own memory
        tensor.copy_(tensors[name])
    net.to(mean.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(net.eval(), run.config, step, sha256, mean)


def is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and not zipfile.is_zipfile(io.BytesIO(data))


def read_tensors(data: bytes) -> Any:
    """What a file of PyTorch's or of safetensors' holds. None of it is executed.

    Raises:
        ValueError: it is neither, or holds more than tensors and plain values.
    """
    if is_safetensors(data):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load
        except ImportError:
            raise ValueError(SAFETENSORS) from None
        try:
            return load(data)
        except SafetensorError as error:
            raise ValueError(f"it is not a file of weights ({error})") from None
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler, and of whatever else it may be instead
        why = "it holds code, which is not run: save its state dict instead" if "weights_only" in str(error) else ""
        reason = why or f"{type(error).__name__}"
        raise ValueError(f"it is not a file of weights ({reason})") from None


def export_weights(trained: Trained, run: Run, target: Path, *, half: bool = False) -> list[Path]:
    """Write the net's state dict to `target`, and beside it `<target>.json`: what the net is, and what it takes.

    As weights.pt in the folder of the run itself they stand in for its checkpoints, where these are left out of what
    is published.

    Args:
        half: rounded to float16, half the size; the errors told are those of the weights before that.

    Returns:
        The two files.

    Raises:
        Failure: one of them is there already, safetensors is wanted and not installed, float16 cannot hold the
            weights, or `target` is the run's own weights.pt and they are not of its last step.
    """
    if target.resolve() == run.folder.resolve() / store.WEIGHTS and trained.step != run.config.steps:
        raise Failure(
            f"{target} stands in for the weights of the last step, {run.config.steps:,}; these are of "
            f"{trained.step:,}: export them elsewhere"
        )
    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.cpu().to(dtype).contiguous() for name, tensor in trained.net.state_dict().items()}
    if half and not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise Failure(f"{run.folder}: half precision cannot hold its weights; export them without --half")
    measured = next((epoch for epoch in run.epochs if epoch.step == trained.step), None)
    about = {
        "run": run.folder.resolve().name,
        "config": trained.config.as_dict(),
        "step": trained.step,
        "train_error": measured and measured.train_error,
        "test_error": measured and measured.test_error,
        "imported": run.imported,
        "dtype": str(dtype).removeprefix("torch."),
        "input": "RGB images, pixels / 255 - mean",
        "mean": trained.mean.tolist(),
    }
    if target.suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise Failure(SAFETENSORS) from None
        data = save(tensors)
    else:
        file = io.BytesIO()
        torch.save(tensors, file)
        data = file.getvalue()
    beside = target.with_name(f"{target.name}.json")
    for path in (target, beside):
        if path.exists():
            raise Failure(f"{path} is there already, and stays as it is")
    about["sha256"] = hashlib.sha256(data).hexdigest()
    commit.write_file(beside, (json.dumps(about) + "\n").encode())
    commit.write_file(target, data)
    return [target, beside]
