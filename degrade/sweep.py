"""A sweep: the grid of runs, less what is finished, executed and stored."""

import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import degrade
from degrade import commit, store
from degrade.config import RunConfig
from degrade.errors import Failure
from degrade.execute import Event
from degrade.execute.local import execute
from degrade.log import Epoch, to_csv
from degrade.store import Run, Study, to_json
from degrade.train import Training, load_splits, prepare_process

COMMIT_SECONDS = 10.0  # what a kill costs at most; a commit takes some 20 ms
REPORT_SECONDS = 0.25


class Progress(NamedTuple):
    """Where a run stands: updates done, the last complete epoch, and something worth a line, if anything is."""

    step: int
    epoch: Epoch | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One run, as it is handed to whatever process trains it."""

    study: str
    folder: Path
    config: RunConfig
    data_dir: Path
    device: str
    threads: int
    commit_seconds: float


@dataclass(frozen=True)
class Machine:
    """What the runs are trained on: `jobs` at a time on `device`, with `threads` CPU threads each."""

    device: str
    jobs: int
    threads: int


def resolve_device(device: str) -> str:
    """
    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    if index >= there.get(kind, 0):
        found = ", ".join(f"{name} ({count})" for name, count in there.items() if count)
        raise ValueError(f"device must be auto or one that is there: {found}; got {device!r}")
    return device


def default_precision(device: str) -> str:
    """PyTorch's own default for convolutions: tf32 on GPUs that have it, fp32 elsewhere."""
    return "tf32" if has_tf32(device) else "fp32"


def has_tf32(device: str) -> bool:
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def resolve_machine(device: str, jobs: int | None, threads: int | None, runs: int) -> Machine:
    """Resolve "auto" (None) from the number of runs and cores alone: as many runs side by side as there are cores.

    Raises:
        ValueError: jobs or threads below 1 or above 1024.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and not 1 <= value <= 1024:
            raise ValueError(f"{name} must be from 1 to 1024; got {value}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        jobs = max(cores // (threads or 1), 1) if device == "cpu" else 1
    jobs = min(jobs, max(runs, 1))
    return Machine(device, jobs, threads or max(cores // jobs, 1))


def find_runs(study: Study, configs: Sequence[RunConfig]) -> list[Run]:
    """The runs of a grid in `study`, whether they are there or not, the longest first."""
    runs = []
    for config in sorted(configs, key=lambda config: (-config.depth, config.seed, config.block)):
        folder = study.folder / config.run_id
        there = (folder / store.CONFIG).exists()
        runs.append(Run.open(study.name, folder) if there else Run(study.name, folder, config))
    return runs


def sweep(
    study: Study,
    runs: Sequence[Run],
    machine: Machine,
    data_dir: Path,
    *,
    commit_seconds: float = COMMIT_SECONDS,
) -> Iterator[tuple[Run, Event]]:
    """Train `runs`, from their newest checkpoints where there are any, and store the results.

    Yields:
        Each run with its executor's events; the values are `Progress`.
    """
    study.create([run.config for run in runs])
    tasks = [
        Task(study.name, run.folder, run.config, data_dir, machine.device, machine.threads, commit_seconds)
        for run in runs
    ]
    for event in execute(train_run, tasks, machine.jobs):
        yield runs[event.item], event


def train_run(task: Task) -> Iterator[Progress]:
    """Train one run to its end, committing on the way; its generator may be dropped anywhere.

    Raises:
        Held: another process trains it.
        OSError: the disk is full, say. The run stays as it was committed last, and can be resumed.
        Exception: anything else, after its traceback was written to error.txt: the run has failed.
    """
    with commit.hold(task.folder / store.LOCK):
        try:
            yield from _train_run(task)
        except (OSError, Failure):
            raise
        except Exception:
            commit.write_file(task.folder / store.ERROR, traceback.format_exc().encode())
            raise


def _train_run(task: Task) -> Iterator[Progress]:
    folder = task.folder
    if Run.open(task.study, folder).outcome:
        return  # another sweep was faster
    (folder / store.ERROR).unlink(missing_ok=True)
    commit.clear_leavings(folder)
    commit.clear_leavings(folder / store.CHECKPOINTS)
    prepare_process(_environment(task)["threads"])
    training = Training(task.config, load_splits(task.config, task.data_dir, task.device), task.device)

    state, bad = commit.read_checkpoint(folder / store.CHECKPOINTS)
    then = "starting anew" if state is None else "going on from the one before"
    note = f"{folder.name}: {', '.join(bad)} damaged, {then}" if bad else ""
    if state is not None:
        training.restore(state)
        _write_log(folder, training)
    last = training.epochs[-1] if training.epochs else None
    yield Progress(training.step, last, note)

    clock = _Clock(folder / store.TIMING, len(training.epochs))
    committed = reported = time.monotonic()
    for epoch in training:
        now = time.monotonic()
        if epoch:
            clock.end_epoch(epoch)
            last = epoch
        if training.finished or now - committed >= task.commit_seconds:
            commit.write_checkpoint(folder / store.CHECKPOINTS, training.step, training.state())
            _write_log(folder, training)
            committed = now
        if epoch or now - reported >= REPORT_SECONDS:
            yield Progress(training.step, last)
            reported = now


def _write_log(folder: Path, training: Training) -> None:
    """Bring log.csv in line with the checkpoint just committed."""
    if training.epochs:
        text = to_csv(training.epochs, validation=training.config.val_images > 0)
        commit.write_file(folder / store.LOG, text.encode())


class _Clock:
    """timing.csv: the seconds of each epoch, counted in the process that ended it, and when it ended (UTC)."""

    HEADER = "epoch,step,seconds,ended\n"

    def __init__(self, path: Path, epochs: int):
        """Keep the rows of the first `epochs` epochs: the later ones are trained again."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        self.rows = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= epochs]
        self.start = time.monotonic()

    def end_epoch(self, epoch: Epoch) -> None:
        now = time.monotonic()
        ended = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.rows.append(f"{epoch.epoch},{epoch.step},{now - self.start:.3f},{ended}\n")
        self.start = now
        commit.write_file(self.path, (self.HEADER + "".join(self.rows)).encode())


def _environment(task: Task) -> dict[str, Any]:
    """What the bits depend on beside the configuration: written at the start, read back on resume."""
    path = task.folder / store.ENVIRONMENT
    if path.exists():
        return store.read_json(path)
    device = torch.device(task.device)
    environment = {
        "degrade": degrade.__version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": task.threads,
        "flush_denormal": True,
    }
    commit.write_file(path, to_json(environment))
    return environment


def _cpu_model() -> str:
    """As Linux names it; elsewhere the kind of processor."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@lru_cache(1)
def _git_commit() -> str | None:
    """The commit of the checkout that degrade runs from, with `+` where its code differs; None elsewhere."""
    package = Path(degrade.__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        changed = git("status", "--porcelain", "--", ".").stdout
        return git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("+" if changed else "")
    except OSError:  # no git
        return None
