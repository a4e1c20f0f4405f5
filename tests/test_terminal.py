import contextlib
import io
import os

import pytest
from conftest import smoke, write_run
from rich.console import Console

from degrade import bench
from degrade.execute import Error, Event
from degrade.log import Epoch
from degrade.sweep import Machine, Progress
from degrade.terminal import SweepView, bench_table, duration, milliseconds, percent, plan_table, runs_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45, "45 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (3 * 3600, "3.0 h"),
        (86400 * 3, "3.0 days"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_milliseconds():
    assert [milliseconds(value) for value in (0.71234, 27.31, 99.7, 1090.4)] == ["0.712", "27.3", "100", "1,090"]


def test_a_bench_fits_a_narrow_terminal():
    record = {
        "block": "residual",
        "depth": 110,
        "milliseconds_per_step": 12345.6,
        "train_images_per_second": 187654.0,
        "evaluation_images_per_second": 1987654.0,
        "fraction_of_matmul_peak": 0.912,
        "start_up_seconds": 12.34,
        "paper_seconds": 1e6,
        "short_seconds": 12345.0,
    }
    text = Console(file=io.StringIO(), width=80)
    text.print(bench_table([record]))
    shown = text.file.getvalue().splitlines()
    for text in ("residual-110", "12,346", "187,654", "1,987,654", "91 %", "12.3 s", "11.6 days", "3.4 h"):
        assert text in shown[1]


def test_percent():
    assert percent(0.12345) == "12.35 %"
    assert percent(None) == "-"


def epoch(number, step, train=0.5, loss=1.0):
    return Epoch(number, step, 0.1, loss, train, 0.6, 1.0, 0.75)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "s", smoke(block, 8, seed), []) for seed in (0, 1) for block in ("plain", "residual")]


def view(runs, console):
    return SweepView(console, runs, {run.config.run_id: 60.0 for run in runs}, jobs=2)


def scripted(runs):
    """Four runs: one from the start, one resumed, one that fails, one that diverges."""
    done, resumed, failed, diverged = runs
    yield done, Event(0, "started")
    yield done, Event(0, "value", Progress(0, None))
    yield resumed, Event(1, "started")
    yield resumed, Event(1, "value", Progress(16, epoch(2, 16), ("checkpoint x damaged",)))
    yield done, Event(0, "value", Progress(8, epoch(1, 8)))
    yield done, Event(0, "value", Progress(24, epoch(3, 24, 0.25)))
    yield done, Event(0, "done")
    yield failed, Event(2, "started")
    yield failed, Event(2, "failed", Error("ValueError", "why", "train.py, line 7, in update", ""))
    yield diverged, Event(3, "value", Progress(8, epoch(1, 8, 0.9, float("nan"))))
    yield diverged, Event(3, "done")


def test_plain_lines_where_there_is_no_terminal(runs):
    console = Console(file=io.StringIO(), width=80)
    with view(runs, console) as shown:
        for run, event in scripted(runs):
            shown.show(run, event)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "checkpoint x damaged"
    assert lines[1].startswith("plain-8-s0  epoch 1/3  step 8/24  train 50.00 %  test 75.00 %  ")
    assert lines[1].endswith(" left")
    assert lines[2] == "plain-8-s0  epoch 3/3  step 24/24  train 25.00 %  test 75.00 %  done"
    assert lines[3:] == [
        "plain-8-s1: ValueError: why (train.py, line 7, in update)",
        "residual-8-s1 diverged: its training loss is nan",
    ]


def test_plain_lines_on_a_terminal_that_cannot_draw_anew(runs):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "dumb"})
    with view(runs, console) as shown:
        for run, event in scripted(runs):
            shown.show(run, event)
    assert "plain-8-s0  epoch 3/3  step 24/24  train 25.00 %  test 75.00 %  done" in console.file.getvalue()
    assert "━" not in console.file.getvalue()


def test_the_live_table_goes_at_the_end_but_stays_where_it_was_stopped(runs):
    for stop in (None, KeyboardInterrupt):
        console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, _environ={"TERM": "xterm"})
        shown = view(runs, console)
        with contextlib.suppress(KeyboardInterrupt), shown:
            shown.show(runs[0], Event(0, "started"))
            if stop:
                raise stop
        assert shown.live.transient is (stop is None)


def test_the_bars_of_the_live_table_take_what_a_wide_terminal_has(runs):
    for width, length in ((80, 14), (100, 34), (200, 50)):
        console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, color_system=None)
        shown = view(runs, console)
        shown.show(runs[0], Event(0, "started"))
        console.print(shown._render())
        assert console.file.getvalue().splitlines()[1].count("╌") == length


def test_a_run_that_another_process_has_is_waited_for_and_then_done(runs):
    console = Console(file=io.StringIO(), width=80)
    shown = view(runs, console)
    shown.show(runs[0], Event(0, "started"))
    shown.show(runs[0], Event(0, "held", "held by process 7; waiting"))
    assert console.file.getvalue() == "plain-8-s0: held by process 7; waiting\n"
    assert shown.rows[runs[0].folder].cells()[1].plain == "elsewhere"
    assert shown.rows[runs[0].folder].active
    for event in (Event(0, "started"), Event(0, "value", Progress(24, epoch(3, 24, 0.25))), Event(0, "done")):
        shown.show(runs[0], event)
    assert shown.rows[runs[0].folder].cells()[1].plain == "done"


