"""`degrade identity`: the deeper net built from a trained shallower one, proved to be no worse, and trained on.

What was proved is in identity.json, in a study of its own; where training goes on, its run is there too.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from degrade import commit, store
from degrade.analysis import identity
from degrade.analysis.identity import Comparison
from degrade.config import BOTTLENECKS, RunConfig, blocks_of
from degrade.data import Splits, Stream, in_memory
from degrade.data.plan import SamplePlan
from degrade.errors import Failure
from degrade.nets import make_net
from degrade.store import Run, Study
from degrade.train import Training, training_batch
from degrade.weights import Trained

CALIBRATION_BATCHES = 50
MARGIN = 0.005  # training error that is half a point higher has left the solution

T = TypeVar("T")
Progress = Callable[[Iterable[T], str, int], Iterable[T]]  # of what is iterated, what it is called, and how many


def check(run: Run, depth: int) -> None:
    """
    Raises:
        ValueError: there is no net of this depth, or it cannot hold the run's net and more.
        Failure: the run has not been trained to its end.
    """
    blocks_of(run.config.family, depth)
    bottleneck = run.config.family == "imagenet" and depth in BOTTLENECKS
    if bottleneck and (run.config.depth not in BOTTLENECKS or run.config.block == "plain"):
        raise ValueError(
            "only a residual net of bottleneck blocks can hold another one: plain ones narrow what they are given; "
            f"got {run.config.block}-{run.config.depth} and {depth}"
        )
    if depth <= run.config.depth:
        raise ValueError(f"depth must be above the run's, {run.config.depth}, to hold its net; got {depth}")
    if run.outcome != "done":
        raise Failure(
            f"{run.folder} is {run.status}; the identity construction needs a net that was trained to its end"
        )


def prove(trained: Trained, run: Run, depth: int, splits: Splits, progress: Progress[Any]) -> dict[str, Any]:
    """Build the deeper net and compare it with the shallow one in eval mode on all images of both splits, and in
    training mode, as training on would begin, on some batches.

    Args:
        trained: the shallow net.
        run: whose it is.
        depth: of the deeper net.
        splits: the run's images.
        progress: wraps what takes a while.

    Returns:
        What goes into identity.json.
    """
    config = replace(trained.config, depth=depth)
    exact, close = make_net(config).eval(), make_net(config).eval()
    identity.deepen(trained.net, exact)
    seed = config.split_seed
    parts = {"train": in_memory(splits.train, seed), "test": in_memory(splits.test, seed)}
    batches = training_batches(trained.config, splits, CALIBRATION_BATCHES)
    start_net(trained, close, batches)
    record: dict[str, Any] = {
        "source": {"study": run.study, "run": run.folder.resolve().name, "weights": trained.sha256},
        "block": config.block,
        "shallow": trained.config.depth,
        "deep": depth,
        "blocks_added_to_each_stage": _blocks_added(config, trained.config),
    }
    if isinstance(splits.train, Stream):
        record["images"] = {split: len(images) for split, images in parts.items()}
    for split, images in parts.items():
        whole = identity.normalised(images, splits.mean)
        count = -(-len(images) // identity.BATCH_SIZE)
        compared = identity.compare(trained.net, exact, progress(whole, f"{split} images", count))
        record[split] = compared._asdict()
        if compared.deep_error != compared.shallow_error:
            errors = f"{compared.deep_error} and {compared.shallow_error}, logits to within {compared.max_difference}"
            raise Failure(f"the construction does not hold on this machine: {split} errors are {errors}")
    record["start"] = {  # of training on
        "eval_mode": identity.compare(trained.net, close, batches)._asdict(),
        "training_mode": identity.compare(trained.net, close, batches, training=True)._asdict(),
    }
    return record


def _blocks_added(deep: RunConfig, shallow: RunConfig) -> int | list[int]:
    """One number where it is the same for each stage, as in the nets of CIFAR-10."""
    counts = (blocks_of(config.family, config.depth) for config in (deep, shallow))
    added = [more - less for more, less in zip(*counts, strict=True)]
    return added[0] if len(set(added)) == 1 else added


def training_batches(config: RunConfig, splits: Splits, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first batches that a run of this configuration trains on, augmented: (B, 3, H, W) and labels (B,).

    Of images on the disk it is a subset in memory, and the middles of images.
    """
    splits = replace(splits, train=in_memory(splits.train, config.split_seed))
    plan = SamplePlan(len(splits.train), config.batch_size, config.seed, config.augment)
    return [training_batch(splits, plan.batch(step), config.padding) for step in range(count)]


