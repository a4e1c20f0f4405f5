"""Promise 9 on Ray: a cluster of three nodes gives the bytes of one machine, and outlives a dead or frozen node."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import smoke, tally, times

from degrade import machines, store
from degrade.errors import Failure
from degrade.execute import ray as on_ray
from degrade.execute.remote import execute_elsewhere
from degrade.sweep import Machine, sweep

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}  # of the clusters here
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
CHECKS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_timeout_ms": 1000}
CHECKS |= {"health_check_failure_threshold": 3}
with socket.socket() as _there:
    _there.bind(("127.0.0.1", 0))
    CLIENT = _there.getsockname()[1]  # a port for those outside of the cluster
RUNS = [smoke(block, steps=64, milestones=(32,)) for block in ("plain", "residual")]
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_ray import train
train(Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, and three nodes of one."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    head = NODE | {"num_cpus": 0, "_system_config": CHECKS, "ray_client_server_port": CLIENT}
    there = Cluster(True, head_node_args=head)
    for _ in range(3):
        there.add_node(**NODE)
    yield there
    there.shutdown()


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """What one machine makes of the runs."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    study = store.Study(folder, "study", "smoke", RUNS[0].shared())
    list(sweep(study, study.find(RUNS), Machine("cpu", 2, 1), data_dir, commit_seconds=0.0))
    return results(folder)


def train(folder: Path, address: str) -> None:
    """A sweep on the cluster, which commits after every update and counts two seconds of silence as a loss."""
    from degrade.execute import remote

    remote.SILENCE = 2.0
    with machines.join("ray", address=address) as there:
        there.use(Machine("cpu", 3, 1))
        study = store.Study(folder, "study", "smoke", RUNS[0].shared())
        for run, event in sweep(
            study, study.find(RUNS), Machine("cpu", 3, 1), None, commit_seconds=0.0, engine=there.engine
        ):
            print(run.folder.name, event.kind, event.value if event.kind == "lost" else "", flush=True)


def results(folder: Path) -> dict[str, str]:
    """The SHA-256 of what must be equal: logs and final weights."""
    files = {}
    for run in sorted(path for path in folder.iterdir() if path.is_dir() and store.RUN.fullmatch(path.name)):
        newest = max((run / store.CHECKPOINTS).iterdir())
        files[f"{run.name}/checkpoint"] = newest.stem
        files[f"{run.name}/log"] = hashlib.sha256((run / store.LOG).read_bytes()).hexdigest()
    return files


@contextlib.contextmanager
def driving(folder: Path, address: str, data_dir: Path):
    """A process that sweeps on the cluster, and what it prints."""
    environment = os.environ | {"DEGRADE_DATA": str(data_dir), "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(folder), address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def steps(folder: Path) -> dict[str, int]:
    """How far each run's newest checkpoint is."""
    far = {}
    for path in folder.glob(f"*/{store.CHECKPOINTS}/[0-9]*.pt"):
        far[path.parent.parent.name] = max(far.get(path.parent.parent.name, 0), int(path.name[:9]))
    return far


def training_somewhere(folder: Path, least: int = 1) -> dict[str, int]:
    """Wait until some run has been committed, and is not at its end."""
    end = time.monotonic() + 120
    while not (far := {name: step for name, step in steps(folder).items() if least <= step < 60}):
        assert time.monotonic() < end, "nothing is trained"
        time.sleep(0.02)
    return far


def descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children[int(fields[1])].append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def squares(n, place):
    for i in range(n):
        yield i * i


def where(n, place):
    yield [place, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), n]


def test_equals_the_built_in_map(cluster, tmp_path):
    items = [3, 0, 5, 1, 2, 4]
    got = defaultdict(list)
    with on_ray.join(cluster.address) as engine:
        assert [(node.cpus, node.gpus) for node in engine.nodes] == [(1, 0)] * 3
        for event in execute_elsewhere(engine, squares, items, [[i] for i in range(6)], tmp_path):
            got[event.item].append(event.value if event.kind == "value" else event.kind)
    assert got == {i: ["started", *squares(n, ""), "done"] for i, n in enumerate(items)}


