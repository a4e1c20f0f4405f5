"""`results/` as studies and runs. What a run is doing is read off its files and its lock, never off a stored flag.

results/<study>/study.json                  what all runs of the study have in common
results/<study>/<run id>/config.json        the whole configuration
                         log.csv            a row an epoch, written from the newest checkpoint
                         timing.csv         seconds an epoch; the only file that knows the clock
                         environment.json   versions, hardware, threads
                         checkpoints/       the commit points
                         snapshots/         the weights at steps that were asked for
                         imported.json      where an imported run's weights come from, and what they measure here
                         weights.pt         of an imported run, or what degrade export has put there, with a .json
                         error.txt          the traceback of a failed run
                         lock               held while the run trains
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from degrade import commit
from degrade.commit import Held, Holder, create_file, hold, make_folder, write_file
from degrade.config import BLOCKS, COMMON, SHALLOW, SWEPT, RunConfig, common, family_of, matches_protocol, run_id
from degrade.errors import Failure
from degrade.log import COLUMNS, VALIDATION, Columns, Epoch, last_row, to_columns, to_rows

if TYPE_CHECKING:
    import pandas as pd

STUDY, CONFIG, LOG, TIMING = "study.json", "config.json", "log.csv", "timing.csv"
ENVIRONMENT, CHECKPOINTS, ERROR, LOCK = "environment.json", "checkpoints", "error.txt", "lock"
IMPORTED, WEIGHTS, SNAPSHOTS = "imported.json", "weights.pt", "snapshots"
IDENTITY, PROBES, FIGURES = "identity.json", "probes", "figures"  # of a study
RUN = re.compile(r"[a-z]+-\d+-s\d+-[0-9a-f]{8}")  # a run id, the name of its folder
MANY = 1000  # logs, from which on several processes read them
FINISHED = ("done", "diverged")  # the statuses of runs that count as results


def to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def read_json(path: Path, advice: str = "restore it") -> dict[str, Any]:
    """
    Raises:
        Failure: the file is not a JSON object; the message ends with the `advice`.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is not JSON: {error}; {advice}") from None
    if not isinstance(values, dict):
        raise Failure(f"{path} is not a JSON object; {advice}")
    return values


def weights_record(folder: Path) -> Path:
    """The file that says what the SHA-256 of a run's weights.pt must be: of its import, else of its export."""
    imported = folder / IMPORTED
    return imported if imported.exists() else folder / f"{WEIGHTS}.json"


def weights_sha256(folder: Path) -> str | None:
    """What the SHA-256 of a run's weights.pt must be; None where nothing says so.

    Raises:
        Failure: the record is damaged.
    """
    record = weights_record(folder)
    return read_json(record).get("weights" if record.name == IMPORTED else "sha256") if record.exists() else None


