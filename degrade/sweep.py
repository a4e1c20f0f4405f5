"""A sweep: the grid of runs, less what is finished, executed and stored."""

import contextlib
import errno
import gc
import heapq
import secrets
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from degrade import commit, store
from degrade.config import INITS, RunConfig
from degrade.data import default_data_dir, fetch
from degrade.engine.compiled import why_not
from degrade.engine.group import ALONE, Group
from degrade.engine.process import cores, prepare_process
from degrade.errors import Failure
from degrade.execute import Crowded, Event, check_counts
from degrade.execute.local import execute
from degrade.execute.remote import Engine, execute_elsewhere
from degrade.execute.slurm import may_begin
from degrade.log import Epoch, to_csv
from degrade.nets import make_net
from degrade.provenance import Clock, Provenance, code
from degrade.store import Run, Study
from degrade.train import Training, load_splits

REPORT_SECONDS = 0.25
COMPILED_FROM = 30e12  # floating-point operations of a run: minutes on a core, and compiling costs ten seconds or so
MAX_PACK = 10  # the nets of the paper
SILENCE = 60.0  # seconds without a sign of life, after which a process that has a run counts as frozen
JOBS = ".jobs-"  # and a name: the folder in a study's for what a sweep's jobs elsewhere have to say


class Progress(NamedTuple):
    """Where a run stands: updates done, the last complete epoch, and what is worth a line, if anything is."""

    step: int
    epoch: Epoch | None
    notes: tuple[str, ...] = ()

    def plain(self) -> list[Any]:
        """What JSON can hold."""
        return [self.step, list(astuple(self.epoch)) if self.epoch else None, list(self.notes)]

    @classmethod
    def of(cls, plain: list[Any]) -> "Progress":
        """The inverse of `plain`."""
        step, epoch, notes = plain
        return cls(step, Epoch(*epoch) if epoch else None, tuple(notes))


@dataclass(frozen=True)
class Task:
    """One run, as it is handed to whatever process trains it.

    Args:
        study, folder, config: of the run.
        data_dir: where the data are; None for the default of the machine that trains it.
        threads, compiled: how, where it begins anew.
        commit_seconds: between commits; None where the device decides.
        retry: even if it has failed.
        snapshots: the steps whose weights are kept.
        owner: the sweep that it is trained for, which can take it away from a process that is out of reach.
    """

    study: str
    folder: Path
    config: RunConfig
    data_dir: Path | None
    threads: int
    compiled: bool = False
    commit_seconds: float | None = None
    retry: bool = False
    snapshots: tuple[int, ...] = ()
    owner: str = ""


@dataclass(frozen=True)
class Machine:
    """What the runs are trained on.

    Args:
        device: "cpu", "cuda" (every GPU), "cuda:1", "mps", ...
        jobs: processes side by side.
        threads: CPU threads each.
        pack: runs at a time in each process; 0 for as many as fit where they are trained.
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
        return "cuda" if torch.cuda.is_available() else "cpu"  # mps is untested, and has to be asked for
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    if index >= there.get(kind, 0):
        found = ", ".join(f"{name} ({count})" for name, count in there.items() if count)
        raise ValueError(f"device must be auto or one that is there: {found}; got {device!r}")
    return "cpu" if kind == "cpu" else device  # there is but one


def commit_interval(device: str) -> float:
    """Seconds of training between commits, which is what a kill costs at most; an evaluation begins anew after it.

    A commit takes some 20 ms.
    """
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
    check_counts(jobs=jobs, threads=threads, pack=pack, compiled=compiled)
    runs = max(len(configs), 1)
    if jobs is None:
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        jobs = max(cores() // (threads or 1), 1) if device == "cpu" else gpus
    jobs = min(jobs, runs)
    if pack is None:
        pack = gpu_pack(device, configs) if torch.device(device).type == "cuda" else 1
    pack = min(pack, -(-runs // jobs))
    machine = Machine(device, jobs, threads or max(cores() // jobs, 1), pack, compiled)
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
    batch_size = config.bn_batch_size or config.batch_size
    size = config.image_size if config.family == "cifar" else config.image_size / 3  # of the maps; bottlenecks are wide
    activations = batch_size * config.depth * config.width * size**2 * (1 + 1 / 2 + 1 / 4) / 3
    return 12 * activations + 2**29


@lru_cache
def training_flops(config: RunConfig) -> float:
    """Floating-point operations of all updates: three times the forward pass's, two a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # which brings triton along

    with torch.device("meta"):
        net = make_net(config).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, config.image_size, config.image_size))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * config.batch_size * config.steps


