"""What every command uses: the program, its exit codes, how it speaks, and what the command line's words mean."""

import errno
import gc
import io
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from degrade import __version__, store, terminal
from degrade.config import FOLDER, RunConfig, dataset_of, did_you_mean, short_name
from degrade.errors import Failure
from degrade.stopping import Stopped

if TYPE_CHECKING:
    from degrade.engine.group import Group
    from degrade.execute.remote import Engine
    from degrade.sweep import Machine

UsageError: type[Any] = typer.BadParameter.__mro__[1]  # of the click that typer uses, whichever that is
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # a path on the command line that none can be


class Plain(TyperCommand):
    """A command whose --help is text: no boxes and no types, options in sections, 80 columns at most."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx  # so that the message can name the command
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            words, text = param.get_help_record(ctx) or ("", "")
            if param.param_type_name == "argument":
                words = param.metavar or ""
            text = re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", text)  # as those that are given are shown
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(param, "rich_help_panel", None) or title, []).append((words, text))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(emoji=False)  # a name such as folder:dog:100 means itself


def main() -> None:
    """Run the command line. Every expected error is one line: exit 2 for usage, 1 for failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder may be called what a terminal cannot show
    gc.set_threshold(100_000)  # thousands of runs are objects that stay: to look for cycles among them is in vain
    try:
        code = app(prog_name="degrade", standalone_mode=False)  # what the command returns; None where all is well
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever read the output, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UsageError as error:
        leave(_usage(error), 2)
    except ValueError as error:
        leave(str(error), 2)
    except Failure as error:
        leave(str(error), 1)
    except OSError as error:
        name = re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.partial$", r"\1", str(error.filename or ""))  # what was being written
        reason = ": ".join(filter(None, (name, error.strerror or str(error))))
        leave(reason, 2 if error.errno in NO_PATH else 1)
    except (KeyboardInterrupt, typer.Abort):
        leave("stopped", 130)
    except Stopped as stop:
        leave("stopped", stop.code)


def _usage(error: Any) -> str:
    """What is wrong with the command line, the nearest of what is known, and where to read on."""
    message = re.sub(r"^Invalid value for '(.+?)':", r"\1", error.format_message())
    if near := getattr(error, "possibilities", None):  # the nearest first
        message = f"{error.message}. Did you mean {next(iter(near))}?"
    elif not message.endswith((".", "?")):
        message += "."
    return f"{message} Try: {error.ctx.command_path if error.ctx else 'degrade'} --help"


def leave(message: str, code: int) -> NoReturn:
    note(message)
    sys.exit(code)


def printable(text: str) -> str:
    """Control characters, of a file's name say, neither end the line nor reach the terminal."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], text)


def _version(asked: bool) -> None:
    if asked:
        print(f"degrade {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reproduce and study the degradation problem: deeper plain nets get a higher training error (He et al. 2015), and
    residual nets do not.

    \b
    Example: degrade sweep --depths 20,56 --dataset shapes --protocol demo
    Example: degrade plot results/
    Example: degrade verdict results/
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def note(text: str) -> None:
    print(f"degrade: {printable(text)}", file=sys.stderr)


def say(text: str) -> None:
    """One line; a terminal too narrow for it wraps it between words, but breaks no word, such as a path."""
    text = printable(text)
    one_line = not console.is_terminal or any(len(word) > console.width for word in text.split())
    console.print(text, highlight=False, markup=False, soft_wrap=one_line)


def say_table(table: Table) -> None:
    """Whole rows: the same in a file as on a terminal, however narrow that is; and 10,000 of them in no time."""
    for row in zip(*map(_lines, table.columns), strict=True):
        print("  ".join(row).rstrip())


def _lines(column: Column) -> list[str]:
    """The heading and the cells of a column, each as wide as the widest."""
    cells = [(cell.plain, str(cell.style)) if isinstance(cell, Text) else (str(cell), "") for cell in column.cells]
    cells.insert(0, (str(column.header), "bold"))
    painted = {(text, style): _painted(text, style) for text, style in set(cells) if style}
    width = max(cell_len(text) for text, _ in cells)
    lines = []
    for text, style in cells:
        space = " " * (width - cell_len(text))
        shown = painted.get((text, style), text)
        lines.append(space + shown if column.justify == "right" else shown + space)
    return lines


def _painted(text: str, style: str) -> str:
    """In colour, where that can be seen."""
    with console.capture() as drawn:
        console.print(Text(text, style), end="", soft_wrap=True)
    return drawn.get()


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def say_paths(paths: Sequence[Path]) -> None:
    kinds = [path.suffix[1:] for path in paths]
    say(f"{paths[0].with_suffix('')}.{{{','.join(kinds)}}}" if len(kinds) > 1 else str(paths[0]))


def say_errors(runs: Sequence[store.Run]) -> None:
    for run in runs:
        if run.status == "failed":
            say(f"{run.folder.name}: {run.error}")


def tell(damaged: Sequence[str]) -> int:
    """Say on stderr what was left out; the exit code."""
    for line in damaged:
        note(f"left out: {line}")
    if damaged:
        note("degrade check looks closer")
    return int(bool(damaged))


def construction_of(study: store.Study, damaged: list[str]) -> dict[str, Any]:
    """What `degrade identity` has stored of the study; nothing where it is damaged, which is named then."""
    try:
        return store.read_identity(study.folder) or {}
    except (Failure, OSError) as error:
        damaged.append(str(error) if isinstance(error, Failure) else f"{error.filename}: {error.strerror}")
        return {}


def epochs_of(results: Path, studies: Sequence[store.Study], damaged: Sequence[str]) -> Any:
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


def names(text: str | None, flag: str) -> list[str] | None:
    """`a,b` as a list; None where the flag was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{flag} must be separated by commas, with nothing empty and no space; got {text!r}")
    return parts


