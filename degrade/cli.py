"""The command line: parse, call, print. Torch, pandas and matplotlib are imported by the commands that need them."""

import csv
import errno
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from degrade import __version__, paper, store, terminal
from degrade.config import BLOCKS, INITS, PROTOCOLS, RunConfig, overridden, protocol_fields, study_name
from degrade.errors import Failure
from degrade.stopping import Stopped, stopping

if TYPE_CHECKING:
    from degrade.sweep import Machine

NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # a path on the command line that none can be
LONG = 12 * 3600  # seconds, from which on a shorter protocol is pointed out
FIELDS = "Fields of the protocol, each of which can be overridden"
SWEEP_FIELDS = ("depths", "blocks", "seeds", "dataset", "protocol", "study")

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reproduce and study the degradation problem: deeper plain nets get a higher training error "
    "(He et al. 2015), and residual nets do not.",
)
console = Console()
Results = Annotated[Path, typer.Argument(help="A folder of results: of one study, or of several.")]


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


def main() -> None:
    """Run the command line. Every expected error is one line: exit 2 for usage, 1 for failure."""
    usage_error: type[Any] = typer.BadParameter.__mro__[1]  # of the click that typer uses, whichever that is
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder may be called what a terminal cannot show
    try:
        code = app(prog_name="degrade", standalone_mode=False)  # what the command returns; None where all is well
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever read the output, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except usage_error as error:
        _exit(f"{error.format_message()} Try: {error.ctx.command_path if error.ctx else 'degrade'} --help", 2)
    except ValueError as error:
        _exit(str(error), 2)
    except Failure as error:
        _exit(str(error), 1)
    except OSError as error:
        reason = ": ".join(filter(None, (str(error.filename or ""), error.strerror or str(error))))
        _exit(reason, 2 if error.errno in NO_PATH else 1)
    except (KeyboardInterrupt, typer.Abort):
        _exit("stopped", 130)
    except Stopped as stop:
        _exit("stopped", stop.code)


def _exit(message: str, code: int) -> NoReturn:
    _note(message)
    sys.exit(code)