def sweep(
    study: Study,
    runs: Sequence[Run],
    machine: Machine,
    data_dir: Path | None,
    *,
    commit_seconds: float | None = None,
    snapshots: Sequence[int] = (),
    group: Group = ALONE,
    engine: Engine | None = None,
) -> Iterator[tuple[Run, Event]]:
    """Train `runs`, from their newest checkpoints where there are any, and store the results.

    On this machine, or on those of an `engine`, which see the study's folder at the same path.

    Another sweep may be at work in the study. Each run is trained by whoever comes first; here the others'
    are waited for, and taken over should their process end before they do.

    Yields:
        Each run with its executor's events; the values are `Progress`. Besides, "held" where another process
        has the run, which is waited for or, where that process has been frozen for `SILENCE` seconds, left to it.
    """
    study.create([run.config for run in runs])
    owner = secrets.token_hex(8)
    todo, held = list(runs), _Elsewhere(owner)
    while todo:
        tasks = [
            Task(
                study.name,
                run.folder,
                run.config,
                data_dir,
                machine.threads,
                machine.compiles(run.config),
                commit_seconds,
                retry=run.status == "failed",
                snapshots=tuple(snapshots),
                owner=owner,
            )
            for run in todo
        ]
        if engine:
            events = _train_elsewhere(engine, tasks, machine, study.folder.absolute() / f"{JOBS}{secrets.token_hex(8)}")
        else:
            function = train_run if group.size == 1 else partial(train_run, group=group)
            events = execute(function, tasks, machine.places, machine.pack)
        for event in events:
            run = todo[event.item]
            if event.kind == "failed" and event.value.type == commit.Held.__name__:
                held.add(run)
                yield run, Event(event.item, "held", f"{event.value}; waiting")
            else:
                yield run, event
                if event.kind == "failed" and group.size > 1:  # the others are somewhere in the middle of it
                    raise Failure(f"{run.folder.name} has failed, and {group.size - 1} more processes with it")
        todo = held.wait()
    for run in held.runs:
        left = f"left to {run.holder or 'its process'}, which has shown no sign of life for {SILENCE:.0f} s"
        yield run, Event(0, "held", left)


def _train_elsewhere(engine: Engine, tasks: Sequence[Task], machine: Machine, folder: Path) -> Iterator[Event]:
    """Train the runs on an engine's machines; `folder` is for what these have to say."""
    tasks = [
        replace(task, folder=task.folder.absolute(), data_dir=task.data_dir and task.data_dir.absolute())
        for task in tasks
    ]
    place = "cuda:0" if machine.device == "cuda" else machine.device  # a job sees its own GPU alone
    commit.make_folder(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_jobs, folder.parent, folder)
        stack.enter_context(commit.hold(folder / "driver"))
        for event in execute_elsewhere(
            engine,
            partial(run_elsewhere, sources=code(), strict=machine.compiled == "on"),
            tasks,
            shares(tasks, machine),
            folder,
            place=place,
            pack=machine.pack or fitting,
            lost=lambda task: commit.fence(task.folder / store.LOCK, task.owner),
        ):
            yield event._replace(value=Progress.of(event.value)) if event.kind == "value" else event


def _remove_jobs(study: Path, mine: Path) -> None:
    """Remove what jobs had to say in this sweep, and in others that were killed, unless some may wait in a queue."""
    for folder in study.glob(f"{JOBS}*"):
        over = (folder / "driver").exists() and not commit.holder(folder / "driver") and not may_begin(folder)
        if over or folder == mine:
            shutil.rmtree(folder, ignore_errors=True)


def shares(tasks: Sequence[Task], machine: Machine) -> list[list[int]]:
    """The numbers of the runs of each job: one, or on a GPU that packs them all that fall to it, the longest first."""
    if machine.pack == 1:
        return [[i] for i in range(len(tasks))]
    loads: list[tuple[float, int, list[int]]] = [(0.0, job, []) for job in range(min(machine.jobs, len(tasks)))]
    for i in sorted(range(len(tasks)), key=lambda i: -training_flops(tasks[i].config)):
        load, job, share = heapq.heappop(loads)
        heapq.heappush(loads, (load + training_flops(tasks[i].config), job, [*share, i]))
    return [share for _, _, share in sorted(loads, key=lambda load: load[1])]


def fitting(device: str, tasks: Sequence[Task]) -> int:
    """How many of the runs fit beside each other where they are to be trained."""
    return gpu_pack(device, [task.config for task in tasks]) if device.startswith("cuda") else 1


