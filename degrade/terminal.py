"""What a person sees in a terminal: tables, and the live view of a sweep."""

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from degrade.config import RunConfig, spelt
from degrade.execute import Event
from degrade.log import Epoch
from degrade.store import Run

if TYPE_CHECKING:  # what takes long to import is not, for --help and for the shell at each Tab
    from degrade.analysis.verdict import Grid, Verdict
    from degrade.sweep import Progress

STYLES = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "interrupted": "yellow"}
VERDICT_STYLES = {"degrades": "red", "does not degrade": "green"}


def percent(error: float | None) -> str:
    """An error in [0, 1] as a table shows it."""
    return "-" if error is None else f"{100 * error:.2f} %"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 days`"""
    for limit, unit, name, digits in ((99.5, 1, "s", 0), (99.5 * 60, 60, "min", 0), (48 * 3600, 3600, "h", 1)):
        if seconds < limit:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.1f} days"


def milliseconds(value: float) -> str:
    """To three digits: `0.712`, `27.3`, `1,090`."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def label(config: RunConfig) -> str:
    """The run id without its hash, which all runs of a study can do without."""
    return f"{config.block}-{config.depth}-s{config.seed}"


def is_live(console: Console) -> bool:
    """Whether what was printed can be drawn anew: neither in a file nor on a dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


def bar(console: Console) -> Bar:
    """A progress bar; nothing where it could not move."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=console, disable=not is_live(console))


def plan_table(runs: Sequence[Run], left: Mapping[str, float | None]) -> Table:
    """The runs of a sweep, and what will be done about each.

    Args:
        runs: all of them.
        left: seconds for each that will be trained, by its folder's name; None where that cannot be told.
    """
    table = make_table("run", "block", ">depth", ">seed", "plan", ">time")
    for run in runs:
        name, config, status = run.folder.name, run.config, run.status
        plan = {"missing": "new", "interrupted": "resumed"}.get(status, status)
        if status == "running":
            plan = f"waited for, {run.holder}"
        elif status == "failed" and name in left:
            plan = "retried"
        seconds = left.get(name)
        time_needed = "-" if seconds is None else duration(seconds)
        style = STYLES.get(status, "")
        table.add_row(name, config.block, str(config.depth), str(config.seed), Text(plan, style), time_needed)
    return table


def runs_table(runs: Sequence[Run]) -> Table:
    """`degrade show`"""
    table = make_table("run", "status", ">epoch", ">step", ">train error", ">test error")
    for run in runs:
        row = run.record()
        table.add_row(
            row["id"],
            Text("imported" if row["imported"] else row["status"], STYLES.get(row["status"], "")),
            str(row["epoch"]),
            f"{row['step']:,}",
            percent(row["train_error"]),
            percent(row["test_error"]),
        )
    return table


def verdict_table(verdicts: Sequence["Verdict"]) -> Table:
    """The comparisons of one study, in percentage points."""
    table = make_table("nets", ">depths", ">seeds", ">rise", ">95 % interval", "verdict")
    for v in verdicts:
        table.add_row(
            v.block,
            f"{v.deep} v {v.shallow}",
            str(v.seeds),
            f"{100 * v.difference:+.2f}",
            interval_text(v),
            Text(v.words, VERDICT_STYLES.get(v.verdict, "")),
        )
    return table


def grid_table(verdicts: Sequence["Verdict"], grid: "Grid") -> Table:
    """Each comparison at every value of the grid, then best against best, in percentage points."""
    table = make_table("nets", ">depths", f">{grid.field}", ">rise", ">95 % interval", "verdict")  # in 80 columns
    for _, group in groupby(sorted(verdicts, key=lambda v: v.place()), key=lambda v: v.place()):
        if table.rows:
            table.add_row()
        for v in group:
            table.add_row(
                v.block,
                f"{v.deep} v {v.shallow}",
                spelt(v.value) if v.best is None else "best",
                f"{100 * v.difference:+.2f}",
                interval_text(v),
                Text(v.words.removeprefix("plain "), VERDICT_STYLES.get(v.verdict, "")),
            )
    return table


def best_lines(best: Sequence["Verdict"], grid: "Grid") -> list[str]:
    """What a grid says of mistuning: best against best, how these were chosen, and whether the grid is wide enough."""
    from degrade.analysis.verdict import CONTRAST

    lines = []
    for v in best:
        if v.best is None or v.block == CONTRAST:
            continue
        deep, shallow = (f"{net} ({grid.field} {spelt(value)})" for net, value in v.best.items())
        rise = f"{100 * abs(v.difference):.2f} points {'above' if v.difference > 0 else 'below'}"
        even, so = ("even ", "") if v.verdict == "degrades" else ("", f": {v.words}")
        lines.append(f"{even}with the best {grid.field} of each depth, {deep} is {rise} {shallow}{so}")
    if lines:
        lines.append("these best are chosen on the runs compared, which the intervals do not allow for")
    chosen = {net: value for v in best for net, value in (v.best or {}).items()}
    values = list(grid.values.values())
    for edge, word in ((values[0], "lowest"), (values[-1], "highest")):
        nets = [net for net, value in chosen.items() if value == edge]
        if nets and isinstance(edge, int | float):
            lines.append(
                f"{grid.field} {spelt(edge)}, the {word} tried, is the best of {', '.join(nets)}: "
                f"one beyond it may be better still"
            )
    return lines


def interval_text(verdict: "Verdict") -> str:
    """`+1.20 to +3.40`, in percentage points."""
    if verdict.low is None or verdict.high is None:
        return "-"
    return f"{100 * verdict.low:+.2f} to {100 * verdict.high:+.2f}"


def bench_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """`degrade bench`"""
    table = make_table("net", ">ms/step", ">train/s", ">eval/s", ">of peak", ">start-up", ">paper", ">short")
    for row in records:
        table.add_row(
            f"{row['block']}-{row['depth']}",
            milliseconds(row["milliseconds_per_step"]),
            f"{row['train_images_per_second']:,.0f}",
            f"{row['evaluation_images_per_second']:,.0f}",
            f"{100 * row['fraction_of_matmul_peak']:.0f} %",
            f"{row['start_up_seconds']:.1f} s",
            duration(row["paper_seconds"]),
            duration(row["short_seconds"]),
        )
    return table


def make_table(*columns: str) -> Table:
    """A plain table; `>` before a heading aligns its column to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


class SweepView:
    """Shows a sweep as it goes: a live table on a terminal, a line an epoch elsewhere.

    Use as a context manager, and hand every event to `show`.
    """

    def __init__(self, console: Console, runs: Sequence[Run], seconds: Mapping[str, float], jobs: int):
        self.console = console
        self.jobs = jobs
        self.rows = {run.folder: _Row(run.config, seconds.get(run.config.run_id)) for run in runs}
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> "SweepView":
        if is_live(self.console):
            self.live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self.live.transient = kind is None  # a table of results takes its place; what was stopped stays in sight
        if is_live(self.console):
            self.live.__exit__(kind, *exception)

    def show(self, run: Run, event: Event) -> None:
        row = self.rows[run.folder]
        if event.kind == "value":
            ended = row.advance(event.value)
            for note in event.value.notes:
                self.line(note)
            if ended and not is_live(self.console):
                self.line(f"{row.label}  {row.line()}")
        elif event.kind in ("failed", "held"):
            row.state = {"failed": "failed", "held": "elsewhere"}[event.kind]
            self.line(f"{row.label}: {event.value}")
        elif event.kind == "lost":
            row.state = "waiting"
            self.line(f"{row.label}: {event.value}; starting it again")
        elif event.kind == "waiting":
            row.state = "waiting"
            self.line(f"{row.label}: no room beside the others; {event.value} at a time from here on")
        elif event.kind == "started":
            row.state, row.start = "running", None  # where it was lost, it goes on from its last commit
        else:
            row.state = "diverged" if row.last and row.last.diverged else "done"
            if row.state == "diverged":
                self.line(f"{row.label} diverged: its training loss is {row.last.train_loss if row.last else ''}")

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> RenderableType:
        rows = list(self.rows.values())
        room = max(self.console.height - 4, 3)  # what is going on goes first, then what comes next
        chosen = sorted(
            rows, key=lambda row: ("running", "waiting", "elsewhere").index(row.state) if row.active else 3
        )[:room]
        shown = [row for row in rows if row in chosen]
        length = min(max(self.console.width - 66, 14), 50)  # of the progress bars
        table = make_table("run", "status", ">epoch", "progress", ">train", ">test", ">left")
        for row in shown:
            table.add_row(*row.cells(length))
        done = sum(not row.active for row in rows)
        known = [seconds for row in rows if (seconds := row.seconds_left) is not None]
        left = max([sum(known) / self.jobs, *known], default=0.0)
        ahead = f", about {duration(left)} left" if done < len(rows) == len(known) else ""
        return Group(table, Text(f"{done} of {len(rows)} runs ended{ahead}", "bold"))


class _Row:
    """One run in the view."""

    def __init__(self, config: RunConfig, seconds: float | None):
        self.label = label(config)
        self.steps = config.steps
        self.epochs = config.epochs
        self.seconds = seconds  # of the whole run, as estimated; None where nothing is known
        self.state = "waiting"
        self.step = 0
        self.last: Epoch | None = None
        self.start: tuple[float, int] | None = None

    @property
    def active(self) -> bool:
        """Whether it has yet to end."""
        return self.state in ("waiting", "running", "elsewhere")

    def advance(self, progress: "Progress") -> bool:
        """Take in the progress; True where it ends an epoch that was trained just now."""
        first = self.start is None
        if self.start is None:
            self.start = (time.monotonic(), progress.step)
        ended = progress.epoch is not None and progress.epoch != self.last
        self.step, self.last = progress.step, progress.epoch
        return ended and not first

    @property
    def seconds_left(self) -> float | None:
        """None where that cannot be told."""
        if not self.active:
            return 0.0
        if self.start and self.step > self.start[1]:
            rate = (time.monotonic() - self.start[0]) / (self.step - self.start[1])
            return rate * (self.steps - self.step)
        return None if self.seconds is None else self.seconds * (1 - self.step / self.steps)

    def line(self) -> str:
        assert self.last is not None  # only called at the end of an epoch
        return (
            f"epoch {self.last.epoch}/{self.epochs}  step {self.step}/{self.steps}  "
            f"train {percent(self.last.train_error)}  test {percent(self.last.test_error)}  "
            + ("done" if self.step == self.steps else f"{duration(self.seconds_left or 0)} left")
        )

    def cells(self, length: int = 14) -> tuple[RenderableType, ...]:
        return (
            self.label,
            Text(self.state, STYLES.get(self.state, "dim")),
            f"{self.last.epoch if self.last else 0}/{self.epochs}",
            "━" * (done := length * self.step // self.steps) + "╌" * (length - done),
            percent(self.last.train_error) if self.last else "-",
            percent(self.last.test_error) if self.last else "-",
            duration(self.seconds_left) if self.seconds_left else "",
        )
