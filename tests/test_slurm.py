"""SLURM through submitit: its local and debug executors, and a controller and a node on this machine."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import smoke, tally

from degrade import machines, store
from degrade.execute import slurm
from degrade.execute.remote import Job, execute_elsewhere
from degrade.sweep import Machine, sweep

RUNS = [smoke(block) for block in ("plain", "residual")]
DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "squeue")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=2
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={other_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A controller and a node of two CPUs on this machine; SLURM's own programs, from the distribution."""
    if os.geteuid() or not all(map(shutil.which, DAEMONS)):
        pytest.skip("a SLURM of one's own needs root and slurmctld, slurmd, munged")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, port=free_port(), other_port=free_port()))
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(conf))
    munge = ["munged", "--foreground", "--force", "--key-file", key, "--num-threads", "2"]
    for name in ("socket", "pid-file", "log-file", "seed-file"):
        munge += [f"--{name}", folder / "munge" / name.removesuffix("-file")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen(munge, **quiet)]
    time.sleep(0.5)
    daemons += [subprocess.Popen([name, "-D"], **quiet) for name in ("slurmctld", "slurmd")]
    try:
        end = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True).stdout:
            if time.monotonic() > end:
                pytest.skip("SLURM does not come up here")
            time.sleep(0.2)
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root", "--signal=KILL", "--full"], **quiet)
        subprocess.run(["scancel", "--user", "root"], **quiet)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        patch.undo()


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """What one machine makes of the runs."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    study = store.Study(folder, "study", "smoke", RUNS[0].shared())
    list(sweep(study, study.find(RUNS), Machine("cpu", 1, 1), data_dir))
    return results(folder)


def results(folder: Path) -> dict[str, str]:
    files = {}
    for run in sorted(path for path in folder.iterdir() if store.RUN.fullmatch(path.name)):
        files[f"{run.name}/checkpoint"] = max((run / store.CHECKPOINTS).iterdir()).stem
        files[f"{run.name}/log"] = hashlib.sha256((run / store.LOG).read_bytes()).hexdigest()
    return files


def squares(n, place):
    for i in range(n):
        yield i * i


def mapped(engine, tmp_path):
    got = defaultdict(list)
    for event in execute_elsewhere(engine, squares, [3, 0, 2], [[0, 1], [2]], tmp_path):
        got[event.item].append(event.value if event.kind == "value" else event.kind)
    assert got == {i: ["started", *squares(n, ""), "done"] for i, n in enumerate([3, 0, 2])}


@pytest.fixture
def importable(monkeypatch):
    """By the processes that submitit starts, this module is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent))))


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_submitit_s_own_executors_equal_the_built_in_map(tmp_path, importable, executor):
    mapped(slurm.Slurm(cluster=executor), tmp_path)


@pytest.mark.parametrize(
    ("executor", "machine"),
    [("local", Machine("cpu", 2, 1)), ("local", Machine("cpu", 1, 1, pack=2)), ("debug", Machine("cpu", 2, 1))],
)
def test_a_sweep_through_them_gives_the_bytes_of_one_machine(tmp_path, data_dir, whole, importable, executor, machine):
    folder = tmp_path / "study"
    study = store.Study(folder, "study", "smoke", RUNS[0].shared())
    engine = slurm.Slurm(cluster=executor)
    events = list(sweep(study, study.find(RUNS), machine, data_dir, engine=engine))
    assert [event.kind for _, event in events if event.kind in ("failed", "lost", "held")] == []
    assert results(folder) == whole
    assert not list(folder.glob(".jobs-*"))


def test_jobs_that_are_started_again_count_among_the_most_at_a_time(tmp_path, importable):
    engine = slurm.Slurm(cluster="local", max_jobs=1)
    assert engine.at_once == slurm.ARRAY  # SLURM is given as many as it takes, and sees to it itself
    mapped(engine, tmp_path)
    assert engine.at_once == 1


