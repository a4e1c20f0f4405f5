"""`degrade sweep`"""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from degrade import store, terminal
from degrade.cli.app import (
    Plain,
    app,
    auto,
    channels,
    configs_of,
    count,
    dataset_named,
    distinct,
    how,
    leave,
    names,
    note,
    numbers,
    say,
    say_errors,
    say_table,
    started_together,
    study_folder,
    train_live,
)
from degrade.cli.options import (
    DATASET_KINDS,
    DEPTHS,
    Compiled,
    DataDir,
    Device,
    ImageSize,
    Out,
    Pack,
    SkipBroken,
    Threads,
    argument,
    auto_or_number,
    list_of,
    numbers_of,
    one_of,
    option,
)
from degrade.config import (
    AUGMENTS,
    BLOCKS,
    DECAYS,
    INITS,
    PADDINGS,
    PRECISIONS,
    PROTOCOLS,
    SHORTCUTS,
    SWEPT,
    TYPES,
    RunConfig,
    did_you_mean,
    name_parts,
    overridden,
    protocol_fields,
    study_name,
    typed,
)
from degrade.execute import check_counts
from degrade.execute.slurm import minutes
from degrade.stopping import stopping

if TYPE_CHECKING:
    from degrade.engine.group import Group
    from degrade.machines import Machines
    from degrade.sweep import Machine

LONG = 12 * 3600  # seconds, from which on a shorter protocol is pointed out
MAX_STUDIES = 100
AUGMENT_WORDS = tuple(dict.fromkeys(word for words in AUGMENTS.values() for word in words))
FIELDS = {"rich_help_panel": "Fields of the protocol, each of which can be overridden"}
CLUSTER = {"rich_help_panel": "On a cluster"}
EXECUTORS = ("local", "ray", "slurm")
SWEEP_FIELDS = ("depths", "blocks", "seeds", "dataset", "image_size", "protocol", "study", "grid")


class Asked(NamedTuple):
    """One study of what is asked for: one point of the grid."""

    name: str
    dataset: str
    protocol: str
    fields: dict[str, Any]  # that differ from the protocol's, or are said all the same


class Plan(NamedTuple):
    """What there is to do in one study."""

    study: store.Study
    configs: list[RunConfig]
    runs: list[store.Run]
    todo: list[store.Run]


