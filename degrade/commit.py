"""The commit protocol: whole files or none, checkpoints that prove themselves, locks that cannot go stale.

Standard library only. A checkpoint's name is `<step>-<SHA-256 of its bytes>.pt`, so that one rename
both publishes and vouches for it; nothing else has to be written in step with it.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KEPT = 2  # checkpoints: the newest, and one to fall back on


class Held(Exception):
    """Another process holds the lock; `pid` is its number, or None where it cannot be told."""

    def __init__(self, path: Path, pid: int | None):
        super().__init__(f"held by {f'process {pid}' if pid else 'another process'}, and left to it")
        self.pid = pid


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, wholly or not at all, also across a power cut.

    Raises:
        OSError: the old file is still there, and no other.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:20]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create the folder and its parents, durably."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, step: int, data: bytes) -> None:
    """Commit `data` as the newest checkpoint in `folder`, then drop all but it and the one before.

    Checkpoints of later steps go too: the run would have gone on from them, had they not been damaged.
    """
    make_folder(folder)
    path = folder / f"{step:09d}-{hashlib.sha256(data).hexdigest()}.pt"
    write_file(path, data)
    kept = [other for other in _checkpoints(folder) if other.name <= path.name][:KEPT]
    for other in _checkpoints(folder):
        if other not in kept:
            other.unlink(missing_ok=True)


def clear_leavings(folder: Path) -> None:
    """Remove what a killed process left half-written. The caller holds the lock of whoever writes there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[bytes | None, list[str]]:
    """The newest checkpoint whose bytes have the hash in its name, and the names of newer ones that have not."""
    bad: list[str] = []
    for path in _checkpoints(folder):
        data = path.read_bytes()
        if path.stem.partition("-")[2] == hashlib.sha256(data).hexdigest():
            return data, bad
        bad.append(path.name)
    return None, bad


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("[0-9]*-*.pt"), reverse=True)


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made if need be. The kernel frees it when the holder dies.

    Raises:
        Held: another process has it, and `wait` is false.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, path, wait)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    for patience in (*(0.01 * i for i in range(10)), None):  # `holder` below has a free lock for microseconds
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return
        except BlockingIOError:
            if patience is None:
                raise Held(path, _pid(descriptor)) from None
            time.sleep(patience)


def holder(path: Path) -> int | None:
    """The process that holds the lock `path` (0 where its number is not known), or None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # A shared lock: readers do not get in each other's way.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _pid(descriptor) or 0
    finally:
        os.close(descriptor)


def _pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
