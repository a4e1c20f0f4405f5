import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from degrade import store
from degrade.cli import app
from degrade.config import PROTOCOLS, RunConfig
from degrade.data import cifar10
from degrade.log import Epoch, to_csv


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `shapes` data set, drawn once a test session."""
    from degrade.data import fetch

    folder = Path(os.environ.get("DEGRADE_TEST_CACHE") or tmp_path_factory.mktemp("data"))
    fetch("shapes", folder)
    return folder


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    folder = Path(os.environ.get("DEGRADE_DATA", "nowhere"))
    if not (folder / cifar10.FOLDER).is_dir():
        pytest.skip("genuine CIFAR-10 is not in DEGRADE_DATA")
    return folder


def smoke(block: str = "plain", depth: int = 8, seed: int = 0, **fields: object) -> RunConfig:
    """A run of seconds on `shapes`."""
    values = {"dataset": "shapes"} | PROTOCOLS["smoke"] | fields
    return RunConfig(block=block, depth=depth, seed=seed, **values)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run the command line in this process; fails the test if an exception gets out."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def write_run(
    folder: Path, config: RunConfig, errors: list[tuple[float, float]], *, protocol: str = "smoke", loss: float = 1.0
) -> store.Run:
    """A run as a sweep leaves it, with these (train, test) errors an epoch; the last row is at the last step."""
    study = store.Study(folder, protocol, config.shared())
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
