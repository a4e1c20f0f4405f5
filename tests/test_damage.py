"""Damage and malice, on real files: what a run, a sweep and a reader make of them. Promises 6, 7, 13 and 16."""

import ast
import copyreg
import dataclasses
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import random
import shutil
import tarfile
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SOAK, micro, tally, times, write_run

import degrade
from degrade import commit, store
from degrade.config import SWEPT, RunConfig, run_id
from degrade.errors import Failure
from degrade.log import to_csv
from degrade.store import Run, Study
from degrade.sweep import Task, train_run
from degrade.train import Training, load_splits, read_state

pytestmark = pytest.mark.promise

REPOSITORY = Path(__file__).parent.parent
CONFIG = micro()
FLAGS = ("--jobs", "1", "--threads", "1", "--device", "cpu", "--compile", "off")
# What makes `degrade sweep` train `CONFIG`, as its TOML file has it.
SPEC = {"depths": [8], "blocks": ["plain"], "study": "s", "dataset": "shapes", "protocol": "smoke"}
SPEC |= {"width": 1, "train_images": 20, "test_images": 10, "batch_size": 10, "steps": 6, "milestones": [3]}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Each run begins with a garbage collection, which takes longer than the run with all that pytest has in memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Undisturbed(NamedTuple):
    """The run `CONFIG`, never interrupted: its study, its final bytes, and its state after each update."""

    folder: Path
    log: bytes
    final: str
    states: dict[int, bytes]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("whole") / "s", CONFIG, [])
    list(train_run(task(run, data_dir), "cpu"))
    states = states_of(CONFIG, data_dir)
    newest = commit.checkpoints(run.folder / store.CHECKPOINTS)[0]
    assert hashlib.sha256(states[6]).hexdigest() == hashlib.sha256(newest.read_bytes()).hexdigest()
    return Undisturbed(run.folder.parent, (run.folder / store.LOG).read_bytes(), newest.name, states)


def task(run, data_dir):
    return Task(run.study, run.folder, run.config, data_dir, 1, commit_seconds=0.0)


def states_of(config, data_dir):
    """The bytes of its checkpoint after each update."""
    training = Training(config, load_splits(config, data_dir, "cpu"), "cpu")
    return dict((training.step, training.state()) for _ in training)  # noqa: C402  the last of each step


def stopped(whole, folder, steps):
    """A run with two sound checkpoints, of these steps, as a kill leaves it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("*.pt", store.LOCK))
    for step in steps:
        checkpoints = folder / CONFIG.run_id / store.CHECKPOINTS
        commit.write_checkpoint(checkpoints, step, whole.states[step], epochs=step // 2)
    run = Run("s", folder / CONFIG.run_id, CONFIG)
    (run.folder / store.LOG).write_bytes(b"".join(rows(whole.log)[:3]))  # two epochs; it may lag behind
    return run


def newest_and_older(run):
    newest, older = commit.checkpoints(run.folder / store.CHECKPOINTS)
    return newest, older


def named(step, data):
    """The name that vouches for the bytes; an epoch is two steps."""
    return f"{step:09d}-{step // 2:06d}-{hashlib.sha256(data).hexdigest()}.pt"


def go_on(run, data_dir):
    """Train the run to its end: what it says first, and its log just then."""
    progress = train_run(task(run, data_dir), "cpu")
    first = next(progress)
    log = (run.folder / store.LOG).read_bytes() if (run.folder / store.LOG).exists() else b""
    for _ in progress:
        pass
    return first.notes, log


def says(run, *lines):
    return tuple(f"{run.folder.name}: {line}" for line in lines)


def assert_as_undisturbed(run, whole, case=""):
    """The very bytes of a run that met no damage, and nothing else left over."""
    log = (run.folder / store.LOG).read_bytes()
    lines = log.decode().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", "1", "2", "3"], case
    assert log == whole.log, case
    newest = commit.checkpoints(run.folder / store.CHECKPOINTS)[0]
    assert newest.name == whole.final == named(6, newest.read_bytes()), case
    assert not (run.folder / store.ERROR).exists(), case
    assert commit.leavings(run.folder) + commit.leavings(newest.parent) == [], case


def listing(root):
    """All there is under `root`: files with their bytes and times, links, folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (status.st_mode, content, 0 if path.is_dir() else status.st_mtime_ns)
    return found


