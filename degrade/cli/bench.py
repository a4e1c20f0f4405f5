"""`degrade bench`"""

import json
from typing import Annotated

import typer

from degrade import terminal
from degrade.cli.app import (
    app,
    check_precision,
    configs_of,
    console,
    count,
    distinct,
    how,
    machine_of,
    names,
    numbers,
    say,
)


@app.command()
def bench(
    depths: Annotated[str, typer.Option(help="6n+2.")] = "20,32,44,56,110",
    blocks: Annotated[str, typer.Option(help="plain, residual.")] = "plain,residual",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    jobs: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    threads: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    pack: Annotated[str, typer.Option(help="As for sweep.")] = "auto",
    compiled: Annotated[str, typer.Option("--compile", help="As for sweep.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, tf32 or bf16.", show_default="tf32 on GPUs that have it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a list of objects.")] = False,
) -> None:
    """Time the nets on this machine, and say how long the paper's protocol and the short one would take.

    Each net is timed alone, on made-up images, with the threads it has in a sweep; a matrix product is the yardstick.

    Example: degrade bench --depths 20,56
    """
    grid = {
        "depth": distinct(numbers(depths, "--depths"), "depths", int),
        "block": distinct(names(blocks, "--blocks"), "blocks", str),
        "seed": [0],
    }
    configs_of(grid, "cifar10", {"precision": precision or "fp32"})

    from degrade import bench as timing
    from degrade import sweep as engine

    device = engine.resolve_device(device)
    configs = configs_of(grid, "cifar10", {"precision": precision or engine.default_precision(device)})
    check_precision(configs[0].precision, device)
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
    console.print(terminal.bench_table(records))
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
