"""`degrade check`: is every file of the results what it should be, and what can be written anew from the others?

A run's name vouches for its configuration, a checkpoint's for its bytes, and the newest checkpoint for the log.
"""

import contextlib
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from degrade import commit, store
from degrade.config import BLOCKS, PROBES, PROTOCOLS, RunConfig, overridden, run_id
from degrade.errors import Failure
from degrade.log import from_csv, to_csv
from degrade.probe import FIRST, digest, read_part
from degrade.provenance import Clock
from degrade.store import Run, Study, to_json
from degrade.train import State, read_state

PARTS = (
    store.CONFIG,
    store.LOG,
    store.CHECKPOINTS,
    store.ENVIRONMENT,
    store.TIMING,
    store.IMPORTED,
)  # any of them makes a run
NAME = re.compile(rf"({'|'.join(BLOCKS)})-([0-9]{{1,9}})-s([0-9]{{1,10}})-[0-9a-f]{{8}}")  # of a run's folder
OLD = 60.0  # seconds, after which nobody is writing a file any more


class Finding(NamedTuple):
    """Something that is not as it should be.

    Args:
        path: the file.
        problem: what is wrong with it.
        remedy: what `mend` does about it, such as "removed".
        mend: None where nothing can be done: what is lost cannot be derived from the other files.
    """

    path: Path
    problem: str
    remedy: str = ""
    mend: Callable[[], None] | None = None


class Checked(NamedTuple):
    """One study: its folder, how many runs have which status, what was found, how many logs stand alone.

    These have no checkpoint to be compared with.
    """

    folder: Path
    statuses: Counter[str]
    findings: list[Finding]
    alone: int


