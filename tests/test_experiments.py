"""Every file in experiments/ is a sweep that works, with a header that says what to expect of it and why."""

import re
import tomllib
from itertools import product
from math import prod
from pathlib import Path

import pytest

from degrade import bench
from degrade import sweep as engine
from degrade.config import PROTOCOLS, RunConfig

ROOT = Path(__file__).parent.parent
OBJECTIONS = ("mistuned", "longer", "bn-statistics", "overfitting", "preact", "zero-gamma")
PAPER = ("--protocol", "paper", "--dataset", "cifar10")
SPECS = sorted((ROOT / "experiments").glob("*.toml"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "estimate", lambda configs, _: {config.run_id: 60.0 for config in configs})
    monkeypatch.setattr(engine, "training_flops", lambda _: 1e12)


def header(spec):
    return spec.read_text().partition("\n\n")[0]


def ids(stdout):
    """The run ids of a plan."""
    return re.findall(r"^\w+-\d+-s\d+-[0-9a-f]{8}", stdout, re.MULTILINE)


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_it_works_with_its_header(cli, spec, tmp_path):
    for word in ("Command:", "Expected:", "Source:", "Measured:", "Hardware:"):
        assert re.search(rf"^# {word} +\S", header(spec), re.MULTILINE), word
    assert f"degrade sweep experiments/{spec.name}" in header(spec)
    values = tomllib.loads(spec.read_text())
    out = tmp_path / "results"
    here = []
    if "precision" in values.get("grid", {}):
        values["grid"]["precision"].remove("tf32")  # which no CPU has
        here = ["--grid", f"precision={','.join(values['grid']['precision'])}"]
    result = cli("sweep", spec, "--dataset", "shapes", "--protocol", "smoke", *here, "--dry-run", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert not out.exists()
    studies = prod(len(axis) for axis in values.get("grid", {}).values())
    runs = len(values["depths"]) * len(values["blocks"]) * len(values["seeds"])
    assert result.stdout.count(f": {runs} run") == studies
    assert len(set(ids(result.stdout))) == studies * runs


@pytest.mark.parametrize("name", OBJECTIONS)
def test_an_objection_says_so_and_goes_to_the_papers_scale_with_one_flag_more(cli, name, tmp_path):
    spec = ROOT / "experiments" / f"{name}.toml"
    assert spec.read_text().startswith("# The objection: ")
    (command,) = re.findall(rf"degrade sweep experiments/{name}\.toml ({' '.join(PAPER)}[^(;\n]*)", header(spec))
    result = cli("sweep", spec, *command.split(), "--device", "cpu", "--dry-run", "--out", tmp_path)
    values = tomllib.loads(spec.read_text())
    grid = {"steps": [64_000, 192_000]} if name == "longer" else values.get("grid", {})
    expected = set()
    for point in product(*grid.values()):
        fields = dict(zip(grid, point, strict=True))
        if fields.get("steps") == 192_000:
            fields["milestones"] = (96_000, 144_000)
        for block, depth, seed in product(values["blocks"], values["depths"], values["seeds"]):
            config = RunConfig(block=block, depth=depth, seed=seed, **PROTOCOLS["paper"], **fields)
            expected.add(config.run_id)
    assert set(ids(result.stdout)) == expected


def test_every_objection_is_there():
    assert set(OBJECTIONS) <= {spec.stem for spec in SPECS}


def test_what_they_share_is_trained_once(cli, tmp_path):
    """All of them start from the demo on shapes, whose study is one for all."""
    demo = ids(cli("sweep", ROOT / "experiments" / "demo.toml", "--dry-run", "--out", tmp_path).stdout)
    for name, share in (("mistuned", 12), ("longer", 12), ("bn-statistics", 12), ("overfitting", 6), ("preact", 12)):
        spec = ROOT / "experiments" / f"{name}.toml"
        result = cli("sweep", spec, "--dry-run", "--out", tmp_path)
        assert len(set(demo) & set(ids(result.stdout))) == share, name
