import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import micro, smoke, write_run

import degrade
from degrade import fidelity, paper, report, store
from degrade.analysis.verdict import decide, final_epochs, verdicts
from degrade.config import RunConfig

ROOT = Path(__file__).parent.parent
ODD = "odd <b>&\"'|*`x"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"><script>alert(1)</script><rect width="9"/></svg>'


def make_study(folder: Path, *, depths=(8, 14), seeds=(0, 1), blocks=("plain", "residual"), make=smoke, **fields):
    """Runs of six epochs; deeper plain nets end higher. Their environments try to break out of the page."""
    for block in blocks:
        for depth in depths:
            for seed in seeds:
                end = 0.3 + (0.2 * (depth > min(depths)) if block == "plain" else 0) + 0.01 * seed
                errors = [(0.9 - (0.9 - end) * i / 5, 0.92 - (0.9 - end) * i / 5) for i in range(6)]
                run = write_run(folder, make(block, depth, seed, **fields), errors)
                environment = {"torch": "</script><script>alert('torch')</script>", "cpu": 2 * "|", "threads": 2}
                if (depth, seed) == (8, 0):
                    environment["changes"] = [{"step": 12, "torch": "<b>newer</b>"}]
                (run.folder / "environment.json").write_bytes(store.to_json(environment))
                (run.folder / "timing.csv").write_text("epoch,step,seconds,ended\n0,0,1.500,2026-01-02T03:04:05Z\n")
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Two studies: one with a hostile name and a diverged run; and the paper's protocol, with figures and no end."""
    root = tmp_path_factory.mktemp("report") / "results"
    odd = make_study(root / ODD, blocks=("plain", "residual", "preact"))
    write_run(odd, smoke("plain", 20), [(0.8, 0.8), (0.5, 0.6)], loss=float("nan"))
    full = make_study(root / "paper", depths=(20, 56), make=lambda *net, **_: RunConfig(**swept(*net)))
    write_run(full, RunConfig(**swept("plain", 110, 0)), [])
    (full / "figures").mkdir()
    (full / "figures" / "lesion.svg").write_bytes(SVG)
    (full / "figures" / "responses-at-init.svg").write_bytes(SVG)
    (full / "figures" / "training-error.png").write_bytes(b"there")
    (full / "figures" / "huge.png").write_bytes(bytes(report.LARGEST + 1))
    return root


def swept(block, depth, seed):
    return {"block": block, "depth": depth, "seed": seed}


@pytest.fixture(scope="session")
def written(results):
    out = results.parent / "out"
    return report.write_report(*store.find_studies(results), out)


@pytest.fixture(scope="session")
def page(written):
    return written[0].read_text()


@pytest.fixture(scope="session")
def twin(written):
    return written[1].read_text()


class Reader(HTMLParser):
    """Tables as lists of rows; every start tag; and what is linked."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if self.inside not in ("script", "style"):
            self.text.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.tags if tag in tags]


def tables_of(text):
    """Of the Markdown twin."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        del rows[1]
        tables.append([[unescaped(cell.strip()) for cell in row] for row in rows])
    return tables


def unescaped(text):
    text = re.sub(r"\\([\\`*_\[\]|#~])", r"\1", text)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_the_twin_has_the_pages_tables(page, twin):
    of_page = [table for table in Reader(page).tables if table != [["nets"]]]  # the film's, which the script fills in
    assert of_page == tables_of(twin)
    assert (
        len(of_page) == 4 + 6 + 1 + 1 + 1
    )  # literature, and a place in it, beside cifar10; environment, departures, runs, numbers, verdict; choices


def test_the_numbers_are_those_of_the_frame(page, results):
    final = final_epochs(degrade.load(results))
    tables = {tuple(table[0][:4]): table[1:] for table in Reader(page).tables[-7:]}
    rows = {row[0]: row[1:] for row in tables["net", "seeds", "training error", "test error"]}
    for block, depth in (("plain", 20), ("plain", 56), ("residual", 20), ("residual", 56)):
        runs = final[(final["study"] == "paper") & (final["block"] == block) & (final["depth"] == depth)]
        for measure, cell in (("train_error", 1), ("test_error", 2)):
            mean, sd = 100 * runs[measure].mean(), 100 * runs[measure].std()
            assert rows[f"{block}-{depth}"][cell] == f"{mean:.2f} ± {sd:.2f} %"
        (published,) = [p for p in paper.CIFAR10 if (p.block, p.depth) == (block, depth)]
        assert rows[f"{block}-{depth}"][3] == f"{100 * published.train_error:.2f} %"
    records = {run.folder.name: run.record() for run in store.Study.open(results / "paper").runs}
    listed = {row[0]: row[3] for row in tables["run", "status", "step", "training error"]}
    assert listed.keys() == records.keys()
    assert listed["plain-110-s0-" + RunConfig(**swept("plain", 110, 0)).run_id[-8:]] == "-"


