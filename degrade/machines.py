"""Where a sweep's runs are trained: here or on a cluster; what there is, and what is demanded of it first."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from degrade import bench, commit, sweep
from degrade.config import RunConfig
from degrade.data import default_data_dir, fetch
from degrade.engine.process import cores
from degrade.errors import Failure
from degrade.execute import check_counts, ray, slurm
from degrade.execute.remote import Engine
from degrade.provenance import code
from degrade.sweep import Machine

BUSY = 60.0  # seconds that a question waits for room on a cluster; then the sweep goes without an answer
DOWNLOAD = 3600.0  # seconds that the nodes have to fetch a data set


class Wanted(NamedTuple):
    """How runs are to be trained; None stands for "auto"."""

    device: str
    jobs: int | None = None
    threads: int | None = None
    pack: int | None = None
    compiled: str = "auto"


class Machines(Protocol):
    """What a sweep wants to know of where its runs are trained.

    `name`: of the place. `engine`: that trains them; None for this process and its own.
    """

    name: str

    @property
    def engine(self) -> Engine | None: ...

    def device(self, asked: str) -> str:
        """`cpu`, `cuda` or what else it is, where "auto" was asked for.

        Raises:
            ValueError: there is no such device.
        """

    def precision(self, device: str, asked: str | None) -> str:
        """The one asked for, or the device's own.

        Raises:
            ValueError: the device has it not.
        """

    def machine(self, configs: Sequence[RunConfig], wanted: Wanted) -> tuple[Machine, str]:
        """What these runs are trained on; and what cannot be had, if anything, in a line.

        Raises:
            ValueError: there is no such machine.
        """

    def use(self, machine: Machine) -> None:
        """Give jobs from here on what the machine takes."""

    def estimate(self, configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
        """As `bench.estimate`; nothing where that cannot be told."""

    def prepare(self, out: Path, datasets: Sequence[str], data_dir: Path | None) -> None:
        """See that all who train can write to the folder of results, and have the data.

        Raises:
            Failure: one of them cannot.
        """


class Here:
    """This machine."""

    name = "this machine"
    engine = None

    def device(self, asked: str) -> str:
        return sweep.resolve_device(asked)

    def precision(self, device: str, asked: str | None) -> str:
        if asked is None:
            return sweep.default_precision(device)
        if not sweep.has_precision(device, asked):
            where = "a GPU that has it" if asked == "tf32" else "a CPU, or a GPU that has it"
            raise ValueError(f"precision {asked} needs {where}; device is {device}")
        return asked

    def machine(self, configs: Sequence[RunConfig], wanted: Wanted) -> tuple[Machine, str]:
        device, jobs, threads, pack, compiled = wanted
        return sweep.resolve_machine(device, configs, jobs=jobs, threads=threads, pack=pack, compiled=compiled)

    def use(self, machine: Machine) -> None:
        pass

    def estimate(self, configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
        return bench.estimate(configs, machine)

    def prepare(self, out: Path, datasets: Sequence[str], data_dir: Path | None) -> None:
        _fetch(datasets, data_dir)


def _chosen(asked: str, there: bool) -> str:
    if asked == "auto":
        return "cuda" if there else "cpu"
    if asked not in ("cpu", "cuda"):
        raise ValueError(f"with --executor, device must be auto, cpu or cuda; got {asked!r}")
    return asked


def _precision(asked: str | None) -> tuple[str, bool]:
    """A GPU's own, and whether it has the one asked for."""
    return sweep.default_precision("cuda:0"), asked is None or sweep.has_precision("cuda:0", asked)


