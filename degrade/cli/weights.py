"""`degrade import`, `export` and `identity`: what is done with a run's weights."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from degrade import commit, store, terminal
from degrade.cli.app import (
    Plain,
    app,
    auto,
    channels,
    console,
    dataset_named,
    leave,
    machine_of,
    names,
    say,
    say_paths,
    say_table,
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
    argument,
    auto_or_number,
    one_of,
    option,
)
from degrade.config import (
    BLOCKS,
    PROTOCOLS,
    ZERO_CHANNELS,
    RunConfig,
    check_is_one_of,
    family_of,
    overridden,
    protocol_fields,
    study_name,
)
from degrade.log import Epoch
from degrade.stopping import stopping


@app.command("import", cls=Plain)
def import_(
    weights: Annotated[Path, argument("WEIGHTS", "A state dict of PyTorch's (.pt, .pth), or a .safetensors file.")],
    block: Annotated[str, one_of(BLOCKS, f"{', '.join(BLOCKS)}.")],
    depth: Annotated[int, option("N", "Layers of the net, 6n+2.", DEPTHS)],
    source: Annotated[str, option("TEXT", "Where they are from, and under which licence.")],
    seed: Annotated[int, option("N", "Tells nets of one depth apart.")] = 0,
    out: Out = Path("results"),
    study: Annotated[str | None, option("TEXT", "Its folder there.", show_default="imported-...")] = None,
    dataset: Annotated[
        str, one_of(DATASET_KINDS, "What the net was trained on: one of degrade data list, or folder:PATH.")
    ] = "cifar10",
    protocol: Annotated[str, one_of(PROTOCOLS, f"How: {', '.join(PROTOCOLS)}.")] = "paper",
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=X", help="A field in which that differed: steps=78125. Can be repeated."),
    ] = None,
    departures: Annotated[
        list[str] | None,
        typer.Option(
            "--departure", metavar="TEXT", help="What else differed from the protocol, in words. Can be repeated."
        ),
    ] = None,
    mean: Annotated[
        str | None,
        option("X,X,X", "Of pixels / 255, a channel each.", show_default="per pixel, of the training images"),
    ] = None,
    std: Annotated[
        str | None, option("X,X,X", "What pixels / 255 - mean were divided by.", show_default="1,1,1")
    ] = None,
    zero_channels: Annotated[str, one_of(ZERO_CHANNELS, f"Of option A: {' or '.join(ZERO_CHANNELS)}.")] = "appended",
    key: Annotated[str | None, option("TEXT", "Of the state dict, where the file holds several.")] = None,
    log: Annotated[Path | None, option("FILE", "The published log: a CSV with a row an epoch.")] = None,
    columns: Annotated[
        str | None, option("TEXT", "Its columns: test_error=test_err,train_error=1-acc says what is which.")
    ] = None,
    in_percent: Annotated[bool, typer.Option("--percent", help="Its errors are in percent.")] = False,
    weights_of: Annotated[
        str | None,
        option("EPOCH", "Which the weights are of: last, best on test, or N.", ("last", "best"), show_default="last"),
    ] = None,
    claimed_test_error: Annotated[float | None, option("X", "In percent.", show_default="the log's")] = None,
    claimed_train_error: Annotated[float | None, option("X", "In percent.", show_default="the log's")] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
) -> None:
    """Bring published weights in as a run, and measure them.

    The names in the state dict do not matter. --mean and --std are those of the images that the net was trained on.
    What is imported stays apart from what is trained here. A run that is there without its weights is given them back.

    \b
    Example: degrade import net.pth --block residual --depth 20 --source "me, MIT"
    Example: degrade import net.pth --block plain --depth 56 --source "me, MIT" \\
      --mean 0.49,0.48,0.45 --log log.csv --columns test_error=err --percent
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
    dataset = dataset_named(dataset, data_dir, image_size)
    if family_of(dataset) == "imagenet":
        raise ValueError("degrade import takes nets of CIFAR-10's form only; those of ImageNet are trained here")
    shared = protocol_fields(protocol, overrides, dataset) | {"dataset": dataset, "input_mean": centre or ()}
    config = RunConfig.from_dict(shared | {"block": block, "depth": depth, "seed": seed})
    usual = study_name(dataset, protocol, overridden(protocol, overrides, dataset))
    name = study if study is not None else f"imported-{usual}"
    folder = study_folder(out, name)
    there = store.Study.open(folder) if (folder / store.STUDY).exists() else None
    if there and not there.imported:
        raise ValueError(f"study {name} holds runs that were trained here; give imported ones another, with --study")
    chosen = there or store.Study(folder, folder.name, protocol, config.shared(), imported=True)
    chosen.check([config])
    (run,) = chosen.find([config])
    if (run.folder / store.LOG).exists() and (run.folder / store.WEIGHTS).exists():
        raise store.there_already(run)
    check_is_one_of(ZERO_CHANNELS, "--zero-channels", zero_channels)
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
    assert run.imported is not None
    say(f"{run.folder}: {block}-{depth}, imported")
    table = terminal.make_table("error", ">measured here", ">claimed")
    for what, measure in (("training, clean images", "train_error"), ("test", "test_error")):
        errors = (run.imported[there][measure] for there in ("measured", "claimed"))
        table.add_row(what, *map(terminal.percent, errors))
    say_table(table)


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


