"""How fast this machine trains and evaluates, and how long a sweep will take on it."""

import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from degrade.config import PROTOCOLS, RunConfig
from degrade.data import Splits
from degrade.data.images import Images
from degrade.engine.process import prepare_process
from degrade.evaluate import evaluation_batch
from degrade.sweep import Machine, training_flops
from degrade.train import Training

MAX_TIMED = 16 * 1024  # batch size times width: eight batches of the paper's
MAX_FLOPS = 200e9  # operations of an update that is timed on a CPU
TIMED = {"cifar": (8, 20), "imagenet": (18, 34)}


class Speed(NamedTuple):
    """Seconds an update takes, seconds an evaluated image takes, and seconds until the first update can start."""

    step: float
    image: float
    start_up: float


def measure(config: RunConfig, device: str, threads: int, *, compiled: bool = False, repeats: int = 3) -> Speed:
    """Time a few updates and evaluations of this net on made-up images: medians, after one of each to warm up."""
    prepare_process(threads, device)
    start = time.perf_counter()
    training = on_noise(config, device, compiled=compiled)
    start_up = time.perf_counter() - start
    step = median_seconds(training.update, device, repeats)

    def evaluate() -> None:
        for _ in training.evaluate():
            pass

    return Speed(step, median_seconds(evaluate, device, repeats) / (2 * len(training.splits.test)), start_up)


def measure_packed(configs: Sequence[RunConfig], device: str, *, compiled: bool = False, rounds: int = 20) -> float:
    """Seconds in which each of these nets makes one update, when they take turns on one GPU."""
    trainings = [on_noise(config, device, compiled=compiled) for config in configs]

    def some() -> None:
        for _ in range(rounds):
            for training in trainings:
                training.update()

    return median_seconds(some, device, 3) / rounds


def matmul_flops(device: str, threads: int, precision: str = "fp32") -> float:
    """Floating-point operations a second of a large matrix product: what the hardware gives in practice at its best."""
    prepare_process(threads, device)
    size = 2048 if torch.device(device).type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    seconds = median_seconds(lambda: torch.mm(a, b), device, 11)
    torch.backends.cuda.matmul.fp32_precision = before
    return 2 * size**3 / seconds


def measurements(configs: Sequence[RunConfig], machine: Machine) -> Iterator[dict[str, Any]]:
    """`degrade bench`: a record for each net, timed alone in one process as a sweep runs it.

    Errors of timing apart, a sweep takes as long as its updates and evaluations; `paper_seconds` and
    `short_seconds` are those of one run under these protocols.
    """
    device = machine.places[0]
    peak = matmul_flops(device, machine.threads, configs[0].precision)
    for config in configs:
        compiled = machine.compiles(config)
        speed = measure(config, device, machine.threads, compiled=compiled)
        whole = {
            f"{protocol}_seconds": _run_seconds(replace(config, **PROTOCOLS[protocol]), speed)
            for protocol in ("paper", "short")
        }
        yield {
            "depth": config.depth,
            "block": config.block,
            "device": device,
            "threads": machine.threads,
            "precision": config.precision,
            "compiled": compiled,
            "milliseconds_per_step": 1000 * speed.step,
            "train_images_per_second": config.batch_size / speed.step,
            "evaluation_images_per_second": 1 / speed.image,
            "fraction_of_matmul_peak": training_flops(config) / config.steps / speed.step / peak,
            "matmul_flops_per_second": peak,
            "start_up_seconds": speed.start_up,
        } | whole


def estimate(configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
    """Seconds each whole run will take, by run id, from timing two depths: a straight line in operations an image.

    Takes a few seconds itself, so nothing is compiled for it: compiled runs will be somewhat faster. Batches of
    very wide nets, or very large ones, are timed in part, to spare memory. Reading images from the disk is not timed.
    """
    first, device = configs[0], machine.places[0]
    ends = [replace(first, depth=depth) for depth in TIMED[first.family]]
    work = [training_flops(config) / config.steps / config.batch_size for config in ends]
    batch_size = min(first.bn_batch_size or first.batch_size, max(MAX_TIMED // first.width, 1))
    if device == "cpu" and first.family == "imagenet":
        batch_size = min(batch_size, max(int(MAX_FLOPS / work[0]), 1))
    scale = first.batch_size / batch_size
    short, long = (
        measure(replace(config, batch_size=batch_size, bn_batch_size=None), device, machine.threads) for config in ends
    )
    seconds = {}
    for config in configs:
        share = (training_flops(config) / config.steps / config.batch_size - work[0]) / (work[1] - work[0])
        step, image, start_up = (max(a + share * (b - a), 0.0) for a, b in zip(short, long, strict=True))
        seconds[config.run_id] = _run_seconds(config, Speed(step * scale, image, start_up))
    return seconds


def _run_seconds(config: RunConfig, speed: Speed) -> float:
    measured = config.training_set_size  # or as many as there are for the test, see `train.measured`
    if config.family == "imagenet":
        measured = min(measured, config.test_set_size)
    images = measured + config.test_set_size + config.val_images
    return speed.start_up + config.steps * speed.step + config.epochs * images * speed.image


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Seconds until all are done, `jobs` at a time, each worker taking the next in order."""
    ends = [0.0] * jobs
    for duration in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def on_noise(config: RunConfig, device: str, *, compiled: bool = False, graphs: bool = True) -> Training:
    """A run on a few made-up images."""
    classes, size = config.num_classes, config.image_size
    count = 2 * evaluation_batch(device, size)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(classes, (count,), device=device)
    images = Images(pixels, labels)
    none = Images(pixels[:0], labels[:0])
    splits = Splits(images, none, images, torch.zeros(3, size, size, device=device), classes)
    return Training(config, splits, device, compiled=compiled, graphs=graphs)


def median_seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Of that many calls after one that is not counted, each to its end on the device."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