def there_already(run: "Run") -> Failure:
    return Failure(f"{run.folder} is there already, and stays as it is; --seed or --study gives this one its own")


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What `degrade identity` has stored in a study's folder; None where it has not been there.

    Raises:
        Failure: the file is damaged.
    """
    path, again = folder / IDENTITY, "delete it, and the same command writes it again"
    try:
        values = read_json(path, again)
    except FileNotFoundError:
        return None
    values = {"scratch": None, "finding": ""} | values
    try:
        texts = [values["block"], values["finding"], *(values["source"][name] for name in ("study", "run", "weights"))]
        numbers = [values["train"]["deep_error"]]
        if scratch := values["scratch"]:
            texts.append(scratch["run"])
            numbers += [scratch["train_error"], scratch["steps"]]
        depths = type(values["shallow"]) is type(values["deep"]) is int
        sound = all(isinstance(text, str) for text in texts) and all(isinstance(n, int | float) for n in numbers)
        sound = sound and depths and values["block"] in BLOCKS
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise Failure(f"{path} is not as degrade identity wrote it; {again}")
    return values


@dataclass(frozen=True)
class Run:
    """One run's folder. The properties are read once; make another `Run` to see what has changed.

    Args:
        study: the name of its study.
        folder: of the run.
        config: its configuration.
        refused: why its config.json is not that, if it is not.
        glance: read the last row of its log alone where nothing looks amiss; `epochs` has no other then.
    """

    study: str
    folder: Path
    config: RunConfig
    refused: str = ""
    glance: bool = False

    @classmethod
    def open(cls, study: str, folder: Path, *, glance: bool = False) -> Self:
        """
        Raises:
            Failure: its config.json is unreadable, or is not the one the run id was made from.
        """
        again = "restore it, or delete its folder and sweep again"
        values = read_json(folder / CONFIG, again)
        try:
            config = RunConfig.from_dict(values)
        except ValueError as error:
            raise Failure(f"{folder / CONFIG}: {error}; {again}") from None
        if (identity := run_id(values)) != folder.name:
            raise Failure(f"{folder / CONFIG} was edited, or its folder renamed: it belongs to {identity}")
        return cls(study, folder, config, glance=glance)

    @cached_property
    def imported(self) -> dict[str, Any] | None:
        """Where its weights come from, if it was imported: the content of imported.json.

        Raises:
            Failure: the file is damaged.
        """
        try:
            return read_json(self.folder / IMPORTED)
        except FileNotFoundError:
            return None

    @cached_property
    def _log(self) -> tuple[Columns, str]:
        """The columns of log.csv, none where it is damaged or not there, and what is wrong with it, if anything is."""
        try:
            data = (self.folder / LOG).read_bytes()
            columns = last_row(data) if self.glance else None
            if columns is None:
                columns = to_columns(data.decode(), gaps=self.imported is not None)
            if (VALIDATION[0] in columns) != (self.config.val_images > 0):
                raise ValueError("it is not as degrade wrote it")
            if columns["step"] and columns["step"][-1] > self.config.steps:
                raise ValueError(f"step {columns['step'][-1]} of {self.config.steps}")
            return columns, ""
        except FileNotFoundError:
            return {}, ""
        except Failure as error:
            return {}, str(error)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            if (self.folder / IMPORTED).exists():
                return {}, f"{self.folder / LOG}: {reason}; restore it, or delete the run's folder and import it again"
            then = "a sweep" if self.has_checkpoint else "restore it, or delete it and a sweep"
            how = "writes it anew from its checkpoint" if self.has_checkpoint else "trains the run again"
            return {}, f"{self.folder / LOG}: {reason}; {then} {how}"

    @property
    def columns(self) -> Columns:
        """The log by columns; none where it is not there, or damaged."""
        return self._log[0]

    @cached_property
    def epochs(self) -> list[Epoch]:
        """The rows of the log; none where it is not there, or damaged."""
        return to_rows(self.columns)

    @cached_property
    def last(self) -> Epoch | None:
        """The last row of the log."""
        return next(iter(to_rows({name: column[-1:] for name, column in self.columns.items()})), None)

    @property
    def problem(self) -> str:
        """What is wrong with its files, in a line that names one; empty where nothing is. `check` looks closer."""
        return self.refused or self._log[1]

    @property
    def has_checkpoint(self) -> bool:
        return bool(commit.checkpoints(self.folder / CHECKPOINTS))

    @property
    def outcome(self) -> str | None:
        """done or diverged, as the log says; None where there is something left to train."""
        if self.last and self.last.diverged:
            return "diverged"
        return "done" if self.last and self.last.step >= self.config.steps else None

    @cached_property
    def status(self) -> str:
        """done, running, interrupted, failed, diverged or missing."""
        if self.refused:
            return "failed"
        if self.outcome:
            return self.outcome  # whoever may be looking at it
        if self.holder:
            return "running"
        if (self.folder / ERROR).exists() or (self.problem and not self.has_checkpoint):
            return "failed"
        if self.last or self.has_checkpoint or (self.folder / ENVIRONMENT).exists():
            return "interrupted"
        return "missing"

    @property
    def holder(self) -> Holder | None:
        """The process that trains it, or None."""
        return commit.holder(self.folder / LOCK)

    @property
    def error(self) -> str:
        """Why it failed: a line."""
        try:
            return self.problem or (self.folder / ERROR).read_text(errors="replace").rstrip().rpartition("\n")[2]
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{self.folder / ERROR}: {error.strerror}"

    def record(self) -> dict[str, Any]:
        """One row of `degrade show`; None for what is not known yet."""
        last = self.last
        return {
            "id": self.folder.name,
            "study": self.study,
            "block": self.config.block,
            "depth": self.config.depth,
            "seed": self.config.seed,
            "status": self.status,
            "imported": (self.folder / IMPORTED).exists(),
            "epoch": last.epoch if last else 0,
            "step": last.step if last else 0,
            "train_error": last.train_error if last else None,
            "test_error": last.test_error if last else None,
        }


@dataclass(frozen=True)
class Study:
    """Runs that differ in block, depth and seed only.

    Args:
        folder: of the study.
        name: the folder's path below the folder of results that was asked for, so that it is unique there.
        protocol: the name of the protocol it started from.
        shared: the configuration that all of its runs have in common.
        imported: whether its runs are imported ones; what was trained here is never mixed with these.
        glance: whether its runs are, as `Run` has it.
    """

    folder: Path
    name: str
    protocol: str
    shared: dict[str, Any]
    imported: bool = False
    glance: bool = False

    @classmethod
    def open(cls, folder: Path, root: Path | None = None, *, glance: bool = False) -> Self:
        """
        Raises:
            Failure: its study.json is unreadable.
        """
        values = read_json(folder / STUDY)
        if not (isinstance(values.get("protocol"), str) and isinstance(values.get("shared"), dict)):
            raise Failure(f"{folder / STUDY} is not of a study of degrade's")
        try:  # fill in the fields that a later version of degrade has added
            depth = SHALLOW[family_of(str(values["shared"].get("dataset")))]
            shared = RunConfig.from_dict({"block": "plain", "depth": depth, "seed": 0} | values["shared"]).shared()
        except ValueError as error:
            raise Failure(f"{folder / STUDY}: {error}") from None
        name = folder.relative_to(root).as_posix() if root and root != folder else folder.resolve().name
        return cls(folder, name, values["protocol"], shared, values.get("imported") is True, glance)

    @cached_property
    def _common(self) -> tuple[Any, ...]:
        """`shared`, as `config.common` has it."""
        values = map(self.shared.get, COMMON)
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    @cached_property
    def _found(self) -> tuple[list[Run], list[str]]:
        runs, damaged = [], []
        for folder in _subfolders(self.folder):
            try:
                run = Run.open(self.name, folder, glance=self.glance)
            except FileNotFoundError:
                if (folder / LOG).exists():
                    damaged.append(f"{folder} has a {LOG} but no {CONFIG}")
            except OSError as error:
                damaged.append(f"{folder / CONFIG}: {error.strerror}")
            except Failure as error:
                damaged.append(str(error))
            else:
                if common(run.config) == self._common:
                    runs.append(run)
                else:
                    there = difference(self.shared, run.config)
                    damaged.append(f"{folder / CONFIG} is of another study: {there}")
        return sorted(runs, key=lambda run: (run.config.block, run.config.depth, run.config.seed)), damaged

    @property
    def runs(self) -> list[Run]:
        """By block, depth and seed, less those whose config.json is unreadable or not the study's."""
        return self._found[0]

    def known(self, *, glance: bool = True) -> dict[RunConfig, Run]:
        """The runs that are there now, by configuration."""
        return {run.config: run for run in replace(self, glance=glance).runs}

    def find(self, configs: Iterable[RunConfig], *, glance: bool = False) -> list[Run]:
        """The runs of a grid, whether they are there or not, the longest first; `glance` as `Run` has it.

        A run that an older version of degrade has begun has another id, and is the same run.
        """
        known = self.known(glance=glance)
        runs = []
        for config in sorted(configs, key=lambda config: (-config.depth, config.seed, config.block)):
            if config in known:
                runs.append(known[config])
                continue
            folder = self.folder / config.run_id
            try:
                runs.append(Run.open(self.name, folder))
            except FileNotFoundError:
                runs.append(Run(self.name, folder, config))
            except (Failure, OSError) as error:
                runs.append(Run(self.name, folder, config, refused=str(error)))
        return runs

    @property
    def damaged(self) -> list[str]:
        """What is wrong with its runs: a line each that names a file."""
        return self._found[1] + [run.problem for run in self.runs if run.problem]

    def check(self, configs: Iterable[RunConfig]) -> None:
        """
        Raises:
            ValueError: a configuration differs from the study's in more than block, depth and seed.
        """
        for config in configs:
            if common(config) != self._common:
                raise ValueError(
                    f"study {self.name} was run with another protocol: {difference(self.shared, config)}. "
                    "Give this sweep a study of its own with --study NAME"
                )

    def create(self, configs: Sequence[RunConfig]) -> None:
        """Write study.json, and each run's config.json, where they are not there yet.

        Raises:
            ValueError: another sweep has made the study meanwhile, with another protocol.
        """
        make_folder(self.folder)
        values = {"protocol": self.protocol, "shared": self.shared} | ({"imported": True} if self.imported else {})
        if not create_file(self.folder / STUDY, to_json(values)):
            Study.open(self.folder).check(configs)
        known = self.known()
        for config in configs:
            folder = self.folder / config.run_id
            if not (config in known or (folder / CONFIG).exists()):
                make_folder(folder)
                with contextlib.suppress(Held), hold(folder / LOCK):  # whoever holds it has written the file
                    write_file(folder / CONFIG, to_json(config.as_dict()))