def run_elsewhere(task: Task, device: str, *, sources: str, strict: bool) -> Iterator[list[Any] | None]:
    """As `train_run`, on a machine of which nothing is known yet; what it yields is what JSON can hold.

    Args:
        task, device: as for `train_run`.
        sources: the `provenance.code` of the sweep.
        strict: a run that should be compiled fails where there is no compiler; else it is trained without one.
    """
    if sources != code():
        raise Failure(f"there is another degrade ({code()}) than where the sweep was started ({sources})")
    precision, data_dir = task.config.precision, task.data_dir or default_data_dir()
    if not has_precision(device, precision):
        raise Failure(f"there is no {precision} on {device}; name another --precision, and another --study")
    fetch(task.config.dataset, data_dir)
    reason = why_not(device) if task.compiled else None
    if reason and strict:
        raise Failure(f"compile on needs a compiler that works: {reason}")
    note = (f"{task.folder.name}: not compiled, since that does not work there: {reason}",) if reason else ()
    for progress in train_run(replace(task, data_dir=data_dir, compiled=task.compiled and not reason), device):
        yield progress._replace(notes=note + progress.notes).plain() if progress else None
        note = () if progress else note


class _Elsewhere:
    """The runs that other processes train; among them may be a frozen one that trains for this sweep, its `owner`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.runs: list[Run] = []
        self.signs: dict[Path, tuple[int, float]] = {}  # of life, and when they were first seen

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.signs[run.folder] = 0, time.monotonic()

    def wait(self) -> list[Run]:
        """Wait until some of them are free, and give them back; none, once all that are left are frozen."""
        looked = time.monotonic()
        while not (free := [run for run in self.runs if not run.holder]):
            looked, before = time.monotonic(), looked
            late = max(looked - before - SILENCE / 4, 0)  # what keeps this process from looking may keep them too
            self.signs = {folder: (sign, seen + late) for folder, (sign, seen) in self.signs.items()}
            if all([self._frozen(run) for run in self.runs]):  # noqa: C419  each is looked at, each time
                return []
            time.sleep(0.2)
        self.runs = [run for run in self.runs if run not in free]
        return free

    def _frozen(self, run: Run) -> bool:
        lock, now = run.folder / store.LOCK, time.monotonic()
        sign = commit.sign_of_life(lock)
        if sign != self.signs[run.folder][0]:
            self.signs[run.folder] = sign, now
        if now - self.signs[run.folder][1] < SILENCE:
            return False
        commit.fence(lock, self.owner)
        return run.holder is not None


def train_run(task: Task, device: str, group: Group = ALONE) -> Iterator[Progress | None]:
    """Train one run to its end, committing on the way; its generator may be dropped anywhere.

    Yields:
        Its progress now and then, and None after every other update.

    Raises:
        Held: another process trains it.
        Crowded: there is no memory for it on the device.
        OSError: the disk is full, say. The run stays as it was committed last, and can be resumed.
        Failure: its files are damaged, and stay as they are.
        Exception: anything else. Unless it came of a lack of disk or memory, the run has failed, and its traceback
            is in error.txt.
    """
    with commit.hold(task.folder / store.LOCK, owner=task.owner) as lock:
        try:
            yield from _train_run(task, device, lock, group)
        except (OSError, Failure):
            raise
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise Crowded(f"no room on {device}: {str(error).partition('. ')[0]}") from None
        except Exception as error:
            if not _passing(error):
                commit.write_file(task.folder / store.ERROR, traceback.format_exc().encode(), lock)
            raise


class Shared(NamedTuple):
    """What the processes of a group are told of a run that they are to train with the first of them."""

    task: Task
    threads: int
    compiled: bool


def follow(group: Group, device: str) -> None:
    """Train what the first process of the group trains, until it says that there is no more."""
    while shared := group.tell():
        _follow(shared, group, device)  # whose net is gone when the next one is made


def _follow(shared: Shared, group: Group, device: str) -> None:
    gc.collect()
    prepare_process(shared.threads, device)
    splits = load_splits(shared.task.config, shared.task.data_dir, device)
    training = Training(shared.task.config, splits, device, compiled=shared.compiled, group=group)
    training.restore(group.tell())
    for _ in training:
        pass


def _passing(error: BaseException | None) -> bool:
    """Whether it came of a lack of disk or memory, whatever the libraries have made of it."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return True
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _train_run(task: Task, device: str, lock: commit.Lock, group: Group) -> Iterator[Progress | None]:
    gc.collect()  # the nets of runs that have ended refer to themselves, and hold their memory until then
    folder = task.folder
    run = Run.open(task.study, folder)
    if run.outcome:  # another sweep was faster
        yield Progress(run.epochs[-1].step, run.epochs[-1])
        return
    if (folder / store.ERROR).exists() and not task.retry:
        raise Failure(f"it has failed in another sweep: {run.error}")
    _tidy(folder, lock)
    provenance = Provenance(folder / store.ENVIRONMENT, device, task.threads, task.compiled, group.size, lock)
    prepare_process(provenance.threads, device)
    splits = load_splits(task.config, task.data_dir, device)
    group.tell(Shared(task, provenance.threads, provenance.compiled))
    training = Training(task.config, splits, device, compiled=provenance.compiled, group=group)
    notes = [note for note in (*_restore(training, run, lock), provenance.resume(training.step)) if note]
    group.tell(training.state() if group.size > 1 else None)
    clock = Clock(folder / store.TIMING)
    last = training.epochs[-1] if training.epochs else None
    clock.start_up(training.step, last.epoch if last else 0)
    yield Progress(training.step, last, tuple(f"{folder.name}: {note}" for note in notes))

    def submit() -> Future[None]:
        """Commit the run as it is now, on a thread of its own: on a GPU, runs go on while the disk is busy."""
        epochs, timing = list(training.epochs), clock.csv()
        return writer.submit(_commit, lock, task.config, training.step, epochs, training.snapshot(), timing)

    interval = commit_interval(device) if task.commit_seconds is None else task.commit_seconds
    committed = reported = time.monotonic()
    kept: int | None = None  # the step of the last snapshot: a step has several turns where an evaluation follows
    with ThreadPoolExecutor(1, "writer") as writer:
        writing: deque[Future[None]] = deque()
        for epoch in training:
            now = time.monotonic()
            if epoch:
                clock.end_epoch(epoch)
                last = epoch
            while writing and writing[0].done():
                writing.popleft().result()  # or its error
            if training.step in task.snapshots and training.step != kept and not epoch:  # before any commit of it
                writing.append(writer.submit(_keep, lock, training.step, training.snapshot(), len(training.epochs)))
                kept = training.step
            if now - committed >= interval and len(writing) < (2 if epoch else 1):  # however slow the disk
                writing.append(submit())
                committed = now
            if epoch or now - reported >= REPORT_SECONDS:
                yield Progress(training.step, last)
                reported = now
            else:
                yield None
        writing.append(submit())
        for pending in writing:
            while not pending.done():
                yield None
                time.sleep(0.001)
            pending.result()


