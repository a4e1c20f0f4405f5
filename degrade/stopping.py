"""SIGTERM and Ctrl-C end a command soon, whatever it is doing, with one line. Standard library only."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import NoReturn

PATIENCE = 3.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised by a signal, so that what is under way is tidied up as it is after any error.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


@contextlib.contextmanager
def stopping(message: str) -> Iterator[None]:
    """In this context SIGINT and SIGTERM end the process with `message` and exit code 130 or 143.

    First `Stopped` is raised, and what runs may tidy up. Where nothing comes of that within a few seconds,
    since it was swallowed, say, or the interpreter is busy elsewhere, the process ends as it is: nothing that
    it leaves behind is needed. Signals that were ignored still are. Use it in the main thread.

    While a library in C is imported it waits: an exception in what such a library calls may abort the process.
    """
    received: list[int] = []
    postponed = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _imports_a_library_in_c(frame):
            postponed.set()
            return
        raise Stopped(number)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in handlers:
                end = time.monotonic() + PATIENCE
                while time.monotonic() < end:
                    time.sleep(0.05)
                    if postponed.is_set():
                        postponed.clear()
                        os.kill(os.getpid(), number[0])
                _leave(message, number[0])
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {n: handler for n in SIGNALS if (handler := signal.getsignal(n)) != signal.SIG_IGN}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, before `stop` is called
    threading.Thread(target=watch, daemon=True).start()
    try:
        for number in handlers:
            signal.signal(number, stop)
        yield
    except BaseException:
        if received:  # whatever it may have become on its way here
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            _leave(message, received[0])  # no interpreter is shut down: some thread may never end
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)


def _imports_a_library_in_c(frame: FrameType | None) -> bool:
    while frame:
        loads = frame.f_code.co_filename == "<frozen importlib._bootstrap_external>"
        if loads and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _leave(message: str, number: int) -> NoReturn:
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0.5)[1]:  # or a pipe that nobody reads would hold it up
            os.write(2, f"{show_cursor}degrade: {message}\n".encode())
    os._exit(128 + number)