def difference(shared: Mapping[str, Any], config: RunConfig) -> str:
    """`lr 0.1 there, 0.05 here; ...`"""
    mine = config.shared()
    return "; ".join(
        f"{name} {shared.get(name)} there, {mine.get(name)} here"
        for name in sorted(set(shared) | set(mine))
        if shared.get(name) != mine.get(name)
    )


def find_studies(root: Path, *, glance: bool = False) -> tuple[list[Study], list[str]]:
    """Every study in `root` or below it, by folder, each named by where it is below `root`.

    Args:
        root: a folder of results.
        glance: look at no more than the ends of the logs, where nothing looks amiss; see `Run`.

    Returns:
        The studies, and what is wrong with any of them or of their runs, a line each: these are left out.

    Raises:
        ValueError: `root` is not a folder, or holds no study.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; name a folder of results, such as results/")
    studies, damaged = [], []
    for folder in sorted(_study_folders(root)):
        try:
            studies.append(Study.open(folder, root, glance=glance))
            if not glance:
                _read_logs(studies[-1].runs)
            damaged += studies[-1].damaged
        except Failure as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{folder / STUDY}: {error.strerror}; degrade check --repair writes it anew")
    if not studies and not damaged:
        raise ValueError(
            f"{root} holds no study (a folder with {STUDY}); `degrade sweep --depths 20,56 --out {root}` makes one"
        )
    return studies, damaged


def _read_logs(runs: Sequence[Run]) -> None:
    """Read the logs now, thousands of them in several processes, as each run would do it when it is asked."""
    if len(runs) < MANY or sys.platform != "linux" or threading.active_count() > 1:  # a fork beside threads can hang
        return
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    from multiprocessing import get_context

    processes = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(processes, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for run, log in zip(runs, pool.map(attrgetter("_log"), runs, chunksize=64), strict=True):
                vars(run)["_log"] = log
        except BrokenProcessPool:  # out of memory, say; the runs left read theirs when they are asked
            pass
        finally:
            pool.shutdown(cancel_futures=True)


def _study_folders(root: Path) -> Iterator[Path]:
    """Those with a study.json or with a run, since a study that has lost its study.json does not vanish."""
    for folder, below, files in os.walk(root):
        others = [name for name in below if not RUN.fullmatch(name)]
        if len(others) < len(below) or STUDY in files:
            yield Path(folder)
        below[:] = others  # a run's folder holds no study


def _subfolders(folder: Path) -> list[Path]:
    """Those in `folder`, by name."""
    try:
        return [Path(path) for path in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())]
    except FileNotFoundError:
        return []


def load(folder: str | Path) -> "pd.DataFrame":
    """All logs below `folder`: a row an epoch, with the run's study, protocol, id, status and configuration.

    `imported` tells runs that were trained elsewhere; the last row of each is what its weights measure here.

    Errors are fractions in [0, 1], losses nats; `log.Epoch` and `config.RunConfig` define the columns.
    `lr` is the epoch's, `initial_lr` the configuration's; `protocol` ends in ", changed" where a field was overridden.

    Warns:
        UserWarning: for each run that is damaged, and left out.

    Raises:
        ValueError: `folder` is not a folder, or holds no study.
    """
    studies, damaged = find_studies(Path(folder))
    for line in damaged:
        warnings.warn(f"left out: {line}", stacklevel=2)
    return to_frame(studies)


def to_frame(studies: Iterable[Study]) -> "pd.DataFrame":
    """As `load`, for studies that are open already."""
    import numpy as np
    import pandas as pd

    abouts, logs = [], []
    for study in studies:
        changed = "" if matches_protocol(study.shared, study.protocol) else ", changed"
        for run in study.runs:
            if not run.columns:
                continue
            about: dict[str, Any] = {"study": study.name, "protocol": study.protocol + changed, "id": run.folder.name}
            about |= {"status": run.status, "imported": study.imported} | {
                name: getattr(run.config, name) for name in SWEPT
            }
            abouts.append(about | run.config.as_dict() | {"initial_lr": run.config.lr})
            logs.append(run.columns)
    lengths = [len(log["epoch"]) for log in logs]
    if not sum(lengths):
        return pd.DataFrame()
    frame = pd.DataFrame(abouts).loc[np.repeat(np.arange(len(logs)), lengths)].reset_index(drop=True)
    for name in COLUMNS:
        values = [log[name] if name in log else np.full(n, np.nan) for log, n in zip(logs, lengths, strict=True)]
        frame[name] = np.concatenate(values)
    return frame