def spread(start, stop, count):
    """`count` whole numbers, evenly from `start` up to, but not including, `stop`; all where there are fewer."""
    count = min(count, stop - start)
    return [start + (stop - start) * i // count for i in range(count)]


def flipped(data, bit):
    bad = bytearray(data)
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


# --- Promise 6: never loads a bad checkpoint; falls back to the one before, and says so ---

CHANGED = "its bytes are not those it was written with"


def replaced(make):
    """`make(path)` in the place of the file."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


# What is done to the file, and what is said about it.
FILE_DAMAGE = {
    "zero length": (lambda path: path.write_bytes(b""), CHANGED),
    "a byte more": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), CHANGED),
    "a block more": (lambda path: path.write_bytes(path.read_bytes() + bytes(4096)), CHANGED),
    "zeros of the same length": (lambda path: path.write_bytes(bytes(path.stat().st_size)), CHANGED),
    "a hole in it": (
        lambda path: path.write_bytes(path.read_bytes()[:4096].ljust(path.stat().st_size, b"\0")),
        CHANGED,
    ),
    "the bytes of the one before": (
        lambda path: path.write_bytes(commit.checkpoints(path.parent)[1].read_bytes()),
        CHANGED,
    ),
    "a web page": (lambda path: path.write_text("<html>404</html>"), CHANGED),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nothing")), "No such file or directory"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "Too many levels of symbolic links"),
    "unreadable bytes": (replaced(lambda path: path.symlink_to("/proc/self/mem")), "Input/output error"),
}
JUNK = {
    "nothing": replaced(lambda path: path.touch()),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "junk": lambda path: path.write_bytes(random.Random(16).randbytes(300)),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "deep nesting": lambda path: path.write_text("[" * 100_000),
    "a number of 5,001 digits": lambda path: path.write_text(f'{{"seed": 1{"0" * 5000}}}'),
    "a folder": replaced(lambda path: path.mkdir()),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "no file": lambda path: path.unlink(),
}
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux has a file that cannot be read")
file_damage = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[needs_proc] * (kind == "unreadable bytes")) for kind in FILE_DAMAGE]
)


class TestDamagedCheckpoints:
    def falls_back(self, run, whole, data_dir, reason, case=""):
        newest, older = newest_and_older(run)
        notes, log = go_on(run, data_dir)
        from_step = int(older.name[:9])
        assert notes == says(run, f"{newest.name} is damaged ({reason})", f"going on from step {from_step}"), case
        assert log == to_csv(read_state(whole.states[from_step]).epochs, validation=False).encode(), case
        assert_as_undisturbed(run, whole, case)

    def test_cut_anywhere_the_one_before_is_gone_on_from(self, whole, data_dir, tmp_path):
        for steps, count in (((4, 5), times(32)), ((5, 6), times(32))):
            size = len(whole.states[steps[1]])
            for offset in spread(0, size, count):
                run = stopped(whole, tmp_path / "s", steps)
                os.truncate(newest_and_older(run)[0], offset)
                self.falls_back(run, whole, data_dir, CHANGED, f"cut at byte {offset} of {size}")
                tally(6, "checkpoints truncated: never loaded, the one before gone on from, the same bytes at the end")

    def test_any_bit_flipped_the_one_before_is_gone_on_from(self, whole, data_dir, tmp_path):
        rng = random.Random(6)
        for _, steps in zip(range(times(200)), itertools.cycle([(4, 5), (5, 6)]), strict=False):
            run = stopped(whole, tmp_path / "s", steps)
            newest, _ = newest_and_older(run)
            bit = rng.randrange(8 * newest.stat().st_size)
            newest.write_bytes(flipped(newest.read_bytes(), bit))
            self.falls_back(run, whole, data_dir, CHANGED, f"bit {bit}")
            tally(
                6, "bits of a checkpoint flipped: never loaded, the one before gone on from, the same bytes at the end"
            )

    @file_damage
    @pytest.mark.parametrize("steps", [(4, 5), (5, 6)])
    def test_other_damage_the_one_before_is_gone_on_from(self, whole, data_dir, tmp_path, kind, steps):
        run = stopped(whole, tmp_path / "s", steps)
        damage, reason = FILE_DAMAGE[kind]
        damage(newest_and_older(run)[0])
        self.falls_back(run, whole, data_dir, reason)
        tally(6, "checkpoints emptied, lengthened, overwritten, unreadable or replaced by something else: likewise")

    @file_damage
    def test_both_damaged_it_starts_anew(self, whole, data_dir, tmp_path, kind):
        run = stopped(whole, tmp_path / "s", (4, 5))
        newest, older = newest_and_older(run)
        damage, reason = FILE_DAMAGE[kind]
        damage(newest)
        older.write_bytes(b"too")
        notes, _ = go_on(run, data_dir)
        damaged = [f"{newest.name} is damaged ({reason})", f"{older.name} is damaged ({CHANGED})"]
        assert notes == says(run, *damaged, "starting anew")
        assert_as_undisturbed(run, whole)
        tally(6, "times both checkpoints were damaged: started anew, the same bytes at the end")

    def test_swapped_neither_is_loaded(self, whole, data_dir, tmp_path):
        run = stopped(whole, tmp_path / "s", (4, 5))
        newest, older = newest_and_older(run)
        newest.write_bytes(whole.states[4])
        older.write_bytes(whole.states[5])
        notes, _ = go_on(run, data_dir)
        damaged = [f"{path.name} is damaged ({CHANGED})" for path in (newest, older)]
        assert notes == says(run, *damaged, "starting anew")
        assert_as_undisturbed(run, whole)
        tally(6, "times both checkpoints were damaged: started anew, the same bytes at the end")

    @pytest.mark.parametrize(
        "other",
        [micro(seed=1), micro("residual"), micro(lr=0.5), micro(weight_decay=0.0), micro(width=2)],
        ids=["seed", "block", "lr", "weight_decay", "width"],
    )
    def test_a_sound_one_of_another_run_is_passed_over(self, whole, data_dir, tmp_path, other):
        data = states_of(other, data_dir)[6]
        run = stopped(whole, tmp_path / "s", (4, 5))
        newest, older = newest_and_older(run)
        older.unlink()
        (newest.parent / named(6, data)).write_bytes(data)
        self.falls_back(run, whole, data_dir, f"it is of {other.run_id}, not of {CONFIG.run_id}")
        for path in newest.parent.iterdir():
            path.unlink()
        (run.folder / store.LOG).unlink()
        (newest.parent / named(6, data)).write_bytes(data)
        notes, _ = go_on(run, data_dir)
        assert notes[-1] == f"{run.folder.name}: starting anew"
        assert_as_undisturbed(run, whole)
        tally(6, "sound checkpoints of other runs, rightly named: passed over", 2)

    def test_a_name_that_lies_about_the_step_does_no_harm(self, whole, data_dir, tmp_path):
        for step in (0, 1, 6, 7, 999_999_999):
            run = stopped(whole, tmp_path / "s", (4, 5))
            (run.folder / store.CHECKPOINTS / named(step, whole.states[3])).write_bytes(whole.states[3])
            go_on(run, data_dir)
            assert_as_undisturbed(run, whole, step)

    def test_the_command_line_says_so_and_ends_with_the_same_bytes(self, whole, data_dir, tmp_path, cli):
        run = stopped(whole, tmp_path / "s", (4, 5))
        newest, _ = newest_and_older(run)
        newest.write_bytes(flipped(newest.read_bytes(), 12_345))
        result = sweep(cli, data_dir, tmp_path)
        assert (result.exit_code, result.stderr) == (0, "")
        assert f"{run.folder.name}: {newest.name} is damaged ({CHANGED})\n" in result.stdout
        assert f"{run.folder.name}: going on from step 4\n" in result.stdout
        assert_as_undisturbed(run, whole)


def sweep(cli, data_dir, out, *flags, **changes):
    """A sweep in the study `out`/s: `CONFIG`, but for what its TOML file or the flags say."""
    spec = out.with_suffix(".toml")
    spec.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (SPEC | changes).items()))
    return cli("sweep", spec, "--out", out, "--data-dir", data_dir, *FLAGS, *flags)


# --- Promise 7: log.csv has one header, and epochs 1..n exactly once ---


def rows(log):
    return log.splitlines(keepends=True)


LOG_DAMAGE = {
    "first row twice": lambda log: b"".join([*rows(log)[:2], *rows(log)[1:]]),
    "last row twice": lambda log: log + rows(log)[-1],
    "all rows twice": lambda log: log + b"".join(rows(log)[1:]),
    "first row gone": lambda log: b"".join([rows(log)[0], *rows(log)[2:]]),
    "last row but one gone": lambda log: b"".join([*rows(log)[:-2], rows(log)[-1]]),
    "rows swapped": lambda log: b"".join([rows(log)[0], *rows(log)[2:0:-1], *rows(log)[3:]]),
    "last rows swapped": lambda log: b"".join([*rows(log)[:-2], rows(log)[-1], rows(log)[-2]]),
    "header twice": lambda log: rows(log)[0] + log,
    "header in the middle": lambda log: b"".join([*rows(log)[:2], rows(log)[0], *rows(log)[2:]]),
    "header at the end": lambda log: log + rows(log)[0],
    "header gone": lambda log: b"".join(rows(log)[1:]),
    "the log twice": lambda log: log + log,
    "a header of Keras": lambda log: b"epoch,accuracy,loss\n" + b"".join(rows(log)[1:]),
    "a column more in the header": lambda log: log.replace(b"test_error\n", b"test_error,lr\n"),
    "columns swapped in the header": lambda log: log.replace(b"epoch,step", b"step,epoch"),
    "the columns of a run with validation": lambda log: log.replace(
        b"test_error\n", b"test_error,val_loss,val_error\n"
    ),
    "the columns and values of a run with validation": lambda log: log.replace(b"\n", b",1.0,0.5\n").replace(
        b"test_error,1.0,0.5\n", b"test_error,val_loss,val_error\n"
    ),
    "a value gone": lambda log: log.rpartition(b",")[0] + b"\n",
    "a value more": lambda log: log[:-1] + b",0.5\n",
    "empty": lambda log: b"",
    "a newline": lambda log: b"\n",
    "an empty line more": lambda log: log + b"\n",
    "an empty line between": lambda log: log.replace(b"\n", b"\n\n", 1),
    "the last newline gone": lambda log: log[:-1],
    "CRLF line ends": lambda log: log.replace(b"\n", b"\r\n"),
    "CR line ends": lambda log: log.replace(b"\n", b"\r"),
    "form feeds as line ends": lambda log: log.replace(b"\n", b"\f", 1),
    "another system's line separators": lambda log: log.replace(b"\n", "\u2028".encode(), 1),
    "a NUL byte at the end": lambda log: log + b"\0",
    "a NUL byte in a value": lambda log: log[:-3] + b"\0" + log[-3:],
    "zeros in place of the last row": lambda log: log[: -len(rows(log)[-1])] + bytes(len(rows(log)[-1])),
    "zeros of the same length": lambda log: bytes(len(log)),
    "binary junk": lambda log: random.Random(7).randbytes(500),
    "binary junk at the end": lambda log: log + random.Random(7).randbytes(50) + b"\n",
    "a byte order mark": lambda log: b"\xef\xbb\xbf" + log,
    "UTF-16": lambda log: log.decode().encode("utf-16"),
    "blanks after commas": lambda log: log.replace(b",", b", "),
    "blanks in the rows": lambda log: rows(log)[0] + b"".join(rows(log)[1:]).replace(b",", b" ,"),
    "underscores in numbers": lambda log: log.replace(b",0.9", b",0.9_0"),
    "decimal commas": lambda log: rows(log)[0] + b"".join(rows(log)[1:]).replace(b".", b","),
    "other digits": lambda log: log.replace(b"\n1,", "\n\u0661,".encode()),
    "semicolons": lambda log: log.replace(b",", b";"),
    "tabs": lambda log: log.replace(b",", b"\t"),
    "quotes": lambda log: log.replace(b"\n1,", b'\n"1",'),
    "a comment": lambda log: b"# degrade\n" + log,
    "an error of 2": lambda log: log.replace(b"0.9", b"2.0"),
    "a step twice": lambda log: log.replace(b"\n2,4,", b"\n2,2,"),
    "a step beyond the last": lambda log: log.replace(rows(log)[-1][:4], rows(log)[-1][:2] + b"9,"),
}


def every_other(cases):
    """Of cases that come in pairs, the first of one and the second of the next; in a soak all."""
    return [case for i, case in enumerate(cases) if SOAK or i % 4 in (0, 3)]


def is_clean_cut(log, whole):
    """Whether it is what a run may have been interrupted with: a header and whole rows of it, or no file."""
    return log.endswith(b"\n") and whole.startswith(log)


class TestDamagedLog:
    def goes_on(self, whole, data_dir, folder, damage, steps, case):
        """A run with a damaged log and these checkpoints ends with the bytes of an undisturbed one."""
        run = stopped(whole, folder, steps)
        path = run.folder / store.LOG
        if steps[-1] == 6:
            path.write_bytes(whole.log)  # finished, but for the damage
        log = path.read_bytes()
        path.write_bytes(damage(log))
        assert path.read_bytes() != log, case
        assert Run("s", run.folder, CONFIG).outcome is None, f"{case}: taken for a finished run"
        notes, begun = go_on(run, data_dir)
        derived = to_csv(read_state(whole.states[steps[-1]]).epochs, validation=False).encode()
        assert begun == derived, f"{case}: going on, the log is not that of the checkpoint"
        said = [f"{store.LOG} was damaged, and is written anew", f"going on from step {steps[-1]}"]
        assert notes == says(run, *([] if is_clean_cut(damage(log), log) else said)), case
        assert_as_undisturbed(run, whole, case)

    def test_cut_at_every_byte_of_its_last_two_rows_it_is_whole_in_the_end(self, whole, data_dir, tmp_path):
        for steps, length in (((5, 6), len(whole.log)), ((4, 5), len(whole.log) - len(rows(whole.log)[-1]))):
            start = length - sum(map(len, rows(whole.log[:length])[-2:]))
            for offset in spread(start, length, times(length - start)):
                self.goes_on(
                    whole, data_dir, tmp_path / "s", lambda log, end=offset: log[:end], steps, f"cut at {offset}"
                )
                tally(7, "cuts in the last two rows of log.csv: written anew from the checkpoint, the same bytes")

    @pytest.mark.parametrize(("kind", "steps"), every_other(itertools.product(LOG_DAMAGE, [(4, 5), (5, 6)])))
    def test_other_damage_it_is_whole_in_the_end(self, whole, data_dir, tmp_path, kind, steps):
        self.goes_on(whole, data_dir, tmp_path / "s", LOG_DAMAGE[kind], steps, kind)
        tally(7, "other kinds of damage to log.csv: written anew from the checkpoint, the same bytes")

    @pytest.mark.parametrize("kind", ["no file", "a link to itself"])
    @pytest.mark.parametrize("steps", [(4, 5), (5, 6)], ids=["interrupted", "finished"])
    def test_missing_or_something_else_it_is_whole_in_the_end(self, whole, data_dir, tmp_path, kind, steps):
        run = stopped(whole, tmp_path / "s", steps)
        JUNK[kind](run.folder / store.LOG)
        go_on(run, data_dir)
        assert_as_undisturbed(run, whole)

    def test_nothing_else_is_taken_for_a_finished_log(self, whole, tmp_path):
        """Cut at any byte, whole rows are an interrupted run's, and anything else is damage."""
        run = stopped(whole, tmp_path / "s", (5, 6))
        shutil.rmtree(run.folder / store.CHECKPOINTS)
        cuts = [whole.log[:end] for end in range(len(whole.log))]
        for bad in [*cuts, *(damage(whole.log) for damage in LOG_DAMAGE.values())]:
            (run.folder / store.LOG).write_bytes(bad)
            there = Run("s", run.folder, CONFIG)
            assert there.outcome is None, bad
            assert bool(there.problem) != is_clean_cut(bad, whole.log), bad
        tally(7, "cuts of log.csv, at every byte: none taken for a finished run's", len(cuts))

    def test_a_byte_changed_added_or_lost_is_noticed_unless_it_leaves_another_number(self, whole, tmp_path, cli):
        """Only the checkpoint can tell one number from another: `degrade check` compares the two."""
        run = stopped(whole, tmp_path / "s", (5, 6))
        rng, missed = random.Random(7), []
        for _ in range(times(8_000)):
            at, byte = rng.randrange(len(whole.log)), rng.choice(b"\n\r\t\f ,.-+_e0123456789\0\x85\xff")
            bad = whole.log[:at] + rng.choice([b"", bytes([byte])]) + whole.log[at + rng.randrange(2) :]
            if bad != whole.log:
                (run.folder / store.LOG).write_bytes(bad)
                there = Run("s", run.folder, CONFIG)
                if there.outcome:
                    assert to_csv(there.epochs, validation=False).encode() == bad
                    missed.append(bad)
                tally(7, "bytes of log.csv changed, added or lost: only another number is taken for a finished run's")
        assert missed
        for bad in rng.sample(sorted(set(missed)), times(40)):
            (run.folder / store.LOG).write_bytes(bad)
            result = cli("check", run.folder.parent)
            assert result.exit_code == 1
            assert str(run.folder / store.LOG) in result.stdout
            tally(7, "finished logs with another number: named by degrade check")

    def test_without_a_checkpoint_it_is_left_as_it_is_and_the_run_refused(self, whole, data_dir, tmp_path):
        """Results from git: rows that could not be had again."""
        length = len(whole.log)
        start = length - sum(map(len, rows(whole.log)[-2:]))
        cuts = [whole.log[:end] for end in spread(start, length, times(length - start))]
        for bad in [*cuts, *(damage(whole.log) for damage in LOG_DAMAGE.values())]:
            if is_clean_cut(bad, whole.log):
                continue
            run = stopped(whole, tmp_path / "s", (5, 6))
            shutil.rmtree(run.folder / store.CHECKPOINTS)
            (run.folder / store.LOG).write_bytes(bad)
            with pytest.raises(Failure) as error:
                list(train_run(task(run, data_dir), "cpu"))
            message = str(error.value)
            assert message.startswith(f"{run.folder / store.LOG}: ")
            assert message.endswith("; restore it, or delete it and a sweep trains the run again")
            assert "\n" not in message
            assert (run.folder / store.LOG).read_bytes() == bad
            assert not (run.folder / store.ERROR).exists()
            tally(7, "damaged logs without a checkpoint: left as they are, byte for byte, and the run refused")

    def test_with_no_sound_checkpoint_it_is_left_as_it_is_and_the_run_refused(self, whole, data_dir, tmp_path):
        run = stopped(whole, tmp_path / "s", (4, 5))
        for path in [run.folder / store.LOG, *newest_and_older(run)]:
            path.write_bytes(b"junk")
        with pytest.raises(Failure) as error:
            list(train_run(task(run, data_dir), "cpu"))
        assert str(error.value).startswith(f"{run.folder / store.LOG}: ")
        assert str(error.value).endswith("; restore it, or delete it and a sweep trains the run again")
        assert {path.read_bytes() for path in [run.folder / store.LOG, *newest_and_older(run)]} == {b"junk"}

    def test_without_a_checkpoint_the_other_runs_of_the_sweep_go_on(self, whole, data_dir, tmp_path, cli):
        kinds = [*LOG_DAMAGE, "cut"]
        bad = {}
        for seed, kind in enumerate(kinds):
            run = write_run(tmp_path / "s", micro(seed=seed), [])
            damage = LOG_DAMAGE.get(kind, lambda log: log[:-5])
            bad[run.folder / store.LOG] = damage(whole.log)
            (run.folder / store.LOG).write_bytes(damage(whole.log))
        seeds = list(range(len(kinds) + 1))
        for flags, left in ((), 1), (("--retry-failed",), 0):
            result = sweep(cli, data_dir, tmp_path, *flags, seeds=seeds)
            assert result.exit_code == 1
            assert result.stderr == f"degrade: {len(kinds)} of {len(kinds) + 1} runs not done (failed)\n"
            assert f"{len(kinds) + 1} runs, {left + len(kinds) * bool(flags)} to train\n" in result.stdout
            lines = result.stdout.splitlines()
            for path, data in bad.items():
                assert path.read_bytes() == data, kinds[list(bad).index(path)]
                name = path.parent.name
                assert len([line for line in lines if line.startswith(f"{name}: {path}: ")]) == 1, name
        healthy = Run.open("s", tmp_path / "s" / micro(seed=len(kinds)).run_id)
        assert healthy.outcome == "done"


class TestDamageBeside:
    """Files that a run has beside its log and checkpoints."""

    @pytest.mark.parametrize("name", [store.LOG, store.TIMING, "checkpoint"])
    def test_a_folder_in_a_files_place_is_named_in_a_line_and_stays(self, whole, data_dir, tmp_path, name):
        """It may be somebody's. Once it is gone, the run goes on."""
        run = stopped(whole, tmp_path / "s", (4, 5))
        path = newest_and_older(run)[0] if name == "checkpoint" else run.folder / name
        replaced(lambda path: (path.mkdir(), (path / "x").touch()))(path)
        with pytest.raises(OSError) as error:
            go_on(run, data_dir)
        assert path.name in str(error.value)
        assert (path / "x").exists()
        shutil.rmtree(path)
        go_on(run, data_dir)
        assert_as_undisturbed(run, whole)

    @pytest.mark.parametrize("kind", ["nothing", "half", "junk", "a link to itself"])
    def test_a_damaged_timing_does_not_stop_a_run(self, whole, data_dir, tmp_path, kind):
        run = stopped(whole, tmp_path / "s", (4, 5))
        JUNK[kind](run.folder / store.TIMING)
        assert go_on(run, data_dir)[0] == ()
        assert_as_undisturbed(run, whole)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", *(f'{{"threads": {n}}}' for n in ("null", "0", '"1"', "1025", '1, "changes": 5'))]
    )
    def test_a_damaged_environment_is_named_in_a_line(self, whole, data_dir, tmp_path, text):
        """The bits depend on the number of threads, which is nowhere else."""
        run = stopped(whole, tmp_path / "s", (4, 5))
        (run.folder / store.ENVIRONMENT).write_text(text)
        with pytest.raises(Failure, match=store.ENVIRONMENT):
            go_on(run, data_dir)
        assert not (run.folder / store.ERROR).exists()

    @pytest.mark.parametrize("kind", ["nothing", "junk", "a folder", "a link to itself"])
    def test_a_damaged_error_does_not_keep_show_from_the_other_runs(self, tmp_path, cli, kind):
        failed = write_run(tmp_path / "s", CONFIG, [])
        (failed.folder / store.ERROR).write_text("ValueError: why")
        JUNK[kind](failed.folder / store.ERROR)
        other = write_run(tmp_path / "s", micro(seed=1), [(0.5, 0.5)])
        result = cli("show", tmp_path)
        assert result.exit_code in (0, 1)
        assert other.folder.name in result.stdout
        assert failed.folder.name in result.stdout