@app.command(cls=Plain)
@stopping("stopped; the same command goes on from the last checkpoints")
def sweep(
    spec: Annotated[
        Path | None, argument("TOML", "A file with depths, blocks, ... and fields, as in experiments/; flags win.")
    ] = None,
    depths: Annotated[
        str | None, numbers_of("Layers of the nets, 6n+2: 20,32,44,56,110; ImageNet 18,34.", DEPTHS)
    ] = None,
    blocks: Annotated[str | None, list_of(BLOCKS, f"{', '.join(BLOCKS)}.", show_default="plain,residual")] = None,
    seeds: Annotated[str | None, numbers_of("A net of each: 0,1,2.", show_default="0")] = None,
    dataset: Annotated[
        str | None,
        one_of(
            DATASET_KINDS, "One of degrade data list; folder:PATH, your own; imagenet:PATH.", show_default="cifar10"
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        one_of(PROTOCOLS, f"{', '.join(PROTOCOLS)}: what the fields below start from.", show_default="paper"),
    ] = None,
    out: Out = Path("results"),
    study: Annotated[str | None, option("TEXT", "Its folder there.", show_default="from what is asked for")] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    jobs: Annotated[
        str, auto_or_number("Processes at a time; auto: one a core, or one a GPU.", "--jobs", "--max-jobs")
    ] = "auto",
    threads: Threads = "auto",
    pack: Pack = "auto",
    compiled: Compiled = "auto",
    snapshots: Annotated[str | None, numbers_of("Steps whose weights are kept besides, for probes: 400,32000.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Resume failed runs too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    grid: Annotated[
        list[str] | None,
        option("FIELD=X,...", "A study for each value of a field: lr=0.1,0.05. Given again: all combinations."),
    ] = None,
    executor: Annotated[
        str, one_of(EXECUTORS, "local, this machine; ray or slurm, a cluster that shares the folder --out.", **CLUSTER)
    ] = "local",
    address: Annotated[
        str | None,
        option(
            "TEXT",
            "Of Ray: auto, HOST:PORT or ray://HOST:PORT.",
            ["auto", "ray://"],
            show_default="one on this machine, for this sweep",
            **CLUSTER,
        ),
    ] = None,
    partition: Annotated[
        str | None, option("TEXT", "Of SLURM, for the jobs.", show_default="the cluster's own", **CLUSTER)
    ] = None,
    time: Annotated[
        str | None,
        option(
            "TEXT",
            "Of each SLURM job (30, 8:00:00); what needs longer is put into the queue again, and goes on.",
            show_default="60 minutes",
            **CLUSTER,
        ),
    ] = None,
    gpus: Annotated[
        int | None, option("N", "Of each SLURM job: 1, which its runs share, or 0.", show_default="0", **CLUSTER)
    ] = None,
    steps: Annotated[int | None, option("N", "Updates; milestones move to half and 3/4.", **FIELDS)] = None,
    batch_size: Annotated[int | None, option("N", "Images an update.", **FIELDS)] = None,
    lr: Annotated[float | None, option("X", "Learning rate.", **FIELDS)] = None,
    milestones: Annotated[str | None, numbers_of("Steps at which lr is divided by 10; or none.", **FIELDS)] = None,
    warmup_depth: Annotated[int | None, option("N", "Nets at least this deep warm up.", **FIELDS)] = None,
    warmup_lr: Annotated[float | None, option("X", "Learning rate while warming up.", **FIELDS)] = None,
    warmup_steps: Annotated[int | None, option("N", "Updates of the warm-up.", **FIELDS)] = None,
    momentum: Annotated[float | None, option("X", "Of SGD.", **FIELDS)] = None,
    weight_decay: Annotated[float | None, option("X", "Of SGD.", **FIELDS)] = None,
    decay: Annotated[
        str | None, one_of(DECAYS, "all: weight decay on all parameters; conv: not on BN and biases.", **FIELDS)
    ] = None,
    width: Annotated[int | None, option("N", "Channels of the first stage.", **FIELDS)] = None,
    shortcut: Annotated[str | None, one_of(SHORTCUTS, "A (zero padding), B or C (projections).", **FIELDS)] = None,
    init: Annotated[
        str | None, one_of(INITS, "he, or zero-gamma: 0 for the last BN scale of residual blocks.", **FIELDS)
    ] = None,
    train_images: Annotated[int | None, option("N", "Train on this many images.", **FIELDS)] = None,
    val_images: Annotated[int | None, option("N", "Hold this many training images out.", **FIELDS)] = None,
    test_images: Annotated[int | None, option("N", "Test on this many images.", **FIELDS)] = None,
    split_seed: Annotated[int | None, option("N", "Which images those are.", **FIELDS)] = None,
    input_mean: Annotated[
        str | None,
        option("X,X,X", "Subtracted from the input: 0.49,0.48,0.45.", show_default="per pixel", **FIELDS),
    ] = None,
    padding: Annotated[
        str | None, one_of(PADDINGS, "Of the crops, with mean (0 after it is subtracted) or black.", **FIELDS)
    ] = None,
    precision: Annotated[
        str | None,
        one_of(PRECISIONS, f"{', '.join(PRECISIONS)}.", show_default="tf32 on GPUs that have it, else fp32", **FIELDS),
    ] = None,
    augment: Annotated[
        str | None,
        one_of(AUGMENT_WORDS, f"{', '.join(AUGMENT_WORDS)}.", show_default="what is usual for the data set", **FIELDS),
    ] = None,
    bn_batch_size: Annotated[
        int | None, option("N", "Images over which BN takes its statistics.", show_default="the batch", **FIELDS)
    ] = None,
) -> None:
    """Train a grid of nets: every depth, block and seed.

    It prints its plan first, with the time that will take here. What is done is skipped; the same command again goes on
    where it stopped. With --grid lr=0.1,0.05 it trains a study for each value of a field of the protocol.

    \b
    Example: degrade sweep --depths 20,56 --blocks plain,residual
    Example: degrade sweep --depths 20,56 --dataset shapes --protocol demo
    Example: degrade sweep experiments/demo.toml --seeds 0 --dry-run
    """
    group = None
    if started_together():
        if executor != "local":
            raise ValueError(f"torchrun trains here, not on {executor}; use one of them")
        from degrade import sweep as engine
        from degrade.engine.group import join
        from degrade.train import check_shares

        group, device = join(engine.resolve_device(device))
        if group.rank:
            engine.follow(group, device)
            group.leave()
            return
        jobs, pack = "1", "1"
    flags = {
        "depths": numbers(depths, "--depths"),
        "blocks": names(blocks, "--blocks"),
        "seeds": numbers(seeds, "--seeds"),
        "dataset": dataset,
        "protocol": protocol,
        "study": study,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "milestones": [] if milestones == "none" else numbers(milestones, "--milestones"),
        "warmup_depth": warmup_depth,
        "warmup_lr": warmup_lr,
        "warmup_steps": warmup_steps,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "decay": decay,
        "width": width,
        "shortcut": shortcut,
        "init": init,
        "train_images": train_images,
        "val_images": val_images,
        "test_images": test_images,
        "split_seed": split_seed,
        "input_mean": channels(input_mean, "--input-mean"),
        "padding": padding,
        "precision": precision,
        "augment": augment,
        "bn_batch_size": bn_batch_size,
        "image_size": image_size,
    }
    wanted, axes = _wanted(spec, {name: value for name, value in flags.items() if value is not None}, grid or [])
    nets = {
        "depth": distinct(wanted.pop("depths", None), "depths", int),
        "block": distinct(wanted.pop("blocks", ["plain", "residual"]), "blocks", str),
        "seed": distinct(wanted.pop("seeds", [0]), "seeds", int),
    }
    size = wanted.pop("image_size", None)

    def full_name(text: str) -> str:
        return dataset_named(text, data_dir, size, skip_broken=skip_broken, write=not dry_run)

    if "dataset" in axes:
        axes["dataset"] = [full_name(text) for text in axes["dataset"]]
    else:
        wanted["dataset"] = full_name(wanted.get("dataset", "cifar10"))
    kept = numbers(snapshots, "--snapshots") or []
    studies = _studies(wanted, axes)
    longest = max(map(len, nets.values()))  # so that each depth, block and seed is looked at, though not each net
    some = [{name: [values[i % len(values)]] for name, values in nets.items()} for i in range(longest)]
    for asked in studies:  # bad input is told before torch is imported
        fields = protocol_fields(asked.protocol, asked.fields, asked.dataset)
        (config, *_) = [configs_of(net, asked.dataset, fields)[0] for net in some]
        if kept and not 0 <= min(kept) <= max(kept) <= config.steps:
            raise ValueError(f"--snapshots must be steps from 0 to {config.steps:,}; got {snapshots}")
        study_folder(out, asked.name)

    counts = {"jobs": auto(jobs, "--jobs"), "threads": auto(threads, "--threads"), "pack": auto(pack, "--pack")}
    check_counts(compiled=compiled, **counts)
    _check_engine(executor, address, partition, time, gpus)
    passed_over = [*store.FINISHED, *([] if retry_failed else ["failed"])]

    def plan_of(asked: Asked, usual: str = "fp32") -> Plan:
        chosen, configs = _open(study_folder(out, asked.name), asked, nets, usual)
        runs = chosen.find(configs, glance=dry_run)
        return Plan(chosen, configs, runs, [run for run in runs if run.status not in passed_over])

    plans: list[Plan] = []
    if "precision" not in wanted | axes and all((study_folder(out, a.name) / store.STUDY).exists() for a in studies):
        plans = [plan_of(asked) for asked in studies]  # whose precision is the one they were begun with
    if plans and not any(plan.todo for plan in plans):  # nobody has to wait for torch, or for a cluster
        _print_plans(plans, {}, {}, "")
    else:
        from degrade import machines

        with machines.join(executor, address=address, partition=partition, time=time, gpus=gpus) as there:
            device = there.device(device)
            usual = there.precision(device, None)
            plans = plans or [plan_of(asked, usual) for asked in _studies(wanted, axes, usual)]
            on = {}
            for plan in plans:
                there.precision(device, plan.configs[0].precision)
                if group:
                    check_shares(plan.configs[0], group)
                machine_wanted = machines.Wanted(device, **counts, compiled=compiled)
                machine, missing = there.machine(plan.configs if plan.todo else [], machine_wanted)
                if missing:
                    note(missing)
                compiled = machine.compiled  # if that does not work here, it is said once
                on[plan.study.folder] = machine
            share = group.size if group else 1  # of each batch is this process's
            seconds = {run: whole / share for run, whole in _estimate(plans, on, there).items()}
            _print_plans(plans, on, seconds, there.name)
            if not dry_run:
                _train([plan for plan in plans if plan.todo], on, there, out, data_dir, seconds, kept, group)
                plans = [plan._replace(runs=plan.study.find(plan.configs)) for plan in plans]
    if group:
        group.tell(None)  # that there is no more
        group.leave()
    if not dry_run:
        _print_results(plans, out)


def _check_engine(
    executor: str, address: str | None, partition: str | None, time: str | None, gpus: int | None
) -> None:
    """
    Raises:
        ValueError: an option of another engine, or one of its own that is none.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be local, ray or slurm; got {executor!r}")
    if executor != "ray" and address is not None:
        raise ValueError("--address is for --executor ray")
    for name, value in (("partition", partition), ("time", time), ("gpus", gpus)):
        if executor != "slurm" and value is not None:
            raise ValueError(f"--{name} is for --executor slurm")
    if address is not None and not re.fullmatch(r"auto|(ray://)?[^\s/:]+:\d{1,5}", address):
        raise ValueError(f"--address must be auto, HOST:PORT or ray://HOST:PORT; got {address!r}")
    if time is not None:
        minutes(time)
    if gpus not in (None, 0, 1):
        raise ValueError(f"--gpus must be 0 or 1: a run is trained on one GPU, which others may share; got {gpus}")


def _wanted(
    spec: Path | None, flags: dict[str, Any], grid: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What is asked for, and the values of each field of the grid. Flags win over the file, field by field."""
    there = _read_spec(spec)
    there_axes, axes = there.pop("grid", {}), _grid_flags(grid)
    for values, of in ((there, there_axes), (flags, axes)):
        if both := sorted(set(values) & set(of)):
            raise ValueError(f"{both[0]} is in the grid and has a value besides; choose one of them")
    wanted = {name: value for name, value in there.items() if name not in axes} | flags
    return wanted, {name: values for name, values in there_axes.items() if name not in flags} | axes


def _grid_flags(grid: Sequence[str]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for text in grid:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--grid must be a field and its values, such as lr=0.1,0.05; got {text!r}")
        if str(TYPES.get(name)).startswith("tuple"):
            raise ValueError(f"--grid cannot have {name}, whose values are lists; a TOML file's [grid] can")
        if name in axes:
            raise ValueError(f"--grid has {name} twice; name all of its values in one")
        axes[name] = _axis(name, [_number(value, TYPES.get(name)) for value in names(values, f"--grid {name}") or []])
    return axes


def _number(text: str, kind: Any) -> Any:
    """The number that `text` is, where the field wants one; what is none is refused with the field's own words."""
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return int(text) if kind is not str and re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _axis(name: str, values: Any) -> list[Any]:
    """The values of one field of the grid, as its own type."""
    allowed = [field for field in TYPES if field not in SWEPT]
    if name.removesuffix("s") in SWEPT:
        raise ValueError(f"{name} cannot be in a grid, since one study holds several: --{name.removesuffix('s')}s")
    if name not in allowed:
        near = did_you_mean(name, allowed)
        raise ValueError(f"a grid is over fields of the protocol ({', '.join(allowed)}); got {name!r}{near}")
    if not isinstance(values, list) or not values:
        raise ValueError(f"the grid's {name} must be a list of values, not empty; got {values!r}")
    axis = [typed(name, value) for value in values]
    if twice := [value for i, value in enumerate(axis) if value in axis[:i]]:
        raise ValueError(f"the grid's {name} must be distinct values; got {twice[0]} twice")
    return axis


def _studies(wanted: dict[str, Any], axes: Mapping[str, list[Any]], usual: str = "fp32") -> list[Asked]:
    """A study for each point of the grid; one where there is none. `usual` is the precision that no name says."""
    if (size := math.prod(map(len, axes.values()))) > MAX_STUDIES:
        raise ValueError(f"a grid must make at most {MAX_STUDIES} studies; got {size:,}")
    studies: list[Asked] = []
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        fields = {"dataset": "cifar10", "protocol": "paper", "study": None} | wanted | point
        dataset, protocol, name = str(fields.pop("dataset")), str(fields.pop("protocol")), fields.pop("study")
        if name is None:
            named = overridden(protocol, fields, dataset) | {"precision": fields.get("precision", usual)}
            if named["precision"] == usual:
                del named["precision"]
            name = study_name(dataset, protocol, named)
        else:
            name = "-".join([name, *name_parts(point)])
        if any(name == other.name for other in studies):
            raise ValueError(f"two studies of the grid would be called {name}: give the folders of images other names")
        studies.append(Asked(name, dataset, protocol, fields))
    return studies


def _open(folder: Path, asked: Asked, nets: dict[str, list[Any]], usual: str) -> tuple[store.Study, list[RunConfig]]:
    """The study, be it there or not yet, and the configurations of the runs asked for.

    `usual` is the precision of a new study where none is asked for.

    Raises:
        ValueError: the study that is there has another protocol.
    """
    there = store.Study.open(folder) if (folder / store.STUDY).exists() else None
    if there and there.imported:
        raise ValueError(
            f"study {there.name} holds imported runs; give this sweep a study of its own with --study NAME"
        )
    precision = there.shared["precision"] if there else usual
    fields = protocol_fields(asked.protocol, {"precision": precision} | asked.fields, asked.dataset)
    configs = configs_of(nets, asked.dataset, fields)
    study = there or store.Study(folder, folder.name, asked.protocol, configs[0].shared())
    study.check(configs)
    return study, configs


def _estimate(plans: Sequence[Plan], on: Mapping[Path, "Machine"], there: "Machines") -> dict[str, float]:
    """Seconds each whole run to train will take, by run id, if that can be told. What trains alike is timed once.

    `on` has what the runs of each study are trained on, by its folder.
    """
    alike: dict[Any, list[RunConfig]] = {}
    for plan in plans:
        for config in (run.config for run in plan.todo):
            key = (
                on[plan.study.folder],
                config.dataset,
                config.width,
                config.shortcut,
                config.batch_size,
                config.bn_batch_size,
                config.augment,
                config.precision,
            )
            alike.setdefault(key, []).append(config)
    seconds: dict[str, float] = {}
    for (machine, *_), configs in alike.items():
        seconds |= there.estimate(configs, machine)
    return seconds


def _left(run: store.Run, seconds: float | None) -> float | None:
    """Seconds that the run has left, of those for all of it; None where these cannot be told."""
    return None if seconds is None else seconds * (1 - run.record()["step"] / run.config.steps)


def _print_plans(plans: Sequence[Plan], on: Mapping[Path, "Machine"], seconds: Mapping[str, float], where: str) -> None:
    """The run table of each study and about how long all will take; `on` and `seconds` as `_estimate` has them."""
    total, steps = 0.0, 1
    for plan in plans:
        left = {
            run.folder.name: _left(run, seconds.get(run.config.run_id)) for run in plan.todo if run.status != "running"
        }
        known = [value for value in left.values() if value is not None]
        say(f"Study {plan.study.folder}: {count(len(plan.runs), 'run')}, {len(left)} to train")
        say_table(terminal.plan_table(plan.runs, left))
        if known:
            from degrade import bench

            wall = bench.makespan(known, on[plan.study.folder].jobs)  # packing shares one GPU: it gains, how much?
            say(f"About {terminal.duration(wall)} on {where}: {how(on[plan.study.folder])}")
            total, steps = total + wall, max(steps, plan.configs[0].steps)
        elif left:
            say(f"On {where}: {how(on[plan.study.folder])}")
    if len(plans) > 1 and total:
        say(f"In all about {terminal.duration(total)}, the {len(plans)} studies one after the other")
    short = PROTOCOLS["short"]["steps"] / steps
    if total > LONG and short < 1:
        say(f"Too long? --protocol short takes about {terminal.duration(total * short)}")


def _train(
    plans: Sequence[Plan],
    on: Mapping[Path, "Machine"],
    there: "Machines",
    out: Path,
    data_dir: Path | None,
    seconds: dict[str, float],
    kept: Sequence[int],
    group: "Group | None",
) -> None:
    """Fetch the data of all studies, and train one after the other, shown live."""
    if plans:
        there.prepare(out, list(dict.fromkeys(str(plan.study.shared["dataset"]) for plan in plans)), data_dir)
    for plan in plans:
        if len(plans) > 1:
            say(f"Study {plan.study.folder}")
        there.use(on[plan.study.folder])
        train_live(plan.study, plan.todo, on[plan.study.folder], data_dir, seconds, kept, group, there.engine)


def _print_results(plans: Sequence[Plan], out: Path) -> None:
    """The table of each study's runs. Ends the program with exit code 1 where some are not done."""
    for plan in plans:
        if len(plans) > 1:
            say(f"Study {plan.study.folder}")
        say_table(terminal.runs_table(plan.runs))
        say_errors(plan.runs)
    runs = [run for plan in plans for run in plan.runs]
    if any(run.last for run in runs):
        folder = out if len(plans) > 1 else plans[0].study.folder
        say(f"Next: degrade plot {folder}; degrade verdict {folder}")
    if unfinished := [run for run in runs if run.status != "done"]:
        states = {run.status for run in unfinished}
        then = "; the same command goes on" if {"interrupted", "missing", "running"} & states else ""
        then += (
            "; --retry-failed tries the failed ones again"
            if any(r.status == "failed" and not r.problem for r in runs)
            else ""
        )
        leave(f"{len(unfinished)} of {count(len(runs), 'run')} not done ({', '.join(sorted(states))}){then}", 1)


def _read_spec(spec: Path | None) -> dict[str, Any]:
    if spec is None:
        return {}
    if not spec.is_file():
        raise ValueError(f"{spec} is not a file; name a TOML file, or separate lists by commas: --depths 20,56")
    try:
        values = _underscored(tomllib.loads(spec.read_text()))
    except UnicodeDecodeError:
        raise ValueError(f"{spec} is not text in UTF-8; name a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{spec}: {error}") from None
    known = list(dict.fromkeys([*SWEEP_FIELDS, *(field for field in TYPES if field not in SWEPT)]))
    if unknown := [name for name in values if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"{spec}: {unknown[0]} is not a setting; the settings are {', '.join(known)}{near}")
    for name in ("dataset", "protocol", "study"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{spec}: {name} must be a string; got {values[name]!r}")
    if type(values.get("image_size", 32)) is not int:
        raise ValueError(f"{spec}: image_size must be a whole number; got {values['image_size']!r}")
    try:
        values |= {name: typed(name, value) for name, value in values.items() if name in TYPES}
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None
    grid = values.get("grid", {})
    if not isinstance(grid, dict):
        raise ValueError(f"{spec}: grid must be a table of fields and their values; got {grid!r}")
    return values | {"grid": {name: _axis(name, axis) for name, axis in _underscored(grid).items()}}


def _underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in values.items()}
