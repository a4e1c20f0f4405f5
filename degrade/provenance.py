"""How a run was made: environment.json, what its bits depend on beside its configuration; and timing.csv."""

import hashlib
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import degrade
from degrade import store
from degrade.commit import Lock, write_file
from degrade.engine.compiled import why_not
from degrade.errors import Failure
from degrade.log import Epoch

# Which kernels the libraries below torch choose, where anyone has set these.
FLAGS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE")
NO_BITS = ("degrade", "commit", "python", "cores")  # recorded, but the bits do not depend on them


class Provenance:
    """The environment of one run: as recorded where there is a record, else as it is now.

    Args:
        path: of its environment.json.
        device: where it is to be trained.
        threads, compiled: how, unless it has begun otherwise.
        processes: that train it together.
        lock: of the run, without which nothing is written.

    Raises:
        Failure: the file is damaged.
    """

    def __init__(
        self, path: Path, device: str, threads: int, compiled: bool, processes: int = 1, lock: Lock | None = None
    ):
        self.path, self.lock = path, lock
        now = environment(device, threads, compiled) | {"processes": processes}
        if not path.exists():
            write_file(path, store.to_json(now), lock)
        self.recorded = store.read_json(path)
        self.before = dict(self.recorded)
        changes = self.before.pop("changes", [])
        if not (isinstance(changes, list) and all(isinstance(change, dict) for change in changes)):
            raise Failure(f"{path}: changes must be a list of objects; restore it")
        for change in changes:
            self.before |= change
        if type(self.before.get("threads")) is not int or not 1 <= self.before["threads"] <= 1024:
            raise Failure(f"{path} does not say how many threads there were; restore it")
        now |= {"threads": self.before["threads"], "compiled": self.before.get("compiled", False)}
        self.reasons = {}
        if now["compiled"] and not compiled and (reason := why_not(device)):
            now["compiled"], self.reasons["compiled"] = False, f" ({reason})"
        self.now = now

    @property
    def threads(self) -> int:
        return int(self.now["threads"])

    @property
    def compiled(self) -> bool:
        return bool(self.now["compiled"])

    def resume(self, step: int) -> str:
        """Record what is not as it was, from this step on; the line that says so, where the bits depend on it."""
        changed = {name: value for name, value in self.now.items() if self.before.get(name, value) != value}
        if changed:
            self.recorded["changes"] = [*self.recorded.get("changes", []), {"step": step} | changed]
            write_file(self.path, store.to_json(self.recorded), self.lock)
        told = [
            f"{name} was {self.before[name]}, is {changed[name]}{self.reasons.get(name, '')}"
            for name in changed
            if name not in NO_BITS
        ]
        return f"not bit for bit the unbroken run from step {step} on: {'; '.join(told)}" if told else ""


class Clock:
    """timing.csv: the seconds of each epoch, counted in the process that ended it, and when it ended (UTC).

    Rows of epoch 0 are start-ups: data, compiling, capturing.
    """

    HEADER = "epoch,step,seconds,ended\n"
    ROW = re.compile(r"(\d+),\d+,\d+\.\d+,[-:TZ\d]+\n")

    def __init__(self, path: Path):
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
        self.rows = [line for line in lines if self.ROW.fullmatch(line)]
        self.start = time.monotonic()

    def start_up(self, step: int, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs: the later ones are trained again."""
        self.rows = [row for row in self.rows if int(row.partition(",")[0]) <= epochs]
        self._add(0, step)

    def end_epoch(self, epoch: Epoch) -> None:
        self._add(epoch.epoch, epoch.step)

    def csv(self) -> str:
        return self.HEADER + "".join(self.rows)

    def _add(self, epoch: int, step: int) -> None:
        now = time.monotonic()
        ended = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.rows.append(f"{epoch},{step},{now - self.start:.3f},{ended}\n")
        self.start = now


def environment(device: str, threads: int, compiled: bool) -> dict[str, Any]:
    """As it is now."""
    values = {
        "degrade": degrade.__version__,
        "commit": _git_commit(),
        "code": code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.device(device).type,
        "threads": threads,
        "compiled": compiled,
        "flush_denormal": True,
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }
    if device.startswith("cuda"):
        values["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return values


def _cpu_model() -> str:
    """As Linux names it; elsewhere the kind of processor."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@lru_cache(1)
def code() -> str:
    """Twelve digits of a SHA-256 of the package's sources."""
    package = Path(degrade.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache(1)
def _git_commit() -> str | None:
    """The commit of the checkout that degrade runs from, with `+` where its code differs; None elsewhere."""
    package = Path(degrade.__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(package), *arguments], capture_output=True, text=True
        )

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        changed = git("status", "--porcelain", "--", ".").stdout
        return git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("+" if changed else "")
    except OSError:  # no git
        return None
