"""The commit protocol: whole files or none, checkpoints that prove themselves, locks that cannot go stale.

Standard library only. Nothing else writes results (what the jobs of a cluster say to each other, in execute/remote.py,
is none). A checkpoint's name is `<step>-<epochs>-<SHA-256 of its bytes>.pt`, so that one rename both publishes and
vouches for it, and nothing else has to be written in step with it. Whatever changes a disk is called as `os.…`, where
the tests listen, fail and kill.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from degrade.errors import Failure

KEPT = 2  # checkpoints: the newest, and one to fall back on
HEARTBEAT = 5.0  # seconds between the signs of life of whoever holds a lock


class Holder(NamedTuple):
    """The process that holds a lock; `pid` is 0 where its number cannot be told.

    `owner` is what it was told to hold the lock for; see `fence`.
    """

    pid: int
    host: str
    owner: str = ""

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host not in ("", socket.gethostname()) else ""
        return f"process {self.pid}{where}" if self.pid else "another process"


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: Holder):
        super().__init__(f"held by {holder}")


def write_file(path: Path, data: bytes, lock: "Lock | None" = None) -> None:
    """Replace `path` by `data`, wholly or not at all, also across a power cut.

    Where a `lock` is given, only as long as it is in place.

    Raises:
        OSError: the old file is still there, and no other; or the new one, where only its folder could not be synced.
        Failure: likewise; the lock has been taken away.
    """
    _publish(os.replace, path, data, lock)


def create_file(path: Path, data: bytes) -> bool:
    """Write `path` like `write_file`, but only where there is none yet; say whether that was so.

    Of several processes that try at once, one succeeds. A file system without hard links cannot tell.

    Raises:
        OSError: there is no such file, or only its folder could not be synced.
    """
    if path.exists():
        return False
    try:
        _publish(os.link, path, data)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        write_file(path, data)
    return True


def _publish(how: Callable[[Path, Path], None], path: Path, data: bytes, lock: "Lock | None" = None) -> None:
    """Write the data under another name, then give them theirs by `how`; the order is what the promises rest on.

    A process whose lock was taken away (`fence`) publishes nothing, wherever in here it was frozen: it looks at
    its lock once its partial file is there, and whoever took the lock removes partial files (`leavings`) after
    that. So either it sees that the lock is gone, or what it would rename is.
    """
    partial = path.with_name(f".{path.name[:20]}.{secrets.token_hex(4)}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if lock:
            lock.check()
        how(partial, path)
    finally:
        if partial.exists():  # linked, or failed
            with contextlib.suppress(OSError):
                os.unlink(partial)
    _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create the folder and its parents, durably.

    One that is there may have been made by a process that was killed before it could see to that.
    """
    if not path.exists():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
    with contextlib.suppress(PermissionError):  # a parent that may be passed through, but not read
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove the file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leavings(folder: Path) -> list[Path]:
    """What killed processes left half-written; they can go where the lock of whoever writes there is held."""
    return sorted(folder.glob(".*.partial"))


def write_checkpoint(folder: Path, step: int, data: bytes, *, epochs: int = 0, lock: "Lock | None" = None) -> None:
    """Commit `data` as a checkpoint in `folder`, then drop what is older than it and the one before.

    What is later stays: whoever has written that has taken this run over.

    Args:
        folder: of the checkpoints of one run.
        step: updates done.
        data: the checkpoint.
        epochs: rows of the log so far. At the end of an epoch there is one more than before, at the same step.
        lock: of the run, as in `write_file`.
    """
    path = keep_checkpoint(folder, step, data, epochs=epochs, lock=lock)
    older = [other for other in checkpoints(folder) if other.name <= path.name]
    for other in older[KEPT:]:
        remove(other)


def keep_checkpoint(folder: Path, step: int, data: bytes, *, epochs: int = 0, lock: "Lock | None" = None) -> Path:
    """Commit `data` as a checkpoint in `folder` like `write_checkpoint`, and drop none; its path."""
    path = folder / f"{step:09d}-{epochs:06d}-{hashlib.sha256(data).hexdigest()}.pt"
    write_file(path, data, lock)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("[0-9]*-*.pt"), reverse=True)