@pytest.mark.parametrize(
    ("squeue", "may_begin"),
    [
        ("echo 12 11 0 COMPLETED; echo 13 11 1 PENDING", True),
        ("echo 12 11 0 COMPLETED; echo 13 11 1 CANCELLED", False),
        ("echo 12 11 0 COMPLETED", False),
        ("", False),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", True),
        (None, True),
    ],
)
def test_what_killed_sweeps_have_left_goes_once_the_queue_has_none_of_their_jobs(
    tmp_path, monkeypatch, squeue, may_begin
):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if squeue is not None else str(tmp_path))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755 if squeue is not None else 0o644)
    (study := tmp_path / "study").mkdir()
    assert not slurm.may_begin(study)
    for name in ("11_0_submitted.pkl", "11_1_submitted.pkl", "11_0_0_result.pkl"):
        (study / name).touch()
    assert slurm.may_begin(study) == may_begin


def test_slurm_equals_the_built_in_map(cluster, tmp_path, importable):
    mapped(slurm.Slurm(), tmp_path)


COMMAND = [sys.executable, "-m", "degrade", "sweep", "--depths", "8", "--dataset", "shapes", "--protocol", "smoke"]
COMMAND += ["--executor", "slurm", "--partition", "debug", "--time", "30", "--threads", "1"]


@contextlib.contextmanager
def sweeping(out: Path, data_dir: Path, *more: str):
    process = subprocess.Popen(
        [*COMMAND, "--out", out, *more],
        env=os.environ | {"DEGRADE_DATA": str(data_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def queue() -> list[str]:
    return subprocess.run(["squeue", "--noheader", "--format=%i %T"], capture_output=True, text=True).stdout.split(
        "\n"
    )[:-1]


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.1)
    return value


def test_the_command_gives_the_bytes_of_one_machine_one_job_at_a_time(cluster, tmp_path, data_dir, whole):
    most = 0
    wait_for(lambda: not queue())
    with sweeping(tmp_path / "out", data_dir, "--max-jobs", "1") as process:
        while process.poll() is None:
            most = max(most, sum("RUNNING" in line for line in queue()))
            time.sleep(0.2)
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "On the SLURM cluster: cpu, 1 run at a time, 1 thread each" in output
    assert results(tmp_path / "out" / "shapes-smoke") == whole
    assert most == 1


LONG = ("--steps", "700", "--width", "4")


@pytest.fixture(scope="module")
def long(data_dir, tmp_path_factory):
    """What one machine makes of a longer run."""
    out = tmp_path_factory.mktemp("long")
    command = [word for word in COMMAND if word not in ("--executor", "slurm", "--partition", "debug", "--time", "30")]
    subprocess.run(
        [*command, "--blocks", "plain", *LONG, "--out", out],
        check=True,
        capture_output=True,
        env=os.environ | {"DEGRADE_DATA": str(data_dir)},
    )
    (study,) = out.iterdir()
    return results(study)


@pytest.mark.promise
def test_a_job_whose_time_is_up_goes_on_in_the_next_one(cluster, tmp_path, data_dir, long):
    """The signal is the one that SLURM sends before the end; the job is put into the queue again, and begins anew."""
    out = tmp_path / "out"
    with sweeping(out, data_dir, "--blocks", "plain", *LONG) as process:
        wait_for(lambda: list(out.glob("*/*/checkpoints/0*.pt")))
        (job,) = [line.split()[0] for line in queue() if "RUNNING" in line]
        (holder,) = out.glob("*/*/lock")
        before = holder.read_text().split()[0]
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        wait_for(lambda: not Path(f"/proc/{before}").exists())
        wait_for(lambda: f"{job} PENDING" in queue())
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])  # SLURM would wait two minutes
        output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert holder.read_text().split()[0] != before
    assert "starting it again" not in output  # it was not lost: SLURM has seen to it
    (study,) = out.iterdir()
    assert results(study) == long
    tally(9, "times a SLURM job was put into the queue again: the bytes of one machine")


@pytest.mark.promise
def test_a_killed_sweep_leaves_its_jobs_which_the_same_command_waits_for(cluster, tmp_path, data_dir, long):
    out = tmp_path / "out"
    with sweeping(out, data_dir, "--blocks", "plain", *LONG) as process:
        wait_for(lambda: list(out.glob("*/*/checkpoints/0*.pt")))
        process.kill()
    with sweeping(out, data_dir, "--blocks", "plain", *LONG) as process:
        output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert "held by process" in output or "waited for, process" in output
    (study,) = out.iterdir()
    assert results(study) == long
    assert not list(study.glob(".jobs-*"))