def check(root: Path, *, repair: bool = False) -> Iterator[Checked]:
    """Look at every study in `root` and below it, and mend what can be mended if that is asked for.

    Runs under way are left alone. Nothing is written otherwise.

    Raises:
        ValueError: `root` is not a folder, or there is no study in it.
        OSError: what was to be mended cannot be written; it is as it was.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; name a folder of results, such as results/")
    folders = {path.parent for path in root.rglob(store.STUDY)}
    folders |= {path.parent for path in root.rglob("*-s*-*") if NAME.fullmatch(path.name) and _is_run(path)}
    if not folders:
        raise ValueError(f"{root} holds no study (a folder with {store.STUDY})")
    for folder in sorted(folders):
        yield _check_study(folder, repair)


def _is_run(folder: Path) -> bool:
    return any((folder / part).exists() for part in PARTS)


def _check_study(folder: Path, repair: bool) -> Checked:
    runs = sorted(path for path in folder.iterdir() if _is_run(path))
    shared, findings = _study(folder, runs)
    if repair:
        _mend(findings)
    findings += [*_constructed(folder), *_probed(folder / store.PROBES)]
    statuses, alone = Counter[str](), 0
    for run in runs:
        found = _settled(run, shared, repair)
        if found is None:
            statuses["running"] += 1
            continue
        findings += found
        try:
            there = Run.open(folder.name, run)
        except (Failure, OSError):
            statuses["unreadable"] += 1
        else:
            statuses[there.status] += 1
            alone += bool(there.last and not there.has_checkpoint)
    return Checked(folder, statuses, findings, alone)


def _settled(folder: Path, shared: dict[str, Any] | None, repair: bool) -> list[Finding] | None:
    """What is wrong with a run, mended if that is asked for; None where the run is under way, or was just now."""
    lock = folder / store.LOCK
    if commit.holder(lock):
        return None
    findings = list(_run(folder, shared))
    if not (repair and any(finding.mend for finding in findings)):
        return None if commit.holder(lock) else findings
    try:
        with commit.hold(lock):
            findings = list(_run(folder, shared))
            _mend(findings)
            return findings
    except commit.Held:
        return None


def _mend(findings: list[Finding]) -> None:
    for finding in findings:
        try:
            if finding.mend:
                finding.mend()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(finding.path)) from None


def _study(folder: Path, runs: list[Path]) -> tuple[dict[str, Any] | None, list[Finding]]:
    """What the runs have in common, as far as it is known, and what is wrong with study.json."""
    path, findings = folder / store.STUDY, []
    configs = [config for config, _ in (_config(run, None) for run in runs) if config]
    shared = configs[0].shared() if configs and all(c.shared() == configs[0].shared() for c in configs) else None
    problem = ""
    try:
        study = Study.open(folder)
        if shared and shared != study.shared:
            problem = f"is not of its runs: {store.difference(study.shared, configs[0])}"
        elif study.protocol not in PROTOCOLS:
            problem = f"names a protocol that there is not: {study.protocol!r}"
    except (Failure, OSError) as error:
        problem = _reason(error, path)
    if problem:
        imported = any((run / store.IMPORTED).exists() for run in runs)
        findings.append(_rewritten(path, problem, "its runs", _study_file(shared, imported) if shared else None))
    else:
        shared = store.read_json(path)["shared"]  # its fields are those of the version that wrote it
    for partial in commit.leavings(folder) + commit.leavings(folder / "figures"):
        with contextlib.suppress(FileNotFoundError):  # it has just been given its name
            if time.time() - partial.stat().st_mtime > OLD:
                findings.append(_leaving(partial))
    return shared, findings


def _study_file(shared: dict[str, Any], imported: bool) -> bytes:
    """Its protocol is the one that the runs differ from least."""
    protocol = min(PROTOCOLS, key=lambda name: len(overridden(name, shared, str(shared["dataset"]))))
    return to_json({"protocol": protocol, "shared": shared} | ({"imported": True} if imported else {}))


def _constructed(folder: Path) -> Iterator[Finding]:
    try:
        store.read_identity(folder)
    except (Failure, OSError) as error:
        path = folder / store.IDENTITY
        yield Finding(path, f"{_reason(error, path)}; degrade identity writes it anew, once it is deleted")


def _probed(folder: Path) -> Iterator[Finding]:
    """What is wrong with the tables of what was probed, and with the parts they were made of, where these are there.

    Nothing while the study is probed.
    """
    if commit.holder(folder / store.LOCK):
        return
    for probe in PROBES:
        parts = {}
        for path in sorted((folder / probe).glob("*.json")):
            stored, text = read_part(path.with_suffix(".csv"))
            if not stored:
                yield Finding(path, "is not a JSON object; degrade probe measures it anew")
            elif stored.get("csv") == digest(text):
                if (folder.parent / path.stem.removesuffix(".init")).is_dir():  # else the table leaves it out
                    parts[path.stem] = text
            elif stored.get("csv"):
                yield Finding(path.with_suffix(".csv"), "is not what was measured; degrade probe measures it anew")
        table = folder / f"{probe}.csv"
        try:
            rows = _table(table.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield Finding(table, _reason(error, table))
            continue
        if other := [part for part in parts if rows.get(part) != parts[part]]:
            yield Finding(table, f"is not of its part {other[0]}; degrade probe writes it anew")


def _table(text: str) -> dict[str, str]:
    """The rows of a table of `degrade probe` by part, each with the header.

    Raises:
        ValueError: it is not as degrade wrote it.
    """
    header, *lines = text.splitlines(keepends=True) or [""]
    if tuple(header.split(",")[: len(FIRST)]) != FIRST:
        raise ValueError("the header is not degrade's")
    rows: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        block, depth, seed, run, init = (line.split(",") + [""] * len(FIRST))[: len(FIRST)]
        named = NAME.fullmatch(run) and run.startswith(f"{block}-{depth}-s{seed}-")
        if not named or line.count(",") != header.count(",") or not line.endswith("\n"):
            raise ValueError(f"row {number} is not degrade's")
        part = run + (".init" if init == "1" else "")
        rows[part] = rows.get(part, header) + line
    return rows


def _run(folder: Path, shared: dict[str, Any] | None) -> Iterator[Finding]:
    for part in (folder, folder / store.CHECKPOINTS, folder / store.SNAPSHOTS):
        for partial in commit.leavings(part):
            yield _leaving(partial)
    for path in commit.checkpoints(folder / store.SNAPSHOTS):
        try:
            commit.read_checkpoint(path)
        except ValueError as error:
            yield Finding(path, str(error).removeprefix("it "))
    config, finding = _config(folder, shared)
    if finding:
        yield finding
    state, bad = _checkpoints(folder, config)
    for path, problem in bad:
        yield Finding(path, problem)
    if config:
        if shared and (of := config.shared() | shared) != config.shared():  # which may lack fields that are newer
            yield Finding(folder / store.CONFIG, f"is of another study: {store.difference(of, config)}")
        yield from _log(folder, config, state)
    yield from _weights(folder)
    yield from _environment(folder)
    yield from _timing(folder)


def _config(folder: Path, shared: dict[str, Any] | None) -> tuple[RunConfig | None, Finding | None]:
    """The configuration of a run, as far as it is known, and what is wrong with its config.json."""
    path = folder / store.CONFIG
    try:
        return Run.open("", folder).config, None
    except (Failure, OSError) as error:
        problem = _reason(error, path)
    state, _ = _checkpoints(folder, None)
    name = NAME.fullmatch(folder.name)
    for source, values in (
        ("its checkpoint", state and state.config.as_dict()),
        (store.STUDY, name and shared and {"block": name[1], "depth": int(name[2]), "seed": int(name[3])} | shared),
    ):
        if values and run_id(values) == folder.name:
            return RunConfig.from_dict(values), _rewritten(path, problem, source, to_json(values))
    return None, Finding(path, problem)


def _checkpoints(folder: Path, config: RunConfig | None) -> tuple[State | None, list[tuple[Path, str]]]:
    """The newest sound one of this configuration, else of the run's name; and what is wrong with the others."""
    newest, bad = None, []
    for path in commit.checkpoints(folder / store.CHECKPOINTS):
        try:
            state = read_state(commit.read_checkpoint(path))
            if not path.name.startswith(f"{state.step:09d}-"):
                raise ValueError(f"is of step {state.step}")
            if config and state.config != config:
                raise ValueError(f"is of {state.config.run_id}")
            if config or state.config.run_id == folder.name:
                newest = newest or state
        except ValueError as error:
            problem = str(error).removeprefix("it ")
            bad.append((path, f"{problem}; a later one is sound" if newest else problem))
    return newest, bad


