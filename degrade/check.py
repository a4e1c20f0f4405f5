"""`degrade check`: is every file of the results what it should be, and what can be written anew from the others?"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from degrade import commit, store
from degrade.config import PROTOCOLS, RunConfig, overridden
from degrade.errors import Failure
from degrade.log import Epoch, to_csv
from degrade.provenance import Clock
from degrade.store import Run, Study, to_json
from degrade.train import State, read_state

PARTS = (store.CONFIG, store.LOG, store.CHECKPOINTS, store.ENVIRONMENT, store.TIMING)  # any of them makes a run
OLD = 60.0  # seconds, after which nobody is writing a file any more


class Finding(NamedTuple):
    """Something that is not as it should be.

    Args:
        path: the file.
        problem: what is wrong with it.
        remedy: what `mend` does about it.
        mend: None where nothing can be done: what is lost cannot be derived from the other files.
    """

    path: Path
    problem: str
    remedy: str = ""
    mend: Callable[[], None] | None = None


@dataclass(frozen=True)
class Checked:
    """One study: its folder, how many runs have which status, how many logs had no checkpoint to compare with."""

    folder: Path
    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)


def check(root: Path, *, repair: bool = False) -> Iterator[Checked]:
    """Look at every study in `root` and below it, and mend what can be mended if that is asked for.

    Runs under way are left alone. Nothing is written otherwise.

    Raises:
        ValueError: `root` is not a folder, or there is no study in it.
        OSError: what was to be mended cannot be written.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name a folder of results, such as results/")
    folders = {path.parent for path in root.rglob(store.STUDY)}
    folders |= {path.parent.parent for name in (store.CONFIG, store.LOG) for path in root.rglob(f"*/{name}")}
    if not folders:
        raise ValueError(f"{root} holds no study")
    for folder in sorted(folders):
        yield _check_study(folder, repair)


def _check_study(folder: Path, repair: bool) -> Checked:
    checked = Checked(folder)

    def note(finding: Finding) -> None:
        checked.findings.append(finding)
        if repair and finding.mend:
            finding.mend()

    for finding in _study(folder):
        note(finding)
    try:
        study = Study.open(folder)
    except (Failure, OSError):
        study = None
    for run_folder in sorted({path.parent for part in PARTS for path in folder.glob(f"*/{part}")}):
        if commit.holder(run_folder / store.LOCK):
            checked.statuses["running"] += 1
            continue
        if repair and any(finding.mend for finding in _run(run_folder, study)):
            with commit.hold(run_folder / store.LOCK):
                for finding in _run(run_folder, study):
                    note(finding)
        else:
            for finding in _run(run_folder, study):
                note(finding)
        try:
            run = Run.open(folder.name, run_folder)
        except (Failure, OSError):
            checked.statuses["unreadable"] += 1
            continue
        checked.statuses[run.status] += 1
        if run.epochs and not run.has_checkpoint:
            checked.alone.append(run_folder)
    return checked


def _study(folder: Path) -> Iterator[Finding]:
    path = folder / store.STUDY
    try:
        Study.open(folder)
    except (Failure, OSError) as error:
        configs = []
        for run_folder in {other.parent for other in folder.glob(f"*/{store.CONFIG}")}:
            try:
                configs.append(Run.open(folder.name, run_folder).config)
            except (Failure, OSError):
                continue
        yield _rewritten(path, _reason(error, path), "from its runs' configurations", _study_file(configs))
    for partial in commit.leavings(folder) + commit.leavings(folder / "figures"):
        if time.time() - partial.stat().st_mtime > OLD:
            yield _leaving(partial)


def _study_file(configs: list[RunConfig]) -> bytes | None:
    """study.json of these runs, where they are of one study. Its protocol is the one they differ from least."""
    if not configs or any(config.shared() != configs[0].shared() for config in configs):
        return None
    shared = configs[0].shared()
    protocol = min(PROTOCOLS, key=lambda name: len(overridden(name, shared)))
    return to_json({"protocol": protocol, "shared": shared})