def _printable(text: str) -> str:
    """Control characters, of a file's name say, neither end the line nor reach the terminal."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], text)


def _version(asked: bool) -> None:
    if asked:
        print(f"degrade {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


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
        "depths": _numbers(depths, "--depths"),
        "blocks": _list(blocks, "--blocks"),
        "seeds": _numbers(seeds, "--seeds"),
        "dataset": dataset,
        "protocol": protocol,
        "study": study,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "milestones": _numbers(milestones, "--milestones"),
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
        "depth": _distinct(wanted.pop("depths", None), "depths", int),
        "block": _distinct(wanted.pop("blocks", ["plain", "residual"]), "blocks", str),
        "seed": _distinct(wanted.pop("seeds", [0]), "seeds", int),
    }
    dataset, protocol = str(wanted.pop("dataset", "cifar10")), str(wanted.pop("protocol", "paper"))
    study = wanted.pop("study", None)
    _configs(grid, dataset, protocol_fields(protocol, wanted))  # bad input is told before torch is imported

    from degrade import sweep as engine

    device = engine.resolve_device(device)
    name = study if study is not None else study_name(dataset, protocol, overridden(protocol, wanted))
    folder = _study_folder(out, name)
    there = store.Study.open(folder) if (folder / store.STUDY).exists() else None
    wanted.setdefault("precision", there.shared["precision"] if there else engine.default_precision(device))
    configs = _configs(grid, dataset, protocol_fields(protocol, wanted))
    _check_precision(configs[0].precision, device)
    chosen = there or store.Study(folder, folder.name, protocol, configs[0].shared())
    chosen.check(configs)
    runs = engine.find_runs(chosen, configs)
    passed_over = [*store.FINISHED, *([] if retry_failed else ["failed"])]
    todo = [run for run in runs if run.status not in passed_over]
    machine = _machine(device, configs if todo else [], jobs, threads, pack, compiled)

    from degrade import bench

    seconds = bench.estimate([run.config for run in todo], machine) if todo else {}
    _print_plan(folder, runs, seconds, machine)
    if dry_run:
        return
    if todo:
        _train(chosen, todo, machine, data_dir, seconds)
    runs = engine.find_runs(chosen, configs)
    console.print(terminal.runs_table(runs))
    _say_errors(runs)
    if any(run.epochs for run in runs):
        _say(f"Next: degrade plot {folder}; degrade verdict {folder}")
    if unfinished := [run for run in runs if run.status != "done"]:
        states = {run.status for run in unfinished}
        then = "; the same command goes on" if {"interrupted", "missing", "running"} & states else ""
        then += (
            "; --retry-failed tries the failed ones again"
            if any(r.status == "failed" and not r.problem for r in runs)
            else ""
        )
        _exit(f"{len(unfinished)} of {_count(len(runs), 'run')} not done ({', '.join(sorted(states))}){then}", 1)


def _print_plan(folder: Path, runs: Sequence[store.Run], seconds: dict[str, float], machine: "Machine") -> None:
    """The run table and about how long it will take, for runs whose whole duration is in `seconds`."""
    from degrade import bench

    left = {
        run.config.run_id: seconds[run.config.run_id] * (1 - run.record()["step"] / run.config.steps)
        for run in runs
        if run.config.run_id in seconds and run.status != "running"
    }
    _say(f"Study {folder}: {_count(len(runs), 'run')}, {len(left)} to train")
    console.print(terminal.plan_table(runs, left))
    if not left:
        return
    wall = bench.makespan(list(left.values()), machine.jobs)  # packing shares one GPU: it gains, but how much?
    _say(f"About {terminal.duration(wall)} on this machine: {_how(machine)}")
    short = PROTOCOLS["short"]["steps"] / runs[0].config.steps
    if wall > LONG and short < 1:
        _say(f"Too long? --protocol short takes about {terminal.duration(wall * short)}")


def _check_precision(precision: str, device: str) -> None:
    from degrade.sweep import has_precision

    if not has_precision(device, precision):
        where = "a GPU that has it" if precision == "tf32" else "a CPU, or a GPU that has it"
        raise ValueError(f"precision {precision} needs {where}; device is {device}")


def _machine(device: str, configs: Sequence[RunConfig], jobs: str, threads: str, pack: str, compiled: str) -> "Machine":
    """The machine as the flags ask for it; what cannot be had is said in a line."""
    from degrade.sweep import resolve_machine

    machine, note = resolve_machine(
        device,
        configs,
        jobs=_auto(jobs, "--jobs"),
        threads=_auto(threads, "--threads"),
        pack=_auto(pack, "--pack"),
        compiled=compiled,
    )
    if note:
        _note(note)
    return machine


def _how(machine: "Machine") -> str:
    jobs, threads = _count(machine.jobs * machine.pack, "run"), _count(machine.threads, "thread")
    packed = f" ({machine.pack} to a process)" if machine.pack > 1 else ""
    return f"{machine.device}, {jobs} at a time{packed}, {threads} each"


def _note(text: str) -> None:
    print(f"degrade: {_printable(text)}", file=sys.stderr)


def _say(text: str) -> None:
    """One line, however narrow the terminal."""
    console.print(_printable(text), highlight=False, markup=False, soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


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


def _say_errors(runs: Sequence[store.Run]) -> None:
    for run in runs:
        if run.status == "failed":
            _say(f"{run.folder.name}: {run.error}")


def _tell(damaged: Sequence[str]) -> int:
    """Say on stderr what was left out; the exit code."""
    for line in damaged:
        _note(f"left out: {line}")
    if damaged:
        _note("degrade check looks closer")
    return int(bool(damaged))


@app.command()
def show(
    results: Results = Path("results"),
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As a list of objects.")] = False,
) -> int:
    """Show every run: its status, how far it is, and its errors.

    Example: degrade show results/
    """
    if as_json and as_csv:
        raise ValueError("--csv and --json exclude each other")
    studies, damaged = store.find_studies(results)
    records = [run.record() for study in studies for run in study.runs]
    if as_json:
        print(json.dumps(records, indent=2))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, records[0] if records else ["id"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        for study in studies:
            _say(f"{study.name}: {study.shared['dataset']}, protocol {study.protocol}")
            console.print(terminal.runs_table(study.runs))
            _say_errors(study.runs)
    return _tell(damaged)


@app.command()
def check(
    results: Results = Path("results"),
    repair: Annotated[bool, typer.Option("--repair", help="Write anew what can be derived from other files.")] = False,
) -> None:
    """Verify every file of every run: configurations, checkpoints, logs. Exit code 1 where something is wrong.

    Example: degrade check results/ --repair
    """
    from degrade.check import check as checks

    findings = []
    for checked in checks(results, repair=repair):
        states = ", ".join(f"{count} {status}" for status, count in sorted(checked.statuses.items())) or "none"
        runs = f"{_count(checked.statuses.total(), 'run')} ({states})"
        _say(f"{checked.folder}: {runs}{'' if checked.findings else ', nothing wrong'}")
        if checked.alone:
            _say(f"  {_count(checked.alone, 'log')} with no checkpoint to compare with")
        for path, problem, remedy, mend in checked.findings:
            _say(str(path))
            _say(f"  {problem}" + (f"; {'' if repair else 'can be '}{remedy}" if mend else ""))
        findings += checked.findings
    mendable = sum(bool(finding.mend) for finding in findings)
    lost = len(findings) - mendable
    if left := lost if repair else len(findings):
        mends = f"; --repair mends {mendable}" if mendable and not repair else ""
        advice = f"; {'otherwise ' if mends else ''}restore the file, or delete it and sweep again" if lost else ""
        _exit(f"{_count(left, 'problem')}{mends}{advice}", 1)


@app.command()
def plot(
    results: Results = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="A folder for the figures.", show_default="figures/ in each study")
    ] = None,
    formats: Annotated[str, typer.Option(help="Any of png, svg, pdf.")] = "png,svg,pdf",
) -> int:
    """Draw each study: training error v depth, error curves, test error v depth, the gap between the two.

    Example: degrade plot results/
    """
    kinds = _list(formats, "--formats") or []
    allowed = ("png", "svg", "pdf")
    if unknown := [kind for kind in kinds if kind not in allowed]:
        raise ValueError(f"--formats must be of {', '.join(allowed)}; got {unknown[0]!r}")
    studies, damaged = store.find_studies(results)
    epochs = _epochs(results, studies, damaged)

    from degrade import plots

    folders = {study.name: study.folder for study in studies}
    for name, rows in epochs.groupby("study", sort=True):
        folder = out / name if out else folders[name] / "figures"
        for title, figure in plots.figures(rows).items():
            paths = plots.save(figure, folder, title, kinds)
            _say(f"{paths[0].with_suffix('')}.{{{','.join(kinds)}}}" if len(kinds) > 1 else str(paths[0]))
    return _tell(damaged)


@app.command()
def verdict(
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="As a list of objects.")] = False,
) -> int:
    """Say whether final training error rises with depth, per block, with Welch's 95 % intervals over seeds.

    A deeper net degrades if its whole interval lies above 0, and does not degrade if it ends at most half a point
    above; otherwise, and with one seed, it is undecided.

    Example: degrade verdict results/
    """
    studies, damaged = store.find_studies(results)
    epochs = _epochs(results, studies, damaged)

    from degrade.analysis.verdict import verdicts

    found = verdicts(epochs)
    if as_json:
        print(json.dumps([v.as_dict() for v in found], indent=2, allow_nan=False))
        return _tell(damaged)
    for study in studies:
        _say(f"{study.name}: final training error, deeper minus shallower, in percentage points")
        mine = [v for v in found if v.study == study.name]
        if mine:
            console.print(terminal.verdict_table(mine))
        else:
            _say("nothing to compare: two finished depths of one block are needed")
        if mine and mine[0].early:
            of = f" of the paper's {paper.STEPS:,}" if study.shared["dataset"] == "cifar10" else ""
            _say(f"early in training: {mine[0].steps:,}{of} steps")
        if lost := sorted({run for v in mine for run in v.diverged}):
            _say(f"diverged, counted at chance: {', '.join(lost)}")
        for run in study.runs:
            if run.status not in store.FINISHED:
                _say(f"left out: {run.folder.name} ({run.status})")
    return _tell(damaged)


@app.command()
def bench(
    depths: Annotated[str, typer.Option(help="6n+2.")] = "20,32,44,56,110",
    blocks: Annotated[str, typer.Option(help="plain, residual.")] = "plain,residual",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    jobs: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    threads: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    pack: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    compiled: Annotated[str, typer.Option("--compile", help="As for sweep.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, tf32 or bf16.", show_default="tf32 on GPUs that have it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a list of objects.")] = False,
) -> None:
    """Time the nets on this machine, and say how long the paper's protocol and the short one would take.

    Each net is timed alone, on made-up images, with the threads it has in a sweep; a matrix product is the yardstick.

    Example: degrade bench --depths 20,56
    """
    grid = {
        "depth": _distinct(_numbers(depths, "--depths"), "depths", int),
        "block": _distinct(_list(blocks, "--blocks"), "blocks", str),
        "seed": [0],
    }
    _configs(grid, "cifar10", {"precision": precision or "fp32"})

    from degrade import bench as timing
    from degrade import sweep as engine

    device = engine.resolve_device(device)
    configs = _configs(grid, "cifar10", {"precision": precision or engine.default_precision(device)})
    _check_precision(configs[0].precision, device)
    machine = _machine(device, configs, jobs, threads, pack, compiled)
    records = []
    for record in timing.measurements(configs, machine):
        records.append(record)
        if console.is_terminal and not as_json:
            step = terminal.milliseconds(record["milliseconds_per_step"])
            _say(f"{record['block']}-{record['depth']}: {step} ms a step")
    if as_json:
        print(json.dumps(records, indent=2))
        return
    peak = records[0]["matmul_flops_per_second"]
    _say(f"{_how(machine)}, {configs[0].precision}, batch {configs[0].batch_size}")
    _say(f"matrix product: {peak / 1e9:,.0f} GFLOP/s on {_count(machine.threads, 'thread')} (the peak below)")
    _say("train/s and eval/s: images a second")
    console.print(terminal.bench_table(records))
    together = 1.0
    if machine.pack > 1:
        taken = timing.measure_packed(configs[: machine.pack], machine.places[0], compiled=records[0]["compiled"])
        together = 1000 * taken / sum(record["milliseconds_per_step"] for record in records[: machine.pack])
        step = terminal.milliseconds(1000 * taken)
        _say(f"{machine.pack} packed: {step} ms for a step of each, {100 * together:.0f} % of what they take alone")
    for protocol in ("paper", "short"):
        wall = timing.makespan(sorted((r[f"{protocol}_seconds"] for r in records), reverse=True), machine.jobs)
        nets = _count(len(records), "net")
        _say(f"{protocol}: about {terminal.duration(together * wall)} for these {nets}, one seed each")


def _epochs(results: Path, studies: Sequence[store.Study], damaged: Sequence[str]) -> Any:
    """A row an epoch.

    Raises:
        ValueError: there is none.
        Failure: there is none that is not damaged.
    """
    epochs = store.to_frame(studies)
    if epochs.empty and damaged:
        raise Failure(f"nothing is left to read: {damaged[0]}")
    if epochs.empty:
        raise ValueError(f"{results} holds no epoch yet; degrade show {results} tells how far its runs are")
    return epochs


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


def _list(text: str | None, flag: str) -> list[str] | None:
    """`a,b` as a list; None where the flag was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{flag} must be separated by commas, with nothing empty; got {text!r}")
    return parts


