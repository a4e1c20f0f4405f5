"""Two processes that train each run together, started by torchrun, on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import smoke

from degrade import commit
from degrade.bench import on_noise
from degrade.engine.group import ALONE, Group
from degrade.train import check_shares

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]


def command(tmp_path, data_dir, *arguments, together):
    base = ["-m", "degrade", "sweep", "--dataset", "shapes", "--protocol", "smoke", "--depths", "8", "--device", "cpu"]
    base += ["--data-dir", str(data_dir), "--threads", "1", "--compile", "off", "--jobs", "1", *arguments]
    runner = [*TORCHRUN, "--rdzv-endpoint", "localhost:0", *base] if together else base
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *runner], "cwd": tmp_path, "env": environment, "text": True}


def run(tmp_path, data_dir, *arguments, together):
    done = subprocess.run(
        **command(tmp_path, data_dir, *arguments, together=together), capture_output=True, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def logs(folder):
    return {path.parent.name: path for path in sorted(folder.glob("*/*/log.csv"))}


def assert_close(there, here):
    assert list(there) == list(here)
    for name, path in there.items():
        a, b = pd.read_csv(path), pd.read_csv(here[name])
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=0.01)


def test_two_processes_give_the_result_of_one(tmp_path, data_dir):
    """With the same parts of a batch for BN, the sums differ at most in their order."""
    shares = ("--bn-batch-size", "8", "--val-images", "40")
    assert run(tmp_path, data_dir, *shares, "--out", "one", together=False)[0] == 0
    code, out, _ = run(tmp_path, data_dir, *shares, "--out", "two", together=True)
    assert code == 0
    assert out.count("2 runs, 2 to train") == 1  # one of them speaks
    assert_close(logs(tmp_path / "one"), logs(tmp_path / "two"))
    code, out, _ = run(tmp_path, data_dir, *shares, "--out", "two", together=True)
    assert (code, "2 runs, 0 to train" in out) == (0, True)


PROGRAM = """
import sys
from pathlib import Path
from degrade import sweep as engine
from degrade.config import PROTOCOLS, RunConfig
from degrade.engine.group import join
from degrade.store import Study

out, data = map(Path, sys.argv[1:])
group, device = join("cpu")
if group.rank:
    engine.follow(group, device)
else:
    fields = PROTOCOLS["smoke"] | {"dataset": "shapes", "width": 16, "batch_size": 24, "bn_batch_size": 4, "steps": 100}
    config = RunConfig(block="residual", depth=8, seed=0, **fields)
    study = Study(out, out.name, "smoke", config.shared())
    runs = study.find([config])
    machine = engine.Machine("cpu", 1, 1)
    for run, event in engine.sweep(study, runs, machine, data, commit_seconds=0.0, group=group):
        assert event.kind != "failed", event
    group.tell(None)
group.leave()
"""


def test_killed_and_begun_again_three_processes_end_with_the_same_bytes(tmp_path, data_dir):
    """Three, since sums of two numbers do not depend on their order. It is torchrun itself that is killed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    start = [sys.executable, *TORCHRUN[:3], "3", *TORCHRUN[4:], "--rdzv-endpoint", "localhost:0", "program.py"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}

    def checkpoints(out):
        return sorted(path.name for path in (tmp_path / out).glob("*/checkpoints/*.pt"))

    def newest(out):
        return max([int(name.partition("-")[0]) for name in checkpoints(out)], default=0)

    assert subprocess.run([*start, "whole", str(data_dir)], timeout=240, **quiet, **where).returncode == 0
    with subprocess.Popen([*start, "killed", str(data_dir)], **quiet, **where) as process:
        deadline = time.monotonic() + 120
        while newest("killed") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    (lock,) = (tmp_path / "killed").glob("*/lock")
    deadline = time.monotonic() + 10
    while commit.holder(lock) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not commit.holder(lock), "its processes have outlived it"
    assert 3 <= newest("killed") < 100
    assert subprocess.run([*start, "killed", str(data_dir)], timeout=240, **quiet, **where).returncode == 0
    logs = [[path.read_bytes() for path in (tmp_path / out).glob("*/log.csv")] for out in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert checkpoints("whole") == checkpoints("killed")  # their names hold the hashes of the weights
    (environment,) = (tmp_path / "whole").glob("*/environment.json")
    assert json.loads(environment.read_text())["processes"] == 3


def test_a_batch_that_cannot_be_shared_out_is_told(tmp_path, data_dir):
    code, _, error = run(tmp_path, data_dir, "--out", "none", together=True)
    assert code != 0
    assert "2 processes share each batch of 32" in error
    assert "bn_batch_size must divide 16; got None" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("batch_size", "part", "size"), [(32, None, 2), (32, 32, 2), (32, 16, 3), (33, 11, 2)])
def test_what_cannot_be_shared_out(batch_size, part, size):
    with pytest.raises(ValueError, match="bn_batch_size must divide"):
        check_shares(smoke(batch_size=batch_size, bn_batch_size=part), Group(0, size))


def test_what_can_be():
    check_shares(smoke(batch_size=32, bn_batch_size=8), Group(1, 4))
    check_shares(smoke(batch_size=32), ALONE)
    assert [Group(rank, 4).rows(32) for rank in (0, 3)] == [slice(0, 8), slice(24, 32)]


def test_each_process_evaluates_its_own_batches():
    """Their sums are what one process finds."""
    from degrade.evaluate import Evaluation

    torch.manual_seed(0)
    training = on_noise(smoke("residual"), "cpu")
    images, mean = training.splits.test, training.splits.mean
    whole = Evaluation(training.net, images, mean)
    parts = [Evaluation(training.net, images, mean, group=Group(rank, 2)) for rank in (0, 1)]
    assert sum(part.batches for part in parts) == whole.batches == 2
    for evaluation in (whole, *parts):
        evaluation.start()
        for _ in range(evaluation.batches):
            evaluation.step()
    assert torch.equal(whole.losses, parts[0].losses + parts[1].losses)
    assert torch.equal(whole.wrong, parts[0].wrong + parts[1].wrong)