def test_the_verdict_is_said_with_its_interval(page, results):
    found = [v for v in verdicts(degrade.load(results)) if v.study == "paper"]
    assert len(found) == 3
    for v in found:
        assert f"{100 * v.low:+.2f} to {100 * v.high:+.2f}" in page
        assert report.in_words(v).replace(" %", "\u00a0%") in page


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"difference": 0.1, "low": 0.05, "high": 0.15}, "rises by 10.00 percentage points (95 % interval +5.00 to"),
        ({"difference": 0.1, "low": 0.05, "high": 0.15}, "above 0, so the deeper nets degrade."),
        ({"difference": -0.01, "low": -0.02, "high": 0.004}, "falls by 1.00 percentage points"),
        ({"difference": -0.01, "low": -0.02, "high": 0.004}, "do not degrade."),
        ({"difference": 0.0, "low": -0.02, "high": 0.02}, "so it stays undecided."),
        ({"difference": 0.1, "low": None, "high": None, "seeds": 1}, "with one seed there is no interval"),
        ({"difference": 0.1, "low": None, "high": None}, "all runs of the shallower net diverged"),
        (
            {"difference": 0.1, "low": 0.05, "high": 0.15, "block": "plain-residual"},
            "10.00 percentage points more",
        ),
    ],
)
def test_verdicts_in_words(results, values, words):
    v = replace(verdicts(degrade.load(results))[0], block="plain")
    v = replace(v, **values)
    assert words in report.in_words(replace(v, verdict=decide(v.low, v.high)))


def test_the_literature_stands_beside_cifar10_only_and_says_what_is_not_comparable(results, tmp_path, page):
    assert page.count("akamaster/pytorch_resnet_cifar10") == 1
    assert "Not comparable" not in page  # the one study of cifar10 is of the paper's protocol
    make_study(tmp_path / "narrow", depths=(20,), make=lambda *net, **_: RunConfig(**swept(*net), width=8))
    studies, damaged = store.find_studies(tmp_path)
    for path in report.write_report(studies, damaged, tmp_path):
        assert "Not comparable" in path.read_text()


def test_what_comes_from_files_is_text(page, twin, results):
    assert "alert(" not in page.replace("&lt;script&gt;alert(&#39;torch&#39;)&lt;/script&gt;", "")
    assert "<b>&" not in page
    assert ODD not in page
    assert ODD in "".join(Reader(page).text)
    prose = [line for line in twin.splitlines() if not line.startswith("    degrade sweep")]  # commands are code
    assert len(prose) == len(twin.splitlines()) - 4
    assert not re.search("<script>|<b>", "\n".join(prose))
    assert {attributes.get("type") for attributes in Reader(page).all("script")} == {"application/json", None}
    handlers = [name for _, attributes in Reader(page).tags for name in attributes if name.startswith("on")]
    assert not handlers


def test_a_run_that_went_on_elsewhere_is_said(page):
    text = "".join(Reader(page).text)
    assert re.search(r"plain-8-s0-\w+ went on from step 12 with torch <b>newer</b>", text)


def test_unfinished_runs_are_named_and_diverged_ones_counted_at_chance(page):
    assert re.search(r"Not counted, as it is not finished: plain-110-s0-\w+: missing", page)
    row = next(row for table in Reader(page).tables for row in table if row[:1] == ["plain-20"])
    assert row[1:3] == ["1 (1 diverged, at chance)", "90.00 %"]


def test_every_picture_is_inside_the_page_and_has_its_alt_text(page):
    reader = Reader(page)
    images = reader.all("img")
    assert len(images) == 4 + 4 + 2  # of logs, and those in the folder but the huge one
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 20 for image in images)
    assert "plain 20 layers 30.50 %; plain 56 layers 50.50 %" in " ".join(image["alt"] for image in images)
    assert any(base64.b64decode(image["src"].partition(",")[2]) == SVG for image in images)
    sources = [attributes[name] for _, attributes in reader.tags for name in ("src", "srcset") if name in attributes]
    assert all(source.startswith("data:") for source in sources)
    links = {attributes["href"] for attributes in reader.all("link", "a")}
    assert {link for link in links if not link.startswith("#")} == {"data:,", "https://arxiv.org/abs/1512.03385"}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert "Layer responses (at init)" in page
    assert "huge" not in page