@dataclass
class OnRay:
    """A Ray cluster."""

    engine: ray.Ray
    precisions: dict[str | None, tuple[str, bool]] = field(default_factory=dict)  # as far as the GPUs were asked
    name = "the Ray cluster"

    def device(self, asked: str) -> str:
        gpus = sum(node.gpus for node in self.engine.nodes)
        device = _chosen(asked, gpus > 0)
        if device == "cuda" and not gpus:
            raise ValueError("device cuda: the Ray cluster has no GPU")
        return device

    def precision(self, device: str, asked: str | None) -> str:
        if device == "cpu":
            usual, there = sweep.default_precision(device), asked is None or sweep.has_precision(device, asked)
        else:
            self.engine.cpus, self.engine.gpus = 1, 1
            if asked not in self.precisions:
                try:
                    self.precisions[asked] = self.engine.call(_precision, asked, patience=BUSY)
                except ray.NoAnswer:  # all GPUs are busy; a run looks before it begins
                    self.precisions[asked] = "tf32", True
            usual, there = self.precisions[asked]
        if not there:
            raise ValueError(f"precision {asked} is not to be had on {self.name}'s {device}")
        return asked or usual

    def machine(self, configs: Sequence[RunConfig], wanted: Wanted) -> tuple[Machine, str]:
        device, jobs, threads, pack, compiled = wanted
        check_counts(jobs=jobs, threads=threads, pack=pack, compiled=compiled)
        nodes, runs = self.engine.nodes, max(len(configs), 1)
        if device == "cuda":
            nodes = [node for node in nodes if node.gpus]
            room = sum(node.gpus for node in nodes)
            threads = threads or max(min(node.cpus // node.gpus for node in nodes), 1)
        else:
            smallest, every = min(node.cpus for node in nodes), sum(node.cpus for node in nodes)
            threads = threads or max(min(smallest, every // runs), 1)
            room = sum(node.cpus // threads for node in nodes)
        if not room or not any(node.cpus >= threads for node in nodes):
            raise ValueError(f"no node of the Ray cluster has {threads} CPUs for a run; lower --threads")
        self.engine.at_once = jobs
        jobs = max(min(jobs or room, room, runs), 1)
        return Machine(device, jobs, threads, (pack or 0) if device == "cuda" else (pack or 1), compiled), ""

    def use(self, machine: Machine) -> None:
        self.engine.cpus, self.engine.gpus = machine.threads, int(machine.device == "cuda")

    def estimate(self, configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
        self.use(machine)
        there = Machine("cuda:0" if machine.device == "cuda" else "cpu", 1, machine.threads)
        try:
            seconds: dict[str, float] = self.engine.call(bench.estimate, list(configs), there, patience=BUSY)
        except Failure:  # there is no room now, say; the runs will wait for it
            return {}
        return seconds

    def prepare(self, out: Path, datasets: Sequence[str], data_dir: Path | None) -> None:
        folder, name = out.absolute(), f".shared-{secrets.token_hex(8)}"
        commit.make_folder(folder)
        try:
            commit.write_file(folder / name, name.encode())
            with commit.hold(folder / f"{name}.lock"):
                for node, seen in self.engine.everywhere(_look, folder, name).items():
                    where = f"node {node.name} ({node.id[:8]})"
                    if seen.get("code") != code():
                        raise Failure(f"{where} has another degrade ({seen.get('code')}) than this machine ({code()})")
                    if problem := seen.get("problem"):
                        raise Failure(f"{where} {problem}; --out must name a folder that all nodes share")
                    if not (folder / f"{name}.{seen['answer']}").exists():
                        raise Failure(
                            f"{where} has a folder {folder} of its own; --out must name a folder that all nodes share"
                        )
        finally:
            for path in folder.glob(f"{name}*"):
                commit.remove(path)
        self.engine.everywhere(_fetch, datasets, data_dir and data_dir.absolute(), patience=DOWNLOAD)


def _look(folder: Path, name: str) -> dict[str, str]:
    """What a node sees of the folder of results; it leaves an answer there."""
    seen = {"code": code(), "answer": secrets.token_hex(8)}
    try:
        if not (folder / name).exists():
            return seen | {"problem": f"does not see {folder} as this machine does"}
        if not commit.holder(folder / f"{name}.lock"):
            return seen | {"problem": f"does not see the locks that this machine holds in {folder}"}
        commit.write_file(folder / f"{name}.{seen['answer']}", b"")
    except OSError as error:
        return seen | {"problem": f"cannot use {folder}: {error.strerror}"}
    return seen


def _fetch(datasets: Sequence[str], data_dir: Path | None) -> None:
    for dataset in datasets:
        fetch(dataset, data_dir or default_data_dir())


@dataclass
class OnSlurm:
    """A SLURM cluster; `start` makes its engine."""

    start: Callable[..., slurm.Slurm]
    gpus: int
    engine: Engine | None = None
    max_jobs: int | None = None
    name = "the SLURM cluster"

    def device(self, asked: str) -> str:
        device = _chosen(asked, self.gpus > 0)
        if (device == "cuda") != (self.gpus > 0):
            raise ValueError("--device cuda goes with --gpus 1, and cpu with none")
        return device

    def precision(self, device: str, asked: str | None) -> str:
        if device == "cpu":
            return Here().precision(device, asked)
        return asked or "tf32"  # which a run looks for before it begins

    def machine(self, configs: Sequence[RunConfig], wanted: Wanted) -> tuple[Machine, str]:
        device, jobs, threads, pack, compiled = wanted
        check_counts(jobs=jobs, threads=threads, pack=pack, compiled=compiled)
        threads, runs = threads or 1, max(len(configs), 1)
        if pack is None:
            pack = 0 if device == "cuda" and jobs else 1
        self.max_jobs = jobs
        jobs = min(jobs or -(-runs // max(pack, 1)), runs)
        return Machine(device, jobs, threads, pack, compiled), ""

    def use(self, machine: Machine) -> None:
        self.engine = self.start(cpus=machine.threads, gpus=self.gpus, max_jobs=self.max_jobs)

    def estimate(self, configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
        return {}  # a job to find out would wait in the queue

    def prepare(self, out: Path, datasets: Sequence[str], data_dir: Path | None) -> None:
        """Nothing can be asked before the first job; the data are fetched here, where that can be done."""
        _fetch(datasets, data_dir)


@contextmanager
def join(
    executor: str,
    *,
    address: str | None = None,
    partition: str | None = None,
    time: str | None = None,
    gpus: int | None = None,
) -> Iterator[Machines]:
    """Where the executor trains; in this context it can be used.

    Args:
        executor: "local", "ray" or "slurm".
        address: of a Ray cluster, as `ray.join` takes it.
        partition, time, gpus: of SLURM's jobs; `time` as `slurm.minutes` takes it.

    Raises:
        Failure: there is no cluster.
    """
    if executor == "local":
        yield Here()
    elif executor == "ray":
        with ray.join(address, cores()) as engine:
            if not engine.nodes:
                raise Failure("the Ray cluster has no node with a CPU to give")
            yield OnRay(engine)
    else:
        start = partial(slurm.Slurm, partition=partition, minutes=slurm.minutes(time or "60"))
        start()  # that it is there is seen at once
        yield OnSlurm(start, gpus or 0)
