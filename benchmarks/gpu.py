"""What each part of the engine is worth on a CUDA GPU, alone and packed, on made-up images.

Milliseconds a step: eager, graphed, compiled and both, at each precision; cuDNN free to choose its algorithms
instead of deterministic ones; the public loop on genuine CIFAR-10 (DEGRADE_DATA); the ten nets of the paper packed.
Everything in one process, in the order A B B A. A line of JSON a measurement.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from degrade.bench import matmul_flops, measure_packed, median_seconds, on_noise
from degrade.config import RunConfig
from degrade.engine.process import set_precision
from degrade.sweep import has_precision, training_flops

sys.path.insert(0, str(Path(__file__).parent))


def one(config: RunConfig, device: str, *, free: bool = False, **how: bool) -> Callable[[], float]:
    """Seconds a step, of 50 between synchronisations. `free`: cuDNN may time its algorithms and use any."""

    def choose(precision: str) -> None:
        set_precision(precision)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = free, not free

    with patch("degrade.train.set_precision", choose):  # a graph keeps what was chosen when it was captured
        training = on_noise(config, device, **how)

    def steps() -> None:
        for _ in range(50):
            training.update()

    def measured() -> float:
        choose(config.precision)
        return median_seconds(steps, device, 3) / 50

    return measured


def public(config: RunConfig, device: str, data_dir: Path) -> Callable[[], float]:
    from public_loop import public_loop

    steps = public_loop(data_dir, config.block, config.depth, device)
    return lambda: sorted(next(steps) for _ in range(50))[25]


def measurements(
    device: str, depths: Sequence[int], packed: Sequence[int], data_dir: Path | None
) -> Iterator[dict[str, Any]]:
    precisions = [precision for precision in ("fp32", "tf32", "bf16") if has_precision(device, precision)]
    for precision in precisions:
        peak = matmul_flops(device, 1, precision)
        yield {"what": "matrix product", "precision": precision, "tflops": peak / 1e12}
        for depth in depths:
            config = RunConfig(block="residual", depth=depth, seed=0, precision=precision)
            variants = {
                "eager": one(config, device, graphs=False),
                "graphed": one(config, device),
                "compiled": one(config, device, compiled=True, graphs=False),
                "graphed and compiled": one(config, device, compiled=True),
                "the same, cuDNN free": one(config, device, compiled=True, free=True),
            }
            if data_dir and precision == "tf32":  # what torch does by default
                variants["the public loop"] = public(config, device, data_dir)
            for order in (list(variants), list(variants)[::-1]):
                for name in order:
                    seconds = variants[name]()
                    share = training_flops(config) / config.steps / seconds / peak
                    yield {"what": name, "precision": precision, "depth": depth, "ms": 1e3 * seconds, "of_peak": share}
    for precision in precisions:
        nets = [
            RunConfig(block=block, depth=depth, seed=0, precision=precision)
            for depth in sorted(packed, reverse=True)
            for block in ("plain", "residual")
        ]
        for compiled in (False, True):
            for pack in sorted({1, 2, 4, len(nets)} & set(range(len(nets) + 1))):
                groups = [nets[i : i + pack] for i in range(0, len(nets), pack)]
                seconds = sum(measure_packed(group, device, compiled=compiled) for group in groups)
                what = f"{len(nets)} nets, {pack} at a time"
                yield {"what": what, "precision": precision, "compiled": compiled, "ms": 1e3 * seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--depths", default="20,56", help="of the residual nets timed alone")
    parser.add_argument("--packed", default="20,32,44,56,110", help="of the nets packed, plain and residual")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DEGRADE_DATA"))
    options = parser.parse_args()
    depths, packed = ([int(n) for n in numbers.split(",")] for numbers in (options.depths, options.packed))
    for found in measurements(options.device, depths, packed, options.data_dir):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
