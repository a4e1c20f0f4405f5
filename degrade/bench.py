"""How fast this machine trains and evaluates, and how long a sweep will take on it."""

import heapq
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from degrade.config import DATASETS, RunConfig
from degrade.data import Images, Splits
from degrade.evaluate import evaluate
from degrade.sweep import Machine
from degrade.engine.process import prepare_process
from degrade.train import Training

EVALUATED = 256  # images
MAX_TIMED = 16 * 1024  # batch size times width: eight batches of the paper's


class Speed(NamedTuple):
    """Seconds an update takes, and seconds an evaluated image takes."""

    step: float
    image: float


def measure(config: RunConfig, device: str, threads: int, *, repeats: int = 3) -> Speed:
    """Time a few updates and evaluations of this net on made-up images: medians, after one of each to warm up."""
    prepare_process(threads)
    classes = DATASETS[config.dataset].num_classes
    pixels = torch.randint(256, (EVALUATED, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(classes, (EVALUATED,), device=device)
    images = Images(pixels, labels)
    none = Images(pixels[:0], labels[:0])
    splits = Splits(images, none, images, torch.zeros(3, 32, 32, device=device), classes)
    training = Training(config, splits, device)
    step = _median_seconds(training.update, device, repeats)
    image = _median_seconds(lambda: evaluate(training.net, pixels, labels, splits.mean), device, repeats) / EVALUATED
    return Speed(step, image)


def estimate(configs: Sequence[RunConfig], machine: Machine) -> dict[str, float]:
    """Seconds each whole run will take, by run id, from timing depths 8 and 20: the time is a straight line in depth.

    Takes a few seconds itself. Batches of very wide nets, or very large ones, are timed in part, to spare memory.
    """
    batch_size = min(configs[0].batch_size, max(MAX_TIMED // configs[0].width, 1))
    scale = configs[0].batch_size / batch_size
    timed = replace(configs[0], batch_size=batch_size)
    short, long = (measure(replace(timed, depth=depth), machine.device, machine.threads) for depth in (8, 20))
    seconds = {}
    for config in configs:
        share = (config.depth - 8) / 12
        step, image = (max(a + share * (b - a), 0.0) for a, b in zip(short, long, strict=True))
        images = config.training_set_size + config.test_set_size + config.val_images
        seconds[config.run_id] = config.steps * step * scale + config.epochs * images * image
    return seconds


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Seconds until all are done, `jobs` at a time, each worker taking the next in order."""
    ends = [0.0] * jobs
    for duration in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def _median_seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
