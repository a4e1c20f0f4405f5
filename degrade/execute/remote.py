"""Items on other machines: what an engine that exists, Ray or SLURM, is told, and what comes of it.

The engine starts jobs, a process each, and says when one has ended. What happens in a job goes through a folder that
all machines share: it appends a line an event to a file of its own, and a line every few seconds besides, so that a
job that is frozen, or whose machine is gone, can be told from one that is busy. Standard library only.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from degrade.commit import look
from degrade.errors import Failure
from degrade.execute import Error, Event
from degrade.execute.local import Function, execute

BEAT = 2.0  # seconds between the lines of a job, at most
FLUSH = 0.5  # seconds that a line may wait, at most
POLL = 0.25  # seconds between two looks at the files
LOOKS = 400  # a second, at most, which a file server bears
SILENCE = 60.0  # seconds without a line, after which a job counts as lost
TRIES = 5  # that an item has, where jobs are lost with it
ENDED, NEVER_BEGUN = "its job ended before it did", "its machine was lost before it began"
LASTING = 600.0  # seconds after which a job has certainly come further: what it loses then is no try
PAUSE = 5.0  # seconds, for each try but the first, before an item is started again
UNHEARD = 60.0  # the same, where nothing was heard of a job: a broken machine is idle, and would be given all there is
Pack = int | Callable[[str, Sequence[Any]], int]


@dataclass(frozen=True)
class Job:
    """Items for one process, as the engine hands them to it: call it there.

    Args:
        function: as for `local.execute`; what it yields is what JSON can hold, with tuples as lists.
        items: with their numbers.
        place: that `function` is given.
        pack: how many take turns; or a function that says so there, of the place and the items.
        events: the file for what happens, which is there.
    """

    function: Function
    items: Sequence[tuple[int, Any]]
    place: str
    pack: Pack
    events: Path

    def __call__(self) -> None:
        """
        Raises:
            OSError: the file is gone, since the job was given up or its folder is not there; or the disk is full.
        """
        numbers, items = zip(*self.items, strict=True)
        with _writing(self.events) as write:
            write("job", os.getpid(), socket.gethostname())
            pack = self.pack if isinstance(self.pack, int) else self.pack(self.place, items)
            for event in execute(self.function, items, [self.place], pack):
                write(numbers[event.item], event.kind, event.value)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[..., None]]:
    """A function that appends a line of JSON to the file, in good time; in this context the file shows a sign of life.

    A process whose file is gone was given up, and ends at once: what it was to begin next is somebody else's.

    Raises:
        OSError: there is no such file; or on leaving, where the lines could not be written.
    """
    lines = [b"\n"]  # the line before may be one that was cut off with its process
    mutex, ended = threading.Lock(), threading.Event()
    synced = getattr(os, "O_DSYNC", 0)  # or NFS would keep the lines for half a minute
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | synced)

    def write(*values: Any) -> None:
        with mutex:
            lines.append(json.dumps(values).encode() + b"\n")
        if "value" not in values[:2]:  # what begins or ends is told before anything else can happen
            with contextlib.suppress(OSError):
                flush()

    def flush(beat: bytes = b"") -> None:
        with mutex:
            data = b"".join(lines) or beat
            if data and not _is_there(path):
                os._exit(1)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                lines[:] = [data] if data else []

    def beat() -> None:
        spoken = 0.0
        while not ended.wait(FLUSH):
            now = time.monotonic()
            if lines or now - spoken >= BEAT:
                with contextlib.suppress(OSError):  # a full disk, say, and it goes on once there is room
                    flush(b"\n")
                    spoken = now

    beats = threading.Thread(target=beat, daemon=True)
    beats.start()
    try:
        yield write
    finally:
        ended.set()
        beats.join()
        try:
            flush()
        finally:
            os.close(descriptor)


def _is_there(path: Path) -> bool:
    try:
        os.close(look(path))
    except FileNotFoundError:
        return False
    return True


class Engine(Protocol):
    """What starts jobs somewhere.

    `at_once`: how many it is given at most; None for all, and it starts them in their order as there is room.
    """

    @property
    def at_once(self) -> int | None: ...

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """Put jobs into the queue, in this order; a handle for each."""

    def state(self, handle: Any) -> str | None:
        """None while the job waits or runs; empty once it has come to its end; else how it was lost, in a line."""

    def is_waiting(self, handle: Any) -> bool:
        """Whether the job is known to be in the queue, where none can show a sign of life."""

    def losses(self) -> int:
        """How many machines have been lost so far: what was under way to one may be lost without a word."""

    def cancel(self, handles: Sequence[Any]) -> None:
        """End the jobs at once, wherever they are, as far as they can be reached."""


def execute_elsewhere(
    engine: Engine,
    function: Function,
    items: Sequence[Any],
    shares: Sequence[Sequence[int]],
    folder: Path,
    *,
    place: str = "cpu",
    pack: Pack = 1,
    lost: Callable[[Any], None] = lambda item: None,
    silence: float | None = None,
) -> Iterator[Event]:
    """Run `function(item, place)` for every item, on whatever machines the engine has.

    A job whose machine dies, freezes or is taken away is started anew with the items that it leaves. Closing the
    iterator ends all jobs.

    Args:
        engine: starts jobs.
        function: as for `local.execute`; what it yields is what JSON can hold.
        items: picklable.
        shares: the numbers of the items of each job, every item once.
        folder: an empty one that every machine sees, for this alone.
        place: given to `function`.
        pack: items at a time in a job, as in `Job`.
        lost: called with an item of a job that was lost, before it is started again; the old process may still be
            there, and come back.
        silence: seconds without a sign of life, after which a job is lost; None for SILENCE.

    Yields:
        Events, as `local.execute`; besides "lost", with how that happened, before an item is started again.
    """
    tries = dict.fromkeys(range(len(items)), 0)  # that came to nothing
    serial = itertools.count()
    waiting = [(0.0, list(share)) for share in shares]  # and from when on it can be submitted
    attempts: list[_Attempt] = []
    silence = SILENCE if silence is None else silence
    try:
        while waiting or attempts:
            room = max(engine.at_once - len(attempts), 0) if engine.at_once else len(waiting)
            chosen = [entry for entry in waiting if entry[0] <= time.monotonic()][:room]
            losses = engine.losses()
            if chosen:
                jobs = [
                    Job(function, [(i, items[i]) for i in group], place, pack, folder / f"{next(serial)}.events")
                    for _, group in chosen
                ]
                waiting = [entry for entry in waiting if entry not in chosen]
                for job in jobs:
                    job.events.touch()  # by whoever reads it: NFS remembers for a while that a name is not there
                try:
                    handles = engine.submit(jobs)
                except Failure:
                    if not attempts:
                        raise
                    waiting += [(time.monotonic() + PAUSE, group) for _, group in chosen]
                    for job in jobs:
                        job.events.unlink()
                else:
                    attempts += [_Attempt(engine, *pair, losses) for pair in zip(jobs, handles, strict=True)]
            time.sleep(max(POLL, len(attempts) / LOOKS))
            losses = engine.losses()
            for attempt in list(attempts):
                how = attempt.lost(silence, losses)
                yield from attempt.events()
                if how is None:
                    continue
                attempts.remove(attempt)
                if how:
                    engine.cancel([attempt.handle])
                    how = how if attempt.where in how else f"{how} ({attempt.where})"
                attempt.give_up()
                lasted = bool(attempt.where) and time.monotonic() - attempt.began > LASTING  # not its time in a queue
                again = []
                for i, item in attempt.job.items:
                    if i not in attempt.left:
                        continue
                    lost(item)
                    if lasted:
                        tries[i] = 0
                    elif how != NEVER_BEGUN:
                        tries[i] += i in attempt.begun or not attempt.begun
                    if tries[i] == TRIES:
                        yield Event(i, "failed", Error("", f"{how or ENDED}; it was tried {TRIES} times", "", ""))
                        continue
                    yield Event(i, "lost", how or ENDED)
                    again.append(i)
                most = max((tries[i] for i in again), default=0)
                alone = most > 1  # one of them may end the others' process
                groups = [[i] for i in again] if alone else [again] if again else []
                pause = (PAUSE if attempt.where else UNHEARD) * max(most - 1, 0)
                waiting[:0] = [(time.monotonic() + pause, group) for group in groups]
    finally:
        engine.cancel([attempt.handle for attempt in attempts])


class _Attempt:
    """A job that was submitted: how far its file was read, and what of it is left."""

    def __init__(self, engine: Engine, job: Job, handle: Any, losses: int):
        self.engine, self.job, self.handle, self.losses = engine, job, handle, losses
        self.left = {number for number, _ in job.items}
        self.begun: set[int] = set()
        self.where = ""
        self.offset = self.queued = 0  # bytes read, and how many there were when it was last seen to wait
        self.began = self.heard = self.looked = time.monotonic()

    def lost(self, silence: float, losses: int) -> str | None:
        """None while there is hope; empty where the job has come to its end; else how it was lost."""
        state, now = self.engine.state(self.handle), time.monotonic()
        self.heard += max(now - self.looked - silence / 4, 0)  # what keeps this process from looking may keep that one
        self.looked = now
        if self.engine.is_waiting(self.handle):
            self.queued = self.offset
        if self._size() > self.offset:
            self.heard = now
        elif self.offset == self.queued:  # it has not begun since, as far as is known here, and that may take its time
            self.heard = now
            return NEVER_BEGUN if losses != self.losses else state
        elif state is None and now - self.heard > silence:
            return f"{self.where} has shown no sign of life for {silence:.0f} s"
        return state

    def _size(self) -> int:
        try:
            descriptor = look(self.job.events)
        except FileNotFoundError:
            return 0
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def give_up(self) -> None:
        """Whatever process there still is may begin nothing more."""
        self.job.events.unlink(missing_ok=True)

    def events(self) -> Iterator[Event]:
        """What is new in the file."""
        try:
            with self.job.events.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        if data:
            self.heard = time.monotonic()
        for line in data.splitlines():
            try:
                first, kind, value = json.loads(line)
            except ValueError:  # a sign of life, or a line that was cut off
                continue
            if first == "job":
                self.where, self.began = f"process {kind} on {value}", time.monotonic()
            elif first in self.left:  # a job that was put into the queue again says once more what is done
                if kind == "started":
                    self.begun.add(first)
                elif kind in ("done", "failed"):
                    self.left.remove(first)
                yield Event(first, kind, Error(*value) if kind == "failed" else value)
