import re
import subprocess
from pathlib import Path

import pytest
from readme import README, renewed

import degrade
from degrade import plots, store
from degrade.cli import app
from degrade.config import PROTOCOLS, RunConfig
from degrade.report import write_report

ROOT = Path(__file__).parent.parent
TEXT = README.read_text()


def test_the_readmes_numbers_come_out_of_the_results():
    assert renewed(TEXT) == TEXT, "run make figures"
    for data in ("cifar10", "shapes"):
        assert f"| {data} | plain | 56 v 20 | 3 |" in TEXT


def test_the_readmes_python_runs(data_dir, monkeypatch, capsys):
    monkeypatch.setenv("DEGRADE_DATA", str(data_dir))
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_every_command_is_in_the_readme():
    for command in app.registered_commands:
        assert f"`degrade {command.name or command.callback.__name__}" in TEXT


def test_every_file_the_readme_shows_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_table_of_protocols_is_that_of_the_code():
    section = TEXT.partition("## Protocols")[2]
    for name, fields in PROTOCOLS.items():
        config = RunConfig(block="plain", depth=20, seed=0, **fields)
        row = re.search(rf"^\| `{name}`.*$", section, re.MULTILINE)[0].split("|")
        cells = [cell.strip() for cell in row[2:-1]]
        assert cells[:4] == [f"{config.steps:,}", str(config.batch_size), str(config.lr), str(config.width)]
        counts = [f"{n:,}" for n in (config.train_images, config.test_images) if n] or ["all"]
        assert all(count in cells[4] for count in counts)


def test_every_room_is_in_the_architecture_section():
    section = TEXT.partition("## Architecture")[2].partition("## Development")[0]
    for path in (ROOT / "degrade").iterdir():
        if path.name.startswith("__"):
            continue
        assert f"  {path.name}{'/' if path.is_dir() else ' '}" in section, path.name


STUDIES = sorted((ROOT / "results").glob("*/study.json"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
class TestReferenceResults:
    def test_every_run_is_done_and_named_by_its_configuration(self, path):
        study = store.Study.open(path.parent)
        counts = {"a-martyn": 8, "shapes-demo": 12, "cifar10-demo": 12}  # a construction and its control: 2
        assert [run.status for run in study.runs] == ["done"] * counts.get(path.parent.name, 2)
        assert path.parent.name in TEXT

    def test_its_figures_are_of_its_logs(self, path, tmp_path):
        """Drawn anew they are the same: every byte of the SVG but for its coordinates' last digits."""
        figures = plots.figures(degrade.load(path.parent))
        assert {p.stem for p in (path.parent / "figures").iterdir()} >= set(figures)
        for name, figure in figures.items():
            plots.save(figure, tmp_path, name)
            for kind in plots.FORMATS:
                assert (path.parent / "figures" / f"{name}.{kind}").stat().st_size > 1000
            there, now = ((folder / f"{name}.svg").read_text() for folder in (path.parent / "figures", tmp_path))
            assert re.findall(r"<text[^>]*>([^<]*)", there) == re.findall(r"<text[^>]*>([^<]*)", now)
            numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+", svg)] for svg in (there, now)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.5), "run make figures"

    def test_nothing_in_it_names_a_machine(self, path):
        for file in [*path.parent.rglob("*.json"), *path.parent.rglob("*.csv"), *path.parent.rglob("*.svg")]:
            assert not re.search(r"/(home|root|Users|tmp|work)/", file.read_text()), file


def test_the_report_is_of_the_results(tmp_path):
    """Its numbers, in the Markdown twin; the page has the same ones, and figures whose last digits may differ."""
    studies, damaged = store.find_studies(ROOT / "results")
    write_report(studies, damaged, tmp_path)
    there, now = ((folder / "report.md").read_text() for folder in (ROOT / "results", tmp_path))
    links = re.compile(r"\]\([^)]*\)")  # relative to where it is
    assert links.sub("]", there) == links.sub("]", now), "run make figures"
    assert not re.search(r"/(home|root|Users|tmp|work)/", (ROOT / "results" / "report.html").read_text())


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split():
        assert re.search(rf"^{target}\s", listed, re.MULTILINE), target


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {degrade.__version__}\n" in citation


def test_the_constraints_pin_what_is_required():
    project = (ROOT / "pyproject.toml").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower() for name in pins}
    for name in re.findall(r'^    "([a-z-]+)>=', project, re.MULTILINE):
        assert name in pinned, name
