"""Milliseconds per update and images per second of each net on this machine, at the paper's width and batch size.

The nets take turns, forwards and backwards, so that a slow moment of the machine falls on all of them;
medians and ranges over the rounds. Run it with `make bench`, with nothing else running.
"""

import argparse
import os
import statistics

from rich.console import Console

from degrade.bench import measure
from degrade.config import BLOCKS, RunConfig
from degrade.sweep import resolve_device
from degrade.terminal import make_table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--depths", default="20,56")
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--device", default="auto")
parser.add_argument("--threads", type=int, default=os.cpu_count())
options = parser.parse_args()

device = resolve_device(options.device)
nets = [(int(depth), block) for depth in options.depths.split(",") for block in BLOCKS]
steps: dict[tuple[int, str], list[float]] = {net: [] for net in nets}
images: dict[tuple[int, str], list[float]] = {net: [] for net in nets}
for turn in range(options.rounds):
    for depth, block in nets if turn % 2 == 0 else nets[::-1]:
        config = RunConfig(block=block, depth=depth, seed=0)
        speed = measure(config, device, options.threads, repeats=3)
        steps[depth, block].append(speed.step)
        images[depth, block].append(speed.image)

table = make_table("net", ">ms/step", ">range", ">train images/s", ">eval images/s")
for depth, block in nets:
    taken = sorted(1000 * s for s in steps[depth, block])
    table.add_row(
        f"{block}-{depth}",
        f"{statistics.median(taken):.0f}",
        f"{taken[0]:.0f} to {taken[-1]:.0f}",
        f"{128_000 / statistics.median(taken):.0f}",
        f"{1 / statistics.median(images[depth, block]):.0f}",
    )
console = Console()
console.print(f"{device}, {options.threads} threads, batch 128, {options.rounds} rounds of 3 steps", highlight=False)
console.print(table)