def test_a_job_holds_a_gpu_and_runs_several_items_in_it_and_one_without_sees_none(cluster, tmp_path):
    """Ray believes in GPUs that are not there."""
    node = cluster.add_node(**NODE, num_gpus=1)
    try:
        with on_ray.join(cluster.address) as engine:
            engine.gpus = 1
            shares, pack = [[0, 1], [2]], lambda place, items: 2
            events = list(execute_elsewhere(engine, where, [7, 8, 9], shares, tmp_path, place="cuda:0", pack=pack))
            values = sorted(event.value[-1:] + event.value for event in events if event.kind == "value")
            assert [value[:3] for value in values] == [[n, "cuda:0", "0"] for n in (7, 8, 9)]
            assert values[0][3] == values[1][3]
            engine.gpus = 0
            (tmp_path / "cpu").mkdir()
            events = list(execute_elsewhere(engine, where, [1], [[0]], tmp_path / "cpu"))
            assert [event.value[:2] for event in events if event.kind == "value"] == [["cpu", ""]]
            there = machines.OnRay(engine)
            assert there.device("auto") == "cuda"
            machine, _ = there.machine(RUNS, machines.Wanted("cuda"))
            assert machine == Machine("cuda", 1, 1, 0, "auto")
    finally:
        cluster.remove_node(node)


def test_the_command_gives_the_bytes_of_one_machine(cluster, data_dir, tmp_path):
    """`degrade sweep --executor ray` as a person types it, and the same command from outside of the cluster."""
    common = ["sweep", "--depths", "8", "--dataset", "shapes", "--protocol", "smoke", "--threads", "1"]
    command = [sys.executable, "-m", "degrade", *common]
    options = {"capture_output": True, "text": True, "env": os.environ | {"DEGRADE_DATA": str(data_dir)}}
    here = subprocess.run([*command, "--out", tmp_path / "here"], **options)
    assert here.returncode == 0, here.stderr
    for again, address in ((False, f"ray://127.0.0.1:{CLIENT}"), (True, cluster.address)):
        there = subprocess.run(
            [*command, "--out", tmp_path / "there", "--executor", "ray", "--address", address], **options
        )
        assert (there.returncode, there.stderr) == (0, "")
        assert ("n the Ray cluster: cpu, 2 runs at a time, 1 thread each" in there.stdout) != again  # On, About ... on
        assert there.stdout.count("epoch 3/3  step 24/24") == (0 if again else 2)
    assert results(tmp_path / "there" / "shapes-smoke") == results(tmp_path / "here" / "shapes-smoke")
    left = {path.name for path in (tmp_path / "there").rglob("*") if path.name.startswith(".")}
    assert left == set()


@pytest.mark.promise
@pytest.mark.parametrize("seed", range(times(20)))
def test_a_node_that_is_removed_costs_no_more_than_what_was_not_committed(cluster, data_dir, tmp_path, whole, seed):
    chance, folder = random.Random(seed), tmp_path / "study"
    with driving(folder, cluster.address, data_dir) as process:
        training_somewhere(folder)
        time.sleep(chance.uniform(0, 2))
        cluster.remove_node(chance.choice(sorted(cluster.worker_nodes, key=raylet)), allow_graceful=False)
        cluster.add_node(**NODE)
        far: dict[str, int] = {}
        while process.poll() is None:
            for name, step in steps(folder).items():
                assert step >= far.get(name, 0), f"{name} went back from {far[name]} to {step}"
                far[name] = step
            time.sleep(0.05)
        output = process.stdout.read()
        assert process.returncode == 0, output
    assert results(folder) == whole
    tally(9, "times a node was removed: the bytes of one machine")


