"""`degrade import`, `export` and `identity`: what is done with a run's weights."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from degrade import commit, store, terminal
from degrade.cli.app import (
    DataDir,
    app,
    auto,
    channels,
    console,
    leave,
    machine_of,
    names,
    say,
    say_paths,
    study_folder,
    train_live,
)
from degrade.config import PROTOCOLS, ZERO_CHANNELS, RunConfig, overridden, protocol_fields, study_name
from degrade.log import Epoch
from degrade.stopping import stopping


@app.command("import")
def import_(
    weights: Annotated[Path, typer.Argument(help="A state dict of PyTorch's (.pt, .pth), or a .safetensors file.")],
    block: Annotated[str, typer.Option(help="plain, residual or preact.")],
    depth: Annotated[int, typer.Option(help="6n+2.")],
    source: Annotated[str, typer.Option(help="Where they are from, and under which licence.")],
    seed: Annotated[int, typer.Option(help="Tells nets of one depth apart.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    study: Annotated[str | None, typer.Option(help="Its folder there.", show_default="imported-...")] = None,
    dataset: Annotated[str, typer.Option(help="What the net was trained on.")] = "cifar10",
    protocol: Annotated[str, typer.Option(help=f"How, of {', '.join(PROTOCOLS)}.")] = "paper",
    fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field in which that differed.")
    ] = None,
    departures: Annotated[
        list[str] | None, typer.Option("--departure", help="What else differed from the protocol, in words.")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Of pixels / 255, a channel each.", show_default="per pixel, of the training images"),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="What pixels / 255 - mean were divided by.", show_default="1,1,1")
    ] = None,
    zero_channels: Annotated[str, typer.Option(help=f"Of option A: {' or '.join(ZERO_CHANNELS)}.")] = "appended",
    key: Annotated[str | None, typer.Option(help="Of the state dict, where the file holds several.")] = None,
    log: Annotated[Path | None, typer.Option(help="The published log: a CSV with a row an epoch.")] = None,
    columns: Annotated[str | None, typer.Option(help="Its columns: test_error=test_err,train_error=1-acc,...")] = None,
    in_percent: Annotated[bool, typer.Option("--percent", help="Its errors are in percent.")] = False,
    weights_of: Annotated[
        str | None, typer.Option(help="The epoch the weights are of: last, best on test, or N.", show_default="last")
    ] = None,
    claimed_test_error: Annotated[float | None, typer.Option(help="In percent.", show_default="the log's")] = None,
    claimed_train_error: Annotated[float | None, typer.Option(help="In percent.", show_default="the log's")] = None,
    data_dir: DataDir = None,
) -> None:
    """Bring published weights into a study as a run of their own, and measure them.

    Example: degrade import resnet20.pth --block residual --depth 20 --source "github.com/o/r, MIT" --mean .49,.48,.45
    """
    overrides = dict(_assignment(text) for text in fields or [])
    centre, scale = channels(mean, "--mean"), channels(std, "--std") or (1.0, 1.0, 1.0)
    if not all(0 <= value <= 1 for value in centre or ()):
        raise ValueError(f"--mean must be of pixels / 255, from 0 to 1; got {mean}")
    if not all(0 < value <= 1 for value in scale):
        raise ValueError(f"--std must be of pixels / 255, above 0 and at most 1; got {std}")
    for flag, percent in (("--claimed-test-error", claimed_test_error), ("--claimed-train-error", claimed_train_error)):
        if percent is not None and not 0 <= percent <= 100:
            raise ValueError(f"{flag} must be in percent, from 0 to 100; got {percent}")
    if swept := sorted({"block", "depth", "seed", "dataset", "input_mean"} & set(overrides)):
        raise ValueError(f"--set {swept[0]}: there is --{swept[0].removeprefix('input_')} for that")
    if str(overrides.get("init")).startswith("identity"):
        raise ValueError(f"--set init: only degrade identity makes nets of identity:...; got {overrides['init']!r}")
    shared = protocol_fields(protocol, overrides) | {"dataset": dataset, "input_mean": centre or ()}
    config = RunConfig.from_dict(shared | {"block": block, "depth": depth, "seed": seed})
    name = study if study is not None else f"imported-{study_name(dataset, protocol, overridden(protocol, overrides))}"
    folder = study_folder(out, name)
    there = store.Study.open(folder) if (folder / store.STUDY).exists() else None
    if there and not there.imported:
        raise ValueError(f"study {name} holds runs that were trained here; give imported ones another, with --study")
    chosen = there or store.Study(folder, folder.name, protocol, config.shared(), imported=True)
    chosen.check([config])
    if (folder / config.run_id / store.LOG).exists():
        leave(f"{folder / config.run_id} is there already, and stays as it is; --seed or --study gives another", 1)
    if zero_channels not in ZERO_CHANNELS:
        raise ValueError(f"--zero-channels must be one of {', '.join(ZERO_CHANNELS)}; got {zero_channels!r}")
    data = weights.read_bytes()

    from degrade import data as images
    from degrade import published
    from degrade.engine.process import prepare_process
    from degrade.train import load_splits

    rows, claimed, not_last = _published_log(log, columns, config, in_percent, weights_of)
    where = data_dir or images.default_data_dir()
    images.fetch(config.dataset, where)
    prepare_process(os.cpu_count() or 1)
    run = published.import_weights(
        chosen,
        config,
        data,
        published.Source(
            file=weights.name,
            source=source,
            std=scale,
            zero_channels=zero_channels,
            weights_of=int(weights_of) if weights_of and weights_of.isdigit() else weights_of or "last",
            departures=(*(departures or ()), *not_last),
            claimed_train_error=claimed[0] if claimed_train_error is None else claimed_train_error / 100,
            claimed_test_error=claimed[1] if claimed_test_error is None else claimed_test_error / 100,
        ),
        load_splits(config, where, "cpu"),
        key=key,
        log=rows,
    )
    assert run.imported is not None  # it was written just now
    say(f"{run.folder}: {block}-{depth}, imported")
    table = terminal.make_table("error", ">measured here", ">claimed")
    for what, measure in (("training, clean images", "train_error"), ("test", "test_error")):
        errors = (run.imported[there][measure] for there in ("measured", "claimed"))
        table.add_row(what, *map(terminal.percent, errors))
    console.print(table)


def _assignment(text: str) -> tuple[str, Any]:
    """`lr=0.05`; the value as JSON where it is that."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set must be FIELD=VALUE, such as steps=78125; got {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _published_log(
    log: Path | None, columns: str | None, config: RunConfig, in_percent: bool, weights_of: str | None
) -> tuple[list[Epoch], tuple[float | None, float | None], list[str]]:
    """The rows of a published log; the training and test error it has at the epoch that the weights are of; and the
    departure that it is where that is not the last.
    """
    from degrade import published

    if log is None:
        if columns is not None or in_percent or weights_of is not None:
            raise ValueError("--columns, --percent and --weights-of are of a published log; --log is missing")
        return [], (None, None), []
    pairs = {}
    for part in names(columns, "--columns") or []:
        mine, equals, theirs = part.partition("=")
        if not equals:
            raise ValueError(f"--columns must be MEASURE=COLUMN, such as test_error=test_err; got {part!r}")
        pairs[mine] = theirs
    try:
        text = log.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{log} is not text") from None
    rows = published.read_log(text, pairs, config, percent=in_percent)
    row = published.epoch_of(rows, weights_of or "last")
    train, test = (None if math.isnan(error) else error for error in (row.train_error, row.test_error))
    best = ", the best on test" if weights_of == "best" else ""
    departure = f"the weights are of epoch {row.epoch} of {len(rows)}{best}, not of the last"
    return rows, (train, test), [] if row is rows[-1] else [departure]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as results/cifar10-paper/plain-20-s0-...")],
    to: Annotated[
        Path | None, typer.Option(help="A file, .pt or .safetensors.", show_default="<run id>.pt, here")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Rounded to float16: half the size.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Write a run's newest weights for others: a state dict, and a JSON file that says what the net is and takes.

    With --half --to RUN/weights.pt a run can be published without its checkpoints, and still be probed.

    Example: degrade export results/shapes-demo/plain-20-s0-f8101586 --to plain-20.safetensors
    """
    there = open_run(run)
    target = to or Path(f"{there.folder.resolve().name}.pt")
    if target.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"--to must end in .pt, .pth or .safetensors; got {str(target)!r}")

    from degrade import data as images
    from degrade.train import load_splits
    from degrade.weights import export_weights, load_weights

    where = data_dir or images.default_data_dir()
    images.fetch(there.config.dataset, where)
    trained = load_weights(there, load_splits(there.config, where, "cpu").mean)
    for path in export_weights(trained, there, target, half=half):
        say(str(path))


@app.command()
@stopping("stopped; the same command goes on from the last checkpoint")
def identity(
    run: Annotated[Path, typer.Argument(help="The folder of a trained run.")],
    depth: Annotated[int, typer.Option(help="Of the deeper net, 6n+2.")],
    steps: Annotated[int, typer.Option(help="Train on from there, for so many updates.")] = 0,
    lr: Annotated[float | None, typer.Option(help="Learning rate, constant.", show_default="the run's last")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of results.", show_default="the run's")] = None,
    study: Annotated[str | None, typer.Option(help="Its folder there.", show_default="...-identity-...")] = None,
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; of training on.")] = "auto",
    threads: Annotated[str, typer.Option(help="CPU threads; auto: all cores.")] = "auto",
    compiled: Annotated[str, typer.Option("--compile", help="on, off, or auto: where it is long.")] = "auto",
) -> None:
    """Build a deeper net from a trained one, with identity layers; prove that it is no worse; train on from there.

    The shallow net is trained on alike beside it, as the control. Training has
    left the solution where its training error ends more than half a point above
    that of the construction.

    Example: degrade identity results/a-martyn/plain-20-s0-35fd8051 --depth 56 --steps 391
    """
    if steps < 0:
        raise ValueError(f"--steps must be at least 0; got {steps}")
    there = open_run(run)

    from degrade import bench, construction, data, plots
    from degrade import sweep as engine
    from degrade.engine.process import prepare_process
    from degrade.train import load_splits
    from degrade.weights import load_weights

    construction.check(there, depth)
    results = out or there.folder.resolve().parent.parent
    name = f"{there.study}-identity-{there.config.block}-{there.config.depth}-{depth}-s{there.config.seed}"
    folder = study_folder(results, study if study is not None else name)
    where = data_dir or data.default_data_dir()
    data.fetch(there.config.dataset, where)
    prepare_process(auto(threads, "--threads") or os.cpu_count() or 1)
    splits = load_splits(there.config, where, "cpu")
    trained = load_weights(there, splits.mean)
    rate = there.config.lr_at(there.config.steps - 1) if lr is None else lr
    base = construction.deeper_config(trained, there, depth, steps=max(steps, 1), lr=rate)
    chosen = store.Study(folder, folder.name, _protocol(there), base.shared())
    if (folder / store.STUDY).exists() and store.Study.open(folder).runs:
        chosen = store.Study.open(folder)
        chosen.check([base] if steps else [])
    record = construction.stored(folder, trained, depth)
    if record is None:
        record = construction.prove(trained, there, depth, splits, _track)
        record["scratch"] = construction.from_scratch(there, depth)
        construction.write(chosen, record)
    continued = control = None
    if not chosen.runs:  # of an earlier proof, say, that was not trained on
        commit.remove(folder / store.STUDY)
    chosen.create([])
    if steps:
        configs = [replace(base, depth=there.config.depth), base]
        for config in configs:
            construction.begin(chosen, config, trained, splits)
        todo = [run for run in engine.find_runs(chosen, configs) if run.status not in store.FINISHED]
        if todo:
            device = engine.resolve_device(device)
            machine = machine_of(device, [run.config for run in todo], "auto", threads, "auto", compiled)
            train_live(chosen, todo, machine, where, bench.estimate([run.config for run in todo], machine))
        continued, control = engine.find_runs(chosen, configs)  # the longest first
    record["scratch"] = construction.from_scratch(there, depth)
    record["finding"] = construction.finding(record, continued, control)
    construction.write(chosen, record)
    if continued and control and continued.epochs:
        figure = plots.draw_identity(record, continued.epochs, control.epochs, base.dataset)
        say_paths(plots.save(figure, folder / store.FIGURES, "identity"))
    say(record["finding"])
    for ended in filter(None, (continued, control)):
        if ended.status != "done":
            leave(f"{ended.folder} is {ended.status}{f': {ended.error}' if ended.error else ''}", 1)


def _protocol(run: store.Run) -> str:
    return store.Study.open(run.folder.resolve().parent).protocol


def _track(parts: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    return track(parts, what, count, console=console, disable=not console.is_terminal)


def open_run(folder: Path) -> store.Run:
    """
    Raises:
        ValueError: the folder is not a run's.
        Failure: the run is damaged.
    """
    if not (folder / store.CONFIG).exists():
        raise ValueError(f"{folder} is not the folder of a run; degrade show tells which there are")
    return store.Run.open(folder.resolve().parent.name, folder)
