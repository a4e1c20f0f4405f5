"""A sweep: the grid of runs, less what is finished, executed and stored."""

import gc
import os
import platform
import re
import subprocess
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import degrade
from degrade import commit, store
from degrade.config import RunConfig
from degrade.engine.compiled import why_not
from degrade.engine.process import prepare_process
from degrade.errors import Failure
from degrade.execute import Crowded, Event
from degrade.execute.local import execute
from degrade.log import Epoch, to_csv
from degrade.nets import cifar_net
from degrade.store import Run, Study, to_json
from degrade.train import Training, load_splits

REPORT_SECONDS = 0.25
COMPILED_FROM = 30e12  # floating-point operations of a run: minutes on a core, and compiling costs ten seconds or so
MAX_PACK = 10  # the nets of the paper


class Progress(NamedTuple):
    """Where a run stands: updates done, the last complete epoch, and something worth a line, if anything is."""

    step: int
    epoch: Epoch | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One run, as it is handed to whatever process trains it. Without `commit_seconds`, the device decides them."""

    study: str
    folder: Path
    config: RunConfig
    data_dir: Path
    threads: int
    compiled: bool = False
    commit_seconds: float | None = None


@dataclass(frozen=True)
class Machine:
    """What the runs are trained on.

    Args:
        device: "cpu", "cuda" (every GPU), "cuda:1", "mps", ...
        jobs: processes side by side.
        threads: CPU threads each.
        pack: runs at a time in each process.
        compiled: "on"; "off"; or "auto", which compiles the long runs.
    """

    device: str
    jobs: int
    threads: int
    pack: int = 1
    compiled: str = "off"

    @property
    def places(self) -> list[str]:
        """The device of each process."""
        if self.device == "cuda":
            return [f"cuda:{i % torch.cuda.device_count()}" for i in range(self.jobs)]
        return [self.device] * self.jobs

    def compiles(self, config: RunConfig) -> bool:
        """Whether a run that starts here is compiled: a matter of its configuration, never of a timing."""
        return self.compiled == "on" or (self.compiled == "auto" and training_flops(config) >= COMPILED_FROM)


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


def commit_interval(device: str) -> float:
    """Seconds between commits, which is what a kill costs at most. A commit takes some 20 ms."""
    return 30.0 if device.startswith("cuda") else 10.0


def default_precision(device: str) -> str:
    """PyTorch's own default for convolutions: tf32 on GPUs that have it, fp32 elsewhere."""
    return "tf32" if has_precision(device, "tf32") else "fp32"


def has_precision(device: str, precision: str) -> bool:
    """tf32 takes a GPU of compute capability 8 or more; bf16 such a GPU or a CPU."""
    if torch.device(device).type == "cuda":
        return precision == "fp32" or torch.cuda.get_device_capability(device)[0] >= 8
    return precision == "fp32" or (precision == "bf16" and device == "cpu")