# --- Promise 13: no checkpoint executes code ---


def put(value):
    """Pickle code that puts a value on the stack."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def imported(dotted):
    """Pickle code that imports something."""
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(function, *arguments):
    """Pickle code that calls a function; both are pickle code."""
    return function + b"(" + b"".join(arguments) + b"tR"


def do(dotted, *values):
    """Pickle code that calls a function with plain values."""
    return call(imported(dotted), *map(put, values))


def file_with(path, data):
    path.write_bytes(data)
    return str(path)


def hostile_module(canary):
    """The name of a module that makes the canary when it is imported."""
    path = canary.with_name(f"hostile_{hashlib.sha256(bytes(canary)).hexdigest()[:8]}.py")
    file_with(path, b"open(%r, 'w')\nclass Net: pass\n" % str(canary))
    return path.stem


def hostile_hub(canary):
    """A folder that torch.hub takes a net from."""
    file_with(canary.with_name("hubconf.py"), b"def net(): open(%r, 'w')\n" % str(canary))
    return str(canary.parent)


def hostile_array(canary):
    path = canary.with_suffix(".npy")
    np.save(path, np.array([Reduces(canary)], dtype=object))
    return str(path)


class ReducesEx:
    def __init__(self, path):
        self.path = str(path)

    def __reduce_ex__(self, _):
        return os.mkdir, (self.path,)


class Reduces:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


MKDIR, PARTIAL, OS = imported("os.mkdir"), imported("functools.partial"), do("builtins.__import__", "os")

# Pickle code that makes the file or folder `c`.
EVIL = {
    "os.system": lambda c: do("os.system", f"touch {c}"),
    "posix.system": lambda c: do("posix.system", f"touch {c}"),
    "subprocess.Popen": lambda c: do("subprocess.Popen", ["touch", str(c)]),
    "builtins.eval": lambda c: do("builtins.eval", f"open({str(c)!r}, 'w')"),
    "builtins.exec": lambda c: do("builtins.exec", f"open({str(c)!r}, 'w')"),
    "timeit.timeit": lambda c: do("timeit.timeit", "pass", f"open({str(c)!r}, 'w')"),
    "runpy.run_path": lambda c: do("runpy.run_path", file_with(c.with_suffix(".py"), b"open(%r, 'w')" % str(c))),
    "__import__ of a hostile module": lambda c: do("builtins.__import__", hostile_module(c)),
    "a class of a hostile module": lambda c: imported(f"{hostile_module(c)}.Net"),
    "a chain of getattr": lambda c: call(call(imported("builtins.getattr"), OS, put("mkdir")), put(str(c))),
    "operator.attrgetter": lambda c: call(call(do("operator.attrgetter", "mkdir"), OS), put(str(c))),
    "operator.methodcaller": lambda c: call(do("operator.methodcaller", "mkdir", str(c)), OS),
    "functools.partial": lambda c: call(call(PARTIAL, MKDIR, put(str(c)))),
    "torch.hub": lambda c: do("torch.hub._load_local", hostile_hub(c), "net"),
    "torch.load": lambda c: call(
        PARTIAL  # new, with a keyword
        + (b"(" + imported("torch.load") + put(file_with(c.with_suffix(".pt"), pickled(put(Reduces(c))))) + b"t")
        + (put({"weights_only": False}) + b"\x92")
    ),
    "torch.storage._load_from_bytes": lambda c: do("torch.storage._load_from_bytes", pickled(put(Reduces(c)))),
    "torch._tensor._rebuild_from_type_v2": lambda c: call(
        imported("torch._tensor._rebuild_from_type_v2"), MKDIR, imported("torch.Tensor"), put((str(c),)), put({})
    ),
    "pickle.loads": lambda c: do("pickle.loads", pickled(put(Reduces(c)))),
    "numpy.load": lambda c: do("numpy.load", hostile_array(c), None, True),
    "a NumPy array of objects": lambda c: put(np.array([Reduces(c)], dtype=object)),
    "__reduce__": lambda c: put(Reduces(c)),
    "__reduce_ex__": lambda c: put(ReducesEx(c)),
    "__setstate__": lambda c: call(
        PARTIAL + (b"(" + imported("builtins.print") + b"t\x81") + (b"(" + MKDIR + put((str(c),)) + b"}}tb")
    ),
    "copyreg's extension codes": lambda c: (
        do("copyreg.add_extension", "os", "mkdir", 77) + b"0" + call(b"\x82\x4d", put(str(c)))
    ),
    "the INST opcode": lambda c: b"(" + put(str(c)) + b"ios\nmkdir\n",
    "the OBJ opcode": lambda c: b"(" + MKDIR + put(str(c)) + b"o",
    "the STACK_GLOBAL opcode": lambda c: call(put("os") + put("mkdir") + b"\x93", put(str(c))),
}


def pickled(code):
    return b"\x80\x02" + code + b"."


def records(state):
    """The files in a checkpoint, which is a zip."""
    with zipfile.ZipFile(io.BytesIO(state)) as there:
        return {name: there.read(name) for name in there.namelist()}


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, data in files.items():
            new.writestr(name, data)
    return file.getvalue()


def with_records(state, **changes):
    """A checkpoint with other files in it; None removes one."""
    there = records(state)
    for name, data in changes.items():
        (path,) = [path for path in there if path.partition("/")[2].replace("/", "_").replace(".", "_") == name]
        there[path] = data
    return zipped({name: data for name, data in there.items() if data is not None})


def tarred(code):
    """A checkpoint of torch 0.1."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in ("sys_info", "storages", "tensors", "pickle"):
            tar.addfile(info := tarfile.TarInfo(member), None)
            info.size = len(pickled(code))
            tar.addfile(info, io.BytesIO(pickled(code)))
    return file.getvalue()


