"""Items side by side in processes on this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from degrade.execute import Error, Event

Function = Callable[[Any], Iterator[Any]]


def execute(function: Function, items: Sequence[Any], jobs: int) -> Iterator[Event]:
    """Run `function(item)`, a generator, for every item, `jobs` at a time and in the order given.

    With one job this happens in this process; otherwise in `jobs` processes that take one item after
    the other. A process that dies fails its item and is replaced. Closing the iterator ends them all,
    and so does the death of this process. `function`, the items and what is yielded must be picklable.

    Yields:
        Events of the items, interleaved; for each item "started", any number of "value", then "done" or "failed".
    """
    if jobs == 1:
        for index, item in enumerate(items):
            yield from _run(function, index, item)
        return
    waiting = list(enumerate(items))[::-1]
    workers = [_Worker(function) for _ in range(min(jobs, len(items)))]
    busy: dict[connection.Connection, _Worker] = {}
    try:
        for worker in workers:
            if waiting:
                worker.give(*waiting.pop())
                busy[worker.pipe] = worker
        while busy:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                event = worker.next_event()
                yield event
                if event.kind not in ("done", "failed"):
                    continue
                del busy[worker.pipe]
                if waiting:
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        worker = _Worker(function)
                        workers.append(worker)
                    worker.give(*waiting.pop())
                    busy[worker.pipe] = worker
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(2)
            worker.process.kill()
            worker.process.join()


def _run(function: Function, index: int, item: Any) -> Iterator[Event]:
    yield Event(index, "started")
    try:
        for value in function(item):
            yield Event(index, "value", value)
    except Exception as error:  # handed on whole: to the caller here, through the pipe elsewhere
        name, message = type(error).__name__, str(error)
        if isinstance(error, OSError) and error.strerror:
            name, message = "OSError", ": ".join(filter(None, (str(error.filename or ""), error.strerror)))
        yield Event(index, "failed", Error(name, message, traceback.format_exc()))
    else:
        yield Event(index, "done")


class _Worker:
    """A process that runs the items it is given, one at a time."""

    def __init__(self, function: Function):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        with _ignoring_sigint():  # inherited: Ctrl-C goes to the whole group, and the parent ends its workers
            self.process.start()
        theirs.close()
        self.index = -1

    def give(self, index: int, item: Any) -> None:
        self.index = index
        self.pipe.send((index, item))

    def next_event(self) -> Event:
        try:
            event: Event = self.pipe.recv()
            return event
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Event(self.index, "failed", Error("", f"its process {how}", ""))


@contextlib.contextmanager
def _ignoring_sigint() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: connection.Connection, function: Function) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            index, item = pipe.recv()
        except EOFError:
            return
        for event in _run(function, index, item):
            pipe.send(event)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
