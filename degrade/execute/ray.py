"""Ray as an engine: core tasks, on a cluster that is there or on one of this machine that ends with the sweep."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from degrade.errors import Failure
from degrade.execute.remote import Job

PATIENCE = 300.0  # seconds for what is asked of every node before the first run
# Some of Ray's processes outlive it, where it is killed with whoever has started it. This one outlives them all: once
# its input ends, since that process has ended, it kills all others that have a file open in the cluster's folder, where
# their logs are, and removes that. (A mark in their environment would not do: they write their titles over it.)
REAPER = """
import os, shutil, signal, sys, time
sys.stdin.read()
folder, starter = sys.argv[1:]
end, found = time.monotonic() + 10, os.path.isdir("/proc")
while found and time.monotonic() < end:
    found = False
    for name in set(filter(str.isdigit, os.listdir("/proc"))) - {starter}:
        try:
            opened = [os.readlink(f"/proc/{name}/fd/{number}") for number in os.listdir(f"/proc/{name}/fd")]
            if any(path.startswith(folder + "/") for path in opened):
                os.kill(int(name), signal.SIGKILL)
                found = True
        except OSError:
            pass
    time.sleep(0.1)
shutil.rmtree(folder, ignore_errors=True)
"""
LOOPBACK = ("127.", "localhost", "[::1]", "::1")


class NoAnswer(Failure):
    """What was asked has not come about in time."""


class Gone(Failure):
    """The node that was asked has left the cluster."""


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    name: str
    cpus: int
    gpus: int


class Ray:
    """A cluster that this process has joined; see `join`.

    Args:
        cpus, gpus: of each job; set them, and how many there are `at_once`, before the first is submitted.
    """

    def __init__(self) -> None:
        import ray

        self.ray = ray
        self.cpus, self.gpus = 1, 0
        self.at_once: int | None = None
        self._lost: set[str] = set()

    @property
    def nodes(self) -> list[Node]:
        """Those that are alive and have CPUs to give."""
        return [node for node in self._alive() if node.cpus]

    def _alive(self) -> list[Node]:
        nodes = []
        for node in self.ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                resources = node.get("Resources", {})
                name = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
                nodes.append(Node(node["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0))))
        return sorted(nodes, key=lambda node: (node.name, node.id))

    def everywhere(
        self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE, idle: bool = False
    ) -> dict[Node, Any]:
        """What the function gives on each node that stays; on those without CPUs to give too, if `idle`.

        Raises:
            Failure: it fails on a node, or gives nothing for so many seconds.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        refs = {
            node: self._remote(
                function, num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, False)
            ).remote(*arguments)
            for node in (self._alive() if idle else self.nodes)
        }
        answers = {}
        for node, ref in refs.items():
            with contextlib.suppress(Gone):
                answers[node] = self._get(ref, f"node {node.name}", patience)
        return answers

    def call(self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> Any:
        """What the function gives where a job would run.

        Raises:
            NoAnswer: there is no room for so many seconds.
            Failure: it fails there.
        """
        return self._get(
            self._remote(function, num_cpus=self.cpus, num_gpus=self.gpus).remote(*arguments), "Ray", patience
        )

    def _remote(self, function: Callable[..., Any], **options: Any) -> Any:
        """What becomes of a call is seen to here, not by Ray."""
        return self.ray.remote(max_retries=0, **options)(function)

    def _get(self, ref: Any, where: str, patience: float = PATIENCE) -> Any:
        try:
            return self.ray.get(ref, timeout=patience)
        except self.ray.exceptions.RayTaskError as error:
            raise Failure(f"{where}: {_line(error.cause)}") from None
        except self.ray.exceptions.GetTimeoutError:
            self.ray.cancel(ref, force=True)
            raise NoAnswer(f"{where} has given no answer for {patience:.0f} s; is there room for a job?") from None
        except (self.ray.exceptions.NodeDiedError, self.ray.exceptions.TaskUnschedulableError) as error:
            raise Gone(f"{where}: {_line(error)}") from None
        except self.ray.exceptions.RayError as error:
            raise Failure(f"{where}: {_line(error)}") from None

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        task = self._remote(_run, num_cpus=self.cpus, num_gpus=self.gpus, scheduling_strategy="SPREAD")
        return [task.remote(job, self.gpus) for job in jobs]

    def state(self, handle: Any) -> str | None:
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        try:
            self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            return _line(error.cause)
        except self.ray.exceptions.RayError as error:
            return _line(error)
        return ""

    def is_waiting(self, handle: Any) -> bool:
        return False  # which cannot be told from one that runs

    def losses(self) -> int:
        nodes = self.ray.nodes()  # type: ignore[no-untyped-call]
        self._lost |= {node["NodeID"] for node in nodes if not node["Alive"]}
        return len(self._lost)

    def cancel(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            self.ray.cancel(handle, force=True)


def _run(job: Job, gpus: int) -> None:
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides none from those that ask for none
    job()


def _line(error: BaseException) -> str:
    """What has happened, without what Ray advises."""
    name = type(error).__name__
    known = {
        "WorkerCrashedError": "its process has died",
        "NodeDiedError": "its node has died",
        "OutOfMemoryError": "its process was ended by Ray, since its node was short of memory",
        "TaskCancelledError": "it was cancelled",
    }
    first, *rest = str(error).strip().splitlines() or [""]
    return known.get(name) or f"{name}: {first} {rest[-1] if rest and first.endswith(':') else ''}".rstrip()


def needs_token(address: str) -> bool:
    """Whether others than this machine's could reach a cluster whose head is at the address."""
    return not address.startswith(LOOPBACK)


@contextmanager
def join(address: str | None = None, cpus: int | None = None) -> Iterator[Ray]:
    """Join the cluster at the address; in this context it can be used.

    Args:
        address: "auto", for the one that this machine belongs to; HOST:PORT; ray://HOST:PORT, from outside of it; or
            None, for one on this machine alone, which is started here and ends with the context.
        cpus: of the latter.

    Raises:
        ValueError: Ray is not installed.
        Failure: there is no cluster, or one that asks for no token though others can reach it.
    """
    with contextlib.nullcontext({"address": address}) if address else _alone(cpus) as options:
        try:
            import ray
            from ray.exceptions import AuthenticationError
        except ImportError:
            raise ValueError("--executor ray needs Ray: pip install 'ray[client]>=2.52'") from None
        if address not in (None, "auto"):
            _listens(address)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        start = partial(ray.init, **options, log_to_driver=False, logging_level=logging.ERROR)
        try:
            try:
                start()
            except ConnectionAbortedError:  # ray:// on a busy machine: what serves it has not come up in Ray's time
                ray.shutdown()
                start()
        except AuthenticationError as error:
            raise Failure(f"Ray at {address}: {_line(error)}; is RAY_AUTH_TOKEN the cluster's?") from None
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise Failure(f"there is no Ray cluster to join at {address or 'this machine'}: {_line(error)}") from None
        finally:
            for number, handler in handlers.items():  # Ray sets its own, which would end this process without a word
                signal.signal(number, handler)
        try:
            cluster = Ray()
            if address is not None:
                _demand_token(cluster)
            yield cluster
        finally:
            ray.shutdown()


@contextmanager
def _alone(cpus: int | None) -> Iterator[dict[str, Any]]:
    """How to start a cluster that nobody else can use: it listens on this machine alone, and demands a token.

    In this context, and no longer, its processes live, whatever becomes of this one.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # all of which Ray reads when it is imported
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    short = os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 # where it is safe to make a folder; sockets are in there
    folder = os.path.realpath(tempfile.mkdtemp(prefix="degrade-ray-", dir=short))  # as /proc has it
    command = [sys.executable, "-ISc", REAPER, folder, str(os.getpid())]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    address = {"address": "local", "_node_ip_address": "127.0.0.1"}
    try:
        yield address | {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": folder}
    finally:
        assert reaper.stdin  # it was asked for
        reaper.stdin.close()
        reaper.wait()


def _listens(address: str) -> None:
    """
    Raises:
        Failure: nobody does; Ray would try for minutes.
    """
    from ray.util import get_node_ip_address

    host, _, port = address.removeprefix("ray://").rpartition(":")
    hosts = [host]
    if host.startswith(LOOPBACK) and not address.startswith("ray://"):
        hosts.append(get_node_ip_address())  # type: ignore[no-untyped-call]  # which is where Ray looks then
    for each in hosts:
        try:
            socket.create_connection((each, int(port)), timeout=5).close()
        except OSError as error:
            reason = error.strerror or error
            raise Failure(f"there is no Ray cluster to join at {address}: {each}:{port}: {reason}") from None


def _demand_token(cluster: Ray) -> None:
    """
    Raises:
        Failure: anyone on the network could run what they like on the cluster.
    """
    where = str(cluster.ray.get_runtime_context().gcs_address)
    if not needs_token(where):
        return
    modes = set(cluster.everywhere(_auth_mode, idle=True).values())
    if modes != {"token"} or os.environ.get("RAY_AUTH_MODE") != "token":
        raise Failure(
            f"Ray at {where} can be used by anyone who reaches it, and they could run any code there. "
            "Start it with RAY_AUTH_MODE=token (ray get-auth-token --generate makes a token), and set that here too"
        )


def _auth_mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "")