# The forms in which torch.load meets pickle code. A sound state beside it would be gone on from.
FORMS = {
    "alone in a zip": lambda code, sound: with_records(sound, data_pkl=pickled(code)),
    "beside a sound state": lambda code, sound: with_records(
        sound, data_pkl=named_record(sound, "data.pkl")[:-1] + put("x") + code + b"s."
    ),
    "in a pickle": lambda code, sound: pickled(code),
    "in a tar": lambda code, sound: tarred(code),
}


def named_record(state, name):
    return next(data for path, data in records(state).items() if path.endswith(f"/{name}"))


class Script(torch.nn.Module):
    """Compiled by TorchScript, it makes a file when it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.tensor = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self):
        return self.path

    @torch.jit.export
    def __setstate__(self, path: str):
        self.path = path
        self.training = False
        self.tensor = torch.from_file(path, True, 1)

    def forward(self, x):
        return x + self.tensor


def scripted(canary):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.script(Script(str(canary))), file)
    return file.getvalue()


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """What hostile files make, in a folder that modules are found in."""
    (tmp_path / "evil").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "evil")
    return tmp_path / "evil" / "canary"


def assert_refused(whole, data_dir, data):
    """It is no state, and nothing has changed once that is clear."""
    training = Training(CONFIG, load_splits(CONFIG, data_dir, "cpu"), "cpu")
    before = training.state()
    with pytest.raises(ValueError) as error:
        training.restore(data)
    assert str(error.value).isprintable()  # so one line, and nothing that a terminal would obey
    assert len(str(error.value)) < 400
    assert training.state() == before


def passed_over(whole, data_dir, folder, data):
    """A run with such a newest checkpoint goes on from the one before, or anew, and says so; nothing else happens."""
    for steps, then in (((3, 4), "going on from step 4"), ((), "starting anew"))[: times(2)]:
        run = stopped(whole, folder, steps)
        path = run.folder / store.CHECKPOINTS / named(5, data)
        path.write_bytes(data)
        assert commit.read_checkpoint(path) == data  # it is what its name says, and so it is looked into
        (damaged, said), _ = go_on(run, data_dir)
        assert damaged.startswith(f"{run.folder.name}: {path.name} is damaged (it")
        assert said == f"{run.folder.name}: {then}"
        assert_as_undisturbed(run, whole)


def some(kinds):
    """A quarter of them, or all."""
    kinds = list(kinds)
    return [kinds[i] for i in spread(0, len(kinds), times(len(kinds)))]


class TestMaliciousCheckpoints:
    @pytest.mark.parametrize("kind", EVIL)
    @pytest.mark.parametrize("form", FORMS)
    def test_it_is_not_executed(self, whole, data_dir, canary, kind, form):
        assert_refused(whole, data_dir, FORMS[form](EVIL[kind](canary), whole.states[5]))
        assert not canary.exists()
        tally(13, "malicious checkpoints: nothing executed, refused with nothing changed")

    @pytest.mark.parametrize(("form", "kind"), some(itertools.product(FORMS, EVIL)))
    def test_a_run_passes_it_over(self, whole, data_dir, tmp_path, canary, kind, form):
        passed_over(whole, data_dir, tmp_path / "s", FORMS[form](EVIL[kind](canary), whole.states[5]))
        assert not canary.exists()
        tally(13, "malicious checkpoints with the right hash: nothing executed, passed over and said")

    @pytest.mark.parametrize("kind", EVIL)
    @pytest.mark.parametrize("form", FORMS)
    def test_loaded_carelessly_it_would_be(self, whole, tmp_path, canary, kind, form):
        path = tmp_path / "evil.pt"
        path.write_bytes(FORMS[form](EVIL[kind](canary), whole.states[5]))
        try:
            torch.load(path, weights_only=False)
        except Exception as error:  # after what it does, it may not be anything
            print(error)
        finally:
            if kind.startswith("copyreg") and canary.exists():
                copyreg.remove_extension("os", "mkdir", 77)
        deadline = time.monotonic() + 5
        while not canary.exists() and time.monotonic() < deadline:  # a process that it has started
            time.sleep(0.01)
        assert canary.exists()

    def test_a_torchscript_archive_is_not_executed(self, whole, data_dir, tmp_path, canary):
        data = scripted(canary)
        assert_refused(whole, data_dir, data)
        passed_over(whole, data_dir, tmp_path / "s", data)
        assert not canary.exists()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), weights_only=False)
        assert canary.exists()
        tally(13, "malicious checkpoints with the right hash: nothing executed, passed over and said")


class Rebuilt:
    """Pickled as the tensor that torch would make of these numbers and a storage."""

    def __init__(self, tensor, offset, size, stride):
        self.of = tensor.untyped_storage(), tensor, offset, size, stride

    def __reduce__(self):
        _, tensor, offset, size, stride = self.of
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())


def first(values):
    """The name and the tensor of the first weights."""
    return next(iter(values["net"].items()))


def weights(make):
    """Change the first weights."""

    def change(values, about):
        name, tensor = first(values)
        values["net"][name] = make(tensor)

    return change


def rebuilt(offset=0, size=None, stride=None):
    return weights(lambda t: Rebuilt(t, offset, tuple(size or t.shape), tuple(stride or t.stride())))


def sets(key, value):
    return lambda values, about: about.update({key: value})


def row(**fields):
    """Change the last row of the log in it."""
    return lambda values, about: about["epochs"][-1].update(fields)


def config(**fields):
    return lambda values, about: about["config"].update(fields)


def raw(about):
    return lambda values, _: values.update(about=about)


DIGITS = "1" + "0" * 5000
HOSTILE = {
    **{f"step {v!r:.20}": sets("step", v) for v in (math.nan, math.inf, -1, -(10**400), 10**400, 1e308, 3, 7, True)},
    **{f"step {v!r:.20}": sets("step", v) for v in ("five", "", None, [5], {"step": 5})},
    "no step": lambda values, about: about.pop("step"),
    **{f"wrong {v!r:.20}": sets("wrong", v) for v in (math.nan, math.inf, -1, 11, 10**18, 10**30, -(10**30), 1e308)},
    **{f"wrong {v!r:.20}": sets("wrong", v) for v in ("ten", None, [1])},
    "no wrong": lambda values, about: about.pop("wrong"),
    **{f"epochs {v!r:.20}": sets("epochs", v) for v in (None, 5, "epochs", {}, [[]], [None], ["row"], [5], [{}])},
    "no epochs": lambda values, about: about.pop("epochs"),
    "no rows": sets("epochs", []),
    "a row less": lambda values, about: about["epochs"].pop(),
    "a row twice": lambda values, about: about["epochs"].append(about["epochs"][-1]),
    "a row too many": lambda values, about: about["epochs"].append(about["epochs"][-1] | {"epoch": 3, "step": 6}),
    "rows swapped": lambda values, about: about["epochs"].reverse(),
    "10,000 rows": lambda values, about: about.update(epochs=5_000 * about["epochs"]),
    "a row without its losses": lambda values, about: about["epochs"][-1].pop("train_loss"),
    "a row with a field more": row(accuracy=0.5),
    **{f"epoch {v!r:.20}": row(epoch=v) for v in (0, 1, 3, -2, 2.5, 10**400, math.nan, "2", None, [2])},
    **{f"a row's step {v!r:.20}": row(step=v) for v in (0, 3, -4, 4.0, 10**400, math.nan, "4", None, [4])},
    **{f"error {v!r:.20}": row(train_error=v) for v in (2.0, -0.5, math.nan, 10**400, "0.9", None, [0.9], True)},
    **{f"loss {v!r:.20}": row(train_loss=v) for v in (2, 10**400, "2.3", "2.3\n9,9", None, [2.3], {"a": 1}, True)},
    **{f"test loss {v!r:.20}": row(test_loss=v) for v in (2, "2.3", "2.3,9", None, [2.3])},
    **{f"lr {v!r:.20}": row(lr=v) for v in (1, "0.1", "0.1\n", None, [0.1], False)},
    "validation that it has not": row(val_loss=0.5, val_error=0.5),
    "no config": lambda values, about: about.pop("config"),
    **{f"config {v!r:.20}": sets("config", v) for v in (None, 5, "plain-8-s0", [], {}, [["block", "plain"]])},
    "a config without a block": lambda values, about: about["config"].pop("block"),
    "another's config": config(seed=1),
    **{
        f"config with {field} {v!r:.20}": config(**{field: v})
        for field, values in {
            "unknown": (1,),
            "block": ("dense", ["plain"], None),
            "depth": (10**9, 10**400, -8, math.nan, "8", 8.0, 9),
            "seed": (-1, 10**400, True),
            "steps": (0, -6, 10**400, math.nan, math.inf, "6"),
            "batch_size": (0, -10, 10**400),
            "lr": (math.nan, math.inf, -1.0, 10**400, "0.1", None),
            "milestones": ([3, 3], [[3]], [math.nan], 3, "3", [10**400]),
            "train_images": (0, -20, 10**400),
        }.items()
        for v in values
    },
    **{f"about {v!r:.20}": raw(v) for v in ("", "null", "[]", "5", "NaN", '"about"', "{", "\0", '{"step": 5}', DIGITS)},
    "about that nests deeply": raw("[" * 1_000_000),
    "about that nests deeply, in order": raw('{"config": ' * 100_000 + "1" + "}" * 100_000),
    "rows that nest deeply": raw('{"epochs": ' + "[" * 900 + "]" * 900 + ', "step": 5, "wrong": 0, "config": {}}'),
    "about with a number of 5,001 digits": raw(f'{{"step": {DIGITS}}}'),
    **{f"about {type(v).__name__}": raw(v) for v in (b"\xff", None, 5, [], {}, torch.zeros(3), {"a"})},
    "no about": lambda values, about: values.pop("about"),
    "no net": lambda values, about: values.pop("net"),
    "no momentum": lambda values, about: values.pop("momentum"),
    "a net that is a list": lambda values, about: values.update(net=list(values["net"].values())),
    "no weights": lambda values, about: values.update(net={}),
    "weights less": lambda values, about: values["net"].popitem(),
    "weights more": lambda values, about: values["net"].update(x=torch.zeros(1)),
    "weights of another name": lambda values, about: values["net"].update(x=values["net"].popitem()[1]),
    "weights in another order": lambda values, about: values.update(net=dict(reversed(values["net"].items()))),
    "momentum less": lambda values, about: values["momentum"].pop(),
    "momentum more": lambda values, about: values["momentum"].append(torch.zeros(1)),
    "momentum that is a dict": lambda values, about: values.update(momentum=dict(enumerate(values["momentum"]))),
    "momentum that is a tensor": lambda values, about: values.update(momentum=torch.zeros(3)),
    "momentum of numbers": lambda values, about: values.update(momentum=[0.0] * len(values["momentum"])),
    "a state that is a list": lambda values, about: values.clear(),
    "a number for weights": weights(lambda t: 1.0),
    "text for weights": weights(lambda t: "weights"),
    "weights of another shape": weights(lambda t: t.flatten()),
    "weights in double precision": weights(torch.Tensor.double),
    "weights in half precision": weights(torch.Tensor.half),
    "complex weights": weights(lambda t: t + 0j),
    "whole weights": weights(torch.Tensor.int),
    "sparse weights": weights(torch.Tensor.to_sparse),
    "nested weights": weights(lambda t: torch.nested.as_nested_tensor(list(t))),
    "quantised weights": weights(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "weights that are a Parameter": weights(torch.nn.Parameter),
    "weights without a storage": weights(lambda t: t.to("meta")),
    "all without a storage": lambda values, about: values.update(
        net={n: t.to("meta") for n, t in values["net"].items()}
    ),
    "weights of a huge size": rebuilt(size=(10**12, 1, 1, 1)),
    "weights of a huge size, by stride 0": rebuilt(size=(10**12, 1, 1, 1), stride=(0, 0, 0, 0)),
    "weights whose size overflows": rebuilt(size=(2**62, 8, 1, 1)),
    "weights of a negative size": rebuilt(size=(-1, 3, 3, 3)),
    "weights outside their storage": rebuilt(offset=10**9),
    "weights just outside their storage": rebuilt(offset=1),
    "weights before their storage": rebuilt(offset=-1),
    "weights at an offset that overflows": rebuilt(offset=2**63 - 1),
    "weights whose strides lead outside": rebuilt(stride=(27, 10**9, 3, 1)),
    "weights with negative strides": rebuilt(stride=(-27, -9, -3, -1)),
}

BROKEN = {
    "lists nested deeply": lambda s: with_records(s, data_pkl=pickled(b"]" * 10**5 + b"a" * (10**5 - 1))),
    "tuples nested deeply": lambda s: with_records(s, data_pkl=pickled(b")" + b"\x85" * 10**5)),
    "an exabyte of zeros": lambda s: with_records(s, data_pkl=pickled(do("builtins.bytearray", 10**18))),
    "a tensor of an exabyte": lambda s: with_records(s, data_pkl=pickled(do("torch.FloatTensor", 10**18))),
    "text of 4 GiB that is not there": lambda s: with_records(s, data_pkl=b"\x80\x02X\xff\xff\xff\xffx."),
    "a pickle without an end": lambda s: with_records(s, data_pkl=b"\x80\x02}"),
    "an empty pickle": lambda s: with_records(s, data_pkl=b""),
    "calls on an empty stack": lambda s: with_records(s, data_pkl=pickled(b"R" * 10)),
    "an entry set in a tensor": lambda s: with_records(
        s, data_pkl=pickled(call(imported("torch.FloatTensor")) + b"K\0Gs")
    ),
    "a memo of nothing": lambda s: with_records(s, data_pkl=pickled(b"h\x09")),
    "a name that a terminal would obey": lambda s: with_records(s, data_pkl=pickled(imported("os.\x1b[2J\x07\x9bx"))),
    "no pickle": lambda s: with_records(s, data_pkl=None),
    "a storage shorter than it claims": lambda s: with_records(s, data_0=b"\0"),
    "an empty storage": lambda s: with_records(s, data_0=b""),
    "no storage": lambda s: with_records(s, data_0=None),
    "another byte order": lambda s: with_records(s, byteorder=b"middle"),
    "a version of a million": lambda s: with_records(s, version=b"1000000\n"),
    "a version that is text": lambda s: with_records(s, version=b"new\n"),
    "a zip with nothing in it": lambda s: zipped({}),
    "a zip cut off": lambda s: s[:-30],
    "a zip in a zip": lambda s: zipped({"archive/data.pkl": s}),
    "an array of NumPy's": lambda s: npy(np.zeros(3)),
    "nothing": lambda s: b"",
    "a line of text": lambda s: b"weights\n",
    "a megabyte of junk": lambda s: random.Random(13).randbytes(10**6),
    "a megabyte of zeros": lambda s: bytes(10**6),
}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def hostile(state, change):
    """A sound state but for one change."""
    values = torch.load(io.BytesIO(state), weights_only=True)
    text, about = values["about"], json.loads(values["about"])
    change(values, about)
    if values.get("about") is text and text != (changed := json.dumps(about)):
        values["about"] = changed
    file = io.BytesIO()
    torch.save(values or [], file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # torch's, of nested and quantised tensors
class TestHostileCheckpoints:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_a_state_with_one_hostile_part_is_refused(self, whole, data_dir, kind):
        assert hostile(whole.states[5], lambda values, about: None) == whole.states[5]
        assert_refused(whole, data_dir, hostile(whole.states[5], HOSTILE[kind]))
        tally(13, "states with one hostile number, text or tensor: refused, with nothing changed")

    @pytest.mark.parametrize("kind", BROKEN)
    def test_a_broken_file_is_refused(self, whole, data_dir, kind):
        assert_refused(whole, data_dir, BROKEN[kind](whole.states[5]))
        tally(13, "broken or oversized archives and pickles: refused, with nothing changed")

    @pytest.mark.parametrize("kind", some([*HOSTILE, *BROKEN]))
    def test_a_run_passes_it_over(self, whole, data_dir, tmp_path, kind):
        data = hostile(whole.states[5], HOSTILE[kind]) if kind in HOSTILE else BROKEN[kind](whole.states[5])
        passed_over(whole, data_dir, tmp_path / "s", data)
        tally(13, "hostile or broken checkpoints with the right hash: passed over and said")


NEVER = {"marshal", "shelve", "joblib", "dill", "cloudpickle", "jsonpickle", "_pickle", "pickle", "runpy", "code"}
NEVER |= {f"builtins.{function}" for function in ("eval", "exec", "compile", "__import__")}
NEVER |= {"os.system", "os.popen", "pty", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml"}
NEVER |= {"torch.jit.load", "torch.hub", "torch.package", "torch.serialization", "torch.storage", "pandas.read_pickle"}
ONLY_WITH = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def executing(source, allowed=()):
    """What in a module can execute what it reads: `line: name`, whatever the name was imported as."""
    tree, names, found, fine = ast.parse(source), {}, [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                found.append((node, alias.name))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" not in ONLY_WITH:
                    found.append((node, f"{node.module}.{alias.name}"))

    def dotted(node):
        if isinstance(node, ast.Name):
            return names.get(node.id, f"builtins.{node.id}" if node.id in BUILTINS else "")
        if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
            return f"{base}.{node.attr}"
        return ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            option, safe = ONLY_WITH.get(dotted(node.func), (None, None))
            if option and keywords.get(option) is safe:
                fine.add(node.func)
            if any(k.arg == "shell" and keywords.get("shell") is not False for k in node.keywords):
                found.append((node, "shell=True"))
        if isinstance(node, ast.Name | ast.Attribute) and node not in fine:
            found.append((node, dotted(node)))
    bad = {*NEVER, *ONLY_WITH, "shell=True"} - set(allowed)
    return sorted(
        {f"{node.lineno}: {what}" for node, what in found if any(f"{what}.".startswith(f"{name}.") for name in bad)}
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "import torch; torch.load(f, weights_only=1)",
        "import torch; torch.load(f, weights_only=safe)",
        "import torch; torch.load(f, **options)",
        "import torch as t; t.load(f)",
        "from torch import load; load(f)",
        "from torch import load as read; read(f)",
        "import torch; read = torch.load",
        "import torch; map(torch.load, files)",
        "from torch import serialization; serialization.load(f)",
        "from torch import jit; jit.load(f)",
        "import torch; torch.jit.load(f)",
        "import torch; torch.hub.load(f)",
        "import torch.hub",
        "import torch; torch.storage._load_from_bytes(b)",
        "import pickle",
        "import pickle as p; p.loads(b)",
        "from pickle import loads",
        "def f():\n    import pickle",
        "import marshal",
        "import shelve",
        "import joblib",
        "import dill",
        "from cloudpickle import load",
        "import yaml; yaml.load(f)",
        "import pandas as pd; pd.read_pickle(f)",
        "import numpy as np; np.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import numpy as np; np.load(f, None, True)",
        "from numpy import load; load(f)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "run = eval",
        "import builtins; builtins.eval(text)",
        "__import__(name)",
        "import os; os.system(line)",
        "import os as o; o.popen(line)",
        "from os import system",
        "import subprocess; subprocess.run(line, shell=True)",
        "import subprocess; subprocess.Popen(line, shell=flag)",
        "import runpy",
    ],
)
def test_the_lint_finds_what_executes_what_it_reads(source):
    assert executing(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f, map_location='cpu', weights_only=True)",
        "from torch import load; load(f, weights_only=True)",
        "import numpy as np; np.load(f, allow_pickle=False)",
        "import json; json.load(f)",
        "import torch, re; net.eval(); re.compile(p); torch.compile(net)",
        "from degrade import load; load('results')",
        "import subprocess; subprocess.run(['git'], shell=False)",
        "import os; os.replace(a, b)",
    ],
)
def test_the_lint_lets_pass_what_does_not(source):
    assert not executing(source)


def test_nothing_in_degrade_executes_what_it_reads():
    """Pickles are read by one module, which checks their MD5 first (test_hostile_data.py)."""
    package = REPOSITORY / "degrade"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        allowed = {"pickle"} if path == package / "data" / "official.py" else ()
        assert executing(path.read_text(), allowed) == [], path
        tally(13, "modules linted: nothing executes what it reads")
    assert executing((package / "data" / "official.py").read_text())


# --- Promise 16: another protocol is refused, and so is a run whose configuration was edited; older results are not ---

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
DEFAULTED = [field.name for field in dataclasses.fields(RunConfig) if field.default is not dataclasses.MISSING]
# Another value of each field than `CONFIG`'s. A field without one fails the tests: add it.
OTHER = {
    "block": "residual",
    "depth": 14,
    "seed": 999,
    "dataset": "cifar10",
    "width": 2,
    "shortcut": "B",
    "init": "zero-gamma",
    "train_images": 30,
    "val_images": 5,
    "test_images": 20,
    "split_seed": 1,
    "input_mean": [0.5, 0.25, 0.125],
    "padding": "black",
    "steps": 12,
    "batch_size": 5,
    "lr": 0.5,
    "milestones": [4],
    "warmup_depth": 8,
    "warmup_lr": 0.5,
    "warmup_steps": 3,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "decay": "conv",
    "precision": "bf16",
    "augment": "none",
    "bn_batch_size": 2,
}


def test_every_field_has_another_value_to_test_with():
    assert list(OTHER) == FIELDS
    for field, value in OTHER.items():
        assert (
            RunConfig.from_dict(CONFIG.as_dict() | {field: value}).as_dict()[field] == value != CONFIG.as_dict()[field]
        )


def as_flag(field):
    value = OTHER[field]
    return f"--{field.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)


def edit(path, **changes):
    """Change a JSON file as a person would."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes, indent=2) + "\n")


