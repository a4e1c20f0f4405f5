import contextlib
import http.server
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from degrade import store
from degrade.cli import main
from degrade.config import PROTOCOLS, RunConfig
from degrade.log import Epoch, to_csv

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

SOAK = os.environ.get("DEGRADE_SOAK") == "1"  # what `make soak` sets
TALLY: dict[tuple[str, str], int] = {}


def times(full: int) -> int:
    """How often a test of a promise repeats: so often in `make soak`, a quarter of it elsewhere."""
    return full if SOAK else -(-full // 4)


def tally(promise: int, what: str, count: int = 1) -> None:
    """Count what a test of a promise has done, for the summary at the end."""
    TALLY[f"{promise:2d}", what] = TALLY.get((f"{promise:2d}", what), 0) + count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for (promise, what), count in sorted(TALLY.items()):
        terminalreporter.write_line(f"| {promise} | {count:,} {what} |")


@contextlib.contextmanager
def serving(httpd: http.server.HTTPServer) -> Iterator[str]:
    """The address of a server on this machine, while it runs."""
    with httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `shapes` data set, drawn once a test session."""
    from degrade.data import fetch

    folder = Path(os.environ.get("DEGRADE_TEST_CACHE") or tmp_path_factory.mktemp("data"))
    fetch("shapes", folder)
    return folder


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    if "DEGRADE_DATA" not in os.environ:
        pytest.skip("DEGRADE_DATA, the folder with genuine CIFAR-10, is not set")
    folder = Path(os.environ["DEGRADE_DATA"])
    assert (folder / "cifar-10-batches-py").is_dir(), f"DEGRADE_DATA is {folder}, where CIFAR-10 is not"
    return folder


def smoke(block: str = "plain", depth: int = 8, seed: int = 0, **fields: object) -> RunConfig:
    """A run of seconds on `shapes`."""
    values = {"dataset": "shapes"} | PROTOCOLS["smoke"] | fields
    return RunConfig(block=block, depth=depth, seed=seed, **values)


def micro(block: str = "plain", seed: int = 0, **fields: object) -> RunConfig:
    """A run of 40 ms on 20 images of `shapes`: six updates, three epochs."""
    values = {"width": 1, "train_images": 20, "test_images": 10, "batch_size": 10, "steps": 6, "milestones": (3,)}
    return smoke(block, seed=seed, **values | fields)


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in this process, 80 columns wide; any exception but SystemExit fails the test."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["degrade", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run


def write_run(
    folder: Path, config: RunConfig, errors: list[tuple[float, float]], *, protocol: str = "smoke", loss: float = 1.0
) -> store.Run:
    """A run as a sweep leaves it, with these (train, test) errors an epoch; the last row is at the last step."""
    study = store.Study(folder, folder.name, protocol, config.shared())
    study.create([config])
    rows = []
    for i, (train_error, test_error) in enumerate(errors, start=1):
        step = config.steps * i // len(errors)
        lr = config.lr_at(step - 1)
        last = loss if i == len(errors) else 1.0
        rows.append(Epoch(i, step, lr, last, train_error, train_error, last, test_error))
    if rows:
        (folder / config.run_id / store.LOG).write_text(to_csv(rows, validation=False))
    return store.Run.open(study.name, folder / config.run_id)