def _tidy(folder: Path, lock: commit.Lock) -> None:
    """Begin anew where an earlier process failed or was killed."""
    commit.make_folder(folder / store.CHECKPOINTS)
    parts = (folder, folder / store.CHECKPOINTS, folder / store.SNAPSHOTS)
    stale = [folder / store.ERROR, *(path for part in parts for path in commit.leavings(part))]
    lock.check()  # once they are listed: what another process writes from here on is not among them
    for path in stale:
        commit.remove(path)


def _restore(training: Training, run: Run, lock: commit.Lock) -> list[str]:
    """Go on from the newest checkpoint that is sound, and say what there is to say. Those that are not are removed.

    Raises:
        Failure: there is none, and log.csv is damaged: rows that could not be had again would be lost.
    """
    notes, damaged = [], []
    for path in commit.checkpoints(run.folder / store.CHECKPOINTS):
        try:
            training.restore(commit.read_checkpoint(path))
        except ValueError as error:
            notes.append(f"{path.name} is damaged ({error})")
            if not isinstance(error.__cause__, OSError):  # or it may be read another time
                damaged.append(path)
            continue
        if not path.name.startswith(f"{training.step:09d}-"):  # it is sound, but not what its name says
            damaged.append(path)
        _remove(damaged)
        if run.problem:
            notes.append(f"{store.LOG} was damaged, and is written anew")
        _write_log(lock, training.config, training.epochs)
        return [*notes, f"going on from step {training.step}"] if notes else []
    if run.config.init not in INITS:
        raise Failure(f"{run.folder} has lost its initial weights; delete it, and degrade identity makes it again")
    if run.problem:
        raise Failure(f"{run.problem.rpartition('; ')[0]}; restore it, or delete it and a sweep trains the run again")
    _remove(damaged)
    if run.epochs and not notes:
        notes.append("no checkpoint is left")
    return [*notes, "starting anew"] if notes else []


def _remove(damaged: Sequence[Path]) -> None:
    """Checkpoints that would count as the newest, though what is committed from here on is newer."""
    for path in damaged:
        commit.remove(path)


def _commit(
    lock: commit.Lock, config: RunConfig, step: int, epochs: list[Epoch], state: Callable[[], bytes], timing: str
) -> None:
    folder = lock.path.parent
    commit.write_checkpoint(folder / store.CHECKPOINTS, step, state(), epochs=len(epochs), lock=lock)
    _write_log(lock, config, epochs)
    commit.write_file(folder / store.TIMING, timing.encode(), lock)


def _keep(lock: commit.Lock, step: int, state: Callable[[], bytes], epochs: int) -> None:
    folder = lock.path.parent / store.SNAPSHOTS
    commit.make_folder(folder)
    commit.keep_checkpoint(folder, step, state(), epochs=epochs, lock=lock)


def _write_log(lock: commit.Lock, config: RunConfig, epochs: list[Epoch]) -> None:
    """Bring log.csv in line with the checkpoint just committed."""
    if epochs:
        text = to_csv(epochs, validation=config.val_images > 0)
        commit.write_file(lock.path.with_name(store.LOG), text.encode(), lock)