def _numbers(text: str | None, flag: str) -> list[int] | None:
    parts = _list(text, flag)
    if parts is None:
        return None
    if bad := [part for part in parts if not re.fullmatch(r"-?[0-9]{1,18}", part)]:
        raise ValueError(f"{flag} must be whole numbers separated by commas, such as 20,56; got {bad[0]!r}")
    return [int(part) for part in parts]


def _distinct(values: Any, name: str, kind: type) -> list[Any]:
    if values is None:
        raise ValueError(f"{name} are missing: name them, such as --depths 20,56")
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"{name} must be a list of {'whole numbers' if kind is int else 'names'}; got {values!r}")
    return list(dict.fromkeys(values))


def _configs(grid: dict[str, list[Any]], dataset: str, shared: dict[str, Any]) -> list[RunConfig]:
    return [
        RunConfig(block=block, depth=depth, seed=seed, dataset=dataset, **shared)
        for depth in grid["depth"]
        for seed in grid["seed"]
        for block in grid["block"]
    ]


def _study_folder(out: Path, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        raise ValueError(f"a study's name must be up to 100 of A-Z a-z 0-9 . _ + -; got {name!r}; set it with --study")
    for path in (out / name, out):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out and --study must name a folder")
    return out / name


def _auto(text: str, flag: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{flag} must be auto or a whole number of at least 1; got {text!r}")
    return int(text)
