"""The engine, step by step, beside the loop that most public trainers run; everything in one command, taking turns.

Genuine CIFAR-10 (--data-dir or DEGRADE_DATA), batch 128, fp32. Each variant is a process of its own, or two side by
side; they run in the order A B C ... C B A, so that a slow moment of the machine falls on all of them. Medians of the
turns' medians, and their range; ratios are to the first variant of the same command. Run it with `make bench`, with
nothing else running. Page faults are those of a step, by getrusage; the peak is of resident memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from degrade.terminal import make_table

WARM = 6  # steps not counted
PUBLIC = "the public loop as shipped"
# name: compiled, memory kept, processes, each on its own core
VARIANTS = {
    "channels_last and resident data": (False, False, 1, False),
    "+ memory kept": (False, True, 1, False),
    "+ compiled blocks": (True, True, 1, False),
    "+ 2 runs with 1 thread each": (True, True, 2, False),
    "pinned to a core each": (True, True, 2, True),
    "2 runs with 1 thread each and eager": (False, True, 2, False),
}


def train(options: argparse.Namespace) -> Iterator[float]:
    """In a process of its own: one variant, step by step; yields the seconds of each."""
    sys.path.insert(0, str(Path(__file__).parent))
    if options.variant == PUBLIC:
        from public_loop import public_loop

        yield from public_loop(options.data_dir, options.block, options.depth)
    compiled, kept, processes, pinned = VARIANTS[options.variant]
    cores = sorted(os.sched_getaffinity(0))
    if pinned:
        os.sched_setaffinity(0, {cores[options.place]})

    import torch

    from degrade.config import RunConfig
    from degrade.engine.process import keep_memory
    from degrade.train import Training, load_splits

    if kept:
        keep_memory()
    torch.set_flush_denormal(True)
    torch.set_num_threads(max(len(cores) // processes, 1))
    config = RunConfig(block=options.block, depth=options.depth, seed=0)
    training = Training(config, load_splits(config, options.data_dir, "cpu"), compiled=compiled)
    while True:
        start = time.perf_counter()
        training.update()
        yield time.perf_counter() - start


def worker(options: argparse.Namespace) -> None:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    steps = train(options)
    for _ in range(WARM):
        next(steps)
    before = faults()
    seconds = [next(steps) for _ in range(options.steps)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "faults": (faults() - before) / options.steps, "peak": peak}))


def run(options: argparse.Namespace, variant: str) -> tuple[float, float, float]:
    """Seconds a step in the long run (of two side by side: half), page faults a step, peak in GiB."""
    processes = VARIANTS[variant][2] if variant in VARIANTS else 1
    named = {"variant": variant, "block": options.block, "depth": options.depth, "steps": options.steps}
    flags = [f"--{name}={value}" for name, value in named.items()] + [f"--data-dir={options.data_dir}"]
    commands = [[sys.executable, __file__, *flags, f"--place={place}"] for place in range(processes)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    seconds = statistics.mean(statistics.median(f["seconds"]) for f in found) / processes
    return seconds, found[0]["faults"], found[0]["peak"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DEGRADE_DATA"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--block", default="residual")
    parser.add_argument("--rounds", type=int, default=2, help="of A B ... B A")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help="of these variants, separated by commas")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("name the folder with CIFAR-10: --data-dir, or DEGRADE_DATA")
    if options.variant:
        worker(options)
        return

    names = options.only.split(",") if options.only else [PUBLIC, *VARIANTS]
    if unknown := [name for name in names if name not in (PUBLIC, *VARIANTS)]:
        parser.error(f"--only must be of {', '.join([PUBLIC, *VARIANTS])}; got {unknown[0]}")
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(2 * options.rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            taken[name].append(run(options, name))
    console = Console(width=140)
    title = f"{options.block}-{options.depth}, batch 128, {2 * options.rounds} turns of {options.steps} steps"
    console.print(title, highlight=False)
    table = make_table("variant", ">ms/step", ">range", ">first / this", ">faults/step", ">peak GiB")
    for name in names:
        seconds, faults, peak = zip(*taken[name], strict=True)
        table.add_row(
            name,
            f"{1000 * statistics.median(seconds):.0f}",
            f"{1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}",
            f"{statistics.median(first for first, *_ in taken[names[0]]) / statistics.median(seconds):.2f}",
            f"{statistics.median(faults):,.0f}",
            f"{max(peak):.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