class TestProtocol:
    @pytest.mark.parametrize("how", ["a flag", "TOML"])
    @pytest.mark.parametrize("field", [field for field in FIELDS if field not in SWEPT])
    def test_a_sweep_that_differs_in_one_field_is_refused(
        self, whole, data_dir, tmp_path, cli, monkeypatch, field, how
    ):
        monkeypatch.setattr("degrade.data.fetch", lambda *_: pytest.fail("it is not refused"))
        shutil.copytree(whole.folder, tmp_path / "out" / "s")
        before = listing(tmp_path / "out")
        if how == "TOML":
            result = sweep(cli, data_dir, tmp_path / "out", seeds=[0, 1], **{field: OTHER[field]})
        else:
            result = sweep(cli, data_dir, tmp_path / "out", *as_flag(field), seeds=[0, 1])
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("degrade: study s was run with another protocol: ")
        assert f"{field} {CONFIG.as_dict()[field]} there, {OTHER[field]} here" in line
        assert line.count(" there, ") == 1
        assert line.endswith("Give this sweep a study of its own with --study NAME")
        assert listing(tmp_path / "out") == before
        tally(16, "sweeps that differ in one field: refused with the difference, exit 2, nothing written")

    @pytest.mark.parametrize("field", SWEPT)
    def test_one_that_differs_in_what_is_swept_is_not(self, whole, data_dir, tmp_path, cli, field):
        shutil.copytree(whole.folder, tmp_path / "out" / "s")
        result = sweep(cli, data_dir, tmp_path / "out", "--dry-run", **{f"{field}s": [OTHER[field]]})
        assert (result.exit_code, result.stderr) == (0, "")
        assert "1 run, 1 to train" in result.stdout


