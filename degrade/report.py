"""Studies to one page: HTML that needs nothing else, and its Markdown twin. Imports no torch.

Both are made of what is on disk alone, so that the same results give the same bytes. Whatever comes from files is
hostile: the templates escape every value, and pictures are shown as pictures, in which no script runs.
"""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

import degrade
from degrade import paper, plots, store
from degrade.analysis.verdict import (
    CONTRAST,
    Grid,
    Verdict,
    best_verdicts,
    chance_error,
    data_sets_of,
    deepest,
    finished,
    from_trained,
    grid_verdicts,
    grids_of,
    verdicts,
)
from degrade.commit import make_folder, write_file
from degrade.config import (
    BLOCKS,
    GENUINE_IMAGENET,
    PROTOCOLS,
    matches_protocol,
    overridden,
    short_name,
    spelt,
    study_name,
)
from degrade.errors import Failure
from degrade.fidelity import departures
from degrade.store import FINISHED, Run, Study
from degrade.terminal import best_lines, duration, interval_text, percent

if TYPE_CHECKING:
    import pandas as pd

HTML, MARKDOWN = "report.html", "report.md"
FRAMES = 200  # of the film of one study, at most
LARGEST = 1_000_000  # bytes of one picture; the page holds them all
WIDTH = 200  # characters of a value that comes from a file
TIMED = re.compile(r"\d+,\d+,(\d{1,9}\.\d+),([-:T\d]+Z)")  # a row of timing.csv
SLACK = timedelta(seconds=2)  # between two epochs, since timing.csv has whole seconds


class Reading(NamedTuple):
    """How a figure is read, and whose figure it is."""

    title: str
    text: str
    source: str = ""


HE = "He et al. 2015, arXiv:1512.03385"
READINGS = {
    "training-error": Reading(
        "Training error v depth",
        "Where a line rises to the right, deeper nets fit their own training images worse: that is degradation.",
        f"{HE}, section 1 and Fig. 1",
    ),
    "curves": Reading(
        "Error curves",
        "Bold lines are test error, thin dashed ones training error, a colour a depth. In a plain net that degrades "
        "the deeper curve runs above the shallower one from beginning to end; in residual nets it ends below.",
        f"{HE}, Fig. 6",
    ),
    "test-error": Reading(
        "Test error v depth",
        "The same for images never trained on. It follows the training error where nets degrade.",
        f"{HE}, Table 6 and Fig. 6",
    ),
    "gap": Reading(
        "Test error minus training error v depth",
        "If deeper nets were worse because they overfit, the gap would grow with depth while training error fell.",
        f"{HE}, section 1",
    ),
    "responses": Reading(
        "Layer responses",
        "Standard deviation of what each layer gives, after BN and before ReLU and addition, in the order of data. "
        "Those of residual nets are expected to be smaller than those of plain nets, and smaller the deeper the net.",
        f"{HE}, Fig. 7",
    ),
    "gradients": Reading(
        "Gradients layer by layer",
        "Norm of the loss's gradient by each layer's weights. If vanishing gradients were the cause, the first "
        "layers' would be far smaller than the last ones'.",
        f"{HE}, section 4.1",
    ),
    "gradient-correlation": Reading(
        "Correlation of nearby gradients",
        "How alike the gradients of two nearby inputs are. In deep plain nets the correlation is lost at small "
        "distances (the gradients are shattered); skip connections keep it.",
        "Balduzzi et al. 2017, arXiv:1702.08591",
    ),
    "lesion": Reading(
        "Lesions",
        "Test error of trained nets after some of their blocks were deleted. Deep residual nets hardly notice one "
        "block; plain nets fall towards chance.",
        "Veit et al. 2016, arXiv:1605.06431",
    ),
    "landscape": Reading(
        "Loss around the trained weights",
        "Loss along random directions, scaled filter by filter. A wide smooth valley is easy to descend, a rugged one "
        "is not.",
        "Li et al. 2018, arXiv:1712.09913",
    ),
    "bn": Reading(
        "Running statistics of BN",
        "Error with the statistics gathered in training, and with statistics measured anew. Where the two agree, the "
        "errors above are not an artefact of stale statistics.",
        "a control of this tool's own",
    ),
    "ten-crop": Reading(
        "One crop and ten",
        "Test error where the predictions for ten crops of each image are averaged, as the paper's numbers on ImageNet "
        "are, and of the middle alone, as the log has it.",
        f"{HE}, Table 2",
    ),
    "identity": Reading(
        "The identity construction",
        "A deeper net that copies a shallower one and passes its signal on has the same error, so a solution no worse "
        "is there. What training makes of it shows whether it stays there.",
        f"{HE}, section 1",
    ),
}
SIDE_BY_SIDE = (
    "A dot is a seed, a line joins the means of a net, and a ring marks the value with which its mean training error "
    "is lowest. If only a poor choice of this field made the deeper nets worse, each net's best would not get worse "
    "with depth."
)
IN_OTHERS = (
    "A panel a data set: only the directions compare. Where the lines of plain nets rise to the right in all of them, "
    "degradation is no matter of one data set, as far as they are independent: variants of one (in grey, or smaller) "
    "are not."
)
DRAWN = ("training-error", "curves", "test-error", "gap")  # in the page's order