def _run(folder: Path, study: Study | None) -> Iterator[Finding]:
    for partial in commit.leavings(folder) + commit.leavings(folder / store.CHECKPOINTS):
        yield _leaving(partial)
    state, bad = _checkpoints(folder)
    path = folder / store.CONFIG
    try:
        config = Run.open("", folder).config
    except (Failure, OSError) as error:
        derived = to_json(state.config.as_dict()) if state and state.config.run_id == folder.name else None
        yield _rewritten(path, _reason(error, path), "from its checkpoint", derived)
        if not derived or not state:
            return
        config = state.config
    if study and config.shared() != study.shared:
        yield Finding(path, f"it is of another study: {store.difference(study.shared, config)}")
    if state and state.config != config:
        yield Finding(folder / store.CHECKPOINTS, f"its checkpoint is of {state.config.run_id}")
        return
    yield from _log(folder, config, state)
    yield from _environment(folder)
    finished = Run("", folder, config).outcome
    for path, problem in bad:
        if state or finished:
            yield Finding(path, problem, "removed", lambda path=path: commit.remove(path))  # type: ignore[misc]
        else:
            yield Finding(path, f"{problem}; no other is left, and a sweep starts anew")


def _checkpoints(folder: Path) -> tuple[State | None, list[tuple[Path, str]]]:
    """The newest sound one, and what is wrong with others."""
    newest, bad = None, []
    for path in commit.checkpoints(folder / store.CHECKPOINTS):
        try:
            state = read_state(commit.read_checkpoint(path))
            if int(path.name.partition("-")[0]) != state.step:
                raise ValueError(f"it is of step {state.step}")
            newest = newest or state
        except ValueError as error:
            bad.append((path, str(error)))
    return newest, bad


def _log(folder: Path, config: RunConfig, state: State | None) -> Iterator[Finding]:
    path = folder / store.LOG
    run = Run("", folder, config)
    validation = config.val_images > 0
    derived = to_csv(state.epochs, validation=validation).encode() if state and state.epochs else None
    if not path.exists():
        if derived:
            yield _rewritten(path, "it is missing", "from its checkpoint", derived)
        return
    if run.problem:
        problem = run.problem.removeprefix(f"{path}: ").partition(";")[0]
        yield _rewritten(path, problem, "from its checkpoint", derived)
        return
    rows, there = run.epochs, path.read_bytes()
    if state and len(rows) > len(state.epochs) and there.startswith(derived or b""):
        yield Finding(path, f"it goes on to step {rows[-1].step}, the newest sound checkpoint only to {state.step}")
    elif derived and there != derived:
        behind = derived.startswith(there)
        problem = f"it lacks the last {len(state.epochs) - len(rows)}" if state and behind else "it is not that"
        yield _rewritten(path, f"{problem} of its checkpoint's rows", "from its checkpoint", derived)
    elif not derived and (wrong := _first_wrong(rows, config)):
        yield Finding(path, f"row {wrong} does not fit {store.CONFIG}")
    elif not derived and there != to_csv(rows, validation=validation).encode():
        yield Finding(path, "it is not as degrade wrote it")


def _first_wrong(rows: list[Epoch], config: RunConfig) -> int | None:
    """The number of the first row whose step or learning rate is not the configuration's."""
    for row in rows:
        if (row.step, row.lr) != (config.epoch_end(row.epoch), config.lr_at(row.step - 1)):
            return row.epoch
    return None


def _environment(folder: Path) -> Iterator[Finding]:
    begun = (folder / store.LOG).exists() or commit.checkpoints(folder / store.CHECKPOINTS)
    path = folder / store.ENVIRONMENT
    try:
        if path.exists() or begun:
            store.read_json(path)["threads"]
    except KeyError:
        yield Finding(path, "it does not say how many threads there were")
    except (Failure, OSError) as error:
        yield Finding(path, _reason(error, path))
    path = folder / store.TIMING
    if path.exists() and path.read_bytes() != (sound := Clock(path).csv().encode()):
        yield _rewritten(path, "it has rows that are not degrade's", "without them", sound)


def _rewritten(path: Path, problem: str, source: str, data: bytes | None) -> Finding:
    if data is None:
        return Finding(path, problem)
    return Finding(path, problem, f"written anew {source}", lambda: commit.write_file(path, data))


def _leaving(path: Path) -> Finding:
    return Finding(path, "left half-written by a process that was killed", "removed", lambda: commit.remove(path))


def _reason(error: Exception, path: Path) -> str:
    """Without the path, which is told beside it."""
    text = (error.strerror or "") if isinstance(error, OSError) else str(error)
    return text.removeprefix(f"{path} ").removeprefix(f"{path}: ")
