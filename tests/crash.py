"""What the tests of crashes share: a disk that is listened to, and processes that start fast and can be killed."""

import gc
import hashlib
import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from degrade import commit, store
from degrade import sweep as module
from degrade.store import Study
from degrade.sweep import Machine, sweep

# Forked from a process that has imported torch already, so that they start in a tenth of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["degrade.cli", "degrade.sweep", "degrade.bench"])

CHANGES = ("open", "write", "pwrite", "truncate", "fsync", "close", "replace", "link", "unlink", "mkdir")


def run_sweep(out: Path, configs, data_dir: Path, *, commit_seconds: float = 0.0, finished: bool = False):
    """Every event of a sweep over these runs, in this process; also of those that have `finished`, if so asked."""
    there = Study(out / "s", "s", "smoke", configs[0].shared())
    runs = [run for run in there.find(configs) if finished or run.status not in store.FINISHED]
    if isinstance(commit.os, Disk):
        module.ThreadPoolExecutor = Inline  # the same calls in the same order each time
    module.gc = SimpleNamespace(collect=lambda: None)  # it takes longer than a run of these
    try:
        yield from sweep(there, runs, Machine("cpu", 1, 1), data_dir, commit_seconds=commit_seconds)
    finally:
        module.gc = gc
        module.ThreadPoolExecutor = ThreadPoolExecutor


class Inline:
    """An executor without a thread."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def finish(out: Path, configs, data_dir: Path, **options) -> None:
    ends = [event for _, event in run_sweep(out, configs, data_dir, **options) if event.kind != "value"]
    assert {event.kind for event in ends} <= {"started", "done"}, ends


def digests(out: Path) -> dict[str, tuple[str, str]]:
    """SHA-256 of the log and of the final checkpoint of each run, by run id."""
    found = {}
    for folder in sorted(out.glob("*/*/")):
        if (folder / store.CONFIG).exists():
            log = (folder / store.LOG).read_bytes()
            last = commit.read_checkpoint(commit.checkpoints(folder / store.CHECKPOINTS)[0])
            found[folder.name] = hashlib.sha256(log).hexdigest(), hashlib.sha256(last).hexdigest()
    return found


class Disk:
    """Stands in for `os` in degrade.commit. Each call that changes the disk has a name, such as `fsync log.csv`.

    Args:
        before, after: called with the name and the place of each such call among all, and among those of its name.
    """

    class Failed(OSError):
        """What a test has it raise."""

    def __init__(self, before=None, after=None):
        self.before, self.after = before, after
        self.calls: list[str] = []
        self.names: dict[int, str] = {}  # of open files
        self.lock = threading.RLock()

    def __getattr__(self, name):
        real = getattr(os, name)
        return real if name not in CHANGES else lambda *arguments: self._call(name, real, arguments)

    def _call(self, name, real, arguments):
        with self.lock:
            target = arguments[-1] if name in ("replace", "link") else arguments[0]
            what = self.names.get(target, "?") if isinstance(target, int) else kind(Path(target))
            called = f"{name} {what}"
            place = len(self.calls), self.calls.count(called)
            self.calls.append(called)
            if self.before:
                self.before(called, *place)
            result = real(*arguments)
            if name == "open":
                self.names[result] = what
            self.record(name, arguments, result)
            if self.after:
                self.after(called, *place)
            return result

    def record(self, name, arguments, result):
        pass

    def __enter__(self):
        commit.os = self
        return self

    def __exit__(self, *_):
        commit.os = os


def kind(path: Path) -> str:
    """What a path is, whatever the run and the step."""
    if path.parent.name == store.CHECKPOINTS:
        return "checkpoint"
    if path.name.endswith(".partial"):
        return path.name.removeprefix(".").rpartition(".")[0].rpartition(".")[0]
    return path.name if path.suffix or path.name in (store.LOCK, store.CHECKPOINTS) else "folder"


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sweep_and_die(out: Path, configs, data_dir: Path, name: str, occurrence: int, when: str) -> None:
    """A sweep whose process is killed just before or after that occurrence of a call on the disk."""

    def kill(called, _, place):
        if (called, place) == (name, occurrence):
            die()

    with Disk(**{when: kill}):
        finish(out, configs, data_dir)


def start(target, *arguments):
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def spread(count: int, total: int, seed: int) -> list[int]:
    """`count` of range(total), evenly and at random; all of them where there are no more."""
    if count >= total:
        return list(range(total))
    rng = random.Random(seed)
    return sorted({int((i + rng.random()) * total / count) for i in range(count)})


class RecordingDisk(Disk):
    """Lists what happens below `root`, as `PowerCut` replays it."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root
        self.log: list[tuple] = []
        self.inodes: dict[int, int] = {}  # of open files
        self.count = 0

    def record(self, name, arguments, result):
        paths = [os.path.relpath(argument, self.root) for argument in arguments if isinstance(argument, Path)]
        if any(path.startswith("..") for path in paths):
            self.inodes[result] = ".."
        elif name == "open" and os.path.isdir(arguments[0]):
            self.inodes[result] = paths[0]
        elif name == "open":
            self.count += 1
            self.inodes[result] = self.count
            self.log.append(("open", paths[0], self.count))
        elif name in ("write", "pwrite"):
            self.log.append((name, self.inodes[arguments[0]], bytes(arguments[1])[:result]))
        elif name in ("fsync", "truncate") and self.inodes[arguments[0]] != "..":
            self.log.append((name, self.inodes[arguments[0]], *arguments[1:]))
        elif paths:
            self.log.append((name, *paths))


