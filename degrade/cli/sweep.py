"""`degrade sweep`"""

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from degrade import store, terminal
from degrade.cli.app import (
    app,
    check_precision,
    configs_of,
    console,
    count,
    distinct,
    how,
    leave,
    machine_of,
    names,
    numbers,
    say,
    say_errors,
)
from degrade.config import BLOCKS, INITS, PROTOCOLS, RunConfig, overridden, protocol_fields, study_name
from degrade.stopping import stopping

if TYPE_CHECKING:
    from degrade.sweep import Machine

LONG = 12 * 3600  # seconds, from which on a shorter protocol is pointed out
FIELDS = "Fields of the protocol, each of which can be overridden"
SWEEP_FIELDS = ("depths", "blocks", "seeds", "dataset", "protocol", "study")


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise typer.BadParameter(f"must be a whole number; got {text!r}.")
    return int(text)


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number; got {text!r}.") from None


def _field(parser: Callable[[str], Any], text: str, **options: Any) -> Any:
    """An option of `sweep` that overrides a field of the protocol."""
    metavar = "N" if parser is _whole else "X" if parser is _real else "TEXT"
    return typer.Option(parser=parser, metavar=metavar, help=text, rich_help_panel=FIELDS, **options)


@app.command()
@stopping("stopped; the same command goes on from the last checkpoints")
def sweep(
    spec: Annotated[
        Path | None, typer.Argument(help="A TOML file with depths, blocks, ... and fields; flags win.")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="6n+2, such as 20,32,44,56,110.")] = None,
    blocks: Annotated[str | None, typer.Option(help=f"{', '.join(BLOCKS)}.", show_default="plain,residual")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2.", show_default="0")] = None,
    dataset: Annotated[str | None, typer.Option(help="cifar10 or shapes.", show_default="cifar10")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PROTOCOLS)}: what the fields below start from.", show_default="paper"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    study: Annotated[str | None, typer.Option(help="Its folder there.", show_default="from what is asked for")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the data are.", show_default="$DEGRADE_DATA, else ~/.cache/degrade")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    jobs: Annotated[str, typer.Option(help="Processes; auto: one a core, or one a GPU.")] = "auto",
    threads: Annotated[str, typer.Option(help="CPU threads each; auto: the cores shared out.")] = "auto",
    pack: Annotated[str, typer.Option(help="Runs at a time in a process; auto: on a GPU as many as fit.")] = "auto",
    compiled: Annotated[str, typer.Option("--compile", help="on, off, or auto: the long runs.")] = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Resume failed runs too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    steps: Annotated[int | None, _field(_whole, "Updates; milestones move to half and 3/4.")] = None,
    batch_size: Annotated[int | None, _field(_whole, "Images an update.")] = None,
    lr: Annotated[float | None, _field(_real, "Learning rate.")] = None,
    milestones: Annotated[str | None, _field(str, "Steps at which lr is divided by 10.")] = None,
    warmup_depth: Annotated[int | None, _field(_whole, "Nets at least this deep warm up.")] = None,
    warmup_lr: Annotated[float | None, _field(_real, "Learning rate while warming up.")] = None,
    warmup_steps: Annotated[int | None, _field(_whole, "Updates of the warm-up.")] = None,
    momentum: Annotated[float | None, _field(_real, "Of SGD.")] = None,
    weight_decay: Annotated[float | None, _field(_real, "Of SGD.")] = None,
    decay: Annotated[str | None, _field(str, "Weight decay on all parameters, or conv: not on BN.")] = None,
    width: Annotated[int | None, _field(_whole, "Channels of the first stage.")] = None,
    shortcut: Annotated[str | None, _field(str, "A (zero padding), B or C (projections).")] = None,
    init: Annotated[str | None, _field(str, f"{' or '.join(INITS)}.")] = None,
    train_images: Annotated[int | None, _field(_whole, "Train on this many images.")] = None,
    val_images: Annotated[int | None, _field(_whole, "Hold this many training images out.")] = None,
    test_images: Annotated[int | None, _field(_whole, "Test on this many images.")] = None,
    split_seed: Annotated[int | None, _field(_whole, "Which images those are.")] = None,
    precision: Annotated[
        str | None, _field(str, "fp32, tf32 or bf16.", show_default="tf32 on GPUs that have it")
    ] = None,
) -> None:
    """Train a grid of nets: every depth, block and seed. The same command again goes on where it stopped.

    Example: degrade sweep --depths 20,56 --blocks plain,residual
    """
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
        "milestones": numbers(milestones, "--milestones"),
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
        "precision": precision,
    }
    wanted = _read_spec(spec) | {name: value for name, value in flags.items() if value is not None}
    grid = {
        "depth": distinct(wanted.pop("depths", None), "depths", int),
        "block": distinct(wanted.pop("blocks", ["plain", "residual"]), "blocks", str),
        "seed": distinct(wanted.pop("seeds", [0]), "seeds", int),
    }
    dataset, protocol = str(wanted.pop("dataset", "cifar10")), str(wanted.pop("protocol", "paper"))
    study = wanted.pop("study", None)
    configs_of(grid, dataset, protocol_fields(protocol, wanted))  # bad input is told before torch is imported

    from degrade import sweep as engine

    device = engine.resolve_device(device)
    name = study if study is not None else study_name(dataset, protocol, overridden(protocol, wanted))
    folder = _study_folder(out, name)
    there = store.Study.open(folder) if (folder / store.STUDY).exists() else None
    wanted.setdefault("precision", there.shared["precision"] if there else engine.default_precision(device))
    configs = configs_of(grid, dataset, protocol_fields(protocol, wanted))
    check_precision(configs[0].precision, device)
    chosen = there or store.Study(folder, folder.name, protocol, configs[0].shared())
    chosen.check(configs)
    runs = engine.find_runs(chosen, configs)
    passed_over = [*store.FINISHED, *([] if retry_failed else ["failed"])]
    todo = [run for run in runs if run.status not in passed_over]
    machine = machine_of(device, configs if todo else [], jobs, threads, pack, compiled)

    from degrade import bench

    seconds = bench.estimate([run.config for run in todo], machine) if todo else {}
    _print_plan(folder, runs, seconds, machine)
    if dry_run:
        return
    if todo:
        _train(chosen, todo, machine, data_dir, seconds)
    runs = engine.find_runs(chosen, configs)
    console.print(terminal.runs_table(runs))
    say_errors(runs)
    if any(run.epochs for run in runs):
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


