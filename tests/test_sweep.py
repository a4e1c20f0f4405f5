"""Sweeps in processes of their own, as a user starts them: killed, resumed, run twice."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import smoke, tally, times

from degrade import commit, store
from degrade.config import PROTOCOLS, RunConfig
from degrade.errors import Failure
from degrade.log import from_csv
from degrade.provenance import code
from degrade.store import Study
from degrade.sweep import (
    Machine,
    Progress,
    Task,
    resolve_device,
    resolve_machine,
    run_elsewhere,
    sweep,
    train_run,
    training_flops,
)
from degrade.train import Training, load_splits, read_state
from degrade.weights import recorded

SWEEP = ["sweep", "--depths", "8,14", "--blocks", "plain,residual", "--dataset", "shapes", "--protocol", "smoke"]


def command(data_dir, out, *arguments):
    return [sys.executable, "-m", "degrade", *SWEEP, "--data-dir", str(data_dir), "--out", str(out), *arguments]


def digests(out):
    """SHA-256 of every log and every final checkpoint, by run id."""
    found = {}
    for folder in sorted(out.glob("*/*/")):
        if (folder / store.CONFIG).exists():
            log = hashlib.sha256((folder / store.LOG).read_bytes()).hexdigest()
            found[folder.name] = log, max((folder / store.CHECKPOINTS).iterdir()).name
    return found


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory):
    """The results of an uninterrupted sweep."""
    out = tmp_path_factory.mktemp("reference")
    subprocess.run(command(data_dir, out), check=True, stdout=subprocess.DEVNULL)
    assert len(digests(out)) == 4
    return out


def task(run, data_dir, commit_seconds=0.0):
    return Task(run.study, run.folder, run.config, data_dir, 1, commit_seconds=commit_seconds)


def train(task):
    """What `train_run` has to say."""
    return (progress for progress in train_run(task, "cpu") if progress)


def new_run(folder, config):
    study = Study(folder, folder.name, "smoke", config.shared())
    study.create([config])
    return store.Run.open(study.name, folder / config.run_id)


def test_snapshots_are_the_weights_at_their_steps_however_often_it_was_stopped(data_dir, tmp_path):
    config, kept = smoke(steps=20), (0, 5, 8, 20)  # the first epoch ends at step 8
    runs = [new_run(tmp_path / name, config) for name in ("unbroken", "broken")]
    for progress in train(dataclasses.replace(task(runs[0], data_dir), snapshots=kept)):
        assert progress
    for stop in (4, 6, 9, 99):
        for number, progress in enumerate(
            train_run(dataclasses.replace(task(runs[1], data_dir), snapshots=kept), "cpu"), start=1
        ):
            if number > stop and progress and progress.epoch:
                break
    names = [sorted(path.name for path in (run.folder / store.SNAPSHOTS).iterdir()) for run in runs]
    assert names[0] == names[1]
    assert [int(name.partition("-")[0]) for name in names[0]] == [5, 8, 20]  # that of step 0 can be made anew
    training = Training(config, load_splits(config, data_dir, "cpu"))
    for _ in range(5):
        training.update()
    state = read_state((runs[0].folder / store.SNAPSHOTS / names[0][0]).read_bytes())
    assert state.step == 5
    assert all(torch.equal(a, b) for a, b in zip(state.net.values(), training.net.state_dict().values(), strict=True))
    assert len(commit.checkpoints(runs[0].folder / store.CHECKPOINTS)) == 2  # nothing else changes
    assert [step for step, _ in recorded(runs[0])][:2] == [5, 8]


def test_a_snapshot_is_written_once_and_before_a_checkpoint_says_that_its_step_is_past(data_dir, tmp_path, monkeypatch):
    from degrade import sweep as module

    run, calls, keep = new_run(tmp_path, smoke()), [], module._keep

    def full_at_first(lock, step, *arguments, **options):
        calls.append(step)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")
        keep(lock, step, *arguments, **options)

    monkeypatch.setattr(module, "_keep", full_at_first)
    job = dataclasses.replace(task(run, data_dir), snapshots=(5, 24), commit_seconds=0.0)
    with pytest.raises(OSError, match="no space"):
        list(train_run(job, "cpu"))
    list(train_run(job, "cpu"))
    assert calls == [5, 5, 24]
    names = [path.name for path in (run.folder / store.SNAPSHOTS).iterdir()]
    assert sorted(int(name.partition("-")[0]) for name in names) == [5, 24]


class TestResume:
    def test_the_same_command_again_trains_nothing(self, reference, data_dir):
        before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
        result = subprocess.run(command(data_dir, reference), check=True, capture_output=True, text=True)
        assert "4 runs, 0 to train" in result.stdout
        assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()} == before

    def test_one_job_or_two_any_order_the_same_bytes(self, reference, data_dir, tmp_path):
        arguments = ("--jobs", "1", "--threads", "1", "--depths", "14,8", "--blocks", "residual,plain")
        subprocess.run(command(data_dir, tmp_path, *arguments), check=True, stdout=subprocess.DEVNULL)
        assert digests(tmp_path) == digests(reference)

    @pytest.mark.promise
    def test_killed_over_and_over_it_ends_with_the_same_bytes(self, reference, data_dir, tmp_path):
        """SIGKILL after a seeded number of commits, in the middle of runs; its workers end by themselves."""
        rng = random.Random(4)
        resumed = 0
        for _ in range(times(16)):
            process = subprocess.Popen(
                [sys.executable, __file__, data_dir, tmp_path], stdout=subprocess.PIPE, text=True
            )
            for _ in range(rng.randint(1, 15)):
                first, step = map(int, process.stdout.readline().split() or [0, 0])
                resumed += first and 0 < step < 24
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.wait()
            process.stdout.close()
            deadline = time.monotonic() + 5
            while any_running(tmp_path) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any_running(tmp_path)
            tally(1, "SIGKILLs of a sweep with two workers")
        assert resumed
        subprocess.run(command(data_dir, tmp_path), check=True, stdout=subprocess.DEVNULL)
        assert digests(tmp_path) == digests(reference)

    @pytest.mark.parametrize("block", ["plain", "residual"])
    def test_dropped_after_any_report_it_goes_on_from_the_last_commit(self, reference, data_dir, tmp_path, block):
        run = new_run(tmp_path / "shapes-smoke", smoke(block, depth=14))
        for _ in range(100):
            for _ in zip(range(2), train(task(run, data_dir)), strict=False):
                pass  # dropped after the second report
            if store.Run.open(run.study, run.folder).status == "done":
                break
        assert digests(tmp_path)[run.folder.name] == digests(reference)[run.folder.name]

    def test_a_damaged_checkpoint_is_named_and_passed_over(self, reference, data_dir, tmp_path):
        run = new_run(tmp_path / "shapes-smoke", smoke(depth=14))
        steps = train(task(run, data_dir))
        while next(steps).step < 16:
            pass
        steps.close()
        newest = max((run.folder / store.CHECKPOINTS).iterdir())
        newest.write_bytes(newest.read_bytes()[:-100])
        first, *_ = train(task(run, data_dir))
        assert first.notes == (
            f"{run.folder.name}: {newest.name} is damaged (its bytes are not those it was written with)",
            f"{run.folder.name}: going on from step {first.step}",
        )
        assert 0 < first.step <= 16  # at the end of an epoch there are two
        assert not newest.exists()  # or it would be kept to fall back on, and the sound one dropped
        assert digests(tmp_path)[run.folder.name] == digests(reference)[run.folder.name]

    def test_threads_are_kept_from_the_start(self, data_dir, tmp_path):
        run = new_run(tmp_path / "s", smoke())
        next(train(task(run, data_dir)))
        again = train(dataclasses.replace(task(run, data_dir), threads=2))
        list(again)
        assert store.read_json(run.folder / store.ENVIRONMENT)["threads"] == 1

    def test_results_without_checkpoints_are_done(self, reference, data_dir, tmp_path):
        """What is in git: CSV and JSON alone."""
        shutil.copytree(reference, tmp_path / "r", ignore=shutil.ignore_patterns("checkpoints", "lock"))
        result = subprocess.run(command(data_dir, tmp_path / "r"), check=True, capture_output=True, text=True)
        assert "0 to train" in result.stdout


def any_running(out):
    return any(commit.holder(folder / store.LOCK) is not None for folder in out.glob("*/*/"))


@pytest.mark.promise
@pytest.mark.skipif(not (sys.platform == "linux" and os.geteuid() == 0), reason="only root can mount a small disk")
def test_a_really_full_disk_and_then_room(reference, data_dir, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted in this sandbox")
    try:
        result = subprocess.run(command(data_dir, disk), capture_output=True, text=True)
        assert result.returncode == 1
        full = [line for line in result.stdout.splitlines() if line.endswith("No space left on device")]
        assert sorted(line.split(":")[0] for line in full) == [
            f"{block}-{depth}-s0" for block in ("plain", "residual") for depth in (14, 8)
        ]
        # Where the disk was full before a run wrote its first file, the run is missing; else it is interrupted.
        state = "(interrupted|missing|interrupted, missing)"
        assert re.fullmatch(rf"degrade: 4 of 4 runs not done \({state}\); the same command goes on\n", result.stderr)
        subprocess.run(["mount", "-o", "remount,size=32m", disk], check=True)
        subprocess.run(command(data_dir, disk), check=True, stdout=subprocess.DEVNULL)
        assert digests(disk) == digests(reference)
        assert not any(disk.rglob("*.partial"))
        tally(4, "disk of 64 KiB, full at once, then larger")
    finally:
        subprocess.run(["umount", disk], check=True)


class TestTroubledRuns:
    def events(self, study, configs, data_dir):
        runs = study.find(configs)
        machine = Machine("cpu", 1, 1)
        return {
            run.folder.name: event
            for run, event in sweep(study, runs, machine, data_dir)
            if event.kind in ("done", "failed")
        }

    def test_a_failed_run_is_a_visible_row_and_the_rest_go_on(self, data_dir, tmp_path, monkeypatch):
        def broken(self):
            if self.config.block == "plain":
                raise RuntimeError("the net is on fire\nin two lines")
            yield from end_epoch(self)

        end_epoch = Training.end_epoch
        monkeypatch.setattr(Training, "end_epoch", broken)
        configs = [smoke(), smoke("residual")]
        study = Study(tmp_path / "s", "s", "smoke", configs[0].shared())
        ends = self.events(study, configs, data_dir)
        plain, residual = (ends[config.run_id] for config in configs)
        assert str(plain.value).startswith("RuntimeError: the net is on fire (test_sweep.py, line ")
        assert residual.kind == "done"
        statuses = {run.config.block: run.status for run in Study.open(tmp_path / "s").runs}
        assert statuses == {"plain": "failed", "residual": "done"}
        assert "on fire" in (tmp_path / "s" / configs[0].run_id / store.ERROR).read_text()
        monkeypatch.undo()
        self.events(study, configs, data_dir)  # what --retry-failed does
        assert {run.status for run in Study.open(tmp_path / "s").runs} == {"done"}

    def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
        self, reference, data_dir, tmp_path, monkeypatch
    ):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        config = smoke(depth=14)
        study = Study(tmp_path / "shapes-smoke", "shapes-smoke", "smoke", config.shared())
        study.create([config])
        monkeypatch.setattr(commit, "write_checkpoint", full)
        (event,) = self.events(study, [config], data_dir).values()
        assert event.kind == "failed"
        assert str(event.value) == "No space left on device"
        monkeypatch.undo()
        (run,) = Study.open(tmp_path / "shapes-smoke").runs
        assert run.status == "interrupted"  # not "failed": nothing is wrong with the run
        self.events(study, [config], data_dir)
        assert digests(tmp_path)[run.folder.name] == digests(reference)[run.folder.name]

    def test_out_of_gpu_memory_fewer_run_at_a_time_and_nothing_is_lost(
        self, reference, data_dir, tmp_path, monkeypatch
    ):
        """Room for two nets: the third waits until one is done, and is no failed run."""
        build = Training._build
        alive = weakref.WeakSet()

        def crowded(self, compiled):
            if len(alive) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            alive.add(self)
            build(self, compiled)

        monkeypatch.setattr(Training, "_build", crowded)
        configs = [smoke(block, depth) for block in ("plain", "residual") for depth in (8, 14)]
        study = Study(tmp_path / "shapes-smoke", "shapes-smoke", "smoke", configs[0].shared())
        events = [
            event
            for _, event in sweep(study, study.find(configs), Machine("cpu", 1, 1, pack=4), data_dir)
            if event.kind != "value"
        ]
        assert [event.value for event in events if event.kind == "waiting"] == [3, 2]
        assert sum(event.kind == "done" for event in events) == 4
        assert not any(tmp_path.rglob(store.ERROR))
        assert digests(tmp_path) == digests(reference)

    def test_no_room_even_alone_is_one_line_and_no_failed_run(self, data_dir, tmp_path, monkeypatch):
        def crowded(self, compiled):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

        monkeypatch.setattr(Training, "_build", crowded)
        study = Study(tmp_path / "s", "s", "smoke", smoke().shared())
        (event,) = self.events(study, [smoke()], data_dir).values()
        assert str(event.value) == "no room on cpu: CUDA out of memory"
        assert [run.status for run in Study.open(tmp_path / "s").runs] == ["interrupted"]

    def test_a_diverged_run_is_a_visible_row(self, data_dir, tmp_path):
        config = smoke(lr=1e30)
        study = Study(tmp_path / "s", "s", "smoke", config.shared())
        (event,) = self.events(study, [config], data_dir).values()
        assert event.kind == "done"
        (run,) = Study.open(tmp_path / "s").runs
        assert run.status == "diverged"
        assert len(from_csv((run.folder / store.LOG).read_text())) == 1

    def test_a_run_that_has_failed_meanwhile_is_not_trained_again(self, data_dir, tmp_path, monkeypatch):
        """By another sweep: this one had planned it before, or waited for it."""

        def broken(self):
            began.append(self)
            raise RuntimeError("the net is on fire")

        began = []
        monkeypatch.setattr(Training, "end_epoch", broken)
        run = new_run(tmp_path / "s", smoke())
        for _ in range(2):
            with pytest.raises((RuntimeError, Failure), match="the net is on fire"):
                list(train(task(run, data_dir)))
        assert len(began) == 1
        monkeypatch.undo()
        assert "on fire" in (run.folder / store.ERROR).read_text()
        list(train(dataclasses.replace(task(run, data_dir), retry=True)))
        assert store.Run.open(run.study, run.folder).status == "done"

    @pytest.mark.parametrize(
        ("cause", "status"),
        [
            (OSError(28, "No space left on device"), "interrupted"),
            (MemoryError(), "interrupted"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "interrupted"),
            (OSError(2, "No such file or directory"), "failed"),
            (KeyError("x"), "failed"),
        ],
    )
    def test_a_lack_of_disk_or_memory_is_no_failure_of_the_run(self, data_dir, tmp_path, monkeypatch, cause, status):
        """Whatever the libraries make of it."""

        def broken(self):
            try:
                raise cause
            except type(cause) as error:
                raise RuntimeError("the backend failed") from error

        monkeypatch.setattr(Training, "end_epoch", broken)
        run = new_run(tmp_path / "s", smoke())
        with pytest.raises(RuntimeError, match="the backend failed"):
            list(train(task(run, data_dir)))
        assert store.Run.open(run.study, run.folder).status == status

    def test_frozen_processes_are_recognised_together(self, tmp_path, monkeypatch):
        from degrade import sweep as module

        monkeypatch.setattr(module, "SILENCE", 0.5)
        held = module._Elsewhere("this sweep")
        with contextlib.ExitStack() as stack:
            for seed in range(4):
                run = new_run(tmp_path / "s", smoke(seed=seed))
                stack.enter_context(commit.hold(run.folder / store.LOCK))
                held.add(run)
            start = time.monotonic()
            assert held.wait() == []
            assert 0.5 <= time.monotonic() - start < 1.5

    def test_what_keeps_this_sweep_from_looking_is_no_silence_of_the_others(self, tmp_path, monkeypatch):
        """A file server that hangs, say."""
        from degrade import sweep as module

        looks, sleep = [], time.sleep
        monkeypatch.setattr(module, "SILENCE", 0.5)
        monkeypatch.setattr(commit, "sign_of_life", lambda path: looks.append(path) or 1)
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(0.6))
        held = module._Elsewhere("this sweep")
        run = new_run(tmp_path / "s", smoke())
        with commit.hold(run.folder / store.LOCK):
            held.add(run)
            assert held.wait() == []
        assert len(looks) >= 4

    def test_a_run_is_taken_away_from_a_frozen_process_of_this_sweep_s_own(self, tmp_path, monkeypatch):
        """SLURM may start a job again somewhere else while the old one is out of reach, but holds its lock."""
        from degrade import sweep as module

        monkeypatch.setattr(module, "SILENCE", 0.5)
        held = module._Elsewhere("ours")
        runs = [new_run(tmp_path / "s", smoke(seed=seed)) for seed in range(2)]
        with (
            commit.hold(runs[0].folder / store.LOCK, owner="ours") as lock,
            commit.hold(runs[1].folder / store.LOCK, owner="theirs") as other,
        ):
            for run in runs:
                held.add(run)
            assert held.wait() == runs[:1]
            other.check()
            with pytest.raises(Failure, match="was taken away"):
                lock.check()

    def test_a_run_held_by_another_process_is_left_to_it(self, data_dir, tmp_path):
        run = new_run(tmp_path / "s", smoke())
        with commit.hold(run.folder / store.LOCK), pytest.raises(commit.Held, match=f"held by process {os.getpid()}"):
            next(train(task(run, data_dir)))

    def test_a_run_another_sweep_has_finished_is_not_trained_again(self, data_dir, tmp_path):
        run = new_run(tmp_path / "s", smoke())
        assert list(train(task(run, data_dir)))
        rows = from_csv((run.folder / store.LOG).read_text())
        assert list(train(task(run, data_dir))) == [(24, rows[-1], ())]

    def test_missing_data_fail_no_run(self, tmp_path):
        config = dataclasses.replace(smoke(), dataset="cifar10")
        run = new_run(tmp_path / "s", config)
        with pytest.raises(Failure, match="CIFAR-10 is missing"):
            next(train(task(run, tmp_path / "nowhere")))
        assert store.Run.open("s", run.folder).status == "interrupted"


def test_the_clock_is_in_timing_csv_alone(reference):
    for folder in reference.glob("*/*/"):
        if not (folder / store.CONFIG).exists():
            continue
        header, *rows = (folder / store.TIMING).read_text().splitlines()
        assert header == "epoch,step,seconds,ended"
        assert [row.split(",")[:2] for row in rows] == [["0", "0"], ["1", "8"], ["2", "16"], ["3", "24"]]
        environment = store.read_json(folder / store.ENVIRONMENT)
        assert {"torch", "threads", "device", "commit", "python"} <= set(environment)
        assert str(Path.home()) not in (folder / store.ENVIRONMENT).read_text()


def test_the_longest_runs_come_first(tmp_path):
    configs = [smoke(depth=depth, seed=seed) for seed in (0, 1) for depth in (8, 20, 14)]
    runs = Study(tmp_path, "s", "smoke", configs[0].shared()).find(configs)
    assert [run.config.depth for run in runs] == [20, 20, 14, 14, 8, 8]


def grid(runs):
    return [smoke(seed=seed) for seed in range(runs)]


class TestMachine:
    @pytest.fixture(autouse=True)
    def four_cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)

    @pytest.mark.parametrize(
        ("asked", "runs", "got"),
        [
            ((None, None), 12, (4, 1)),
            ((None, None), 2, (2, 2)),
            ((None, None), 1, (1, 4)),
            ((None, 2), 12, (2, 2)),
            ((3, None), 12, (3, 1)),
            ((8, 8), 1, (1, 8)),
        ],
    )
    def test_auto_shares_out_the_cores(self, asked, runs, got):
        machine, _ = resolve_machine("cpu", grid(runs), jobs=asked[0], threads=asked[1])
        assert (machine.jobs, machine.threads) == got

    @pytest.mark.parametrize(("jobs", "threads", "name"), [(0, None, "jobs"), (None, 0, "threads")])
    def test_none_is_refused(self, jobs, threads, name):
        with pytest.raises(ValueError, match=f"{name} must be from 1 to 1024; got 0"):
            resolve_machine("cpu", grid(1), jobs=jobs, threads=threads)

    def test_long_runs_are_compiled_and_short_ones_are_not(self):
        machine = Machine("cpu", 1, 1, compiled="auto")
        paper = RunConfig(block="plain", depth=20, seed=0)
        assert machine.compiles(paper)
        assert machine.compiles(dataclasses.replace(paper, **PROTOCOLS["short"]))
        assert not machine.compiles(dataclasses.replace(paper, **PROTOCOLS["demo"]))
        assert not Machine("cpu", 1, 1, compiled="off").compiles(paper)
        assert Machine("cpu", 1, 1, compiled="on").compiles(smoke())

    def test_floating_point_operations(self):
        """41 million multiply-adds for ResNet-20 and 126 for ResNet-56, as the literature has it."""
        for depth, millions in ((20, 41), (56, 126), (110, 253)):
            config = RunConfig(block="residual", depth=depth, seed=0)
            assert training_flops(config) / (64_000 * 128 * 3 * 2) == pytest.approx(millions * 1e6, rel=0.02)

    @pytest.mark.parametrize(("free", "pack"), [(1, 1), (16, 7), (139, 10)])
    def test_as_many_runs_to_a_gpu_as_fit_and_a_process_a_gpu(self, monkeypatch, free, pack):
        """The ten nets of the paper on one GPU with so many GiB free, and on two."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**30, free * 2**30))
        nets = [RunConfig(block="plain", depth=depth, seed=seed) for depth in (110, 56) for seed in range(5)]
        for gpus in (1, 2):
            monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
            machine, _ = resolve_machine("cuda", nets, compiled="off")
            assert machine.places == ["cuda:0", "cuda:1"][:gpus]
            assert machine.pack == min(pack, 10 // gpus)
        assert resolve_machine("cuda:1", nets, compiled="off")[0].places == ["cuda:1"]
        assert resolve_machine("cuda", nets, pack=4, jobs=3, compiled="off")[0].places == ["cuda:0", "cuda:1", "cuda:0"]

    def test_the_cpu_is_one_device(self):
        assert resolve_device("cpu:0") == resolve_device("cpu") == "cpu"

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:1", "xla"])
    def test_a_device_that_is_not_there(self, device):
        with pytest.raises(ValueError, match="device must be auto or one that is there: cpu"):
            resolve_device(device)


if __name__ == "__main__":  # of the test that kills: the reference sweep, committing after every step
    configs = [smoke(block, depth) for block in ("plain", "residual") for depth in (8, 14)]
    study = Study(Path(sys.argv[2]) / "shapes-smoke", "shapes-smoke", "smoke", configs[0].shared())
    begun = set()
    todo = [run for run in study.find(configs) if run.status != "done"]
    for run, event in sweep(study, todo, Machine("cpu", 2, 1), Path(sys.argv[1]), commit_seconds=0):
        if event.kind == "value":
            print(int(run.folder not in begun), event.value.step, flush=True)
            begun.add(run.folder)


def test_elsewhere_a_run_wants_the_same_degrade_and_a_compiler_if_one_was_asked_for(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["degrade.sweep"], "why_not", lambda device: "there is none")
    config = smoke()
    study = Study(tmp_path / "study", "study", "smoke", config.shared())
    study.create([config])
    task = Task("study", study.folder / config.run_id, config, data_dir, 1, compiled=True)
    with pytest.raises(Failure, match="compile on needs a compiler that works: there is none"):
        next(run_elsewhere(task, "cpu", sources=code(), strict=True))
    with pytest.raises(Failure, match=r"there is another degrade \(.*\) than where the sweep was started \(123\)"):
        next(run_elsewhere(task, "cpu", sources="123", strict=False))
    first = Progress.of(next(run_elsewhere(task, "cpu", sources=code(), strict=False)))
    assert first.notes == (f"{config.run_id}: not compiled, since that does not work there: there is none",)
