"""`degrade probe`"""

import re
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from degrade import store, terminal
from degrade.cli.app import (
    Plain,
    app,
    console,
    count,
    machine_of,
    names,
    numbers,
    say,
    say_paths,
    say_table,
    some_of,
    tell,
)
from degrade.cli.options import (
    DEPTHS,
    FORMATS,
    DataDir,
    Device,
    Formats,
    Results,
    auto_or_number,
    list_of,
    numbers_of,
    option,
)
from degrade.config import BLOCKS, PROBES, RunConfig
from degrade.errors import Failure
from degrade.stopping import stopping

if TYPE_CHECKING:
    from degrade.probe import Part


@app.command(cls=Plain)
@stopping("stopped; the same command goes on from the last rows committed")
def probe(
    results: Results = Path("results"),
    probes: Annotated[
        str | None,
        list_of(PROBES, f"{', '.join(PROBES)}.", show_default="all; at init responses, gradients, landscape"),
    ] = None,
    depths: Annotated[str | None, numbers_of("Only these.", DEPTHS, show_default="all")] = None,
    blocks: Annotated[str | None, list_of(BLOCKS, "Only these.", show_default="all")] = None,
    seeds: Annotated[str | None, numbers_of("Only these.", show_default="all")] = None,
    at_init: Annotated[
        bool, typer.Option("--at-init", help="Freshly initialised nets of the same designs, not the trained ones.")
    ] = False,
    images: Annotated[
        int | None,
        option(
            "N",
            "At most so many: test images for lesion, both for bn, else training images.",
            show_default="1000; gradients 512; bn all",
        ),
    ] = None,
    budget: Annotated[
        str, option("TIME", "90s, 10m, 2h: for all landscapes together; sets their points and images.")
    ] = "10m",
    points: Annotated[
        int | None,
        option(
            "N",
            "A side of a landscape, odd; its line has 2 N + 1.",
            show_default="25, or what fits the budget on 100 images",
        ),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Annotated[str, auto_or_number("CPU threads; auto: all cores.")] = "auto",
    formats: Formats = "png,svg,pdf",
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what is there with other images or points; else it is kept.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
) -> int:
    """Look into trained nets: responses, gradients, lesions, loss.

    How much each layer changes its signal (responses), which gradients reach it (gradients), what deleting a block
    costs (lesion), how rough the loss around the net is (landscape), and what is due to BN's statistics (bn).

    Takes the finished runs of every study. The same command again skips what is done. Tables go into probes/ of each
    study, figures into figures/.

    Gradients are of the freshly initialised net (of imported runs, one of the same design), of the last step, and of
    those that sweep --snapshots kept.

    \b
    Example: degrade probe results/ --probes responses,lesion --depths 20,56
    Example: degrade probe results/shapes-demo --at-init --dry-run
    Example: degrade probe results/ --probes landscape --budget 1h
    """
    chosen = some_of(PROBES, names(probes, "--probes"), "--probes")
    wanted = {
        "depth": numbers(depths, "--depths"),
        "block": names(blocks, "--blocks"),
        "seed": numbers(seeds, "--seeds"),
    }
    kinds = some_of(FORMATS, names(formats, "--formats"), "--formats")
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1; got {images}")
    seconds = _seconds(budget)
    studies, damaged = store.find_studies(results)

    from degrade import probe as engine
    from degrade.engine.process import prepare_process
    from degrade.sweep import resolve_device

    wish = engine.Wish(at_init, images, seconds, points)
    parts: list[Part] = []
    for study in studies:
        runs = [r for r in study.runs if all(v is None or getattr(r.config, k) in v for k, v in wanted.items())]
        found, left_out = engine.find_parts(study, runs, chosen, wish)
        parts += found
        damaged += left_out
    if not parts and damaged:
        raise Failure(damaged[0])
    if not parts:
        raise ValueError(f"{results} holds no such run that is done; degrade show {results} tells which there are")
    machine = machine_of(resolve_device(device), [], "1", threads, "1", "off")
    prepare_process(machine.threads, machine.device)

    def image_seconds(config: RunConfig) -> float:
        return engine.image_seconds(config, machine.device)

    parts = engine.with_points(parts, wish, image_seconds)
    kept: list[Part] = []
    if not again:
        parts, kept = engine.keep(parts)
    needed = [0.0 if part.done else part.passes * image_seconds(part.run.config) for part in parts]
    _print_plan(parts, needed, kept)
    if any(needed):
        where = f"{machine.device}, {count(machine.threads, 'thread')}"
        say(f"About {terminal.duration(sum(needed))} on this machine: {where}")
    if dry_run:
        return tell(damaged)
    _measure(parts, needed, data_dir, machine.device)
    return tell(damaged + _draw(parts, kinds))


def _seconds(text: str) -> float:
    """`90s`, `10m` or `2h`."""
    if not (found := re.fullmatch(r"([0-9]{1,6})([smh])", text)) or not int(found[1]):
        raise ValueError(f"--budget must be like 90s, 10m or 2h; got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _print_plan(parts: Sequence["Part"], needed: Sequence[float], kept: Sequence["Part"]) -> None:
    """A line for each probe of each study: how many nets, how many of them are left, on what, and for how long."""
    pairs = sorted(zip(parts, needed, strict=True), key=lambda pair: pair[0].study.name)
    for name, group in groupby(pairs, key=lambda pair: pair[0].study.name):
        table = terminal.make_table("probe", ">nets", ">left", ">images", ">points", ">time")
        for probe, some in groupby(group, key=lambda pair: pair[0].probe):
            mine = list(some)
            left = [seconds for _, seconds in mine if seconds]
            begun = sum(bool(part.begun) for part, _ in mine)
            images = sorted({part.asked["images"] for part, _ in mine})
            points = sorted({part.asked.get("points", 0) for part, _ in mine} - {0})
            table.add_row(
                probe,
                str(len(mine)),
                f"{len(left)}, {begun} begun" if begun else str(len(left)),
                " or ".join(f"{number:,}" for number in images),
                " or ".join(f"{number}x{number}" for number in points),
                terminal.duration(sum(left)) if left else "-",
            )
        say(f"Study {name}: {'fresh initialisations' if parts[0].init else 'trained nets'}")
        say_table(table)
        _print_kept([part for part in kept if part.study.name == name])


def _print_kept(kept: Sequence["Part"]) -> None:
    """What is kept though it was measured with other images or points: a line for each way in which it was."""
    nets: dict[tuple[str, str], list[str]] = {}
    for part in kept:
        images, points = part.asked["images"], part.asked.get("points")
        how = f"{images:,} image{'' if images == 1 else 's'}" + (f" and {points} x {points} points" if points else "")
        nets.setdefault((part.probe, how), []).append(terminal.label(part.run.config))
    for (probe, how), labels in nets.items():
        them = "it" if len(labels) == 1 else "them"
        say(f"{probe} {', '.join(labels)}: measured with {how} already; --again measures {them} anew")


def _measure(parts: Sequence["Part"], needed: Sequence[float], data_dir: Path | None, device: str) -> None:
    """Fetch the data and measure: a bar on a terminal, elsewhere a line a part."""
    from degrade import data
    from degrade.probe import probe_parts

    folder = data_dir or data.default_data_dir()
    for dataset in sorted({part.run.config.dataset for part, seconds in zip(parts, needed, strict=True) if seconds}):
        data.fetch(dataset, folder)
    weights = dict(zip((part.path for part in parts), needed, strict=True))
    done, start = 0.0, time.monotonic()
    with terminal.bar(console) as bar:
        task = bar.add_task("", total=sum(needed))
        for part, rows in probe_parts(parts, folder, device):
            label = f"{part.probe} {terminal.label(part.run.config)}"
            seconds = weights[part.path]
            bar.update(task, description=label, completed=done + seconds * rows / part.rows)
            if rows == part.rows:
                done += seconds
                taken, start = time.monotonic() - start, time.monotonic()
                if not terminal.is_live(console):
                    say(f"{label}: {rows} rows, {terminal.duration(taken)}")


def _draw(parts: Sequence["Part"], kinds: Sequence[str]) -> list[str]:
    """Draw what has been measured of each study, and say where it is; a line for each table that is damaged."""
    from degrade import plots, probe_plots
    from degrade.probe import folder_of

    damaged: list[str] = []
    for study in {part.study.folder: part.study for part in parts}.values():
        for probe in dict.fromkeys(part.probe for part in parts if part.study == study):
            say(str(folder_of(study) / f"{probe}.csv"))
        figures, unreadable = probe_plots.of_study(study)
        damaged += unreadable
        for name, figure in figures.items():
            say_paths(plots.save(figure, study.folder / store.FIGURES, name, kinds))
    return damaged
