"""Promises 1, 2, 3 and 5: a sweep that is killed, or fails to write, or loses its power, ends with the same bytes."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import time

import pytest
from conftest import micro, smoke, tally, times
from crash import (
    Disk,
    PowerCut,
    RecordingDisk,
    digests,
    finish,
    read_tree,
    run_sweep,
    spread,
    start,
    sweep_and_die,
    write_tree,
)

from degrade import commit, store
from degrade.check import check
from degrade.log import from_csv
from degrade.store import Run
from degrade.sweep import commit_interval
from degrade.train import Training, read_state

pytestmark = pytest.mark.promise

ALONE = [micro("residual")]
PAIR = [*ALONE, micro()]
GRID = [smoke(block, depth) for block in ("plain", "residual") for depth in (8, 14)]


@pytest.fixture(scope="module")
def pair(data_dir, tmp_path_factory):
    """The digests of `PAIR` as it ends undisturbed."""
    out = tmp_path_factory.mktemp("pair")
    finish(out, PAIR, data_dir)
    return digests(out)


@pytest.fixture(scope="module")
def grid(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    finish(out, GRID, data_dir)
    return digests(out)


def newest(folder):
    """The state that a run would go on from, or None."""
    for path in commit.checkpoints(folder / store.CHECKPOINTS):
        with contextlib.suppress(ValueError):
            return read_state(commit.read_checkpoint(path))
    return None


def assert_sound(out):
    """Wherever it was killed: every checkpoint is whole, and no log ahead of the newest."""
    for path in out.glob(f"*/*/{store.CHECKPOINTS}/*.pt"):
        read_state(commit.read_checkpoint(path))
    for path in out.glob(f"*/*/{store.LOG}"):
        state, rows = newest(path.parent), from_csv(path.read_text())
        assert state is not None
        assert [row.epoch for row in rows] == [row.epoch for row in state.epochs][: len(rows)]


# 1. A killed sweep, run again, gives the same bytes.


def test_killed_at_any_time(grid, data_dir, tmp_path):
    rng = random.Random(1)
    out, ended = tmp_path / "0", 0
    for kill in range(times(200)):
        process = start(finish, out, GRID, data_dir)
        process.join(rng.uniform(0.05, 0.8))
        done = process.exitcode is not None
        process.kill()
        process.join()
        assert_sound(out)
        tally(1, "SIGKILLs at seeded times")
        if done:
            assert digests(out) == grid
            ended += 1
            out = tmp_path / str(kill)
    finish(out, GRID, data_dir)
    assert digests(out) == grid
    tally(1, "sweeps over which those were spread, each with the bytes of an unbroken one", ended + 1)


@pytest.fixture(scope="module")
def points(data_dir, tmp_path_factory):
    """How often each call that changes the disk is made in a sweep over PAIR, by name."""
    with Disk() as disk:
        finish(tmp_path_factory.mktemp("points"), PAIR, data_dir)
    counts = {name: disk.calls.count(name) for name in disk.calls}
    for name in ("fsync checkpoint", "replace checkpoint", "fsync log.csv", "replace log.csv", "unlink checkpoint"):
        assert counts[name] > 4
    return counts


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_sync_point(pair, points, data_dir, tmp_path, when):
    for name, count in points.items():
        for i, occurrence in enumerate(itertools.islice(itertools.cycle(spread(10, count, 0)), times(10))):
            out = tmp_path / f"{name} {i}"
            process = start(sweep_and_die, out, PAIR, data_dir, name, occurrence, when)
            process.join()
            assert_sound(out)
            finish(out, PAIR, data_dir, commit_seconds=1e9)
            assert digests(out) == pair, (name, occurrence)
            shutil.rmtree(out)
            tally(1, f"SIGKILLs at {len(points)} named points, before and after", process.exitcode == -9)
    assert len(points) > 25


# 2. At most one epoch is lost per crash.


def slow_sweep(out, config, data_dir, pipe):
    """Epochs of a fifth of a second; each is told when it ends."""
    update = Training.update

    def slow(self):
        time.sleep(0.02)
        update(self)

    Training.update = slow
    for _, event in run_sweep(out, [config], data_dir):
        if event.kind == "value":
            pipe.send(event.value.epoch.epoch if event.value.epoch else 0)


@pytest.mark.parametrize("round_", range(times(4)))
def test_ten_kills_in_a_row_cost_an_epoch_each_at_most(data_dir, tmp_path, round_):
    from crash import processes

    rng = random.Random(round_)
    config = smoke(steps=400, milestones=())
    committed = 0
    for _ in range(10):
        ours, theirs = processes.Pipe(duplex=False)
        process = start(slow_sweep, tmp_path, config, data_dir, theirs)
        theirs.close()
        told = ours.recv()
        assert told >= committed
        end = time.monotonic() + rng.uniform(0.1, 1.0)
        while ours.poll(max(end - time.monotonic(), 0)):
            told = ours.recv()
        process.kill()
        process.join()
        while ours.poll():
            try:
                told = ours.recv()
            except EOFError:
                break
        state = newest(tmp_path / "s" / config.run_id)
        now = len(state.epochs) if state else 0
        assert now >= max(told - 1, committed), "more than an epoch was lost"
        committed = now
        tally(2, "SIGKILLs, ten in a row: an epoch lost at most, no committed one ever")
    assert committed > 3


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_where_epochs_are_short_thirty_seconds_are_lost_at_most(data_dir, tmp_path, monkeypatch, device):
    """On a clock by which every update takes a second."""
    from degrade import sweep as module

    class Clock:
        now = 0.0
        sleep = staticmethod(time.sleep)

        @classmethod
        def monotonic(cls):
            return cls.now

    update = Training.update
    lost = []

    def one_second(self):
        update(self)
        Clock.now += 1
        state = newest(folder)
        lost.append(self.step - (state.step if state else 0))

    config = micro(steps=100, milestones=())
    folder = tmp_path / "s" / config.run_id
    monkeypatch.setattr(Training, "update", one_second)
    monkeypatch.setattr(module, "time", Clock)
    finish(tmp_path, [config], data_dir, commit_seconds=commit_interval(device))
    assert len(lost) == 100
    assert 5 < max(lost) <= 31  # the commit itself may still be under way


# 3. No I/O error destroys the last good state.


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["committed often", "committed at the end"])
@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_any_call_may_fail(pair, data_dir, tmp_path, code, once, seconds):
    with Disk() as disk:
        finish(tmp_path / "whole", ALONE, data_dir, commit_seconds=seconds)
    total = len(disk.calls)
    for k in spread(times(total), total, code + once):
        out = tmp_path / str(k)
        committed = []

        def fail(name, place, _, k=k):
            if (place == k if once else place >= k) and not name.startswith(("close", "truncate")):
                raise Disk.Failed(code, os.strerror(code), name)

        with Disk(before=fail) as disk, contextlib.suppress(Disk.Failed):  # raised before any run began
            for run, event in run_sweep(out, ALONE, data_dir, commit_seconds=seconds):
                state = newest(run.folder)
                committed.append((run.folder, state.step if state else 0))
                assert event.kind != "failed" or os.strerror(code) in str(event.value)
                assert event.kind != "done" or Run.open("s", run.folder).status == "done"
        assert len(disk.calls) > k  # the call was made
        assert_sound(out)
        for folder, step in committed:
            assert step == 0 or newest(folder).step >= step, "a committed state was lost"
            assert Run.open("s", folder).status in ("done", "interrupted", "missing")  # never failed
        finish(out, ALONE, data_dir, commit_seconds=1e9)
        assert digests(out).items() < pair.items()
        shutil.rmtree(out)
        tally(3, "calls on the disk that failed, each in turn, with ENOSPC and EIO, once and from then on")


# 5. It survives the loss of power.


@pytest.fixture(scope="module")
def operations(data_dir, tmp_path_factory):
    """All that a sweep over PAIR does to the disk, and each commit: (what, run, step), once it has returned."""
    out = tmp_path_factory.mktemp("recorded")
    write = commit.write_checkpoint
    with RecordingDisk(out) as disk:

        def noted(folder, step, data, **options):
            write(folder, step, data, **options)
            disk.log.append(("committed", folder.parent.name, step))

        commit.write_checkpoint = noted
        try:
            finish(out, PAIR, data_dir)
        finally:
            commit.write_checkpoint = write
    model = PowerCut()
    for operation in disk.log:
        if operation[0] != "committed":
            model.apply(operation)
    assert model.everything() == read_tree(out), "something was written that this test does not know of"
    return disk.log


def test_power_is_cut_after_any_operation(pair, operations, data_dir, tmp_path):
    turns = -(-1000 // len(operations))  # each with other losses
    chosen = set(spread(times(turns * len(operations)), turns * len(operations), 5))
    seen = set()
    for turn in range(turns):
        model, committed = PowerCut(), {}
        for number, operation in enumerate(operations, start=turn * len(operations)):
            if operation[0] == "committed":
                committed[operation[1]] = operation[2]
            else:
                model.apply(operation)
            if number not in chosen:
                continue
            tree = model.after_the_cut(random.Random(number))
            tally(5, f"prefixes of the {len(operations)} operations of a sweep, after which power was cut")
            if (key := str(sorted(tree.items()))) in seen:
                continue
            seen.add(key)
            tally(5, "of these left a disk that no other had left")
            out = tmp_path / "out"
            write_tree(out, tree)
            for name, step in committed.items():
                state = newest(out / "s" / name)
                assert state is not None, f"{name} had committed step {step}"
                assert state.step >= step
            finish(out, PAIR, data_dir, commit_seconds=1e9)
            assert digests(out) == pair, number
            (checked,) = check(out)
            assert [f for f in checked.findings if not f.path.name.endswith(".partial")] == [], number
            shutil.rmtree(out)