@pytest.mark.promise
@pytest.mark.parametrize("seed", range(times(5)))
def test_a_node_that_freezes_is_given_up_and_changes_nothing_when_it_comes_back(
    cluster, data_dir, tmp_path, whole, seed
):
    """First the workers come back, while Ray on their node is still frozen: they go on training, and try to commit."""
    chance, folder = random.Random(100 + seed), tmp_path / "study"
    with driving(folder, cluster.address, data_dir) as process:
        name = chance.choice(list(training_somewhere(folder, 1 + chance.randrange(30))))
        pid = int((folder / name / store.LOCK).read_text().split()[0])
        (node,) = [node for node in sorted(cluster.worker_nodes, key=raylet) if pid in descendants(raylet(node))]
        frozen = descendants(raylet(node))
        for each in frozen:
            os.kill(each, signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert results(folder) == whole
    assert f"{name} lost" in output
    before = files(folder)
    for each in sorted(frozen, key=lambda each: each == raylet(node)):
        if each != raylet(node):
            os.kill(each, signal.SIGCONT)
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end and _trains(pid, folder / name):
        time.sleep(0.1)
    time.sleep(0.5)
    assert files(folder) == before
    os.kill(raylet(node), signal.SIGCONT)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)
    tally(9, "times a node was frozen and came back: the bytes of one machine")