class TestEditedRuns:
    @pytest.mark.parametrize("field", FIELDS)
    def test_an_edited_configuration_is_refused(self, whole, data_dir, tmp_path, field):
        run = stopped(whole, tmp_path / "s", (4, 5))
        edit(run.folder / store.CONFIG, **{field: OTHER[field]})
        before = listing(run.folder)
        with pytest.raises(Failure, match=rf"{store.CONFIG} was edited, or its folder renamed: it belongs to "):
            Run.open("s", run.folder)
        with pytest.raises(Failure, match=store.CONFIG):
            list(train_run(task(run, data_dir), "cpu"))
        (run.folder / store.LOCK).unlink()
        assert listing(run.folder) == before
        tally(16, "fields of a run's config.json edited: the run refused, its folder left as it was")

    @pytest.mark.parametrize("field", DEFAULTED)
    def test_a_field_lost_is_an_edit_too(self, whole, tmp_path, field):
        run = stopped(whole, tmp_path / "s", (4, 5))
        values = CONFIG.as_dict()
        del values[field]
        (run.folder / store.CONFIG).write_text(json.dumps(values))
        with pytest.raises(Failure, match=store.CONFIG):
            Run.open("s", run.folder)

    def test_one_that_is_only_laid_out_anew_is_not(self, whole, tmp_path):
        run = stopped(whole, tmp_path / "s", (4, 5))
        (run.folder / store.CONFIG).write_text(json.dumps(CONFIG.as_dict(), sort_keys=True))
        assert Run.open("s", run.folder).config == CONFIG

    def test_a_sweep_leaves_them_alone_and_trains_the_others(self, whole, data_dir, tmp_path, cli):
        """A run for each field, with that one edited, and one that is missing."""
        edited = []
        for seed, field in enumerate(FIELDS):
            run = write_run(tmp_path / "s", micro(seed=seed), [(0.5, 0.5)])
            edit(run.folder / store.CONFIG, **{field: OTHER[field]})
            edited.append(run.folder)
        before = {folder: listing(folder) for folder in edited}
        total = len(edited) + 1
        for flags in ((), ("--retry-failed",)):
            result = sweep(cli, data_dir, tmp_path, *flags, seeds=list(range(total)))
            assert result.exit_code == 1
            assert result.stderr == f"degrade: {len(edited)} of {total} runs not done (failed)\n"
            for folder in edited:
                line = f"{folder.name}: {folder / store.CONFIG} was edited, or its folder renamed: it belongs to "
                assert line in result.stdout
                after = listing(folder)
                assert after | {store.LOCK: before[folder][store.LOCK]} == before[folder]  # taken by --retry-failed
                assert flags or after == before[folder]
        healthy = Run.open("s", tmp_path / "s" / micro(seed=len(edited)).run_id)
        assert healthy.outcome == "done"
        for command, *options in (["show", "--json"], ["plot", "--formats", "png"], ["verdict", "--json"]):
            result = cli(command, tmp_path, *options)
            assert result.exit_code == 1
            left_out = [line for line in result.stderr.splitlines() if line.startswith("degrade: left out: ")]
            assert len(left_out) == len(edited)
            for folder in edited:
                assert sum(f"{folder / store.CONFIG} was edited" in line for line in left_out) == 1
                assert folder.name not in result.stdout
            if command == "show":
                assert [record["id"] for record in json.loads(result.stdout)] == [healthy.folder.name]
        assert {path.name for path in (tmp_path / "s" / "figures").iterdir()} >= {"curves.png", "gap.png"}
        tally(16, "sweeps over a study with a run edited in each field: those left alone, the others trained")


