"""`degrade bench`"""

import json
from typing import Annotated

import typer

from degrade import terminal
from degrade.cli.app import (
    Plain,
    app,
    configs_of,
    console,
    count,
    distinct,
    how,
    machine_of,
    names,
    numbers,
    say,
    say_table,
)
from degrade.cli.options import (
    DEPTHS,
    Compiled,
    Device,
    Jobs,
    Pack,
    Precision,
    Threads,
    list_of,
    numbers_of,
)
from degrade.config import BLOCKS


@app.command(cls=Plain)
def bench(
    depths: Annotated[str, numbers_of("Layers of the nets, 6n+2.", DEPTHS)] = ",".join(DEPTHS),
    blocks: Annotated[str, list_of(BLOCKS, f"{', '.join(BLOCKS)}.")] = "plain,residual",
    device: Device = "auto",
    jobs: Jobs = "auto",
    threads: Threads = "auto",
    pack: Pack = "auto",
    compiled: Compiled = "auto",
    precision: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
) -> None:
    """Time the nets on this machine: how long will it take?

    Each net is timed alone, on made-up images, with the threads it has in a sweep; a matrix product is the yardstick.
    It says how long the protocols paper and short would take.

    \b
    Example: degrade bench
    Example: degrade bench --depths 20,56 --threads 1 --json > bench.json
    """
    grid = {
        "depth": distinct(numbers(depths, "--depths"), "depths", int),
        "block": distinct(names(blocks, "--blocks"), "blocks", str),
        "seed": [0],
    }
    configs_of(grid, "cifar10", {"precision": precision or "fp32"})

    from degrade import bench as timing
    from degrade.machines import Here

    here = Here()
    device = here.device(device)
    configs = configs_of(grid, "cifar10", {"precision": here.precision(device, precision)})
    machine = machine_of(device, configs, jobs, threads, pack, compiled)
    records = []
    for record in timing.measurements(configs, machine):
        records.append(record)
        if console.is_terminal and not as_json:
            step = terminal.milliseconds(record["milliseconds_per_step"])
            say(f"{record['block']}-{record['depth']}: {step} ms a step")
    if as_json:
        print(json.dumps(records, indent=2))
        return
    peak = records[0]["matmul_flops_per_second"]
    say(f"{how(machine)}, {configs[0].precision}, batch {configs[0].batch_size}")
    say(f"matrix product: {peak / 1e9:,.0f} GFLOP/s on {count(machine.threads, 'thread')} (the peak below)")
    say("train/s and eval/s: images a second")
    say_table(terminal.bench_table(records))
    together = 1.0
    if machine.pack > 1:
        taken = timing.measure_packed(configs[: machine.pack], machine.places[0], compiled=records[0]["compiled"])
        together = 1000 * taken / sum(record["milliseconds_per_step"] for record in records[: machine.pack])
        step = terminal.milliseconds(1000 * taken)
        say(f"{machine.pack} packed: {step} ms for a step of each, {100 * together:.0f} % of what they take alone")
    for protocol in ("paper", "short"):
        wall = timing.makespan(sorted((r[f"{protocol}_seconds"] for r in records), reverse=True), machine.jobs)
        nets = count(len(records), "net")
        say(f"{protocol}: about {terminal.duration(together * wall)} for these {nets}, one seed each")