def _log(folder: Path, config: RunConfig, state: State | None) -> Iterator[Finding]:
    path = folder / store.LOG
    known = state.epochs if state else []
    derived = to_csv(known, validation=config.val_images > 0).encode() if known else None
    try:
        there = path.read_bytes()
        problem = _problem(there, config, state, gaps=(folder / store.IMPORTED).exists())
    except FileNotFoundError:
        if not (known or (not state and _timed(folder))):
            return
        there, problem = b"", "is missing"
    except OSError as error:
        there, problem = b"", error.strerror or "cannot be read"
    if not problem:
        return
    ended = known and (known[-1].step >= config.steps or known[-1].diverged)
    if state and not ended and there.count(b"\n") - 1 > len(known):  # rows that no sound checkpoint has
        yield Finding(path, f"{problem}; delete it, and a sweep goes on from step {state.step}")
    else:
        yield _rewritten(path, problem, "its checkpoint", derived)


def _problem(log: bytes, config: RunConfig, state: State | None, *, gaps: bool) -> str:
    """How the log differs from its checkpoint or, without one, from what it can be; empty where it does not."""
    known = state.epochs if state else []
    try:
        rows = from_csv(log.decode(errors="replace"), gaps=gaps)
    except ValueError as error:
        return str(error)
    for row, its in zip(rows, known, strict=False):
        if repr(row) != repr(its):  # NaN is not equal to itself
            return f"row {row.epoch} is not that of its checkpoint"
    if len(rows) < len(known):
        return f"lacks the last {len(known) - len(rows)} of its checkpoint's {len(known)} rows"
    for row in rows:
        if (row.step, row.lr) != (config.epoch_end(row.epoch), config.lr_at(row.step - 1)):
            return f"row {row.epoch} does not fit {store.CONFIG}"
    if log != to_csv(rows, validation=config.val_images > 0).encode():
        return "is not written as degrade writes it"
    if state and len(rows) > len(known):
        return f"has {len(rows)} rows, its newest sound checkpoint {len(known)}"
    return ""


def _weights(folder: Path) -> Iterator[Finding]:
    """Of weights.pt, if it is there; what is imported stays out of git, and may be missing."""
    path, record = folder / store.WEIGHTS, store.weights_record(folder)
    try:
        expected = store.weights_sha256(folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return
    except (Failure, OSError) as error:
        yield Finding(record, _reason(error, record))
    else:
        if found != expected:
            how = "imported; import it" if record.name == store.IMPORTED else "exported; export it"
            yield Finding(path, f"is not what was {how} again")


def _environment(folder: Path) -> Iterator[Finding]:
    path = folder / store.ENVIRONMENT
    begun = (folder / store.LOG).exists() or commit.checkpoints(folder / store.CHECKPOINTS)
    try:
        values = store.read_json(path)
    except FileNotFoundError:
        if begun:
            yield Finding(path, "is missing")
    except (Failure, OSError) as error:
        yield Finding(path, _reason(error, path))
    else:
        threads, changes = values.get("threads"), values.get("changes", [])
        if not (isinstance(threads, int) and threads > 0):
            yield Finding(path, "does not say how many threads there were")
        elif not (isinstance(changes, list) and all(isinstance(c, dict) and "step" in c for c in changes)):
            yield Finding(path, "does not say what has changed from which step on")


def _timing(folder: Path) -> Iterator[Finding]:
    path = folder / store.TIMING
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:  # it is written last, and a kill may come before
        return
    except OSError as error:
        yield Finding(path, error.strerror or "cannot be read")
        return
    if lines[:1] != [Clock.HEADER]:
        yield Finding(path, "the header is not degrade's")
    elif bad := [number for number, line in enumerate(lines) if number and not Clock.ROW.fullmatch(line)]:
        yield Finding(path, f"row {bad[0]} is not degrade's")


def _timed(folder: Path) -> bool:
    """Whether timing.csv knows of epochs."""
    with contextlib.suppress(OSError):
        return bool(re.search(rb"\n[1-9]", (folder / store.TIMING).read_bytes()))
    return False


def _rewritten(path: Path, problem: str, source: str, data: bytes | None) -> Finding:
    if data is None or path.is_dir():
        return Finding(path, problem)
    return Finding(path, problem, f"restored from {source}", lambda: commit.write_file(path, data))


def _leaving(path: Path) -> Finding:
    return Finding(path, "left half-written by a process that was killed", "removed", lambda: commit.remove(path))


def _reason(error: Exception, path: Path) -> str:
    """Without the path, which is told beside it, and without advice."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    text = (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
    text = text.removeprefix(f"{path} ").removeprefix(f"{path}: ")
    return text.partition("; restore it")[0].partition("; delete it")[0]