def files(folder: Path) -> dict[Path, bytes]:
    """All but what a process that was ended, as any that comes back may be, has left half-written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {path: path.read_bytes() for path in paths}


def _trains(pid: int, run: Path) -> bool:
    """Whether the process still holds the lock file that was taken away from it."""
    with contextlib.suppress(OSError):
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        return f"{run / store.LOCK} (deleted)" in links
    return False


@pytest.mark.promise
@pytest.mark.parametrize("seed", range(times(4)))
def test_a_killed_driver_run_again_finishes(cluster, data_dir, tmp_path, whole, seed):
    folder = tmp_path / "study"
    with driving(folder, cluster.address, data_dir) as process:
        training_somewhere(folder, 1 + 10 * seed)
        process.kill()
    with driving(folder, cluster.address, data_dir) as process:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
    assert results(folder) == whole
    assert not list(folder.glob(".jobs-*"))
    tally(9, "times the driver was killed, and run again: the bytes of one machine")


@pytest.mark.promise
def test_a_local_cluster_ends_with_its_sweep_however_that_ends(data_dir, tmp_path):
    """No process is left, and no file of Ray's, whether the sweep is asked to stop or killed."""
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for sockets
    (tmp_path / "link").symlink_to(temporary)
    command = [sys.executable, "-m", "degrade", "sweep", "--depths", "8", "--dataset", "shapes", "--protocol", "smoke"]
    command += ["--steps", "100000", "--executor", "ray", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            command,
            env=environment | {"DEGRADE_DATA": str(data_dir), "RAY_TMPDIR": str(tmp_path / "link")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*/*/checkpoints/*.pt")) or len(descendants(process.pid)) < 5:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)
        there = descendants(process.pid)
        process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code
        if number != signal.SIGKILL:
            assert time.monotonic() - start < 5
            assert errors.splitlines()[-1] == "degrade: stopped; the same command goes on from the last checkpoints"
        while alive := [pid for pid in there if Path(f"/proc/{pid}").exists() and _is_running(pid)]:
            assert time.monotonic() - start < 15, [Path(f"/proc/{pid}/cmdline").read_bytes()[:80] for pid in alive]
            time.sleep(0.2)
        while left := list(temporary.iterdir()):
            assert time.monotonic() - start < 15, left
            time.sleep(0.2)
        shutil.rmtree(tmp_path / "out")
    temporary.rmdir()


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_folder_that_a_node_does_not_share_is_refused(cluster, data_dir, tmp_path, monkeypatch):
    """A node whose processes see another folder at the path: they live in a mount namespace of their own."""
    out = tmp_path / "out"
    out.mkdir()
    with on_ray.join(cluster.address) as engine:
        there = machines.OnRay(engine)
        there.prepare(out, ["shapes"], data_dir)
        assert list(out.iterdir()) == []
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    start = f"{Path(sys.executable).parent / 'ray'} start --address {cluster.address} --num-cpus 1 --block"
    start += " --object-store-memory 80000000"
    other = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {out} && exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with on_ray.join(cluster.address) as engine:
            end = time.monotonic() + 60
            while len(engine.nodes) < 4:
                assert time.monotonic() < end
                time.sleep(0.2)
            with pytest.raises(
                Failure, match=r"node .* does not see .*; --out must name a folder that all nodes share"
            ):
                machines.OnRay(engine).prepare(out, ["shapes"], data_dir)
        assert list(out.iterdir()) == []
    finally:
        for pid in reversed(descendants(other.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        other.wait()


def linger(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_a_node_that_leaves_while_it_is_asked_is_left_out(cluster):
    node = cluster.add_node(**NODE)
    with on_ray.join(cluster.address) as engine:
        assert len(engine.nodes) == 4
        threading.Timer(2.0, cluster.remove_node, (node, False)).start()
        assert len(engine.everywhere(linger, 6.0)) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("code", lambda: "0.0.0", r"node .* has another degrade \(.*\) than this machine \(0\.0\.0\)"),
        ("commit.hold", contextlib.nullcontext, "node .* does not see the locks that this machine holds in .*"),
    ],
)
def test_a_node_with_another_degrade_or_without_the_locks_is_refused(
    cluster, data_dir, tmp_path, monkeypatch, name, value, message
):
    monkeypatch.setattr(f"degrade.machines.{name}", value)
    with on_ray.join(cluster.address) as engine, pytest.raises(Failure, match=message):
        machines.OnRay(engine).prepare(tmp_path, ["shapes"], data_dir)
    assert list(tmp_path.iterdir()) == []


def test_where_all_gpus_are_busy_a_sweep_goes_without_asking_them():
    class Busy:
        def call(self, *arguments, patience):
            raise on_ray.NoAnswer("Ray has given no answer")

    there = machines.OnRay(Busy())
    assert there.precision("cuda", None) == "tf32"
    assert there.precision("cuda", "bf16") == "bf16"
    assert there.estimate([], Machine("cuda", 1, 1)) == {}


def test_a_cluster_that_anyone_can_use_is_refused(monkeypatch):
    """However it is reached: what counts is where its head listens, and what every node demands."""

    class Open:
        ray = property(lambda self: self)
        get_runtime_context = property(lambda self: lambda: self)

        def everywhere(self, function, idle):
            assert idle  # the head too, which may have no CPU to give
            return {on_ray.Node("1", "a", 0, 0): "token", on_ray.Node("2", "b", 1, 0): self.mode}

    for address in ("127.0.0.1:6379", "localhost:6379"):
        assert not on_ray.needs_token(address)
    for address in ("10.0.0.7:6379", "head:6379", "0.0.0.0:1"):
        assert on_ray.needs_token(address)
    there = Open()
    there.gcs_address, there.mode = "10.0.0.7:6379", ""
    with pytest.raises(Failure, match="could run any code there"):
        on_ray._demand_token(there)
    there.mode = "token"
    on_ray._demand_token(there)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(Failure, match="RAY_AUTH_MODE=token"):  # which is not set here
        on_ray._demand_token(there)
    there.gcs_address = "127.0.0.1:6379"
    on_ray._demand_token(there)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "rya"], "executor must be local, ray or slurm; got 'rya'"),
        (["--address", "auto"], "--address is for --executor ray"),
        (["--partition", "gpu"], "--partition is for --executor slurm"),
        (["--executor", "ray", "--time", "30"], "--time is for --executor slurm"),
        (
            ["--executor", "ray", "--address", "head"],
            "--address must be auto, HOST:PORT or ray://HOST:PORT; got 'head'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(cli, tmp_path, arguments, message):
    result = cli("sweep", "--depths", 8, "--dataset", "shapes", "--out", tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"degrade: {message}")
    assert not (tmp_path / "out").exists()


def test_without_ray_a_line_says_what_to_install(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = cli("sweep", "--depths", 8, "--dataset", "shapes", "--out", tmp_path / "out", "--executor", "ray")
    assert result.exit_code == 2
    assert result.stderr == "degrade: --executor ray needs Ray: pip install 'ray[client]>=2.52'\n"


def test_no_cluster_at_the_address_is_one_line(data_dir, tmp_path):
    command = [sys.executable, "-m", "degrade", "sweep", "--depths", "8", "--dataset", "shapes", "--executor", "ray"]
    result = subprocess.run(
        [*command, "--address", "127.0.0.1:9", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_raylet_start_wait_time_s": "1", "DEGRADE_DATA": str(data_dir)},
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("degrade: there is no Ray cluster to join at 127.0.0.1:9")
    assert not (tmp_path / "out").exists()
