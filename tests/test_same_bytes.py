"""Promises 10 and 11: the same configuration gives the same bytes, and a diverged run is a visible row."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess

import pytest
import torch
from conftest import micro, tally, times
from crash import digests, finish, run_sweep, start
from torch import nn

from degrade import provenance, store
from degrade.config import RunConfig
from degrade.store import Run, Study
from degrade.sweep import Machine, Task, sweep, train_run
from degrade.train import Training

pytestmark = pytest.mark.promise

GRID = [micro(block, seed) for block in ("plain", "residual") for seed in (0, 1)]


def sweep_as(out, configs, data_dir, machine):
    """As the command line would, in a process of its own."""
    study = Study(out / "s", "s", "smoke", configs[0].shared())
    ends = [event for _, event in sweep(study, study.find(configs), machine, data_dir, commit_seconds=0.0)]
    assert ends[-1].kind == "done"


@pytest.mark.parametrize(("threads", "compiled"), [(1, "off"), (2, "off"), (1, "on")])
def test_three_times_any_order_packed_or_not_the_same_bytes(data_dir, tmp_path, threads, compiled):
    """In a process each; `test_sweep.py` has one job against two."""
    found = []
    for i, pack in enumerate((1, 4, 2)):
        configs = random.Random(i).sample(GRID, len(GRID))
        machine = Machine("cpu", 1, threads, pack, compiled)
        process = start(sweep_as, tmp_path / str(i), configs, data_dir, machine)
        process.join()
        assert process.exitcode == 0
        found.append(digests(tmp_path / str(i)))
        tally(10, "sweeps three times each: 1 and 2 threads, compiled or not, packed or not, in any order")
    assert len(found[0]) == 4
    assert found[0] == found[1] == found[2]


def until(out, config, data_dir, epoch, compiled):
    """Train until this epoch was reported, and drop the rest."""
    study = Study(out / "s", "s", "smoke", config.shared())
    study.create([config])
    task = Task("s", out / "s" / config.run_id, config, data_dir, 1, compiled, commit_seconds=0.0)
    for progress in train_run(task, "cpu"):
        if progress and progress.epoch and progress.epoch.epoch >= epoch:
            break


@pytest.mark.parametrize(("block", "compiled"), [("plain", False), ("residual", False), ("residual", True)])
def test_resumed_at_every_epoch_the_same_bytes(data_dir, tmp_path, block, compiled):
    config = micro(block, steps=4 if compiled else 8, milestones=(4,))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    until(whole, config, data_dir, 99, compiled)
    for epoch in range(1, config.epochs + 1):
        process = start(until, parts, config, data_dir, epoch, compiled)
        process.join()
        assert process.exitcode == 0
        tally(10, "epochs after each of which a run went on in a new process")
    until(parts, config, data_dir, 99, compiled)
    assert digests(parts) == digests(whole)


def test_a_damaged_record_of_times_is_no_reason_to_stop(data_dir, tmp_path):
    config = micro(steps=8, milestones=(4,))
    until(tmp_path, config, data_dir, 2, False)
    path = tmp_path / "s" / config.run_id / store.TIMING
    path.write_bytes(path.read_bytes() + b"\xff\x00,1\n1,2\n")
    until(tmp_path, config, data_dir, 99, False)
    assert Run.open("s", path.parent).status == "done"
    assert all(provenance.Clock.ROW.fullmatch(line + "\n") for line in path.read_text().splitlines()[1:])


class TestEnvironment:
    """Where what the bits depend on has changed, a line says so, and both are recorded."""

    def begun(self, out, data_dir):
        config = micro(steps=100, milestones=())
        until(out, config, data_dir, 2, False)
        return Run.open("s", out / "s" / config.run_id)

    def go_on(self, run, data_dir, **options):
        task = Task("s", run.folder, run.config, data_dir, 1, commit_seconds=0.0)
        (first, *_) = (p for p in train_run(dataclasses.replace(task, **options), "cpu") if p)
        return first, store.read_json(run.folder / store.ENVIRONMENT)

    def test_unchanged_there_is_nothing_to_say(self, data_dir, tmp_path):
        run = self.begun(tmp_path, data_dir)
        before = (run.folder / store.ENVIRONMENT).read_bytes()
        first, _ = self.go_on(run, data_dir, threads=2)  # it goes on with one
        assert first.notes == ()
        assert (run.folder / store.ENVIRONMENT).read_bytes() == before

    @pytest.mark.parametrize("name", ["torch", "platform", "cpu", "device", "code", "flags", "flush_denormal"])
    def test_changed_it_is_said_and_recorded(self, data_dir, tmp_path, monkeypatch, name):
        run = self.begun(tmp_path, data_dir)
        now = provenance.environment
        monkeypatch.setattr(provenance, "environment", lambda *a: now(*a) | {name: "another"})
        first, environment = self.go_on(run, data_dir)
        step = first.step
        before = environment[name]
        assert first.notes == (
            f"{run.folder.name}: not bit for bit the unbroken run from step {step} on: {name} was {before}, is another",
        )
        assert before != "another"
        assert environment["changes"] == [{"step": step, name: "another"}]
        assert Run.open("s", run.folder).status == "done"

    def test_what_no_bit_depends_on_is_recorded_alone(self, data_dir, tmp_path, monkeypatch):
        run = self.begun(tmp_path, data_dir)
        now = provenance.environment
        monkeypatch.setattr(provenance, "environment", lambda *a: now(*a) | {"commit": "123", "python": "4.0"})
        first, environment = self.go_on(run, data_dir)
        assert first.notes == ()
        assert environment["changes"] == [{"step": first.step, "commit": "123", "python": "4.0"}]

    def test_changed_once_it_is_said_once_and_back_again(self, data_dir, tmp_path, monkeypatch):
        run = self.begun(tmp_path, data_dir)
        now = provenance.environment
        for torch_, says in (("another", True), ("another", False), (torch.__version__, True)):
            monkeypatch.setattr(provenance, "environment", lambda *a, t=torch_: now(*a) | {"torch": t})
            steps = train_run(Task("s", run.folder, run.config, data_dir, 1, commit_seconds=0.0), "cpu")
            assert bool(next(steps).notes) is says
            next(steps)
            steps.close()
        assert [c["torch"] for c in store.read_json(run.folder / store.ENVIRONMENT)["changes"]] == [
            "another",
            torch.__version__,
        ]

    def test_begun_compiled_it_goes_on_eagerly_where_there_is_no_compiler(self, data_dir, tmp_path, monkeypatch):
        config = micro(steps=100, milestones=())
        until(tmp_path, config, data_dir, 2, True)
        monkeypatch.setattr(provenance, "why_not", lambda _: "no C++ compiler")
        run = Run.open("s", tmp_path / "s" / config.run_id)
        first, environment = self.go_on(run, data_dir)
        assert first.notes[0].endswith("compiled was True, is False (no C++ compiler)")
        assert environment["compiled"] is True
        assert environment["changes"] == [{"step": first.step, "compiled": False}]
        assert Run.open("s", run.folder).status == "done"

    def test_the_record_of_an_older_version_is_compared_in_what_it_has(self, data_dir, tmp_path):
        run = self.begun(tmp_path, data_dir)
        path = run.folder / store.ENVIRONMENT
        old = {k: v for k, v in store.read_json(path).items() if k not in ("code", "flags", "compiled")}
        path.write_text(json.dumps(old))
        first, environment = self.go_on(run, data_dir)
        assert first.notes == ()
        assert environment == old


# 11. A diverged run is a visible row; the others finish; exit 1.


def first_norm(training):
    return next(module for module in training.net.modules() if isinstance(module, nn.BatchNorm2d))


def last_norm(training):
    return [module for module in training.net.modules() if isinstance(module, nn.BatchNorm2d)][-1]


# After how many of the six updates, of which two make an epoch, and what.
POINTS = {
    "a weight of the first layer, before the first step": (0, lambda t: t.net.conv.weight),
    "a batch norm's scale, within an epoch": (1, lambda t: first_norm(t).weight),
    "momentum, at an epoch's end": (2, lambda t: t._momentum()[0]),
    "a batch norm's running mean, which training does not see": (3, lambda t: last_norm(t).running_mean),
    "the last bias, after the last step": (6, lambda t: t.net.linear.bias),
}


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("point", POINTS)
def test_a_diverged_run_is_a_visible_row_and_the_others_finish(
    cli, data_dir, tmp_path, monkeypatch, point, value, block
):
    step, tensor = POINTS[point]
    update = Training.update

    def poisoned(self):
        mine = self.config.block == block
        if mine and self.step == step:
            poison(self)
        update(self)
        if mine and self.step == step == 6:
            poison(self)

    def poison(self):
        with torch.no_grad():  # minus infinity, since ReLU makes nothing of the other
            tensor(self)[(0,) * tensor(self).ndim] = -value

    monkeypatch.setattr(Training, "update", poisoned)
    pair = [micro("plain"), micro("residual")]
    events = [event for _, event in run_sweep(tmp_path, pair, data_dir) if event.kind not in ("value", "started")]
    assert [event.kind for event in events] == ["done", "done"]
    found = {run.config.block: run for run in Study.open(tmp_path / "s").runs}
    other = found["residual" if block == "plain" else "plain"]
    assert (found[block].status, other.status) == ("diverged", "done")
    assert not math.isfinite(found[block].epochs[-1].train_loss)
    assert all(math.isfinite(row.train_loss) for row in found[block].epochs[:-1])
    monkeypatch.undo()
    logs = {run.folder: (run.folder / store.LOG).read_bytes() for run in found.values()}
    finish(tmp_path, pair, data_dir)  # it stays as it is
    assert logs == {folder: (folder / store.LOG).read_bytes() for folder in logs}
    shown = cli("show", tmp_path)
    assert shown.exit_code == 0
    assert [line.split()[1] for line in shown.stdout.splitlines()[2:]] in (["diverged", "done"], ["done", "diverged"])
    tally(11, "runs poisoned with NaN or Inf at five points, plain and residual")


def test_a_sweep_with_a_diverged_run_ends_with_exit_code_1(cli, data_dir, tmp_path):
    flags = ("--depths", "8", "--dataset", "shapes", "--protocol", "smoke", "--lr", "1e30", "--jobs", "1")
    result = cli("sweep", *flags, "--out", tmp_path, "--data-dir", data_dir)
    assert result.exit_code == 1
    assert result.stderr == "degrade: 2 of 2 runs not done (diverged)\n"
    for block in ("plain", "residual"):
        assert f"{block}-8-s0 diverged: its training loss is " in result.stdout
    shutil.rmtree(tmp_path)


def test_every_field_of_a_micro_run_is_the_smoke_protocols_but_for_its_size():
    """What these tests run is what users run, only smaller."""
    reference = RunConfig(block="plain", depth=8, seed=0, dataset="shapes")
    changed = {name for name, value in micro().as_dict().items() if value != reference.as_dict()[name]}
    assert changed == {
        "width",
        "train_images",
        "test_images",
        "steps",
        "milestones",
        "batch_size",
        "lr",
        "warmup_steps",
    }
    assert times(4) in (1, 4)


def test_asking_git_for_the_commit_writes_nothing(tmp_path, monkeypatch):
    """`git status` would refresh the index, which a kill can leave locked."""
    package = tmp_path / "degrade"
    package.mkdir()
    (package / "__init__.py").touch()
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    os.utime(package / "__init__.py", (1, 1))  # the index no longer has its time
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(provenance.degrade, "__file__", str(package / "__init__.py"))
    assert len(provenance._git_commit.__wrapped__()) == 12
    assert (tmp_path / ".git" / "index").read_bytes() == before