def read_checkpoint(path: Path) -> bytes:
    """
    Raises:
        ValueError: its bytes cannot be read, or do not have the hash in its name.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from error
    if path.stem.rpartition("-")[2] != hashlib.sha256(data).hexdigest():
        raise ValueError("its bytes are not those it was written with")
    return data


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor
        self.line = b""  # that names this process, once it is written

    @property
    def in_place(self) -> bool:
        """Whether its file is still the one at its path, and names this process.

        Where it was deleted, others may have taken the lock; and where a file server has waited in vain for this
        machine, they may have taken this very file.
        """
        try:
            there = look(self.path)
        except FileNotFoundError:
            return False
        try:
            same = os.path.samestat(os.fstat(self.descriptor), os.fstat(there))
            return same and (not self.line or os.pread(there, 300, 0) == self.line)
        finally:
            os.close(there)

    def check(self) -> None:
        """
        Raises:
            Failure: its file was deleted or replaced, or names another process.
        """
        if not self.in_place:
            raise Failure(f"{self.path} was taken away while it was held; nothing more is written")


def look(path: Path) -> int:
    """Open the file for reading, as it is now, also where another machine has made, changed or removed it; close it.

    NFS may answer `stat` from a minute ago, and so whether a name is there. It looks again at what is opened, and at
    names once their folder was opened.

    Raises:
        FileNotFoundError: it is not there.
    """
    with contextlib.suppress(PermissionError):  # a folder that may be passed through, but not read
        os.scandir(path.parent).close()
    return os.open(path, os.O_RDONLY)


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False, owner: str = "") -> Iterator[Lock]:
    """Hold an exclusive lock on the file `path`, which is made if need be. The kernel frees it when the holder dies.

    Its file says who holds it, and for which `owner`, if that is said (a word). It is touched every few seconds,
    so that others can tell a frozen holder.

    Raises:
        Held: another process has it, and `wait` is false.
        Failure: locks do not work here.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        lock = Lock(path, descriptor)
        ended = threading.Event()
        try:
            _lock(descriptor, path, wait)
            if not (held := holder(path)) and lock.in_place:
                raise _no_locks(path, "two can hold one at once")
            if not (held and lock.in_place):
                continue  # whoever cleaned up here took the file as well
            line = f"{os.getpid()} {socket.gethostname()} {owner}".rstrip().encode() + b"\n"
            os.pwrite(descriptor, line, 0)
            os.truncate(descriptor, len(line))
            lock.line = line
            threading.Thread(target=_beat, args=(lock, ended), daemon=True).start()
            yield lock
            return
        finally:
            ended.set()
            os.close(descriptor)


def fence(path: Path, owner: str) -> None:
    """Take the lock `path` away from whoever holds it for `owner`, and from nobody else.

    That process may be out of reach: whatever it does from here on, it commits nothing more. The lock is free.
    """
    descriptor = os.open(path, os.O_RDONLY) if path.exists() else None
    if descriptor is None:
        return
    try:
        if owner and _named(descriptor).owner == owner:
            remove(path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_or_fail(path: Path) -> Iterator[Lock]:
    """As `hold`, for who cannot go on without the lock.

    Raises:
        Failure: another process has it, or locks do not work here.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(hold(path))
        except Held as held:
            raise Failure(f"{path.parent}: {held}") from None
        yield lock


def _beat(lock: Lock, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a full disk, say, and it goes on once there is room
            if lock.in_place:  # or it would speak for whoever holds the new one
                os.utime(lock.path)


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    for patience in (*(0.01 * i for i in range(10)), None):  # `holder` below has a free lock for microseconds
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return
        except BlockingIOError:
            if patience is None:
                raise Held(_named(descriptor)) from None
            time.sleep(patience)
        except OSError as error:
            raise _no_locks(path, error.strerror) from None


def _no_locks(path: Path, reason: str | None) -> Failure:
    return Failure(f"{path.parent}: locks do not work on its file system ({reason}); name a folder on another")


def holder(path: Path) -> Holder | None:
    """The process that holds the lock `path`, or None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # A shared lock: readers do not get in each other's way.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _named(descriptor)
    finally:
        os.close(descriptor)


def sign_of_life(path: Path) -> int:
    """A number that changes as long as whoever holds the lock `path` is not frozen."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _named(descriptor: int) -> Holder:
    line = os.pread(descriptor, 300, 0).partition(b"\n")[0].decode(errors="replace")
    pid, host, owner = (*line.split(" "), "", "")[:3]
    return Holder(int(pid) if pid.isdigit() else 0, host, owner)