def start_net(trained: Trained, deep: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make `deep` the net that training on starts from: a plain net's added BNs are calibrated to the batches."""
    calibrated = identity.stage_statistics(trained.net, (x for x, _ in batches))
    identity.deepen(trained.net, deep, calibrated)


def stored(folder: Path, trained: Trained, depth: int) -> dict[str, Any] | None:
    """What has been proved of this construction already; None where nothing has.

    Raises:
        Failure: the folder holds another construction.
    """
    record = store.read_identity(folder)
    if record is None:
        return None
    there = (record["source"]["weights"], record["block"], record["deep"])
    if there != (trained.sha256, trained.config.block, depth):
        name = f"{record['block']}-{record['deep']} from {record['source']['run']}"
        raise Failure(f"{folder / store.IDENTITY} is of {name}; --study gives this construction a study of its own")
    return record


def begin(study: Study, config: RunConfig, trained: Trained, splits: Splits) -> None:
    """Put the run into the study, with a checkpoint at step 0 that holds the constructed net. One that is there stays.

    Args:
        study: of its own.
        config: of the run; its `init` names the shallow one, which it is deeper than, or as deep as (the control).
        trained: the shallow net.
        splits: the run's images.

    Raises:
        Failure: another process has the run.
    """
    study.create([config])
    (run,) = study.find([config])
    folder = run.folder / store.CHECKPOINTS
    with commit.hold_or_fail(run.folder / store.LOCK):
        if run.outcome or commit.checkpoints(folder):
            return
        training = Training(config, splits)
        start_net(trained, training.net, training_batches(trained.config, splits, CALIBRATION_BATCHES))
        commit.make_folder(folder)
        commit.write_checkpoint(folder, 0, training.state())


def deeper_config(trained: Trained, run: Run, depth: int, *, steps: int, lr: float) -> RunConfig:
    """Of the run that goes on from the constructed net, at a constant learning rate.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    init = f"identity:{run.folder.resolve().name}:{trained.sha256[:12]}"
    return replace(run.config, depth=depth, init=init, steps=steps, lr=lr, milestones=(), warmup_steps=0)


def from_scratch(run: Run, depth: int) -> dict[str, Any] | None:
    """The finished run of that depth in the shallow run's study, of the same seed if there is one: its id, its last
    training error and its steps.
    """
    study = Study.open(run.folder.parent)
    same = [
        other
        for other in study.runs
        if (other.config.block, other.config.depth) == (run.config.block, depth) and other.outcome == "done"
    ]
    if not same:
        return None
    best = min(same, key=lambda other: other.config.seed != run.config.seed)
    last = best.epochs[-1]
    return {"run": best.folder.name, "train_error": last.train_error, "steps": last.step}


def finding(record: dict[str, Any], continued: Run | None, control: Run | None) -> str:
    """What the construction shows, in a few sentences.

    Args:
        record: of identity.json.
        continued: the run that was trained on from the constructed net, if any.
        control: the shallow net itself, trained on in the same way, if it was.
    """
    deep, shallow = f"{record['block']}-{record['deep']}", f"{record['block']}-{record['shallow']}"
    train, gap = Comparison(**record["train"]), Comparison(**record["start"]["training_mode"])
    same = (
        "every logit bit for bit"
        if not train.differing
        else f"the logits to within {train.max_difference:.2g} ({train.differing:,} of {train.images:,} images differ)"
    )
    text = (
        f"Built from {shallow} with identity layers, {deep} gives {same} on {train.images:,} training images, "
        f"and with them {_percent(train.deep_error)} training error (shallow: {_percent(train.shallow_error)})."
    )
    if record["scratch"]:
        text += f" Trained from scratch, {deep} ends at {_percent(record['scratch']['train_error'])}."
    text += (
        f" In training mode, on augmented batches with their own statistics, its error at step 0 is "
        f"{_percent(gap.deep_error)} where the shallow net's is {_percent(gap.shallow_error)}."
    )
    if continued and continued.epochs:
        last = continued.epochs[-1]
        steps = f"{last.step:,} step{'' if last.step == 1 else 's'}"
        text += f" After {steps} of training on at lr {continued.config.lr:g} it is at {_percent(last.train_error)}"
        alike = control.epochs[-1].train_error if control and control.epochs else None
        if alike is not None:
            text += f", and {shallow} itself, trained on alike, at {_percent(alike)}"
        text += f": {_left(last.train_error, train.deep_error, alike)}."
    return text


def _left(error: float, start: float, control: float | None) -> str:
    if error <= start + MARGIN:
        return "training did not leave the solution by more than half a point"
    if control is None:
        return "training left the solution"
    if error > control + MARGIN:
        return "training left the solution, and the deeper net is further from it"
    return "training left the solution, at this learning rate that of the shallow net too"


def _percent(error: float) -> str:
    return f"{100 * error:.2f} %"


def write(study: Study, record: dict[str, Any]) -> None:
    """Store what was proved in the study's folder."""
    commit.make_folder(study.folder)
    commit.write_file(study.folder / store.IDENTITY, store.to_json(record))