class Table(NamedTuple):
    """A table of text. `>` before a heading aligns its column to the right."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Picture(NamedTuple):
    """One figure: `uri` holds it all, for the page; `link` leads to its file, for Markdown, where there is one."""

    reading: Reading
    alt: str
    uri: str
    link: str | None


@dataclass
class Section:
    """One study, as both templates take it."""

    name: str
    anchor: str
    about: str
    headline: str = "no finished run yet"
    findings: list[tuple[str, str]] = field(default_factory=list)  # (verdict, sentence)
    early: str = ""
    unfinished: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    film: dict[str, Any] | None = None
    comparable: bool = False
    tables: dict[str, Table] = field(default_factory=dict)
    shares: bool = False  # whether it makes the choices that the page lists once, for all studies
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class SideBySide(NamedTuple):
    """Studies that differ in one field, or in the data set, as both templates take them."""

    field: str
    about: str
    picture: Picture
    findings: list[str]
    table: Table | None


def write_report(studies: Sequence[Study], damaged: Sequence[str], out: Path) -> list[Path]:
    """Write `out`/report.html and `out`/report.md; nothing else, and nothing elsewhere.

    Args:
        studies, damaged: as `store.find_studies` gives them.
        out: a folder; it is made if need be.

    Returns:
        The two paths.

    Raises:
        ValueError: there is no epoch in any study, and no construction.
        OSError: a file cannot be written; an older one stays as it was.
    """
    epochs = store.to_frame(studies)
    if epochs.empty and not any(map(_construction, studies)):
        raise ValueError("there is no epoch to report yet; degrade show tells how far the runs are")
    sections = [_section(study, epochs, f"study-{i}", out) for i, study in enumerate(studies, start=1)]
    shared = _take_shared(sections)
    data_sets = [_data_sets(name, grid, studies, epochs, out) for name, grid in data_sets_of(studies).items()]
    grids = [_side_by_side(name, grid, studies, epochs, out) for name, grid in grids_of(studies).items()]
    ended = max((end for study in studies for run in study.runs for _, end in _timing(run)), default=None)
    values = {
        "version": degrade.__version__,
        "date": f"{ended:%Y-%m-%d}" if ended else "",
        "sections": sections,
        "grids": [*data_sets, *(grid for grid in grids if grid)],
        "shared": shared,
        "damaged": [_plain(line, 1000) for line in damaged],
        "chapters": CHAPTERS,
    }
    make_folder(out)
    paths = []
    for path, environment in ((out / HTML, _html()), (out / MARKDOWN, _markdown())):
        text = environment.get_template(f"{path.name}.jinja").render(values)
        write_file(path, text.encode(errors="replace"))  # a file's name may hold bytes that are no text
        paths.append(path)
    return paths


def _html() -> jinja2.Environment:
    """Every value escaped; the page's one script is allowed by its hash, and no other can run."""
    environment = _environment()
    script = environment.get_template("report.js").render()
    environment.globals["hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment


def _markdown() -> jinja2.Environment:
    """Every value escaped, for Markdown in place of HTML, unless it has passed the filter `raw`."""
    environment = _environment()
    environment.finalize = lambda value: value if isinstance(value, Markup) else Markup(escaped(value))  # noqa: S704
    environment.filters["raw"] = Markup
    return environment


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("degrade")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def escaped(value: Any) -> str:
    """One line of text as Markdown, where it means nothing but itself."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


CHOICE = ("what", "published", "here", "kind")
CHAPTERS = ("Verdict", "Figures", "Numbers", "Fidelity", "Provenance")


def _section(study: Study, epochs: "pd.DataFrame", anchor: str, out: Path) -> Section:
    rows = epochs if epochs.empty else epochs[epochs["study"] == study.name]
    final = rows if rows.empty else finished(rows)
    section = Section(_plain(study.name), anchor, _about(study))
    section.comparable = matches_protocol(study.shared, "paper") and not study.imported
    section.unfinished = [f"{run.folder.name}: {run.status}" for run in study.runs if run.status not in FINISHED]
    found = verdicts(rows) if len(final) else []
    if len(final):
        section.headline = headline(found) or "nothing to compare: two finished depths of one block are needed"
        section.findings = [(v.verdict, in_words(v)) for v in deepest(found)]
        section.tables["numbers"] = _numbers(final)
    if went_on := from_trained(study.shared["init"]):
        section.headline = "begun from trained weights"
    if (constructed := _construction(study)) and constructed["finding"]:
        section.headline = _plain(constructed["finding"].partition(". ")[0], 1_000)
        section.findings.insert(0, ("identity", _plain(constructed["finding"], 1_000)))
    if found:
        section.tables["verdict"] = _verdict_table(found)
    if study.shared["steps"] < paper.STEPS and not went_on:
        of = f" of the paper's {paper.STEPS:,}" if study.shared["dataset"] == "cifar10" else ""
        section.early = f"This is early in training: {study.shared['steps']:,}{of} steps."
    if len(rows):
        section.pictures = _pictures(study, rows, final, out)
        section.film = film(rows)
    if not went_on and (literature := _literature(study)):
        section.tables["literature"] = literature
    if section.comparable and len(final) and (among := among_the_published(final)):
        section.tables["among"] = among
    imported, problems = _imported(study)
    section.tables["departures"] = Table(
        "Where it departs from the published protocol, and what it does where that leaves a choice open",
        CHOICE,
        [tuple(_plain(text) for text in departure) for departure in departures(study.shared, imported)],
    )
    section.tables["environment"], notes = _environments(study)
    section.notes = problems + notes
    section.tables["runs"] = _runs(study)
    section.commands = [_plain(command, 10_000) for command in commands(study)]
    return section


def _take_shared(sections: Sequence[Section]) -> Table | None:
    """What all studies trained here do alike, taken out of their tables; of imported runs no choices are known."""
    making = [section for section in sections if any(row[-1] == "assumed" for row in _departures(section))]
    if len(making) < 2:
        return None
    first, *others = (_departures(section) for section in making)
    rows = [row for row in first if row[-1] == "assumed" and all(row in other for other in others)]
    if not rows:
        return None
    for section in making:
        own = [row for row in _departures(section) if row not in rows]
        section.tables["departures"] = section.tables["departures"]._replace(rows=own)
        section.shares = True
    return Table("What all studies trained here do alike where the paper leaves a choice open", CHOICE, rows)


def _departures(section: Section) -> Sequence[tuple[str, ...]]:
    return section.tables["departures"].rows


def _construction(study: Study) -> dict[str, Any] | None:
    """What `degrade identity` has stored of the study; None where it has not been there, or the file is damaged."""
    try:
        return store.read_identity(study.folder)
    except (Failure, OSError):
        return None


def _about(study: Study) -> str:
    """What was run, in two sentences."""
    shared, runs = study.shared, study.runs
    seeds = Counter((run.config.block, run.config.depth) for run in runs).values()
    if not seeds and from_trained(shared["init"]):
        return "A construction that no run went on from."
    if not seeds:
        return "No run that can be read."
    many = str(max(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    count = f"{len(runs)} {'imported ' if study.imported else ''}run{'s' if len(runs) > 1 else ''}"
    images = "all" if shared["train_images"] is None else f"{shared['train_images']:,}"
    return (
        f"{count} on {short_name(shared['dataset'])}: {_nets(study)}, {many} seed{'s' if many != '1' else ''} each. "
        f"Protocol {_plain(study.protocol)}: {shared['steps']:,} steps of batch {shared['batch_size']}, "
        f"learning rate {shared['lr']:g}, width {shared['width']}, {images} training images."
    )


def _nets(study: Study) -> str:
    """`plain and residual nets of 20 and 56 layers`"""
    blocks = [block for block in BLOCKS if any(run.config.block == block for run in study.runs)]
    depths = [str(depth) for depth in sorted({run.config.depth for run in study.runs})]
    return f"{_and(blocks)} nets of {_and(depths)} layers"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def headline(found: Sequence[Verdict]) -> str:
    """Of each block what `deepest` picks: `plain nets degrade (56 v 20 layers: +16.73); ...`"""
    words = {"degrades": "degrade", "does not degrade": "do not degrade", "undecided": "undecided"}
    parts = []
    for v in deepest(found):
        if v.block == CONTRAST:
            continue
        said = f": {words[v.verdict]}" if v.verdict == "undecided" else f" {words[v.verdict]}"
        parts.append(f"{v.block} nets{said} ({v.deep} v {v.shallow} layers: {100 * v.difference:+.2f} points)")
    return "; ".join(parts)


def in_words(v: Verdict) -> str:
    """A verdict and its interval as a sentence."""
    points = f"{abs(100 * v.difference):.2f} percentage points"
    if v.block == CONTRAST:
        more = "more" if v.difference >= 0 else "less"
        what = f"the training error of plain nets rises by {points} {more} than that of residual nets"
    else:
        what = f"the training error of {v.block} nets {'rises' if v.difference >= 0 else 'falls'} by {points}"
    if v.low is None:
        why = "with one seed there is no interval" if v.seeds < 2 else "all runs of the shallower net diverged"
        return f"From {v.shallow} to {v.deep} layers {what}; {why}, so it stays undecided."
    if v.block == CONTRAST:
        then = {
            "degrades": "the whole interval lies above 0, so plain nets degrade more",
            "does not degrade": "it ends at most half a point above 0, so plain nets degrade no more",
        }
    else:
        then = {
            "degrades": "the whole interval lies above 0, so the deeper nets degrade",
            "does not degrade": "it ends at most half a point above 0, so the deeper nets do not degrade",
        }
    decided = then.get(v.verdict, "it holds both no rise and one of more than half a point, so it stays undecided")
    interval = f"95 % interval {interval_text(v)}, at least {v.seeds} seeds each"
    return f"From {v.shallow} to {v.deep} layers {what} ({interval}): {decided}."


def _verdict_table(found: Sequence[Verdict], field: str = "") -> Table:
    """With a column for the values of a grid's `field`, where there is one."""
    rows = [
        (
            v.block.replace("-", " minus "),
            f"{v.deep} v {v.shallow}",
            *([spelt(v.value) if v.best is None else "best"] if field else []),
            str(v.seeds),
            f"{100 * v.difference:+.2f}",
            interval_text(v),
            v.words,
        )
        for v in found
    ]
    columns = ("nets", ">depths", *([f">{field}"] if field else []), ">seeds", ">rise", ">95 % interval", "verdict")
    return Table("Final training error, deeper minus shallower, in percentage points", columns, rows)


def _side_by_side(
    name: str, grid: Grid, studies: Sequence[Study], epochs: "pd.DataFrame", out: Path
) -> SideBySide | None:
    """A grid: its figure, whose file is called `name`, and its verdicts; None where fewer than two studies have any."""
    figure = plots.draw_grid(epochs, grid)
    if figure is None:
        return None
    best = best_verdicts(epochs, grid)
    found = sorted([*grid_verdicts(epochs, grid), *best], key=Verdict.place)
    lines = best_lines(best, grid)
    title = f"Final errors v {grid.field}"
    picture = Picture(
        Reading(title, SIDE_BY_SIDE, "a control of this tool's own"),
        ". ".join([f"{title}, of {len(grid.values)} studies", *lines]),
        _uri(_svg(figure, f"{name} {' '.join(grid.values)}"), "svg+xml"),
        _link(_of_all(grid, studies) / f"{name}.png", out),
    )
    values = _and([f"{_plain(study)} ({spelt(value)})" for study, value in grid.values.items()])
    return SideBySide(
        grid.field,
        f"Studies that differ in {grid.field} alone: {values}.",
        picture,
        [f"{line if line.startswith(grid.field) else line[0].upper() + line[1:]}." for line in lines],
        _verdict_table(found, grid.field) if found else None,
    )


def _data_sets(name: str, grid: Grid, studies: Sequence[Study], epochs: "pd.DataFrame", out: Path) -> SideBySide:
    """Studies that are alike but for the data set: their figure, whose file is called `name`, and their verdicts."""
    found = grid_verdicts(epochs, grid)
    final = finished(epochs)
    title = "Training error v depth in each data set"
    said = [
        f"{dataset}: {_said(final[final['study'] == study], 'training-error')}"
        for study, dataset in grid.values.items()
    ]
    picture = Picture(
        Reading(title, IN_OTHERS, f"{HE}, section 1"),
        ". ".join([title, *said]),
        _uri(_svg(plots.draw_data_sets(epochs, grid), f"{name} {' '.join(grid.values)}"), "svg+xml"),
        _link(_of_all(grid, studies) / f"{name}.png", out),
    )
    values = _and([f"{_plain(study)} ({dataset})" for study, dataset in grid.values.items()])
    lines = {dataset: headline([v for v in found if v.study == study]) for study, dataset in grid.values.items()}
    return SideBySide(
        "data set",
        f"Studies that are alike but for the data set and what goes with it: {values}.",
        picture,
        [f"{dataset}: {line}." for dataset, line in lines.items() if line],
        _verdict_table(found, "data set") if found else None,
    )


def _of_all(grid: Grid, studies: Sequence[Study]) -> Path:
    """Where `degrade plot` puts the figures of several studies."""
    first = next(study for study in studies if study.name in grid.values)
    return first.folder.parents[first.name.count("/")] / store.FIGURES


def _numbers(final: "pd.DataFrame") -> Table:
    """Final errors over seeds; beside the paper's, on CIFAR-10."""
    published = {(p.block, p.depth): p for p in paper.CIFAR10}
    beside = set(final["dataset"]) == {"cifar10"} and not from_trained(final["init"].iloc[0])
    rows = []
    for block, depth in _in_order(final):
        runs = final[(final["block"] == block) & (final["depth"] == depth)]
        lost = int((runs["status"] == "diverged").sum())
        row = [f"{block}-{depth}", f"{len(runs)}" + (f" ({lost} diverged, at chance)" if lost else "")]
        row += [spread(runs[measure].dropna().tolist()) for measure in ("train_error", "test_error")]
        if beside:
            known = published.get((block, depth))
            row += [percent(known.train_error), percent(known.test_error)] if known else ["-", "-"]
        rows.append(tuple(row))
    theirs = (">train, He et al.", ">test, He et al.") if beside else ()
    columns = ("net", ">seeds", ">training error", ">test error", *theirs)
    return Table("Final errors, mean ± standard deviation over seeds", columns, rows)


def spread(errors: Sequence[float]) -> str:
    """`67.12 ± 0.43 %`: mean and sample standard deviation; the mean alone of one."""
    if not errors:
        return "-"
    mean = 100 * statistics.fmean(errors)
    return f"{mean:.2f} ± {100 * statistics.stdev(errors):.2f} %" if len(errors) > 1 else f"{mean:.2f} %"


def _in_order(rows: "pd.DataFrame") -> list[tuple[str, int]]:
    """The nets, by block and depth."""
    nets = {(str(block), int(depth)) for block, depth in zip(rows["block"], rows["depth"], strict=True)}
    return sorted(nets, key=lambda net: (BLOCKS.index(net[0]), net[1]))


def _literature(study: Study) -> Table | None:
    """Training / test error of the study's nets, as others published them."""
    nets = {(run.config.block, run.config.depth) for run in study.runs}
    dataset, on = str(study.shared["dataset"]), "CIFAR-10"
    every: tuple[paper.Published, ...] = (*paper.CIFAR10, *paper.REPRODUCTIONS) if dataset == "cifar10" else ()
    if GENUINE_IMAGENET.fullmatch(dataset):
        every, on = paper.IMAGENET, "ImageNet, of 10 crops"
    numbers = [p for p in every if (p.block, p.depth) in nets]
    columns: dict[str, dict[tuple[str, int], str]] = {}
    for p in numbers:
        cell = f"{_bare(p.train_error)} / {_bare(p.test_error)}"
        source = "He et al." if p in (*paper.CIFAR10, *paper.IMAGENET) else p.source.split("/")[1]
        columns.setdefault(source, {})[p.block, p.depth] = cell
    listed = sorted({(p.block, p.depth) for p in numbers}, key=lambda net: (BLOCKS.index(net[0]), net[1]))
    rows = [(f"{b}-{d}", *(cells.get((b, d), "") for cells in columns.values())) for b, d in listed]
    caption = f"Published on {on}: training / test error in %"
    return Table(caption, ("net", *(f">{name}" for name in columns)), rows) if rows else None


def among_the_published(final: "pd.DataFrame") -> Table | None:
    """Mean final errors beside the lowest and highest that were published of each net; None where none was.

    Args:
        final: finished runs of the paper's protocol, as `verdict.finished` gives them.
    """
    rows = []
    for block, depth in _in_order(final):
        runs = final[(final["block"] == block) & (final["depth"] == depth)]
        spans = paper.spread(block, depth)
        means = [float(runs[measure].mean()) for measure in ("train_error", "test_error")]
        if any(spans):
            pairs = list(zip(means, spans, strict=True))
            rows.append(
                (
                    f"{block}-{depth}",
                    f"{len(runs)}",
                    " / ".join(_bare(mean) for mean in means),
                    " / ".join(span_text(span) for span in spans),
                    " / ".join(_place(mean, span) for mean, span in pairs),
                )
            )
    caption = "Beside the lowest and highest published: training / test error in %"
    return Table(caption, ("net", ">seeds", ">here", ">published", ">here is"), rows) if rows else None


def span_text(span: tuple[float, float] | None) -> str:
    """`6.97 to 9.18`, in percent."""
    return "-" if span is None else " to ".join(dict.fromkeys(_bare(error) for error in span))


def _place(error: float, span: tuple[float, float] | None) -> str:
    """Where an error lies: `among them`, `0.12 above`, in points of what a table shows."""
    if span is None:
        return "-"
    here, low, high = (round(100 * value, 2) for value in (error, *span))
    if low <= here <= high:
        return "among them"
    return f"{low - here:.2f} below" if here < low else f"{here - high:.2f} above"


def _bare(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f}"


def _pictures(study: Study, rows: "pd.DataFrame", final: "pd.DataFrame", out: Path) -> list[Picture]:
    """The figures drawn from the logs, then those that lie in the study's folder."""
    drawn = plots.figures(rows)
    pictures = []
    for name in DRAWN:
        if name in drawn:
            said = _said(final, name)
            alt = f"{READINGS[name].title}, {_nets(study)}. {said}".strip()
            uri = _uri(_svg(drawn[name], f"{study.name} {name}"), "svg+xml")
            pictures.append(Picture(READINGS[name], alt, uri, _link(study.folder / "figures" / f"{name}.png", out)))
    folder = study.folder / "figures"
    for name in sorted({path.stem for path in folder.glob("*") if path.suffix in (".svg", ".png")} - set(DRAWN)):
        files = {kind: _read_picture(folder / f"{name}.{kind}") for kind in ("png", "svg")}
        held = [(len(data), kind, data) for kind, data in files.items() if data]
        if not held:
            continue
        _, kind, data = min(held)
        reading = _reading(name)
        alt = f"{reading.title}, {_nets(study)}"
        uri = _uri(data, {"svg": "svg+xml"}.get(kind, kind))
        pictures.append(Picture(reading, alt, uri, _link(folder / f"{name}.{'png' if files['png'] else 'svg'}", out)))
    return pictures


def _reading(name: str) -> Reading:
    """Of `responses`, or of `responses-at-init`, which is the same of something else."""
    stem, _, rest = name.partition("-")
    if name in READINGS:
        return READINGS[name]
    if stem in READINGS:
        return READINGS[stem]._replace(title=f"{READINGS[stem].title} ({_plain(rest.replace('-', ' '))})")
    return Reading(_plain(name), "A figure that lies in the study's folder.")


def _said(final: "pd.DataFrame", name: str) -> str:
    """What a figure v depth shows, for those who cannot see it."""
    measure = {"training-error": "train_error", "test-error": "test_error"}.get(name)
    if measure is None:
        return ""
    means = final.groupby(["block", "depth"])[measure].mean()
    known = [(net, float(means[net])) for net in _in_order(final) if means[net] == means[net]]
    return "; ".join(f"{block} {depth} layers {percent(error)}" for (block, depth), error in known)


def _svg(figure: Figure, salt: str) -> bytes:
    """The figure with its text as outlines: the same everywhere, whatever fonts there are."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _read_picture(path: Path) -> bytes:
    """Its bytes; none where there is no such file, or it is too large for the page."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST else b""
    except OSError:
        return b""


def _link(path: Path, out: Path) -> str | None:
    """From the Markdown to the file, if it is there."""
    return quote(os.fsencode(os.path.relpath(path.resolve(), out.resolve()))) if path.is_file() else None


def film(rows: "pd.DataFrame") -> dict[str, Any] | None:
    """Training error v depth, frame by frame, for the page's script; None where there are no two frames.

    None either of runs that began from trained weights. Finished runs only, or all of them while none is. A frame is
    an epoch that all of these have; a diverged run stays at chance from its last epoch on. At most 200 frames, thinned
    evenly, with the first and the last.

    Args:
        rows: of one study, as `store.load` gives them.

    Returns:
        steps, epochs: of each frame. nets: block, depth, and the error of each seed in each frame, (seeds, frames).
        chance: the error of guessing; last: the step at which training ends.
    """
    if from_trained(rows["init"].iloc[0]):
        return None
    ended = rows[rows["status"].isin(FINISHED)]
    chosen = ended if len(ended) else rows
    table = chosen.pivot(index="step", columns="id", values="train_error").sort_index()
    chance = chance_error(str(rows["dataset"].iloc[0]))
    for run, own in chosen[chosen["status"] == "diverged"].groupby("id"):
        table.loc[table.index >= own["step"].max(), run] = chance
    table = table.dropna()
    if len(table) < 2:
        return None
    count = min(FRAMES, len(table))
    table = table.iloc[[i * (len(table) - 1) // (count - 1) for i in range(count)]]
    epochs = chosen.groupby("step")["epoch"].max()
    nets = []
    for block, depth in _in_order(chosen):
        runs = sorted(set(chosen.loc[(chosen["block"] == block) & (chosen["depth"] == depth), "id"]))
        errors = [[round(float(error), 5) for error in table[run]] for run in runs]
        nets.append({"block": block, "depth": depth, "errors": errors})
    return {
        "steps": [int(step) for step in table.index],
        "epochs": [int(epochs[step]) for step in table.index],
        "nets": nets,
        "chance": chance,
        "last": int(rows["steps"].iloc[0]),
    }


def _imported(study: Study) -> tuple[dict[str, Any] | None, list[str]]:
    """What the study's imported runs say of themselves, if they were imported; and what cannot be read."""
    lines: list[Any] = []
    problems = []
    for run in study.runs:
        try:
            own = (run.imported or {}).get("departures")
        except (Failure, OSError) as error:
            problems.append(_plain(error, 1000))
            continue
        lines += [line for line in own if line not in lines] if isinstance(own, list) else []
    return ({"departures": lines} if study.imported else None), problems


def _environments(study: Study) -> tuple[Table, list[str]]:
    """Versions and hardware, each value with its number of runs; and a line for each run that is not of one piece."""
    found: dict[str, Counter[str]] = {}
    notes = []
    for run in study.runs:
        try:
            values = store.read_json(run.folder / store.ENVIRONMENT)
        except FileNotFoundError:
            continue
        except (Failure, OSError) as error:
            notes.append(_plain(error, 1000))
            continue
        changes = values.pop("changes", [])
        for name, value in values.items():
            found.setdefault(_plain(name), Counter())[_plain(value)] += 1
        for change in changes if isinstance(changes, list) else []:
            if isinstance(change, dict):
                told = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in change.items() if k != "step")
                notes.append(f"{run.folder.name} went on from step {_plain(change.get('step'))} with {told}")
    rows = [(name, value, str(count)) for name, values in found.items() for value, count in sorted(values.items())]
    rows += _times(study)
    return Table("How it was made", ("what", "value", ">runs"), rows), notes


def _times(study: Study) -> list[tuple[str, str, str]]:
    """When the runs were trained, for how long each, and for how long in all, whatever ran side by side."""
    timings = [timing for run in study.runs if (timing := _timing(run))]
    if not timings:
        return []
    count = str(len(timings))
    days = dict.fromkeys(f"{edge(end for own in timings for _, end in own):%Y-%m-%d}" for edge in (min, max))
    taken = [sum((end - start).total_seconds() for start, end in own) for own in timings]
    each = f"{duration(min(taken))} to {duration(max(taken))} a run, {duration(sum(taken))} summed over runs"
    return [
        ("trained on (UTC)", " to ".join(days), count),
        ("training time", each if len(taken) > 1 else duration(taken[0]), count),
        ("wall time", duration(wall_time(study)), count),
    ]


def wall_time(study: Study) -> float:
    """Seconds during which at least one run of the study was trained: start-up and evaluation count, breaks do not."""
    spans = sorted(span for run in study.runs for span in _timing(run))
    seconds, until = 0.0, datetime.min.replace(tzinfo=UTC)
    for start, end in spans:
        start = until if until < start <= until + SLACK else start
        seconds += max((end - max(start, until)).total_seconds(), 0)
        until = max(until, end)
    return seconds


def _timing(run: Run) -> list[tuple[datetime, datetime]]:
    """When each epoch began and ended; what is damaged of timing.csv counts for nothing."""
    try:
        lines = (run.folder / store.TIMING).read_text(errors="replace").splitlines()
    except OSError:
        return []
    spans = []
    for match in filter(None, map(TIMED.fullmatch, lines)):
        with contextlib.suppress(ValueError, OverflowError):  # a day that there is not
            end = datetime.fromisoformat(match[2])
            spans.append((end - timedelta(seconds=float(match[1])), end))
    return spans


def _runs(study: Study) -> Table:
    records = [run.record() for run in study.runs]
    rows = [
        (
            str(row["id"]),
            str(row["status"]),
            f"{row['step']:,}",
            *("-" if (e := row[name]) is None or e != e else percent(e) for name in ("train_error", "test_error")),
        )
        for row in records
    ]
    return Table("Every run", ("run", "status", ">step", ">training error", ">test error"), rows)


def commands(study: Study) -> list[str]:
    """The commands that redo the study, where results are in results/; none of imported runs."""
    shared = study.shared
    if from_trained(shared["init"]):
        record = _construction(study)
        run, source = shared["init"].split(":")[1], record["source"]["study"] if record else "STUDY"
        depth = record["deep"] if record else max((run.config.depth for run in study.runs), default="DEPTH")
        trained = ["--steps", str(shared["steps"]), "--lr", str(shared["lr"])] if study.runs else []
        own = ["--study", study.folder.resolve().name]
        return [shlex.join(["degrade", "identity", f"results/{source}/{run}", "--depth", str(depth), *trained, *own])]
    if study.imported:
        return []
    fields = {name: value for name, value in shared.items() if name != "dataset"}
    protocol, dataset = study.protocol, str(shared["dataset"])
    if protocol not in PROTOCOLS or None in overridden(protocol, fields, dataset).values():  # no flag says "all"
        protocol = "paper"
    changed = overridden(protocol, fields, dataset) | {"precision": shared["precision"]}
    name = study.folder.resolve().name
    common = ["--dataset", dataset, "--protocol", protocol]
    for key, value in changed.items():
        common += [f"--{key.replace('_', '-')}", _flag(value)]
    if name != study_name(dataset, protocol, overridden(protocol, fields, dataset)):
        common += ["--study", name]
    return [
        shlex.join(["degrade", "sweep", "--depths", depths, "--blocks", blocks, "--seeds", seeds, *common])
        for depths, blocks, seeds in _grids(study.runs)
    ]


def _flag(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _grids(runs: Iterable[Run]) -> list[tuple[str, str, str]]:
    """(depths, blocks, seeds) whose products are the runs, as few as come of joining alike ones."""
    nets = _joined((run.config.depth, run.config.block, run.config.seed) for run in runs)
    lines = _joined((block, seeds, depth) for (depth, block), seeds in nets.items())
    grids = _joined((seeds, depths, block) for (block, seeds), depths in lines.items())
    return [(_flag(depths), _flag(blocks), _flag(seeds)) for (seeds, depths), blocks in grids.items()]


def _joined(cells: Iterable[tuple[Any, Any, Any]]) -> dict[tuple[Any, Any], tuple[Any, ...]]:
    """The sorted last values of the cells that agree in the other two."""
    groups = itertools.groupby(sorted(set(cells)), key=lambda cell: cell[:2])
    return {key: tuple(cell[2] for cell in group) for key, group in groups}


def _plain(value: Any, width: int = WIDTH) -> str:
    """What a file says, as one line of printable text that is not endless."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else json.dumps(value)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else text[: width - 1] + "…"
