"""SLURM as an engine, through submitit: the jobs are an array, and what runs into its time limit goes on later."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from degrade.errors import Failure
from degrade.execute.remote import Job

LOOK = 5.0  # seconds between two calls of squeue
ARRAY = 1000  # jobs, which SLURM takes in one array unless it is told otherwise
REQUEUES = 10_000  # that a job has: each is a time limit's worth of training
RUNNING = ("RUNNING", "COMPLETING")
OVER = ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

MINUTES = re.compile(r"(?:(?P<days>\d{1,3})-)?(?P<a>\d{1,5})(?::(?P<b>\d\d?))?(?::(?P<c>\d\d?))?")


@dataclass(frozen=True)
class _Requeued:
    """A job as submitit runs it, and puts it into the queue again where its time is up: it goes on where it was."""

    job: Job

    def __call__(self) -> None:
        number = getattr(signal, os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), signal.SIGUSR2)
        requeue = signal.getsignal(number)

        def leave(*arguments: Any) -> None:
            """An error of scontrol's is none of the run that is being trained; whoever waits for the job sees to it."""
            try:
                requeue(*arguments)  # type: ignore[misc, operator]
            except Exception as error:
                raise SystemExit(f"not put into the queue again: {error}") from None

        if callable(requeue) and threading.current_thread() is threading.main_thread():
            signal.signal(number, leave)
        self.job()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def may_begin(folder: Path) -> bool:
    """Whether jobs that were submitted from the folder are in the queue still, or may be, for all that is known."""
    ids = {path.stem.removesuffix("_submitted") for path in folder.glob("*_submitted.pkl")}
    states = _queue(ids) if ids else {}
    return states is None or any(states.get(job_id, "") not in OVER for job_id in ids)


def _queue(ids: Iterable[str]) -> dict[str, str] | None:
    """The state of each of the jobs that the queue knows; None where it cannot be asked. sacct needs a database."""
    arrays = sorted({job_id.partition("_")[0] for job_id in ids})
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%A %F %K %T", f"--jobs={','.join(arrays)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    states = {}
    for line in answer.stdout.splitlines():
        number, array, index, state = line.split()
        states[number if index == "N/A" else f"{array}_{index}"] = state
    return states


class Slurm:
    """Jobs of one sweep.

    Args:
        partition: as sbatch takes it; None for the cluster's own.
        minutes: after which SLURM ends a job, which is then put into the queue again, and goes on.
        cpus, gpus: of each job.
        max_jobs: at a time; None for as many as the cluster gives.
        cluster: "slurm"; or, for tests, submitit's "local" (processes here) or "debug" (this process).

    Raises:
        ValueError: submitit or SLURM is not installed.
    """

    def __init__(
        self,
        *,
        partition: str | None = None,
        minutes: int = 60,
        cpus: int = 1,
        gpus: int = 0,
        max_jobs: int | None = None,
        cluster: str = "slurm",
    ):
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ValueError("--executor slurm needs submitit: pip install 'submitit>=1.5'") from None
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise ValueError("--executor slurm needs SLURM's sbatch, which is not on this machine; log in where it is")
        self.at_once = ARRAY  # and the array sees to it that no more than max_jobs run
        self.cluster, self.max_jobs = cluster, max_jobs
        self.values: dict[str, Any] = {"name": "degrade", "cpus_per_task": cpus, "timeout_min": minutes}
        if cluster == "slurm":
            asked = {"slurm_partition": partition, "slurm_gpus_per_node": gpus}
            self.values |= {name: value for name, value in asked.items() if value}
            self.values |= {"slurm_additional_parameters": {"requeue": True}}
            self.values |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"]}  # which srun does not take from sbatch
        self._states: dict[str, str] = {}
        self._looked = 0.0

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """Beside the files for their events submitit keeps what it knows of the jobs.

        Raises:
            Failure: SLURM does not take them.
        """
        import submitit

        executor = submitit.AutoExecutor(jobs[0].events.parent, self.cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**self.values)
        if self.cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=min(self.max_jobs or len(jobs), len(jobs)))
        try:
            with executor.batch():
                handles = [executor.submit(_Requeued(job)) for job in jobs]
        except (
            subprocess.CalledProcessError,
            submitit.core.utils.FailedJobError,
            submitit.core.utils.FailedSubmissionError,
        ) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise Failure(f"sbatch: {_last(said).removeprefix('sbatch: ')}") from None
        self._states |= {handle.job_id: "PENDING" for handle in handles}
        self._looked = time.monotonic()
        self.at_once = self.max_jobs or ARRAY  # of this array and those to come
        return handles

    def state(self, handle: Any) -> str | None:
        if self._has_result(handle):
            error = handle.exception()  # submitit's frames the traceback by lines of dashes
            return _last(re.split(r"^-{5,}$", f"{error}\n", flags=re.MULTILINE)[-2:][0]) if error else ""
        if self.cluster != "slurm":
            return None
        self._look()
        if self._states[handle.job_id] not in OVER:
            return None
        with contextlib.suppress(OSError):
            if said := _last(handle.paths.stderr.read_text(errors="replace")):
                return f"its job has left the queue without a result: {said}"
        return "its job has left the queue without a result"

    def _has_result(self, handle: Any) -> bool:
        if self.cluster != "slurm":
            return bool(handle.done())
        try:
            os.close(os.open(handle.paths.result_pickle, os.O_RDONLY))  # which NFS answers anew
        except FileNotFoundError:
            return False
        return True

    def is_waiting(self, handle: Any) -> bool:
        return self.cluster == "slurm" and self._states[handle.job_id] not in RUNNING

    def losses(self) -> int:
        return 0  # SLURM puts what was on a lost node into the queue again

    def cancel(self, handles: Sequence[Any]) -> None:
        if self.cluster != "slurm":
            for handle in handles:
                handle.cancel()
            return
        ids = [handle.job_id for handle in handles]
        if len(ids) == len(self._states):
            ids = sorted({job_id.partition("_")[0] for job_id in ids})
        for how in ((), ("--signal=KILL", "--full")):  # the queue lets them go; what runs would have half a minute
            for i in range(0, len(ids), 500):
                with contextlib.suppress(OSError):
                    subprocess.run(["scancel", *how, *ids[i : i + 500]], capture_output=True)

    def _look(self) -> None:
        """Ask the queue for the state of every job; one that it does not know has none."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        if (found := _queue(self._states)) is not None:  # or the controller does not answer, for now
            self._states = {job_id: found.get(job_id, "") for job_id in self._states}


def _last(text: str) -> str:
    """The last line that says anything."""
    return (text.strip().splitlines() or [""])[-1].strip()


def minutes(text: str) -> int:
    """SLURM's times in whole minutes: `30`, `30:00`, `8:00:00`, `2-12`, `2-12:30`.

    Raises:
        ValueError: it is none, or below five minutes, which are too few for a job to begin and to end in order.
    """
    found = MINUTES.fullmatch(text)
    parts = [int(part) for part in found.group("a", "b", "c") if part is not None] if found else []
    if found and found["days"]:
        hours, mins, *_ = [*parts, 0, 0]
        total = (24 * int(found["days"]) + hours) * 60 + mins
    elif len(parts) == 3:
        total = 60 * parts[0] + parts[1]
    else:
        total = parts[0] if parts else 0
    if total < 5:
        raise ValueError(f"--time must be at least 5 minutes, as sbatch takes it (30, 8:00:00, 2-12); got {text!r}")
    return total