@pytest.mark.promise
def test_a_sweep_that_is_stopped_takes_its_jobs_with_it(cluster, tmp_path, data_dir):
    out = tmp_path / "out"
    with sweeping(out, data_dir, *LONG, "--max-jobs", "1") as process:
        wait_for(lambda: list(out.glob("*/*/checkpoints/0*.pt")))
        assert len(queue()) == 2  # one runs, one waits
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143
        assert time.monotonic() - start < 5
        assert errors.splitlines()[-1] == "degrade: stopped; the same command goes on from the last checkpoints"
    wait_for(lambda: not queue(), 20)


def test_a_job_that_cannot_be_put_into_the_queue_again_is_no_failure_of_its_run(tmp_path):
    """submitit calls scontrol in the middle of whatever is being trained."""

    def refuse(*_):
        raise subprocess.CalledProcessError(1, "scontrol")

    def function(item, place):
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            yield from (1, 2, 3)
        except Exception as error:
            (tmp_path / "error.txt").write_text(str(error))

    (tmp_path / "events").touch()
    before = signal.signal(signal.SIGUSR2, refuse)
    try:
        with pytest.raises(SystemExit, match="not put into the queue again"):
            slurm._Requeued(Job(function, [(0, 0)], "cpu", 1, tmp_path / "events"))()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not (tmp_path / "error.txt").exists()


def test_the_reason_of_a_job_that_fails_is_told(tmp_path, importable):
    """The last line of submitit's own message is no more than a path."""
    engine = slurm.Slurm(cluster="local")
    (tmp_path / "events").touch()
    (handle,) = engine.submit([Job(squares, [(0, 1)], "cpu", broken, tmp_path / "events")])
    assert wait_for(lambda: engine.state(handle)) == "LookupError: no room here"


def broken(place, items):
    raise LookupError("no room here")


def test_a_partition_that_is_not_there_is_one_line(cluster, tmp_path, data_dir):
    with sweeping(tmp_path / "out", data_dir, "--partition", "gpu") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("degrade: sbatch"), errors


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("45:00", 45),
        ("8:00:00", 480),
        ("1-0", 1440),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-2:03:59", 1563),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text, minutes):
    assert slurm.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "4", "1:00", "0:04:59", "soon", "1h", "-5", "30 ", "1:2:3:4", "9" * 400])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="--time must be"):
        slurm.minutes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "--gpus must be 0 or 1"),
        (["--time", "soon"], "--time must be at least 5 minutes"),
        (["--address", "auto"], "--address is for --executor ray"),
    ],
)
def test_what_slurm_is_not_asked_for_is_refused(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    result = cli("sweep", "--depths", 8, "--executor", "slurm", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"degrade: {message}")
    assert not (tmp_path / "out").exists()


def test_without_submitit_or_slurm_a_line_says_what_is_missing(cli, tmp_path, monkeypatch):
    arguments = ("sweep", "--depths", 8, "--dataset", "shapes", "--out", tmp_path / "out", "--executor", "slurm")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("degrade: --executor slurm needs SLURM's sbatch, which is not on this machine")
    monkeypatch.setitem(sys.modules, "submitit", None)
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stderr == "degrade: --executor slurm needs submitit: pip install 'submitit>=1.5'\n"


def test_gpus_are_shared_out(monkeypatch):
    """A job a run, unless it is said how many jobs there are: then each packs what falls to it."""
    asked = []
    there = machines.OnSlurm(lambda **options: asked.append(options), gpus=1)
    assert there.device("auto") == "cuda"
    assert there.precision("cuda", None) == "tf32"
    with pytest.raises(ValueError, match="goes with --gpus 1"):
        there.device("cpu")
    eight = [smoke(seed=seed) for seed in range(8)]
    assert there.machine(eight, machines.Wanted("cuda"))[0] == Machine("cuda", 8, 1, 1, "auto")
    assert there.machine(eight, machines.Wanted("cuda", jobs=2))[0] == Machine("cuda", 2, 1, 0, "auto")
    machine, _ = there.machine(eight, machines.Wanted("cuda", threads=4, pack=3))
    assert machine == Machine("cuda", 3, 4, 3, "auto")
    there.use(machine)
    assert asked[-1] == {"cpus": 4, "gpus": 1, "max_jobs": None}