def _print_plan(folder: Path, runs: Sequence[store.Run], seconds: dict[str, float], machine: "Machine") -> None:
    """The run table and about how long it will take, for runs whose whole duration is in `seconds`."""
    from degrade import bench

    left = {
        run.config.run_id: seconds[run.config.run_id] * (1 - run.record()["step"] / run.config.steps)
        for run in runs
        if run.config.run_id in seconds and run.status != "running"
    }
    say(f"Study {folder}: {count(len(runs), 'run')}, {len(left)} to train")
    console.print(terminal.plan_table(runs, left))
    if not left:
        return
    wall = bench.makespan(list(left.values()), machine.jobs)  # packing shares one GPU: it gains, but how much?
    say(f"About {terminal.duration(wall)} on this machine: {how(machine)}")
    short = PROTOCOLS["short"]["steps"] / runs[0].config.steps
    if wall > LONG and short < 1:
        say(f"Too long? --protocol short takes about {terminal.duration(wall * short)}")


def _train(
    study: store.Study, todo: Sequence[store.Run], machine: "Machine", data_dir: Path | None, seconds: dict[str, float]
) -> None:
    """Fetch the data and train, shown live."""
    from degrade import data
    from degrade.sweep import sweep as events

    folder = data_dir or data.default_data_dir()
    data.fetch(str(study.shared["dataset"]), folder)
    with terminal.SweepView(console, todo, seconds, machine.jobs * machine.pack) as view:
        for run, event in events(study, todo, machine, folder):
            view.show(run, event)


def _read_spec(spec: Path | None) -> dict[str, Any]:
    if spec is None:
        return {}
    if not spec.is_file():
        raise ValueError(f"{spec} is not a file; name a TOML file, or separate lists by commas: --depths 20,56")
    try:
        values = {key.replace("-", "_"): value for key, value in tomllib.loads(spec.read_text()).items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{spec}: {error}") from None
    known = list(dict.fromkeys([*SWEEP_FIELDS, *RunConfig(block="plain", depth=20, seed=0).shared()]))
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{spec}: {unknown[0]} is not a setting; the settings are {', '.join(known)}")
    for name in ("dataset", "protocol", "study"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{spec}: {name} must be a string; got {values[name]!r}")
    return values


def _study_folder(out: Path, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        raise ValueError(f"a study's name must be up to 100 of A-Z a-z 0-9 . _ + -; got {name!r}; set it with --study")
    for path in (out / name, out):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out and --study must name a folder")
    return out / name