def test_the_live_table(runs):
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    shown = view(runs, console)
    for run, event in list(scripted(runs))[:5]:
        shown.show(run, event)
    text = Console(file=io.StringIO(), width=80)
    text.print(shown._render())
    header, first, second, third, _, total = text.file.getvalue().splitlines()
    assert header.split() == ["run", "status", "epoch", "progress", "train", "test", "left"]
    assert first.split()[:3] == ["plain-8-s0", "running", "1/3"]
    assert "50.00 %" in first
    assert "75.00 %" in first
    assert "━" in first
    assert second.split()[:3] == ["residual-8-s0", "running", "2/3"]
    assert second.split()[-2:] == ["20", "s"]  # a third of the 60 seconds that were estimated
    assert third.split()[:3] == ["plain-8-s1", "waiting", "0/3"]
    assert total.startswith("0 of 4 runs ended, about ")
    assert all(len(line) <= 80 for line in text.file.getvalue().splitlines())


def test_more_runs_than_lines_shows_those_under_way(tmp_path):
    runs = [write_run(tmp_path / "s", smoke(seed=seed), []) for seed in range(30)]
    console = Console(file=io.StringIO(), width=80, height=12, force_terminal=True)
    shown = view(runs, console)
    for i in range(3):
        shown.show(runs[i], Event(i, "started"))
        shown.show(runs[i], Event(i, "done"))
    shown.show(runs[25], Event(25, "started"))
    text = Console(file=io.StringIO(), width=80)
    text.print(shown._render())
    first = [line.split()[0] for line in text.file.getvalue().splitlines()[1:-1]]
    assert first == [f"plain-8-s{i}" for i in (*range(3, 10), 25)]  # what comes next, and what is under way
    assert len(text.file.getvalue().splitlines()) <= 11


def test_the_plan_says_what_becomes_of_each_run(tmp_path):
    from degrade import commit, store

    missing, done, failed, interrupted, running = (
        write_run(tmp_path / "s", smoke(seed=seed), [(0.5, 0.5)] if seed == 1 else []) for seed in range(5)
    )
    (failed.folder / store.ERROR).touch()
    commit.make_folder(interrupted.folder / store.CHECKPOINTS)
    commit.write_checkpoint(interrupted.folder / store.CHECKPOINTS, 5, b"state")
    console = Console(file=io.StringIO(), width=100)
    with commit.hold(running.folder / store.LOCK):
        seconds = {run.config.run_id: 60.0 for run in (missing, interrupted)}
        console.print(plan_table([missing, done, failed, interrupted, running], seconds))
        console.print(plan_table([failed], {failed.folder.name: None}))
        console.print(runs_table([missing, done]))
    lines = console.file.getvalue().splitlines()
    plans = [" ".join(line.split()[4:]) for line in lines[1:6]]
    assert plans[:4] == ["new 60 s", "done -", "failed -", "resumed 60 s"]
    assert plans[4] == f"waited for, process {os.getpid()} -"
    assert " ".join(lines[7].split()[4:]) == "retried -"
    assert lines[-1].split() == [done.folder.name, "done", "1", "24", "50.00", "%", "50.00", "%"]


class TestEstimate:
    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch):
        """One millisecond a layer and update, a tenth of it a layer and image."""
        self.timed = []

        def measure(config, *_, **__):
            self.timed.append(config)
            return bench.Speed(0.001 * config.depth, 0.0001 * config.depth, 0.0)

        monkeypatch.setattr(bench, "measure", measure)

    def test_a_straight_line_in_depth(self):
        configs = [smoke(depth=depth) for depth in (8, 20, 56)]
        seconds = bench.estimate(configs, Machine("cpu", 1, 1))
        for config in configs:
            expected = config.depth * (24 * 0.001 + 3 * (256 + 128) * 0.0001)  # 3 epochs of 256 + 128 images
            assert seconds[config.run_id] == pytest.approx(expected)

    def test_large_batches_are_timed_in_part(self):
        config = smoke(width=64, batch_size=2048)
        seconds = bench.estimate([config], Machine("cpu", 1, 1))
        assert {timed.batch_size for timed in self.timed} == {256}
        assert seconds[config.run_id] == pytest.approx(8 * (24 * 0.001 * 8 + 24 * 384 * 0.0001))


@pytest.mark.parametrize(("jobs", "wall"), [(1, 10), (2, 5), (3, 4), (9, 4)])
def test_makespan(jobs, wall):
    assert bench.makespan([4, 3, 2, 1], jobs) == wall


def test_measuring_measures():
    speed = bench.measure(smoke(), "cpu", 1, repeats=1)
    assert 0 < speed.image < speed.step < 10


def test_a_run_that_was_lost_goes_on_from_its_last_commit(runs):
    """An epoch that was told is not told again, and the pause is no part of the pace."""
    text = Console(file=io.StringIO(), width=80)
    shown = view(runs, text)
    for event in (
        Event(0, "started"),
        Event(0, "value", Progress(0, None)),
        Event(0, "value", Progress(8, epoch(1, 8))),
        Event(0, "value", Progress(16, epoch(2, 16))),
        Event(0, "lost", "its machine was lost"),
        Event(0, "started"),
        Event(0, "value", Progress(8, epoch(1, 8))),
        Event(0, "value", Progress(16, epoch(2, 16))),
    ):
        shown.show(runs[0], event)
    told = [line.split()[2] for line in text.file.getvalue().splitlines() if " epoch " in line]
    assert told == ["1/3", "2/3", "2/3"]  # the second was trained twice


def test_the_time_left_is_at_the_pace_since_the_start_or_resume(runs, monkeypatch):
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("degrade.terminal.time.monotonic", lambda: next(clock))
    shown = view(runs, Console(file=io.StringIO()))
    shown.show(runs[0], Event(0, "started"))
    shown.show(runs[0], Event(0, "value", Progress(8, None)))  # resumed at step 8 of 24
    shown.show(runs[0], Event(0, "value", Progress(12, None)))
    row = shown.rows[runs[0].folder]
    assert row.seconds_left == 30.0  # 4 steps took 10 s, 12 are left