def test_without_javascript_the_static_figure_is_there(page):
    reader = Reader(page)
    assert all("hidden" in attributes for attributes in reader.all("figure") if attributes.get("class") == "film")
    assert page.count("<noscript>") == 2


def test_the_twins_links_lead_to_files(written, twin):
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", twin)
    assert len(links) == 3
    for link in links:
        assert (written[1].parent / unquote(link)).is_file()


def test_the_film_is_the_mean_over_seeds_and_ends_at_the_last_epoch(results):
    rows = degrade.load(results)
    film = report.film(rows[rows["study"] == "paper"])
    assert film["steps"] == [64_000 * i // 6 for i in range(1, 7)]
    assert film["epochs"] == [1, 2, 3, 4, 5, 6]
    assert [(net["block"], net["depth"]) for net in film["nets"]] == [
        ("plain", 20),
        ("plain", 56),
        ("residual", 20),
        ("residual", 56),
    ]
    assert film["nets"][1]["errors"][1][-1] == pytest.approx(0.51)
    assert film["chance"] == 0.9


def test_a_diverged_run_stays_at_chance_in_the_film(results):
    rows = degrade.load(results)
    film = report.film(rows[rows["study"] == ODD])
    (lost,) = [net for net in film["nets"] if (net["block"], net["depth"]) == ("plain", 20)]
    assert lost["errors"] == [[0.8, 0.9]]
    assert film["steps"] == [12, 24]  # the epochs that all have


def test_a_long_film_is_thinned_evenly(tmp_path):
    config = smoke(steps=1000)
    write_run(tmp_path / "s", config, [(i / 2000, 0.5) for i in range(999)])
    film = report.film(degrade.load(tmp_path))
    assert len(film["steps"]) == report.FRAMES
    assert film["epochs"][0] == 1
    assert film["epochs"][-1] == 999
    gaps = {b - a for a, b in pairwise(film["epochs"])}
    assert gaps <= {5, 6}
    assert len(json.dumps(film)) < 5_000


def test_unfinished_runs_only(tmp_path):
    """A page that says so; the film shows what there is."""
    run = write_run(tmp_path / "s", smoke(), [(0.8, 0.8), (0.6, 0.6), (0.5, 0.6)])
    log = run.folder / store.LOG
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    studies, damaged = store.find_studies(tmp_path)
    for path in report.write_report(studies, damaged, tmp_path / "out"):
        text = path.read_text()
        assert "No finished run yet" in text
        assert run.folder.name in text
    rows = degrade.load(tmp_path)
    assert len(report.film(rows)["steps"]) == 2


def test_no_epoch_is_an_error(tmp_path):
    write_run(tmp_path / "s", smoke(), [])
    with pytest.raises(ValueError, match="no epoch"):
        report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_named_and_left_out(tmp_path):
    make_study(tmp_path / "s")
    run, other = store.Study.open(tmp_path / "s").runs[:2]
    (run.folder / store.LOG).write_text("nonsense")
    (other.folder / store.ENVIRONMENT).write_text("[<i>")
    (other.folder / store.TIMING).write_bytes(b"\xff\x00")
    page, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = " ".join("".join(Reader(page.read_text()).text).split())
    for said in (text, unescaped(twin.read_text())):
        assert "Left out: damaged" in said
        assert f"{run.folder / store.LOG}: the header is not degrade's" in said
        assert f"{other.folder / store.ENVIRONMENT} is not JSON" in said
    assert "| plain-8 | 1 |" in twin.read_text()


def test_choices_that_all_studies_make_alike_are_listed_once(results, twin, page, tmp_path):
    (shared,) = tables_of(section_of(twin, "Choices"))
    assert 'href="#choices"' in page
    for study in store.find_studies(results)[0]:
        tables = tables_of(section_of(twin, re.escape(report.escaped(study.name))))
        (own,) = [table for table in tables if tuple(table[0]) == report.CHOICE]
        rows = [list(departure) for departure in fidelity.departures(study.shared, None)]
        assert sorted(own[1:] + shared[1:]) == sorted([" ".join(cell.split()) for cell in row] for row in rows)
    assert {row[-1] for row in shared[1:]} == {"assumed"}
    make_study(tmp_path / "s", seeds=(0,))
    page, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    assert "## Choices" not in twin.read_text()
    assert "at the end" not in twin.read_text() + page.read_text()
    assert "| which step counts |" in twin.read_text()


def test_imported_runs_list_their_departures(tmp_path):
    make_study(tmp_path / "s", seeds=(0,))
    study = store.Study.open(tmp_path / "s")
    values = json.loads((study.folder / store.STUDY).read_text())
    (study.folder / store.STUDY).write_bytes(store.to_json(values | {"imported": True}))
    runs = study.runs
    for run, lines in zip(runs, (["mean per <channel>"], ["best on test"], "none", None), strict=True):
        (run.folder / store.IMPORTED).write_bytes(store.to_json({"departures": lines}))
    _, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = twin.read_text()
    assert "| as imported |  | mean per &lt;channel&gt; | explicit |" in text
    assert "| as imported |  | best on test | explicit |" in text
    assert "assumed |" not in text
    assert "degrade sweep" not in text


def test_the_same_results_give_the_same_bytes_and_nothing_else_is_written(results, written, tmp_path):
    before = sorted(results.rglob("*"))
    again = report.write_report(*store.find_studies(results), written[0].parent.parent / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    assert sorted(results.rglob("*")) == before
    assert sorted(path.name for path in written[0].parent.iterdir()) == ["report.html", "report.md"]
    assert "as of 2026-01-02" in written[0].read_text()


@pytest.mark.parametrize(
    "made",
    [
        lambda: ("smoke", [smoke(b, d, s) for b in ("plain", "residual") for d in (8, 14) for s in (0, 3)]),
        lambda: ("smoke", [smoke(*net) for net in (("plain", 8), ("plain", 14), ("plain", 14, 1), ("residual", 8))]),
        lambda: ("smoke", [micro("residual", shortcut="B", decay="conv", lr=0.05, milestones=(2, 4))]),
        lambda: ("smoke", [micro(milestones=())]),
        lambda: ("paper", [RunConfig(**swept("plain", 20, 0), steps=100, milestones=(50, 75), val_images=5_000)]),
        lambda: ("lost", [RunConfig(**swept("plain", 20, 0), init="zero-gamma", test_images=100)]),
    ],
)
def test_the_commands_redo_the_study(tmp_path, cli, monkeypatch, made):
    monkeypatch.setattr("degrade.bench.estimate", lambda configs, _: {config.run_id: 1.0 for config in configs})
    protocol, configs = made()
    for config in configs:
        write_run(tmp_path / "re.done", config, [(0.5, 0.5)], protocol=protocol)
    planned = set()
    for command in report.commands(store.Study.open(tmp_path / "re.done")):
        words = shlex.split(command)
        assert words.pop(0) == "degrade"
        result = cli(*words, "--out", tmp_path / "again", "--dry-run", "--jobs", "1")
        assert result.exit_code == 0, result.stderr
        assert f"{tmp_path / 'again' / 're.done'}" in result.stdout
        planned |= set(re.findall(r"\b(?:plain|residual|preact)-\d+-s\d+-[0-9a-f]{8}\b", result.stdout))
    assert planned == {config.run_id for config in configs}


FINDING = "Built from <plain-8>, it is no worse. Training left the solution."


def construct(root, *, runs=True):
    """Beside a study, what `degrade identity` makes of its plain-8, maybe with both of its runs."""
    make_study(root / "s", blocks=("plain",), seeds=(0,))
    source = smoke("plain", 8, 0).run_id
    init = f"identity:{source}:0123456789ab"
    store.Study(root / "c", "c", "smoke", smoke(init=init, steps=12, milestones=()).shared()).create([])
    for depth in (8, 14) if runs else ():
        write_run(root / "c", smoke(depth=depth, init=init, steps=12, milestones=()), [(0.3, 0.3), (0.2, 0.25)])
    record = {"source": {"study": "s", "run": source, "weights": "0123456789ab"}, "block": "plain", "shallow": 8}
    record |= {"deep": 14, "train": {"deep_error": 0.1}, "finding": FINDING}
    (root / "c" / store.IDENTITY).write_bytes(store.to_json(record))
    return root


def section_of(twin, name):
    return re.search(rf"^## {name}\n.*?(?=^## |\Z)", twin, re.MULTILINE | re.DOTALL)[0]


def test_runs_that_began_from_trained_weights_are_no_degradation_study(tmp_path):
    construct(tmp_path)
    (tmp_path / "c" / "figures").mkdir()
    for name in ("identity", "training-error"):  # the other as an older degrade left it
        (tmp_path / "c" / "figures" / f"{name}.svg").write_bytes(SVG)
    page, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = section_of(unescaped(twin.read_text()), "c")
    assert f"- {FINDING}\n" in text
    assert "1. c: Built from &lt;plain-8&gt;, it is no worse\n" in twin.read_text()
    assert re.findall(r"\*\*Figure 1.*?\*\*", text) == ["**Figure 1.1. The identity construction.**"]
    assert "| plain-14 | 1 | 20.00 % | 25.00 % |" in text
    for word in ("early in training", "rises by", "undecided"):
        assert word not in text
        assert word in section_of(twin.read_text(), "s")
    assert page.read_text().count('class="film"') == 1
    assert f"degrade identity results/s/{smoke().run_id} --depth 14 --steps 12 --lr 0.02 --study c" in text


def test_a_construction_without_a_run(tmp_path):
    construct(tmp_path, runs=False)
    _, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = section_of(unescaped(twin.read_text()), "c")
    assert f"- {FINDING}\n" in text
    assert f"degrade identity results/s/{smoke().run_id} --depth 14 --study c" in text
    _, twin = report.write_report(*store.find_studies(tmp_path / "c"), tmp_path / "out")
    assert f"- {FINDING}\n" in unescaped(twin.read_text())


@pytest.mark.parametrize(
    "text", ["[]", "{", "3", "null", '{"source": [1]}', '{"source": {}}', "{}", '{"finding": ["x"]}', "\udcff"]
)
def test_a_damaged_record_of_a_construction_counts_as_none(tmp_path, text):
    construct(tmp_path)
    (tmp_path / "c" / store.IDENTITY).write_bytes(text.encode(errors="surrogateescape"))
    _, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = section_of(twin.read_text(), "c")
    assert "Begun from trained weights.\n" in text
    assert f"degrade identity results/STUDY/{smoke().run_id} --depth 14 --steps 12" in text


@pytest.mark.parametrize("missing", ["scratch", "finding"])
def test_a_record_that_lacks_what_need_not_be_there(tmp_path, missing):
    path = construct(tmp_path) / "c" / store.IDENTITY
    record = {"scratch": None} | json.loads(path.read_bytes())
    del record[missing]
    path.write_bytes(store.to_json(record))
    _, twin = report.write_report(*store.find_studies(tmp_path), tmp_path / "out")
    text = section_of(unescaped(twin.read_text()), "c")
    assert (FINDING in text) is (missing == "scratch")
    assert f"results/s/{smoke().run_id}" in text


def test_relative_or_absolute_results_give_the_same_bytes(tmp_path, monkeypatch):
    construct(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    for root, out in ((Path("here"), Path("one")), (tmp_path / "here", tmp_path / "two")):
        report.write_report(*store.find_studies(root), out)
    for name in (report.HTML, report.MARKDOWN):
        text = (tmp_path / "one" / name).read_bytes()
        assert text == (tmp_path / "two" / name).read_bytes()
        assert b"here/s" not in text
        assert str(tmp_path).encode() not in text


@pytest.fixture
def tuned(tmp_path):
    """plain-8 is best at lr 0.1, plain-14 at 0.05, and still worse there; two of the studies in one folder <b>."""
    for lr, shallow, deep in ((0.1, 0.30, 0.70), (0.05, 0.35, 0.45)):
        for depth, error in ((8, shallow), (14, deep)):
            for seed in (0, 1):
                config = smoke("plain", depth, seed, lr=lr)
                write_run(tmp_path / "<b>" / f"s-lr{lr}", config, [(0.9, 0.9), (error + 0.01 * seed, 0.9)])
    return tmp_path


def test_studies_that_differ_in_one_field_are_side_by_side(tuned, cli):
    assert cli("plot", tuned / "<b>", "--formats", "png").exit_code == 0
    page, twin = report.write_report(*store.find_studies(tuned / "<b>"), tuned / "out")
    text = twin.read_text()
    mine = section_of(text, "Side by side")
    assert "3. Side by side: studies that differ in lr\n" in text
    assert "Studies that differ in lr alone: s-lr0.05 (0.05) and s-lr0.1 (0.1).\n" in mine
    assert "- Even with the best lr of each depth, plain-14 (lr 0.05) is 15.00 points above plain-8 (lr 0.1).\n" in mine
    assert "- lr 0.1, the highest tried, is the best of plain-8: one beyond it may be better still.\n" in mine
    (table,) = tables_of(mine)
    assert [row[:5] for row in table[1:]] == [
        ["plain", "14 v 8", "0.05", "2", "+10.00"],
        ["plain", "14 v 8", "0.1", "2", "+40.00"],
        ["plain", "14 v 8", "best", "2", "+15.00"],
    ]
    (link,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", mine)
    assert (tuned / "out" / unquote(link)).resolve() == tuned / "<b>" / "figures" / "grid-lr.png"
    assert "**Figure 3.1. Final errors v lr.**" in mine
    reader = Reader(page.read_text())
    assert [t for t in reader.tables if t != [["nets"]]] == tables_of(text)
    assert any(image["alt"].startswith("Final errors v lr, of 2 studies. even with") for image in reader.all("img"))
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "#side-by-side" in {attributes["href"] for attributes in reader.all("a")}
    again = report.write_report(*store.find_studies(tuned / "<b>"), tuned / "again")
    assert [path.read_text() for path in again] == [page.read_text(), text]


def test_of_studies_in_folders_too_and_their_names_are_text(tuned):
    page, twin = report.write_report(*store.find_studies(tuned), tuned / "out")
    assert "differ in lr alone: &lt;b&gt;/s-lr0.05 (0.05)" in twin.read_text()
    assert "<b>/" not in page.read_text()
    assert "![" not in section_of(twin.read_text(), "Side by side")  # no file yet


def test_without_such_studies_nothing_is_side_by_side(page, twin):
    assert "ide by side" not in page
    assert "ide by side" not in twin


def test_data_sets_are_side_by_side_in_panels(tmp_path, cli):
    root = make_study(tmp_path / "<b>" / "one").parent
    make_study(root / "two", dataset="svhn", seeds=(0,))
    assert cli("plot", root, "--formats", "png").exit_code == 0
    page, twin = report.write_report(*store.find_studies(root), tmp_path / "out")
    text = twin.read_text()
    mine = section_of(text, "Side by side")
    assert "3. Side by side: studies that differ in data set\n" in text
    assert "alike but for the data set and what goes with it: one (shapes) and two (svhn).\n" in mine
    assert "- shapes: plain nets degrade (14 v 8 layers: +20.00 points); residual nets: undecided" in mine
    assert "- svhn: plain nets: undecided (14 v 8 layers: +20.00 points); residual nets: undecided" in mine
    (table,) = tables_of(mine)
    assert [row[:5] for row in table[1:3]] == [
        ["plain", "14 v 8", "shapes", "2", "+20.00"],
        ["plain", "14 v 8", "svhn", "1", "+20.00"],
    ]
    (link,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", mine)
    assert (tmp_path / "out" / unquote(link)).resolve() == root / "figures" / "data-sets-smoke.png"
    assert "**Figure 3.1. Training error v depth in each data set.**" in mine
    reader = Reader(page.read_text())
    assert [t for t in reader.tables if t != [["nets"]]] == tables_of(text)
    (alt,) = [image["alt"] for image in reader.all("img") if "each data set" in image["alt"]]
    assert ". svhn: plain 8 layers 30.00 %; plain 14 layers 50.00 %; residual 8 layers 30.00 %" in alt
    again = report.write_report(*store.find_studies(root), tmp_path / "again")
    assert [path.read_text() for path in again] == [page.read_text(), text]
    above = report.write_report(*store.find_studies(tmp_path), tmp_path / "above")  # they are <b>/one and <b>/two there
    assert "<b>/" not in above[0].read_text()


def test_a_command_is_quoted_for_the_shell(results):
    (command, other) = report.commands(store.Study.open(results / ODD))
    assert shlex.split(command)[-1] == shlex.split(other)[-1] == ODD
    (command,) = report.commands(store.Study.open(ROOT / "results" / "shapes-demo"))
    assert "--study" not in command  # it is the name that a sweep would give it


def test_escaped_text_means_itself_in_markdown():
    assert report.escaped("a|b*c_d`e<f>&g\n# h") == r"a\|b\*c\_d\`e&lt;f&gt;&amp;g \# h"


def test_neither_torch_nor_a_network_is_needed():
    code = "import sys, degrade.report; assert 'torch' not in sys.modules and 'selenium' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# In a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not both installed, so nothing looks at the report")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    folder = tmp_path_factory.mktemp("browser")
    quiet = ("disable-quic", "no-first-run", "disable-component-update", "disable-background-networking")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", *quiet, "disable-sync", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def opened(browser, written):
    browser.get(written[0].resolve().as_uri())
    return browser


@pytest.fixture
def shown(opened):
    """The page as it opens, 1280 pixels wide."""
    look(opened)
    return opened


def look(browser, width=1280, scheme="light", media="screen"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def film_of(browser, number=1):
    """What the film of a study shows: its parts, the table's numbers and where the means are drawn."""
    film = browser.find_elements("css selector", ".film")[number]
    table = [row.text for row in film.find_elements("css selector", "tbody tr")]
    drawn = [mean.get_attribute("transform") for mean in film.find_elements("css selector", ".mean")]
    parts = [film.find_element("css selector", name) for name in ("input", "button", "output", "svg")]
    return parts, table, drawn


class TestInABrowser:
    def test_it_opens_without_a_complaint_and_asks_for_nothing(self, shown):
        assert shown.get_log("browser") == []
        asked = shown.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in asked if not name.startswith("data:")] == []
        assert shown.title.startswith("The degradation problem: ")
        assert shown.execute_script("return document.documentElement.lang") == "en"
        loaded = "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
        assert shown.execute_script(loaded)

    def test_every_picture_has_a_name(self, shown):
        script = """return [...document.querySelectorAll("img, svg")].map(
            picture => picture.getAttribute("alt") || picture.getAttribute("aria-label"))"""
        names = shown.execute_script(script)
        assert len(names) == 12
        assert all(names)
        levels = shown.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))

    def test_the_slider_moves_the_drawing_by_keyboard(self, shown, results):
        from selenium.webdriver.common.keys import Keys

        rows = degrade.load(results)
        rows = rows[rows["study"] == "paper"]
        (slider, _, label, svg), table, drawn = film_of(shown)
        assert label.text == "epoch 6, step 64,000 of 64,000"
        slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
        (_, _, label, svg), moved, redrawn = film_of(shown)
        assert label.text == "epoch 2, step 21,333 of 64,000"
        for table_shown, epoch in ((table, 6), (moved, 2)):
            means = rows[rows["epoch"] == epoch].groupby(["block", "depth"])["train_error"].mean()
            assert table_shown == [
                f"{mark} {block} {100 * means[block, 20]:.2f} % {100 * means[block, 56]:.2f} %"
                for mark, block in (("■", "plain"), ("●", "residual"))
            ]
        assert len(redrawn) == 4
        assert all(a != b for a, b in zip(drawn, redrawn, strict=True))
        assert f"plain 56 layers {100 * means['plain', 56]:.2f} %" in svg.get_attribute("aria-label")
        assert slider.get_attribute("aria-valuetext") == "epoch 2, step 21,333"
        assert len(shown.find_elements("css selector", ".film .chance")) == 2
        slider.send_keys(Keys.END)

    def test_heights_are_in_proportion_to_errors(self, shown):
        """On the linear axis that these errors get: the means' heights v the numbers of the table."""
        _, table, drawn = film_of(shown)
        errors = [float(number) for row in table for number in re.findall(r"([\d.]+) %", row)]
        heights = [float(re.findall(r"[\d.]+", place)[1]) for place in drawn]
        slope = (heights[1] - heights[0]) / (errors[1] - errors[0])
        assert slope < 0
        expected = [heights[0] + slope * (error - errors[0]) for error in errors]
        assert heights == pytest.approx(expected, abs=0.5)

    def test_play_goes_to_the_end_and_pause_stops_it(self, shown):
        from selenium.webdriver.support.ui import WebDriverWait

        (slider, button, label, _), _, _ = film_of(shown)
        assert button.text == "Play"
        button.click()
        assert button.text == "Pause"
        WebDriverWait(shown, 5, 0.05).until(lambda _: slider.get_attribute("value") == "1")
        button.click()
        assert button.text == "Play"
        time.sleep(1)
        assert slider.get_attribute("value") == "1"
        button.click()
        WebDriverWait(shown, 10, 0.05).until(lambda _: button.text == "Play")
        assert label.text == "epoch 6, step 64,000 of 64,000"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_nothing_is_wider_than_a_phone(self, shown, scheme):
        look(shown, 360, scheme)
        width, room = shown.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert width <= room == 360
        for svg in shown.find_elements("css selector", ".film svg"):
            assert svg.size["width"] <= 360
            assert float(svg.get_dom_attribute("viewBox").split()[2]) <= 360  # so that its letters are not shrunk

    def test_dark_is_dark_and_both_can_be_read(self, shown):
        lightness = {}
        for scheme in ("light", "dark"):
            look(shown, scheme=scheme)
            lightness[scheme], worst = shown.execute_script(CONTRAST)
            assert worst[0] >= 4.5, worst
        assert lightness["dark"] < 0.1 < 0.8 < lightness["light"]

    def test_paper_is_white_and_has_no_controls(self, shown):
        look(shown, 700, "dark", "print")
        script = "return getComputedStyle(document.body).backgroundColor"
        assert shown.execute_script(script) == "rgb(255, 255, 255)"
        controls = shown.find_elements("css selector", "button, input, output")
        assert len(controls) == 6
        assert not any(control.is_displayed() for control in controls)
        script = """return [...document.images].every(image => image.getBoundingClientRect().right <= innerWidth)"""
        assert shown.execute_script(script)
        assert shown.execute_script("return document.querySelector('details table').checkVisibility()")
        assert base64.b64decode(shown.print_page()).startswith(b"%PDF")


# The lightness of the page, and the worst contrast of text with what is behind it (WCAG 2, relative luminance).
CONTRAST = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
let worst = [99, ""];
for (const element of document.querySelectorAll("body *:not(script):not(style):not(noscript)")) {
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  if (!element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ink = luminance(channels(element.namespaceURI.endsWith("svg") ? style.fill : style.color));
  const paper = luminance(behind(element));
  const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (contrast < worst[0]) worst = [contrast, element.outerHTML.slice(0, 100)];
}
return [luminance(behind(document.body)), worst];
"""


def timed(folder, *rows):
    """A study of one run whose timing.csv has these rows: (seconds, when it ended)."""
    run = write_run(folder, smoke(seed=len(list(folder.glob("*/config.json")))), [(0.5, 0.5)])
    lines = [f"{i},{i},{seconds},{ended}\n" for i, (seconds, ended) in enumerate(rows)]
    (run.folder / store.TIMING).write_text("epoch,step,seconds,ended\n" + "".join(lines))
    return store.Study.open(folder)


def test_the_wall_time_counts_what_ran_side_by_side_once_and_breaks_not_at_all(tmp_path):
    day = "2026-01-02T03:"
    timed(tmp_path, ("60.000", f"{day}01:00Z"), ("59.500", f"{day}02:00Z"))  # from 3:00:00, and no break
    study = timed(tmp_path, ("30.000", f"{day}01:30Z"), ("30.000", f"{day}10:00Z"))  # within; then after a break
    assert report.wall_time(study) == pytest.approx(150)
    times = dict(row[:2] for row in report._times(study))
    assert times == {
        "trained on (UTC)": "2026-01-02",
        "training time": "60 s to 2 min a run, 3 min summed over runs",
        "wall time": "2 min",
    }


@pytest.mark.parametrize("row", [("1.000", "2026-13-45T99:00:00Z"), ("999999999.9", "0001-01-01T00:00:00Z"), ("x", "")])
def test_a_damaged_timing_counts_for_nothing(tmp_path, row):
    study = timed(tmp_path, row)
    assert report.wall_time(study) == 0
    assert report._times(study) == []


def test_a_comparable_study_stands_among_the_published(written, page, tmp_path):
    """Of the paper's protocol alone: 30.5 % is far above whatever was published of ResNet-20."""
    text = "Beside the lowest and highest published"
    rows = next(table for table in tables_of(written[1].read_text()) if "here is" in table[0])
    assert text in page
    assert rows[3] == [
        "residual-20",
        "2",
        "30.50 / 32.50",
        "0.40 to 1.13 / 8.04 to 9.18",
        "29.37 above / 23.32 above",
    ]
    narrow = make_study(tmp_path / "narrow", depths=(20,), make=lambda *net, **_: RunConfig(**swept(*net), width=8))
    for path in report.write_report([store.Study.open(narrow)], [], tmp_path):
        assert text not in path.read_text()


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (0.0804, "among them"),
        (0.08045, "among them"),
        (0.0918, "among them"),
        (0.08, "0.04 below"),
        (0.1, "0.82 above"),
    ],
)
def test_where_an_error_lies(error, where):
    assert report._place(error, (0.0804, 0.0918)) == where
    assert report._place(error, None) == "-"