def resolve_machine(
    device: str,
    configs: Sequence[RunConfig],
    *,
    jobs: int | None = None,
    threads: int | None = None,
    pack: int | None = None,
    compiled: str = "auto",
) -> tuple[Machine, str]:
    """Resolve "auto" (None) from the runs and the machine alone, and say in a line what cannot be had, if anything.

    On a CPU as many runs side by side as there are cores; on GPUs a process each, with as many runs as fit.

    Raises:
        ValueError: jobs, threads or pack below 1 or above 1024, or no compiler where one was asked for.
    """
    for name, value in (("jobs", jobs), ("threads", threads), ("pack", pack)):
        if value is not None and not 1 <= value <= 1024:
            raise ValueError(f"{name} must be from 1 to 1024; got {value}")
    if compiled not in ("auto", "on", "off"):
        raise ValueError(f"compile must be auto, on or off; got {compiled!r}")
    runs = max(len(configs), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        jobs = max(cores // (threads or 1), 1) if device == "cpu" else gpus
    jobs = min(jobs, runs)
    if pack is None:
        pack = gpu_pack(device, configs) if torch.device(device).type == "cuda" else 1
    pack = min(pack, -(-runs // jobs))
    machine = Machine(device, jobs, threads or max(cores // jobs, 1), pack, compiled)
    note = ""
    if any(machine.compiles(config) for config in configs) and (reason := why_not(device)):
        if compiled == "on":
            raise ValueError(f"compile on needs a compiler that works: {reason}")
        machine, note = replace(machine, compiled="off"), f"not compiled, since that does not work here: {reason}"
    return machine, note


def gpu_pack(device: str, configs: Sequence[RunConfig]) -> int:
    """How many of the runs fit beside each other into the memory that the GPU has free, at most the paper's ten."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(min(int(free // max(map(memory, configs), default=1)), MAX_PACK), 1)


def memory(config: RunConfig) -> float:
    """A generous guess at the bytes a run takes on a GPU: 3 fp32 copies of every activation, and a bit."""
    activations = config.batch_size * config.depth * config.width * 32 * 32 * (1 + 1 / 2 + 1 / 4) / 3
    return 12 * activations + 2**29


@lru_cache
def training_flops(config: RunConfig) -> float:
    """Floating-point operations of all updates: three times the forward pass's, two a multiply-add."""
    with torch.device("meta"):
        net = cifar_net(config.depth, config.block, width=config.width, shortcut=config.shortcut)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 32, 32))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * config.batch_size * config.steps


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
    commit_seconds: float | None = None,
) -> Iterator[tuple[Run, Event]]:
    """Train `runs`, from their newest checkpoints where there are any, and store the results.

    Yields:
        Each run with its executor's events; the values are `Progress`.
    """
    study.create([run.config for run in runs])
    tasks = [
        Task(
            study.name,
            run.folder,
            run.config,
            data_dir,
            machine.threads,
            machine.compiles(run.config),
            commit_seconds,
        )
        for run in runs
    ]
    for event in execute(train_run, tasks, machine.places, machine.pack):
        yield runs[event.item], event


def train_run(task: Task, device: str) -> Iterator[Progress | None]:
    """Train one run to its end, committing on the way; its generator may be dropped anywhere.

    Yields:
        Its progress now and then, and None after every other update.

    Raises:
        Held: another process trains it.
        Crowded: there is no memory for it on the device.
        OSError: the disk is full, say. The run stays as it was committed last, and can be resumed.
        Exception: anything else, after its traceback was written to error.txt: the run has failed.
    """
    with commit.hold(task.folder / store.LOCK):
        try:
            yield from _train_run(task, device)
        except (OSError, Failure):
            raise
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise Crowded(f"no room on {device}: {str(error).partition('. ')[0]}") from None
        except Exception:
            commit.write_file(task.folder / store.ERROR, traceback.format_exc().encode())
            raise


def _train_run(task: Task, device: str) -> Iterator[Progress | None]:
    gc.collect()  # the nets of runs that have ended refer to themselves, and hold their memory until then
    folder = task.folder
    if Run.open(task.study, folder).outcome:
        return  # another sweep was faster
    (folder / store.ERROR).unlink(missing_ok=True)
    commit.clear_leavings(folder)
    commit.clear_leavings(folder / store.CHECKPOINTS)
    environment = _environment(task, device)
    clock = _Clock(folder / store.TIMING)
    prepare_process(environment["threads"], device)
    splits = load_splits(task.config, task.data_dir, device)
    training = Training(task.config, splits, device, compiled=environment.get("compiled", False))

    state, bad = commit.read_checkpoint(folder / store.CHECKPOINTS)
    then = "starting anew" if state is None else "going on from the one before"
    note = f"{folder.name}: {', '.join(bad)} damaged, {then}" if bad else ""
    if state is not None:
        training.restore(state)
        _write_log(folder, task.config, training.epochs)
    last = training.epochs[-1] if training.epochs else None
    clock.start_up(training.step, last.epoch if last else 0)
    yield Progress(training.step, last, note)

    interval = commit_interval(device) if task.commit_seconds is None else task.commit_seconds
    committed = reported = time.monotonic()
    # A thread of its own: a run on a GPU, and those packed beside it, go on while the disk is busy.
    with ThreadPoolExecutor(1, "writer") as writer:
        writing: deque[Future[None]] = deque()
        for epoch in training:
            now = time.monotonic()
            if epoch:
                clock.end_epoch(epoch)
                last = epoch
            while writing and writing[0].done():
                writing.popleft().result()  # or its error
            due = now - committed >= interval and (epoch or not writing)
            if due or training.finished:
                snapshot = training.snapshot()
                epochs = list(training.epochs)
                writing.append(writer.submit(_commit, folder, task.config, training.step, epochs, snapshot))
                committed = now
            if epoch or now - reported >= REPORT_SECONDS:
                yield Progress(training.step, last)
                reported = now
            else:
                yield None
        while writing:
            if writing[0].done():
                writing.popleft().result()
            else:
                yield None
                time.sleep(0.001)


def _commit(folder: Path, config: RunConfig, step: int, epochs: list[Epoch], state: Callable[[], bytes]) -> None:
    commit.write_checkpoint(folder / store.CHECKPOINTS, step, state())
    _write_log(folder, config, epochs)


def _write_log(folder: Path, config: RunConfig, epochs: list[Epoch]) -> None:
    """Bring log.csv in line with the checkpoint just committed."""
    if epochs:
        commit.write_file(folder / store.LOG, to_csv(epochs, validation=config.val_images > 0).encode())


class _Clock:
    """timing.csv: the seconds of each epoch, counted in the process that ended it, and when it ended (UTC).

    Rows of epoch 0 are start-ups: data, compiling, capturing.
    """

    HEADER = "epoch,step,seconds,ended\n"

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        self.rows = [line for line in lines if line.endswith("\n")]
        self.start = time.monotonic()

    def start_up(self, step: int, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs: the later ones are trained again."""
        self.rows = [row for row in self.rows if int(row.partition(",")[0]) <= epochs]
        self._add(0, step)

    def end_epoch(self, epoch: Epoch) -> None:
        self._add(epoch.epoch, epoch.step)

    def _add(self, epoch: int, step: int) -> None:
        now = time.monotonic()
        ended = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.rows.append(f"{epoch},{step},{now - self.start:.3f},{ended}\n")
        self.start = now
        commit.write_file(self.path, (self.HEADER + "".join(self.rows)).encode())


def _environment(task: Task, place: str) -> dict[str, Any]:
    """What the bits depend on beside the configuration: written at the start, read back on resume."""
    path = task.folder / store.ENVIRONMENT
    if path.exists():
        return store.read_json(path)
    device = torch.device(place)
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
        "compiled": task.compiled,
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
