"""Items side by side in processes on this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from degrade.execute import Crowded, Error, Event

Function = Callable[[Any, str], Iterator[Any]]


def execute(function: Function, items: Sequence[Any], places: Sequence[str], pack: int = 1) -> Iterator[Event]:
    """Run `function(item, place)`, a generator, for every item, in the order given.

    Each place runs `pack` items at a time, which take turns in one thread, from one value to the next. One
    place is this process; of several, each has a process of its own. A process that dies fails its items
    and is replaced. Closing the iterator ends them all, and so does the death of this process.
    `function`, the items and what is yielded must be picklable. None is yielded to give up a turn.

    Yields:
        Events of the items, interleaved; for each item "started", any number of "value", then "done" or
        "failed"; or "waiting", where there was no room for it, and it is started again later.
    """
    waiting = deque(enumerate(items))
    if len(places) == 1:
        turns = _Turns(function, places[0], pack)
        try:
            while waiting or turns.active:
                while waiting and turns.room:
                    yield turns.start(*waiting.popleft())
                for event in turns.round():
                    if event.kind == "waiting":
                        waiting.appendleft((event.item, items[event.item]))
                    yield event
        finally:
            turns.close()
        return
    workers = [_Worker(function, place, pack) for place in places[: len(items)]]
    try:
        while waiting or any(worker.items for worker in workers):
            for worker in sorted(workers, key=lambda worker: len(worker.items)):
                if waiting and worker.room:
                    worker.give(*waiting.popleft())
            busy = {worker.pipe: worker for worker in workers if worker.items}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                for event in worker.events():
                    if event.kind == "waiting":
                        waiting.appendleft((event.item, items[event.item]))
                    yield event
                if not worker.process.is_alive() and not worker.items:
                    workers[workers.index(worker)] = _Worker(function, worker.place, pack)
    finally:
        for worker in workers:  # at any moment: whatever they write, they write whole
            worker.process.kill()
        for worker in workers:
            worker.process.join()


class _Turns:
    """Generators that take turns: the packed items of one place."""

    def __init__(self, function: Function, place: str, pack: int):
        self.function, self.place, self.pack = function, place, pack
        self.active: dict[int, Iterator[Any]] = {}

    @property
    def room(self) -> bool:
        return len(self.active) < self.pack

    def start(self, index: int, item: Any) -> Event:
        self.active[index] = self.function(item, self.place)
        return Event(index, "started")

    def round(self) -> Iterator[Event]:
        """One turn of each item."""
        for index in list(self.active):
            try:
                value = next(self.active[index])
            except StopIteration:
                del self.active[index]
                yield Event(index, "done")
            except Exception as error:  # handed on whole: to the caller here, through the pipe elsewhere
                del self.active[index]
                if isinstance(error, Crowded) and self.active:
                    self.pack = len(self.active)
                    yield Event(index, "waiting", self.pack)
                else:
                    yield Event(index, "failed", _describe(error))
            else:
                if value is not None:
                    yield Event(index, "value", value)

    def close(self) -> None:
        for generator in self.active.values():
            generator.close()  # type: ignore[attr-defined]


def _describe(error: Exception) -> Error:
    name, message = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.strerror:
        name, message = "OSError", ": ".join(filter(None, (str(error.filename or ""), error.strerror)))
    *_, last = traceback.extract_tb(error.__traceback__)
    where = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}"
    return Error(name, message, where, "".join(traceback.format_exception(error)))


class _Worker:
    """A process that runs the items it is given, `pack` at a time."""

    def __init__(self, function: Function, place: str, pack: int):
        context = multiprocessing.get_context("spawn")
        self.place, self.pack = place, pack
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _blocking_sigint():  # the parent ends its workers
            self.process.start()
        theirs.close()
        self.items: list[int] = []
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send((function, place, pack))  # so that it can die with us before it imports what that needs

    @property
    def room(self) -> bool:
        return len(self.items) < self.pack

    def give(self, index: int, item: Any) -> None:
        self.items.append(index)
        with contextlib.suppress(BrokenPipeError):  # it has died, which the next event will tell
            self.pipe.send((index, item))

    def events(self) -> list[Event]:
        """The next event, or, once the process has died, how each of its items ended."""
        try:
            event: Event = self.pipe.recv()
        except (EOFError, OSError):  # perhaps in the middle of a message
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = "; did memory run out?" if code == -signal.SIGKILL else ""
            lost, self.items = self.items, []
            return [Event(index, "failed", Error("", f"its process {how}{why}", "", "")) for index in lost]
        if event.kind in ("done", "failed", "waiting"):
            self.items.remove(event.item)
        if event.kind == "waiting":
            self.pack = event.value
        return [event]


@contextlib.contextmanager
def _blocking_sigint() -> Iterator[None]:
    """A process started in this context never sees Ctrl-C, which goes to the whole group; this one sees it after."""
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has died
        turns = _Turns(*pipe.recv())
        while True:
            while not turns.active or pipe.poll():
                pipe.send(turns.start(*pipe.recv()))
            for event in turns.round():
                pipe.send(event)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