class TestOlderResults:
    @pytest.mark.parametrize("field", DEFAULTED)
    def test_those_of_before_a_field_was_added_stay_readable(self, tmp_path, cli, field):
        values = CONFIG.as_dict()
        del values[field]
        config = dataclasses.replace(
            CONFIG, **{field: next(f.default for f in dataclasses.fields(RunConfig) if f.name == field)}
        )
        folder = tmp_path / "s" / run_id(values)
        folder.mkdir(parents=True)
        (folder / store.CONFIG).write_text(json.dumps(values))
        shared = {name: value for name, value in values.items() if name not in SWEPT}
        (folder.parent / store.STUDY).write_text(json.dumps({"protocol": "smoke", "shared": shared}))
        rows = [f"{i},{i},0.1,1.0,0.5,0.5,1.0,0.{i}\n" for i in (1, 2)]
        (folder / store.LOG).write_text(to_csv([], validation=False) + "".join(rows))
        study = Study.open(folder.parent)
        assert study.damaged == []
        (run,) = study.runs
        assert (run.config, run.folder.name) == (config, run_id(values))
        result = cli("show", tmp_path, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        assert [(r["id"], r["test_error"]) for r in json.loads(result.stdout)] == [(folder.name, 0.2)]
        tally(16, "results without a field that was added later: readable, under their own ids")

    def test_the_reference_results_are(self):
        studies, damaged = store.find_studies(REPOSITORY / "results")
        assert damaged == []
        folders = {path.parent for path in (REPOSITORY / "results").rglob(store.CONFIG)}
        runs = [run for study in studies for run in study.runs]
        assert {run.folder for run in runs} == folders
        assert len(folders) >= 12
        for run in runs:
            assert run_id(json.loads((run.folder / store.CONFIG).read_text())) == run.folder.name
            assert run.outcome == "done"
            assert (run.folder / store.LOG).read_text() == to_csv(run.epochs, validation=False)
            tally(16, "reference results: readable, under their own ids")


# --- One damaged run does not keep a reader from the others ---

DAMAGED = {
    store.CONFIG: JUNK | {"an edit": lambda path: edit(path, lr=0.5)},
    store.STUDY: JUNK | {"an edit": lambda path: edit(path, protocol=5, shared=[])},
    store.LOG: {kind: damage for kind, damage in JUNK.items() if kind != "no file"}
    | {kind: lambda path, d=damage: path.write_bytes(d(path.read_bytes())) for kind, damage in LOG_DAMAGE.items()},
}
FURTHER_UP = ("rows swapped", "an error of 2", "a step twice")  # in a log, where `degrade show` does not look
HEALTHY = [micro(seed=seed, depth=depth).run_id for depth in (8, 14) for seed in (0, 1)]


class TestReaders:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Every kind of damage at once, each to a run or a study of its own, beside healthy ones: which file has it."""
        found = {}
        for seed in (0, 1):
            for depth in (8, 14):
                write_run(tmp_path / "s", micro(seed=seed, depth=depth), [(0.9, 0.9), (0.8, 0.8), (0.5, depth / 20)])
        for i, (file, kinds) in enumerate(DAMAGED.items()):
            for j, (kind, damage) in enumerate(kinds.items()):
                study = f"study{j}" if file == store.STUDY else "s"
                run = write_run(tmp_path / study, micro(seed=100 * (i + 1) + j), [(0.9, 0.9), (0.8, 0.8), (0.5, 0.5)])
                path = (run.folder.parent if file == store.STUDY else run.folder) / file
                before = path.read_bytes()
                damage(path)
                assert not path.is_file() or path.read_bytes() != before, kind
                found[path] = kind
        return found

    def assert_named(self, damaged, lines):
        """A line for each."""
        for path in damaged:
            known = path.parent if path.name == store.CONFIG and not os.path.lexists(path) else path
            assert sum(str(known) in line for line in lines) == 1, known
        assert len(lines) == len(damaged)

    def left_out(self, damaged, result):
        assert result.exit_code == 1
        *lines, last = result.stderr.splitlines()
        assert last == "degrade: degrade check looks closer"
        self.assert_named(damaged, lines)

    def test_show_shows_the_others(self, damaged, tmp_path, cli):
        result = cli("show", tmp_path, "--json")
        unseen = [path for path, kind in damaged.items() if kind in FURTHER_UP]
        assert len(unseen) == len(FURTHER_UP)
        self.left_out([path for path in damaged if path not in unseen], result)
        records = json.loads(result.stdout)
        done = sorted([*HEALTHY, *(path.parent.name for path in unseen)])
        assert sorted(record["id"] for record in records if record["status"] == "done") == done
        assert {r["status"] for r in records if r["id"] not in done} == {"failed"}  # damaged logs: visible rows
        assert cli("show", tmp_path).stdout.count(" done ") == len(done)
        assert cli("show", tmp_path, "--csv").stdout.count(",done,") == len(done)
        tally(
            16,
            "damaged files that one `show`, `plot`, `verdict`, `degrade.load` was shown the others beside",
            len(damaged),
        )

    def test_plot_draws_the_others(self, damaged, tmp_path, cli):
        self.left_out(damaged, cli("plot", tmp_path, "--formats", "png"))
        assert (tmp_path / "s" / "figures" / "training-error.png").exists()
        assert not list(tmp_path.glob("study*/figures"))

    def test_verdict_judges_the_others(self, damaged, tmp_path, cli):
        result = cli("verdict", tmp_path, "--json")
        self.left_out(damaged, result)
        (found,) = json.loads(result.stdout)
        assert (found["study"], found["shallow"], found["deep"], found["seeds"]) == ("s", 8, 14, 2)

    def test_load_loads_the_others(self, damaged, tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            epochs = degrade.load(tmp_path)
        assert sorted(set(epochs["id"])) == sorted(HEALTHY)
        self.assert_named(damaged, [str(warning.message) for warning in caught])