class PowerCut:
    """A file system as POSIX has it: what was not synced may be there, or not, or in part, after the power is cut.

    An entry of a folder is durable once the folder was synced, the bytes of a file once the file was.
    """

    def __init__(self) -> None:
        self.same: dict[int, object] = {}  # the inode that one opened again has in truth
        self.bytes: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.folders: dict[str, dict[str, object]] = {".": {}}  # as a process sees them: an inode, or "folder"
        self.durable: dict[str, dict[str, object]] = {".": {}}
        self.pending: dict[str, list[dict[str, object]]] = {".": []}  # changes since the folder was synced

    def apply(self, operation: tuple) -> None:
        name, *arguments = operation
        if name == "open":
            path, inode = arguments
            there = self.folders[os.path.dirname(path) or "."].get(os.path.basename(path))
            if there is None:
                self.bytes[inode] = self.synced[inode] = b""
                self._change(path, inode)
            else:
                self.same[inode] = there
            return
        if isinstance(arguments[0], int):
            arguments[0] = self.same.get(arguments[0], arguments[0])
        if name == "write":
            self.bytes[arguments[0]] += arguments[1]
        elif name == "pwrite":
            inode, data = arguments
            self.bytes[inode] = data + self.bytes[inode][len(data) :]
        elif name == "truncate":
            self.bytes[arguments[0]] = self.bytes[arguments[0]][: arguments[1]]
        elif name == "fsync" and isinstance(arguments[0], int):
            self.synced[arguments[0]] = self.bytes[arguments[0]]
        elif name == "fsync":
            self.durable[arguments[0]] = dict(self.folders[arguments[0]])
            self.pending[arguments[0]] = []
        elif name == "mkdir":
            self._change(arguments[0], "folder")
            self.folders[arguments[0]], self.durable[arguments[0]], self.pending[arguments[0]] = {}, {}, []
        elif name in ("replace", "link"):
            before, after = arguments
            inode = self.folders[os.path.dirname(before)][os.path.basename(before)]
            gone = {os.path.basename(before): None} if name == "replace" else {}
            self._change(after, inode, gone)
        elif name == "unlink":
            self._change(arguments[0], None)
        else:
            raise AssertionError(operation)

    def _change(self, path: str, value: object, also=None) -> None:
        folder, entry = os.path.split(path)
        change = {entry: value} | (also or {})
        self.folders[folder or "."] = _with(self.folders[folder or "."], change)
        self.pending[folder or "."].append(change)

    def after_the_cut(self, rng: random.Random) -> dict[str, bytes | None]:
        """What may be left, by path; None for a folder."""
        left: dict[str, bytes | None] = {}
        luck = rng.random()  # of the folders: none of the changes, all of them, or any

        def visit(folder: str) -> None:
            entries = self.durable[folder]
            for change in self.pending[folder]:
                if rng.random() < (luck if 0.2 < luck < 0.8 else round(luck)):
                    entries = _with(entries, change)
            for name, value in entries.items():
                path = name if folder == "." else f"{folder}/{name}"
                if value == "folder":
                    left[path] = None
                    visit(path)
                else:
                    left[path] = self._torn(value, rng)

        visit(".")
        return left

    def _torn(self, inode: int, rng: random.Random) -> bytes:
        """What was synced, or all, or a part of what came since, or its length in zeros."""
        synced, written = self.synced[inode], self.bytes[inode]
        if synced == written:
            return written
        cut = rng.randrange(len(written) + 1)
        return rng.choice([synced, written, written[:cut], written[:cut] + bytes(len(written) - cut)])

    def everything(self) -> dict[str, bytes | None]:
        """What a process sees."""
        self.durable = {path: dict(entries) for path, entries in self.folders.items()}
        self.pending = {path: [] for path in self.folders}
        self.synced = dict(self.bytes)
        return self.after_the_cut(random.Random(0))


def _with(entries: dict[str, object], change: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in (entries | change).items() if value is not None}


def write_tree(root: Path, tree: dict[str, bytes | None]) -> None:
    root.mkdir()
    for path, data in tree.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def read_tree(root: Path) -> dict[str, bytes | None]:
    return {
        os.path.relpath(path, root): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }
