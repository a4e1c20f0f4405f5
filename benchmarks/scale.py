"""A folder of 10,000 finished runs of 164 epochs, made up, and how long each command that reads it takes.

python benchmarks/scale.py              writes about 250 MB into a temporary folder
python benchmarks/scale.py --runs 1000 --keep results-at-scale
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from degrade.config import BLOCKS, RunConfig, protocol_fields
from degrade.log import Epoch, to_csv
from degrade.store import CHECKPOINTS, CONFIG, LOCK, LOG, STUDY, TIMING, Study, to_json

DEPTHS = (20, 32, 44, 56, 110)
COMMANDS = {
    "show": "3 s, 1 GB",
    "show --csv": "3 s, 1 GB",
    "verdict": "20 s",
    "plot --formats png": "20 s",
    "sweep --dry-run": "5 s",
}


def log_of(config: RunConfig) -> str:
    """A log of the usual shape, with the digits of a real one."""
    rng = random.Random(config.run_id)
    rows = []
    for epoch in range(1, config.epochs + 1):
        step = config.epoch_end(epoch)
        error = 0.02 + 0.001 * config.depth + 0.6 * 0.97**epoch + 0.01 * rng.random()
        wrong = [round(50_000 * error) / 50_000, error * 1.02, round(10_000 * error + 600) / 10_000]
        train_loss, test_loss = 2 * error + rng.random() / 100, 3 * error + rng.random() / 100
        rows.append(Epoch(epoch, step, config.lr_at(step - 1), train_loss, *wrong[:2], test_loss, wrong[2]))
    return to_csv(rows, validation=False)


def make_results(out: Path, runs: int) -> None:
    """`runs` finished runs of the paper's protocol in one study, of as many seeds as that takes."""
    fields = protocol_fields("paper", {})
    seeds = -(-runs // (len(BLOCKS[:2]) * len(DEPTHS)))
    configs = [
        RunConfig(block=block, depth=depth, seed=seed, **fields)
        for seed in range(seeds)
        for block in BLOCKS[:2]
        for depth in DEPTHS
    ][:runs]
    study = Study(out / "cifar10-paper", "cifar10-paper", "paper", configs[0].shared())
    study.folder.mkdir(parents=True)
    (study.folder / STUDY).write_bytes(to_json({"protocol": study.protocol, "shared": study.shared}))
    for config in configs:
        folder = study.folder / config.run_id
        (folder / CHECKPOINTS).mkdir(parents=True)
        (folder / CONFIG).write_bytes(to_json(config.as_dict()))
        (folder / LOG).write_text(log_of(config))
        (folder / LOCK).touch()
        (folder / TIMING).touch()


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds, and the most memory in GB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "degrade", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"degrade {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="where to write the results; read again where they are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.keep or Path(temporary) / "results"
        if not out.exists():
            make_results(out, options.runs)
        seeds = ",".join(map(str, range(-(-options.runs // 10))))
        for command, target in COMMANDS.items():
            name, *flags = command.split()
            where = (
                ["--depths", ",".join(map(str, DEPTHS)), "--out", str(out), "--protocol", "paper", "--seeds", seeds]
                if name == "sweep"
                else [str(out)]
            )
            seconds, memory = measure([name, *where, *flags])
            print(f"{command:20} {seconds:6.1f} s  {memory:.2f} GB  (at most {target})", flush=True)


if __name__ == "__main__":
    main()
