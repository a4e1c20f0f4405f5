"""What several options have in common: what their values are called in --help, how they are read, and how completed.

Metavars: N and X are a whole and a real number, NAME is one of the words that the help names, DIR and FILE are paths;
what ends in ",..." is a list separated by commas. Nothing here imports torch: the shell waits at each Tab.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from degrade.config import DATASETS, PRECISIONS

FORMATS = ("png", "svg", "pdf")
DATASET_KINDS = (*DATASETS, "folder:", "imagenet:")
DEPTHS = ("20", "32", "44", "56", "110")  # the paper's


def _among(words: Iterable[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _listed(words: Iterable[str]) -> Callable[[str], list[str]]:
    """`plain,` goes on as `plain,residual`; what is in the list already is not offered again."""

    def complete(incomplete: str) -> list[str]:
        *before, last = incomplete.split(",")
        return [",".join([*before, word]) for word in words if word.startswith(last) and word not in before]

    return complete


def whole(text: str | int) -> int:
    """A default comes as the number that it is."""
    if not re.fullmatch(r"-?[0-9]{1,18}", str(text)):
        raise typer.BadParameter(f"must be a whole number; got {text!r}.")
    return int(text)


def real(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number; got {text!r}.") from None


def argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text)


def option(metavar: str, text: str, usual: Iterable[str] = (), **more: Any) -> Any:
    """An option with a value, some of which are usual; N and X are read as numbers."""
    parser = {"N": whole, "X": real}.get(metavar)
    complete = _among(usual) if usual else None  # without one the shell completes paths
    return typer.Option(metavar=metavar, parser=parser, autocompletion=complete, help=text, **more)


def one_of(words: Iterable[str], text: str, *flags: str, **more: Any) -> Any:
    """An option whose value is one of the words."""
    return typer.Option(*flags, metavar="NAME", autocompletion=_among(words), help=text, **more)


def list_of(words: Iterable[str], text: str, **more: Any) -> Any:
    """An option whose value is a list of some of the words."""
    return typer.Option(metavar="NAME,...", autocompletion=_listed(words), help=text, **more)


def numbers_of(text: str, usual: Iterable[str] = (), **more: Any) -> Any:
    """An option whose value is a list of whole numbers, some of which are usual."""
    return typer.Option(metavar="N,...", autocompletion=_listed(usual), help=text, **more)


def auto_or_number(text: str, *flags: str) -> Any:
    return typer.Option(*flags, metavar="N", autocompletion=_among(["auto"]), help=text)


Results = Annotated[Path, argument("RESULTS", "A folder of results: of one study, or of several.")]
Out = Annotated[Path, option("DIR", "The folder of results.")]
DataDir = Annotated[
    Path | None, option("DIR", "Where the data are, or go.", show_default="$DEGRADE_DATA, else ~/.cache/degrade")
]
ImageSize = Annotated[
    int | None,
    option("N", "Height and width of the images of folder:PATH, or crops of imagenet:PATH.", show_default="32, or 224"),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images of folder:PATH that cannot be decoded.")
]
Device = Annotated[str, one_of(("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda (all GPUs), cuda:1 or mps.")]
Jobs = Annotated[str, auto_or_number("Processes; auto: one a core, or one a GPU.")]
Threads = Annotated[str, auto_or_number("CPU threads of each process; auto: the cores shared out.")]
Pack = Annotated[str, auto_or_number("Runs at a time in a process; auto: on a GPU as many as fit.")]
Compiled = Annotated[str, one_of(("auto", "on", "off"), "on, off, or auto: the long runs.", "--compile")]
Precision = Annotated[
    str | None, one_of(PRECISIONS, f"{', '.join(PRECISIONS)}.", show_default="tf32 on GPUs that have it, else fp32")
]
Formats = Annotated[str, list_of(FORMATS, f"{', '.join(FORMATS)}.")]
