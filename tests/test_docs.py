import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import degrade
from degrade import plots, store
from degrade.analysis.verdict import data_sets_of, finished
from degrade.cli import app
from degrade.log import COLUMNS
from degrade.report import write_report
from degrade.terminal import STYLES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import tables  # noqa: E402  what `make tables` runs

README = ROOT / "README.md"
TEXT = README.read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.PAGES}
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(text, language):
    """The code of a page."""
    return [code for name, code in BLOCKS.findall(text) if name == language]


@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_come_out_of_the_results(page):
    assert tables.renewed(PAGES[page]) == PAGES[page], "run make tables"


def test_every_place_is_on_a_page():
    places = [place[1] for text in PAGES.values() for place in tables.PLACE.finditer(text)]
    assert set(places) == set(tables.PLACES)
    for text in PAGES.values():
        assert text.count("written by make tables") == len(tables.PLACE.findall(text))
        for start, written in re.findall(r"^(.*)<!-- [a-z0-9-]+: written by make tables -->(.?)", text, re.MULTILINE):
            assert bool(start) == bool(written)  # a comment that begins a line ends the paragraph


def test_a_number_that_is_changed_by_hand_is_noticed():
    changed = re.sub(r"\+\d+\.\d\d", "+99.99", TEXT, count=1)
    assert changed != TEXT
    assert tables.renewed(changed) == TEXT


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_no_measured_number_is_written_by_hand(page):
    """What is left outside the written places is of the protocols, the paper, the promises and the installation."""
    prose = tables.PLACE.sub("", PAGES[page])
    found = re.findall(r"\d+(?:[.,]\d+)*\s?(?:%|points|ms|minutes?|seconds?|hours?|days?|GB|x|times)", prose)
    allowed = {
        "README.md": {"6 GB", "90 minutes", "10 seconds", "5 seconds"},
        "docs/tutorial.md": {"6 GB", "90 minutes", "10 minutes", "30 minutes", "40 minutes", "55 minutes"}
        | {"70 minutes", "85 minutes"},
    }
    assert {" ".join(words.split()) for words in found} <= allowed[page]


def test_the_page_of_commands_is_that_of_the_program():
    assert tables.COMMANDS.read_text() == tables.commands_page(), "run make tables"


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_its_python_runs(page, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("DEGRADE_DATA", str(data_dir))
    (example,) = blocks(PAGES[page], "python")
    exec(compile(example, page, "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def commands(code):
    """The command lines of degrade in shell code, as lists of words."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.startswith("degrade ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


EXPERIMENTS = {path.name: path.read_text() for path in sorted((ROOT / "experiments").glob("*.toml"))}
SHOWN = [
    *(words for text in PAGES.values() for code in blocks(text, "sh") for words in commands(code)),
    *(shlex.split(line)[1:] for text in PAGES.values() for line in re.findall(r"`(degrade [a-z]+ [^`.]*)`", text)),
    *(
        words
        for text in EXPERIMENTS.values()
        for line in re.findall(r"^# Command: +(.*)$", text, re.MULTILINE)
        for words in commands(line.replace("; ", "\n"))
    ),
]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_every_command_that_is_shown_can_be_given(words):
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert any(words[0] in param.opts for param in group.params)
        return
    name, command, rest = group.resolve_command(group.make_context("degrade", [], resilient_parsing=True), list(words))
    command.make_context(name, rest)
    for word in words:
        if word.startswith("experiments/"):
            assert (ROOT / word).is_file()


def test_the_tutorial_can_be_walked(data_dir, tmp_path):
    """All of its commands, from top to bottom, with the protocol that takes seconds."""
    code = "\n".join(blocks(PAGES["docs/tutorial.md"], "sh"))
    assert code.count("degrade ") >= 8
    quick = code.replace("demo", "smoke").replace("--steps 250", "--steps 2").replace("--seeds 0,1,2", "--seeds 0")
    assert quick.count("smoke") == code.count("demo") >= 3
    program = f'degrade() {{ "{sys.executable}" -m degrade "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
    paths = {"PYTHONPATH": str(ROOT), "DEGRADE_DATA": str(data_dir), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", "-euc", program + quick], cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts = dict(re.findall(r"^((?:plain|residual) \d+) (\d+)$", run.stdout, re.MULTILINE))
    assert counts["plain 56"] == counts["residual 56"]
    assert int(counts["plain 56"]) > 3 * int(counts["plain 20"])  # as it says
    figures = {path.name for path in (tmp_path / "class/shapes-smoke/figures").iterdir()}
    for figure in re.findall(r"`(?:class/shapes-demo/figures/)?([a-z-]+\.png)`", PAGES["docs/tutorial.md"]):
        assert figure in figures, figure
    assert (tmp_path / "class" / "report.html").exists()


def anchors(text):
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", BLOCKS.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "docs/commands.md", "results/a-martyn/README.md", "benchmarks/RESULTS.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_every_command_is_in_the_readme():
    for words in tables.every_command():
        assert f"`degrade {' '.join(words)}" in TEXT


def test_the_reference_names_every_column_and_status():
    text = PAGES["docs/reference.md"]
    for name in (*COLUMNS, *STYLES, "missing"):
        assert f"`{name}`" in text, name


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
        counts = {"a-martyn": 8, "cifar10-short": 18, "cifar10-demo": 12, "shapes-demo": 12}
        counts |= {"cifar10-grey-demo": 12, "cifar10-half-demo": 12}  # a construction: 2
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


def test_what_the_readme_says_of_short():
    """In words: "the deeper a plain net, the less it learns, and with 110 layers nothing", and of residual nets."""
    final = finished(degrade.load(ROOT / "results" / "cifar10-short"))
    assert final.groupby("depth")["seed"].nunique().to_dict() == {20: 3, 32: 1, 44: 1, 56: 3, 110: 1}
    errors = final.groupby(["block", "depth"])["train_error"].mean()
    plain, residual = errors["plain"], errors["residual"]
    assert plain.is_monotonic_increasing
    assert plain[110] > 0.9 - 3 * math.sqrt(0.9 * 0.1 / 50_000)  # within three standard deviations of guessing
    plain_behind, residual_behind = ((net - net[20]).drop(20) for net in (plain, residual))
    assert (residual_behind > 0).all()
    assert (residual_behind < plain_behind).all()


def test_the_figures_of_several_data_sets_are_of_the_results(tmp_path):
    studies, _ = store.find_studies(ROOT / "results")
    figures = data_sets_of(studies)
    assert "data-sets-demo" in figures
    for name, grid in figures.items():
        plots.save(plots.draw_data_sets(store.to_frame(studies), grid), tmp_path, name)
        there, now = ((folder / f"{name}.svg").read_text() for folder in (ROOT / "results" / "figures", tmp_path))
        assert re.findall(r"<text[^>]*>([^<]*)", there) == re.findall(r"<text[^>]*>([^<]*)", now), "run make figures"
        assert not re.search(r"/(home|root|Users|tmp|work)/", there)


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
