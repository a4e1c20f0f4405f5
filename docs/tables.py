"""What README.md and the pages beside this file take from results/ and from the program: `make tables` renews it.

A page marks its place by `<!-- NAME: written by make tables -->` and `<!-- /NAME -->`. commands.md is written whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from typer.testing import CliRunner

import degrade
from degrade import paper, report, store
from degrade.analysis.verdict import deepest, finished, from_trained, verdicts
from degrade.cli import app
from degrade.config import PROTOCOLS, RunConfig
from degrade.terminal import duration, interval_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
COMMANDS = ROOT / "docs" / "commands.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {COMMANDS})]
PLACE = re.compile(r"<!-- ([a-z0-9-]+): written by make tables -->.*?<!-- /\1 -->", re.DOTALL)
ORDER = (
    *("cifar10-paper", "cifar10-short", "cifar10-demo", "cifar10-grey-demo", "cifar10-half-demo", "shapes-demo"),
)  # what says most goes first
NOT_YET = "not measured yet"


def verdict_table() -> str:
    """What `degrade verdict` says of the reference results: of each block what is said first (`deepest`)."""
    epochs = degrade.load(RESULTS)
    rows = []
    for study in studies():
        if not (study.imported or from_trained(study.shared["init"])):  # what was trained elsewhere is told apart
            rows += [
                (
                    study.name,
                    v.block.replace("-", " minus "),
                    f"{v.deep} v {v.shallow}",
                    v.seeds,
                    f"{100 * v.difference:+.2f}",
                    interval_text(v),
                    v.words,
                )
                for v in deepest(verdicts(epochs[epochs["study"] == study.name]))
            ]
    return table("study | nets | depths | >seeds | >rise | >95 % interval | verdict", rows)


def paper_table() -> str:
    """Training / test error in %: the paper's, of public reproductions, of imported weights, and of this tool.

    Of plain-110 the caption of the paper's Fig. 6 says that its error is higher than 60 %, and no more.
    """
    final = finished(degrade.load(RESULTS))
    rows = []
    for block, depth in ((block, depth) for block in ("plain", "residual") for depth in (20, 32, 44, 56, 110)):
        own = final[(final["block"] == block) & (final["depth"] == depth)]
        theirs = next((p for p in paper.CIFAR10 if (p.block, p.depth) == (block, depth)), None)
        spans = paper.spread(block, depth)
        rows.append(
            (
                f"{block}-{depth}",
                pair(theirs.train_error, theirs.test_error) if theirs else "> 60",
                " / ".join(report.span_text(span) for span in spans) if any(spans) else "-",
                means(own[own["study"] == "a-martyn"]) or "-",
                means(own[own["study"] == "cifar10-paper"]) or NOT_YET,
            )
        )
    heads = ["net", ">He et al.", ">He et al. and 3 reproductions", ">a-martyn's weights, measured here"]
    return table(" | ".join([*heads, ">`degrade`, protocol `paper`"]), rows)


def studies_table() -> str:
    """What is in results/: the command of each study, on what it was measured, and its time by the clock."""
    rows = []
    for study in studies():
        own = ["sh experiments/a-martyn.sh WEIGHTS again"] if study.imported else report.commands(study)
        values = [store.read_json(run.folder / store.ENVIRONMENT) for run in study.runs]
        machines = {f"{v['cores']} cores of {v['cpu']}" if v["device"] == "cpu" else v["device"] for v in values}
        torches = sorted({v["torch"].partition("+")[0] for v in values})
        rows.append(
            (
                f"[{study.name}](results/{study.name})",
                f"{len(study.runs)}{' imported' if study.imported else ''}",
                "<br>".join(f"`{command}`" for command in own),
                f"{'; '.join(sorted(machines))}; torch {', '.join(torches)}",
                duration(seconds) if (seconds := report.wall_time(study)) else "-",
            )
        )
    return table("study | >runs | command | measured on | >wall time", rows)


def protocols_table() -> str:
    """The named protocols, as the code has them."""
    rows = []
    for name, fields in PROTOCOLS.items():
        c = RunConfig(block="plain", depth=20, seed=0, **fields)
        images = ", ".join(
            f"{count:,} {what}" for count, what in ((c.train_images, "training"), (c.test_images, "test")) if count
        )
        rows.append((f"`{name}`", f"{c.steps:,}", c.batch_size, c.lr, c.width, images or "all"))
    return table("protocol | >steps | >batch | >lr | >width | images", rows)


def wall_time(name: str) -> Callable[[], str]:
    return lambda: duration(report.wall_time(store.Study.open(RESULTS / name)))


def commands_page() -> str:
    """What `degrade --help` and each command's `--help` say in 80 columns."""
    runner = CliRunner(env={"COLUMNS": "80"})
    parts = ["# Every command and option\n\nAs `degrade COMMAND --help` says it.\n"]
    for words in [[], *every_command()]:
        said = runner.invoke(app, [*words, "--help"], prog_name="degrade").output.strip()
        parts.append(f"## {' '.join(['degrade', *words])}\n\n```text\n{said}\n```\n")
    return "\n".join(parts)


def every_command(group: Any = None) -> Iterator[list[str]]:
    """The words of each command; those of a group come after the group itself."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        yield [name]
        if hasattr(command, "commands"):
            yield from ([name, *words] for words in every_command(command))


PLACES: dict[str, Callable[[], str]] = {
    "verdict": verdict_table,
    "paper": paper_table,
    "studies": studies_table,
    "protocols": protocols_table,
    "time-of-shapes-demo": wall_time("shapes-demo"),
}


def studies() -> list[store.Study]:
    """Those in results/, what says most first."""
    found, damaged = store.find_studies(RESULTS)
    assert not damaged, damaged
    return sorted(found, key=lambda study: ORDER.index(study.name) if study.name in ORDER else len(ORDER))


def pair(train: float | None, test: float | None) -> str:
    cells = ["-" if error is None else f"{100 * error:.2f}" for error in (train, test)]
    return "-" if set(cells) == {"-"} else " / ".join(cells)


def means(runs: pd.DataFrame) -> str:
    """Of final errors, with the number of seeds where there are several; empty where there is no run."""
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return pair(runs["train_error"].mean(), runs["test_error"].mean()) + seeds if len(runs) else ""


def table(heads: str, rows: Iterable[tuple[object, ...]]) -> str:
    """As Markdown; `>` before a heading aligns its column to the right."""
    columns = heads.split(" | ")
    lines = [[column.lstrip(">") for column in columns], ["---:" if c[0] == ">" else "---" for c in columns]]
    return "\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in [*lines, *rows]) + "\n"


def renewed(text: str) -> str:
    """A page with what is written here put in its places."""

    def write(place: re.Match[str]) -> str:
        written = PLACES[place[1]]()
        block = f"\n{written}\n" if written.startswith("\n") else written
        return f"<!-- {place[1]}: written by make tables -->{block}<!-- /{place[1]} -->"

    return PLACE.sub(write, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text()))
    COMMANDS.write_text(commands_page())