def some_of(allowed: Sequence[str], chosen: Sequence[str] | None, flag: str) -> list[str]:
    """Those chosen, each once; every one of them is allowed."""
    for word in chosen or []:
        if word not in allowed:
            raise ValueError(f"{flag} must be of {', '.join(allowed)}; got {word!r}{did_you_mean(word, allowed)}")
    return list(dict.fromkeys(chosen or []))


def numbers(text: str | None, flag: str) -> list[int] | None:
    parts = names(text, flag)
    if parts is None:
        return None
    if bad := [part for part in parts if not re.fullmatch(r"-?[0-9]{1,18}", part)]:
        raise ValueError(f"{flag} must be whole numbers separated by commas, such as 20,56; got {bad[0]!r}")
    return [int(part) for part in parts]


def channels(text: str | None, flag: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(map(float, names(text, flag) or []))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"{flag} must be three numbers, a channel each, such as 0.49,0.48,0.45; got {text!r}")
    return values


def distinct(values: Any, name: str, kind: type) -> list[Any]:
    if values is None:
        raise ValueError(f"{name} are missing: name them, such as --depths 20,56")
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"{name} must be a list of {'whole numbers' if kind is int else 'names'}; got {values!r}")
    return list(dict.fromkeys(values))


def configs_of(grid: dict[str, list[Any]], dataset: str, shared: dict[str, Any]) -> list[RunConfig]:
    return [
        RunConfig(block=block, depth=depth, seed=seed, dataset=dataset, **shared)
        for depth in grid["depth"]
        for seed in grid["seed"]
        for block in grid["block"]
    ]


def dataset_named(
    text: str, data_dir: Path | None, image_size: int | None = None, *, skip_broken: bool = False, write: bool = True
) -> str:
    """A data set's name; of `folder:PATH` and `imagenet:PATH` the full one.

    The images of the first are decoded here, unless they are in the cache.
    """
    kind, colon, path = text.partition(":")
    if not colon or kind not in ("folder", "imagenet") or FOLDER.fullmatch(text):
        if image_size is not None:
            size = dataset_of(text).image_size
            raise ValueError(f"--image-size is for folder:PATH; the images of {short_name(text)} are {size}x{size}")
        return text
    if not path:
        raise ValueError(f"{kind}: must name a folder of images, such as {kind}:flowers")
    from degrade.data import default_data_dir, folder, imagenet

    root, where = Path(path).expanduser(), data_dir or default_data_dir()
    if kind == "folder":
        size = 32 if image_size is None else image_size
        prepared = folder.prepare(root, where, image_size=size, skip_broken=skip_broken, write=write)
    elif skip_broken:
        raise ValueError("--skip-broken is for folder:PATH and for degrade data pack; imagenet:PATH is read as it is")
    else:
        prepared = imagenet.prepare(root, where, image_size=224 if image_size is None else image_size, write=write)
    say(f"Data set {prepared.dataset}")
    for line in prepared.notes:
        note(f"{path}: {line}")
    return prepared.dataset


def study_folder(out: Path, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        raise ValueError(f"a study's name must be up to 100 of A-Z a-z 0-9 . _ + -; got {name!r}; set it with --study")
    for path in (out / name, out):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out and --study must name a folder")
    return out / name


def machine_of(
    device: str, configs: Sequence[RunConfig], jobs: str, threads: str, pack: str, compiled: str
) -> "Machine":
    """The machine as the flags ask for it; what cannot be had is said in a line."""
    from degrade.sweep import resolve_machine

    machine, missing = resolve_machine(
        device,
        configs,
        jobs=auto(jobs, "--jobs"),
        threads=auto(threads, "--threads"),
        pack=auto(pack, "--pack"),
        compiled=compiled,
    )
    if missing:
        note(missing)
    return machine


def started_together() -> bool:
    """Whether torchrun has started this process beside others, to train each run with them."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def train_live(
    study: store.Study,
    runs: Sequence[store.Run],
    machine: "Machine",
    data_dir: Path | None,
    seconds: Mapping[str, float],
    snapshots: Sequence[int] = (),
    group: "Group | None" = None,
    engine: "Engine | None" = None,
) -> None:
    """Train the runs, shown live; `seconds` are those that each whole run will take, by run id, as far as is known."""
    from degrade.engine.group import ALONE
    from degrade.sweep import sweep

    with terminal.SweepView(console, runs, seconds, machine.jobs * max(machine.pack, 1)) as view:
        for run, event in sweep(
            study, runs, machine, data_dir, snapshots=snapshots, group=group or ALONE, engine=engine
        ):
            view.show(run, event)


def how(machine: "Machine") -> str:
    threads = count(machine.threads, "thread")
    if not machine.pack:
        return f"{machine.device}, {count(machine.jobs, 'job')}, in each as many runs as fit, {threads} each"
    packed = f" ({machine.pack} to a process)" if machine.pack > 1 else ""
    return f"{machine.device}, {count(machine.jobs * machine.pack, 'run')} at a time{packed}, {threads} each"


def auto(text: str, flag: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{flag} must be auto or a whole number of at least 1; got {text!r}")
    return int(text)
