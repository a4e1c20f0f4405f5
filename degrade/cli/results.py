"""What reads results: `degrade show`, `check`, `plot` and `verdict`."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from degrade import paper, store, terminal
from degrade.cli.app import (
    Plain,
    app,
    construction_of,
    count,
    epochs_of,
    leave,
    names,
    say,
    say_errors,
    say_paths,
    say_table,
    some_of,
    tell,
)
from degrade.cli.options import FORMATS, Formats, Results, option

if TYPE_CHECKING:
    from degrade.analysis.verdict import Verdict

FROM_TRAINED = "begun from trained weights: see its identity.json"


@app.command(cls=Plain)
def show(
    results: Results = Path("results"),
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row a run; errors are fractions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects, likewise.")] = False,
) -> int:
    """Show every run: its status, how far it is, its errors.

    A run is done, running, interrupted, failed, diverged or missing: read off its files and its lock. Errors are those
    of its last row, over the whole training set and the whole test set. Damage further up in a log is told by check,
    and by whatever reads whole logs.

    \b
    Example: degrade show results/
    Example: degrade show results/shapes-demo --csv > runs.csv
    """
    if as_json and as_csv:
        raise ValueError("--csv and --json exclude each other")
    studies, damaged = store.find_studies(results, glance=True)
    if as_json or as_csv:
        records = [run.record() for study in studies for run in study.runs]
        if as_json:
            print(json.dumps(records, indent=2))
        else:
            writer = csv.DictWriter(sys.stdout, records[0] if records else ["id"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
    else:
        for study in studies:
            say(f"{study.name}: {study.shared['dataset']}, protocol {study.protocol}")
            say_table(terminal.runs_table(study.runs))
            say_errors(study.runs)
    return tell(damaged)


@app.command(cls=Plain)
def check(
    results: Results = Path("results"),
    repair: Annotated[bool, typer.Option("--repair", help="Write anew what can be derived from other files.")] = False,
) -> None:
    """Verify every file of every run, and say what is wrong.

    Configurations, checkpoints, logs, weights, what was imported, constructed and probed. The exit code is 1 where
    something is wrong.

    \b
    Example: degrade check results/
    Example: degrade check results/ --repair
    """
    from degrade.check import check as checks

    findings = []
    for checked in checks(results, repair=repair):
        states = ", ".join(f"{count} {status}" for status, count in sorted(checked.statuses.items())) or "none"
        runs = f"{count(checked.statuses.total(), 'run')} ({states})"
        say(f"{checked.folder}: {runs}{'' if checked.findings else ', nothing wrong'}")
        if checked.alone:
            say(f"  {count(checked.alone, 'log')} with no checkpoint to compare with")
        for path, problem, remedy, mend in checked.findings:
            say(str(path))
            say(f"  {problem}" + (f"; {'' if repair else 'can be '}{remedy}" if mend else ""))
        findings += checked.findings
    mendable = sum(bool(finding.mend) for finding in findings)
    lost = len(findings) - mendable
    if left := lost if repair else len(findings):
        mends = f"; --repair mends {mendable}" if mendable and not repair else ""
        advice = f"; {'otherwise ' if mends else ''}restore the file, or delete it and sweep again" if lost else ""
        leave(f"{count(left, 'problem')}{mends}{advice}", 1)


@app.command(cls=Plain)
def plot(
    results: Results = Path("results"),
    out: Annotated[
        Path | None, option("DIR", "A folder for the figures.", show_default="figures/ in each study")
    ] = None,
    formats: Formats = "png,svg,pdf",
) -> int:
    """Draw each study: training error v depth, curves, the gap.

    Training error v depth, the error curves, test error v depth, the gap between the two; and what was probed. Studies
    that differ in one field alone, as sweep --grid makes them, are drawn side by side too, in figures/ of the results;
    so is the training error in several data sets, of studies that are alike otherwise.

    \b
    Example: degrade plot results/
    Example: degrade plot results/shapes-demo --out slides/ --formats png
    """
    kinds = some_of(FORMATS, names(formats, "--formats"), "--formats")
    studies, damaged = store.find_studies(results)
    epochs = epochs_of(results, studies, damaged)

    from degrade import plots, probe_plots
    from degrade.analysis.verdict import data_sets_of, grids_of

    for name, rows in epochs.groupby("study", sort=True):
        study = next(study for study in studies if study.name == name)
        folder = out / name if out else study.folder / store.FIGURES
        probed, unreadable = probe_plots.of_study(study)
        damaged += unreadable
        for title, figure in (plots.figures(rows) | _identity(study, damaged) | probed).items():
            say_paths(plots.save(figure, folder, title, kinds))
    for name, grid in grids_of(studies).items():
        if side_by_side := plots.draw_grid(epochs, grid):
            say_paths(plots.save(side_by_side, out or results / store.FIGURES, name, kinds))
    for name, grid in data_sets_of(studies).items():
        say_paths(plots.save(plots.draw_data_sets(epochs, grid), out or results / store.FIGURES, name, kinds))
    return tell(damaged)


def _identity(study: store.Study, damaged: list[str]) -> dict[str, Any]:
    """The figure of a study that goes on from an identity construction; none of another."""
    from degrade import plots

    record = construction_of(study, damaged)
    if not record:
        return {}
    logs = {run.config.depth: run.epochs for run in study.runs}
    continued, control = (logs.get(record[depth], []) for depth in ("deep", "shallow"))
    if not continued:
        return {}
    return {"identity": plots.draw_identity(record, continued, control, study.shared["dataset"])}


@app.command(cls=Plain)
def verdict(
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
) -> int:
    """Say whether training error rises with depth, per block.

    Each deeper net is compared with the shallowest of its block: final training errors, with Welch's 95 % interval over
    seeds. It degrades if its whole interval lies above 0, and does not degrade if it ends at most half a point above;
    otherwise, and with one seed, it is undecided.

    Studies that differ in one field alone are shown side by side, and each depth with the value that is best for it.
    Of runs that began from trained weights it is said what degrade identity has found.

    \b
    Example: degrade verdict results/
    Example: degrade verdict results/cifar10-demo --json
    """
    studies, damaged = store.find_studies(results)

    from degrade.analysis.verdict import best_verdicts, from_trained, grid_verdicts, grids_of, verdicts

    constructed = [study for study in studies if from_trained(study.shared["init"])]
    epochs = store.to_frame(studies) if constructed else epochs_of(results, studies, damaged)
    grids = [(grid, grid_verdicts(epochs, grid), best_verdicts(epochs, grid)) for grid in grids_of(studies).values()]
    side_by_side = {name for grid, _, _ in grids for name in grid.values}
    alone = [v for v in verdicts(epochs) if v.study not in side_by_side]
    if as_json:
        found = [*alone, *(v for _, each, best in grids for v in (*each, *best))]
        print(json.dumps([v.as_dict() for v in found], indent=2, allow_nan=False))
        return tell(damaged)
    for study in studies:
        if study in constructed:
            say(f"{study.name}: {construction_of(study, damaged).get('finding') or FROM_TRAINED}")
        elif study.name not in side_by_side:
            mine = [v for v in alone if v.study == study.name]
            _say_verdicts(study.name, mine, terminal.verdict_table(mine), [study])
    for grid, each, best in grids:
        mine = [*each, *best]
        members = [study for study in studies if study.name in grid.values]
        _say_verdicts(f"{grid.field} in {', '.join(grid.values)}", mine, terminal.grid_table(mine, grid), members)
        for line in terminal.best_lines(best, grid):
            say(line)
    return tell(damaged)


def _say_verdicts(title: str, found: "Sequence[Verdict]", table: Table, studies: Sequence[store.Study]) -> None:
    """The table of one study's comparisons, or of one grid's, and what there is to know about their runs."""
    say(f"{title}: final training error, deeper minus shallower, in percentage points")
    if found:
        say_table(table)
    else:
        say("nothing to compare: two finished depths of one block are needed")
    if any(v.early for v in found):
        of = f" of the paper's {paper.STEPS:,}" if studies[0].shared["dataset"] == "cifar10" else ""
        lengths = dict.fromkeys((min(v.steps for v in found), max(v.steps for v in found)))
        say(f"early in training: {' to '.join(f'{steps:,}' for steps in lengths)}{of} steps")
    if lost := sorted({run for v in found for run in v.diverged}):
        say(f"diverged, counted at chance: {', '.join(lost)}")
    for run in (run for study in studies for run in study.runs):
        if run.status not in store.FINISHED:
            say(f"left out: {run.folder.name} ({run.status})")