@app.command(cls=Plain)
def export(
    run: Annotated[Path, argument("RUN", "A run's folder, such as results/cifar10-paper/plain-20-s0-...")],
    to: Annotated[
        Path | None, option("FILE", "Ends in .pt, .pth or .safetensors.", show_default="RUN's name and .pt, here")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Rounded to float16: half the size.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Write a run's weights for others.

    A state dict of the newest weights, and beside it a JSON file that says what the net is and takes.

    With --half --to RUN/weights.pt a run can be published without its checkpoints, and still be probed.

    \b
    Example: degrade export demo-results/shapes-demo/plain-20-s0-*
    Example: degrade export demo-results/shapes-demo/plain-20-s0-* \\
      --to net.safetensors
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


@app.command(cls=Plain)
@stopping("stopped; the same command goes on from the last checkpoint")
def identity(
    run: Annotated[Path, argument("RUN", "The folder of a trained run.")],
    depth: Annotated[int, option("N", "Layers of the deeper net, 6n+2.", DEPTHS)],
    steps: Annotated[int, option("N", "Train on from there, for so many updates.")] = 0,
    lr: Annotated[float | None, option("X", "Learning rate, constant.", show_default="the run's last")] = None,
    out: Annotated[Path | None, option("DIR", "The folder of results.", show_default="the run's")] = None,
    study: Annotated[
        str | None, option("TEXT", "Its folder there.", show_default="the run's study and -identity-...")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Annotated[str, auto_or_number("CPU threads; auto: all cores.")] = "auto",
    compiled: Compiled = "auto",
) -> None:
    """Build a deeper net that is no worse from a trained one.

    The layers added are the identity, and it is proved that no error differs. With --steps it is trained on from there,
    and the shallow net alike beside it, as the control. Training has left the solution where its training error ends
    more than half a point above that of the construction.

    \b
    Example: degrade identity results/a-martyn/plain-20-s0-35fd8051 --depth 56
    Example: degrade identity results/a-martyn/plain-20-s0-35fd8051 --depth 56 \\
      --steps 391
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
    beside = there.folder.resolve().parent.parent
    results = out or (beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
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
        theirs = {} if steps else {name: chosen.shared[name] for name in ("steps", "lr")}  # of training on
        chosen.check([replace(base, **theirs)])
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
        todo = [run for run in chosen.find(configs) if run.status not in store.FINISHED]
        if todo:
            device = engine.resolve_device(device)
            machine = machine_of(device, [run.config for run in todo], "auto", threads, "auto", compiled)
            train_live(chosen, todo, machine, where, bench.estimate([run.config for run in todo], machine))
        continued, control = chosen.find(configs)  # the longest first
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
    with terminal.bar(console) as bar:
        yield from bar.track(parts, count, description=f"logits of {what}")


def open_run(folder: Path) -> store.Run:
    """
    Raises:
        ValueError: the folder is not a run's.
        Failure: the run is damaged.
    """
    if not (folder / store.CONFIG).exists():
        raise ValueError(f"{folder} is not the folder of a run; degrade show tells which there are")
    return store.Run.open(folder.resolve().parent.name, folder)
