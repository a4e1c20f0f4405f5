"""The runner of the probes: what it stores, that it takes up what was interrupted, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import micro

from degrade import commit, probe, store, sweep
from degrade.analysis.landscape import landscape_rows
from degrade.analysis.lesion import lesion_rows
from degrade.errors import Failure
from degrade.probe import Landscapes, Wish, choose, find_parts, fresh, probe_parts, with_points
from degrade.store import Run, Study
from degrade.train import Training, load_splits, read_state
from degrade.weights import recorded

CONFIGS = [micro("plain"), micro("residual")]
SLOW = 1e-3  # seconds a forward pass of one image takes, as far as these tests are concerned
WISH = Wish(points=3)


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A study of two runs, trained as a sweep trains them."""
    folder = tmp_path_factory.mktemp("trained") / "s"
    Study(folder, "s", "smoke", CONFIGS[0].shared()).create(CONFIGS)
    for config in CONFIGS:
        task = sweep.Task("s", folder / config.run_id, config, data_dir, threads=1, commit_seconds=0.0)
        for _ in sweep.train_run(task, "cpu"):
            pass
    return folder


@pytest.fixture
def study(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "results" / "s")
    return Study.open(tmp_path / "results" / "s", tmp_path / "results")


def asked(study, *probes, wish=WISH, seconds=SLOW):
    parts, left_out = find_parts(Study.open(study.folder), study.runs, probes, wish)
    assert not left_out
    return with_points(parts, wish, lambda config: seconds)


def finish(study, parts, data_dir):
    for _ in probe_parts(parts, data_dir, "cpu"):
        pass
    return files(study)


def files(study):
    folder = study.folder / "probes"
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != store.LOCK}


COLUMNS = {
    "responses": ["layer", "name", "stage", "std", "images"],
    "gradients": ["kind", "step", "layer", "name", "distance", "value", "relative", "images"],
    "lesion": ["deleted", "blocks", "changes_shape", "draw", "error", "loss", "images"],
    "landscape": ["dimension", "x", "y", "loss", "error", "images"],
    "bn": ["split", "statistics", "loss", "error", "images"],
}


def test_end_to_end(study, data_dir, cli):
    command = ["probe", study.folder.parent, "--points", "3", "--data-dir", data_dir, "--threads", "1"]
    first = cli(*command, "--formats", "svg")
    assert first.exit_code == 0, first.stderr
    for name, own in COLUMNS.items():
        table = pd.read_csv(study.folder / "probes" / f"{name}.csv")
        assert list(table.columns) == [*probe.FIRST, *own]
        counts = table.groupby("id").size()
        assert list(counts.index) == [config.run_id for config in CONFIGS]
        assert set(counts) == {asked(study, name)[0].rows}
        assert f"{name} plain-8-s0: {counts.iloc[0]} rows" in first.stdout
    figures = {path.stem for path in (study.folder / "figures").glob("*.svg")}
    assert figures == {*COLUMNS, "gradient-correlation", "landscape-line"}
    before = files(study)
    second = cli(*command, "--formats", "svg")
    assert second.exit_code == 0
    assert "About" not in second.stdout
    assert " rows" not in second.stdout
    assert files(study) == before


def test_a_table_keeps_the_rows_of_runs_whose_parts_are_not_here(study, data_dir):
    """As in a clone: tables are in git, the parts they were made of are not."""
    finish(study, asked(study, "responses"), data_dir)
    table = study.folder / "probes" / "responses.csv"
    before = table.read_bytes()
    shutil.rmtree(table.parent / "responses")
    one = [part for part in asked(study, "responses") if part.run.config.block == "plain"]
    finish(study, one, data_dir)
    assert table.read_bytes() == before


def test_a_table_keeps_the_rows_of_a_run_until_it_is_measured_anew(study, data_dir, monkeypatch):
    monkeypatch.setattr(probe, "COMMIT_SECONDS", -1.0)
    finish(study, asked(study, "responses"), data_dir)
    table = study.folder / "probes" / "responses.csv"
    before = table.read_text()
    retrain(study.runs[0], data_dir)
    (part, _) = asked(study, "responses")
    events = probe_parts([part], data_dir, "cpu")
    for _ in range(4):
        next(events)
    events.close()
    assert part.begun
    assert probe.table(study, "responses") == before
    finish(study, [part], data_dir)
    assert table.read_text() == probe.table(study, "responses") != before
    assert part.path.read_text() in table.read_text()
    assert table.read_text().count("\n") == before.count("\n")


def test_what_was_measured_with_other_settings_is_kept(study, data_dir, cli):
    def command(*arguments):
        shown = ["probe", study.folder, "--data-dir", data_dir, "--threads", "1", "--formats", "svg", *arguments]
        result = cli(*shown)
        assert result.exit_code == 0, result.stderr
        return " ".join(result.stdout.split())

    lesion = ("--probes", "lesion", "--images", "5")
    landscape = ("--probes", "landscape", "--images", "5", "--points", "5")
    first = command("--probes", "lesion,landscape", "--points", "3")
    assert "--again" not in first
    before = files(study)
    kept = command(*lesion)
    both = "plain-8-s0, residual-8-s0: measured with"
    assert f"lesion {both} 10 images already; --again measures them anew" in kept
    assert "About" not in kept
    kept = command(*landscape)
    assert f"landscape {both} 20 images and 3 x 3 points already; --again measures them anew" in kept
    assert files(study) == before
    kept = command(*lesion, "--blocks", "residual")
    assert "lesion residual-8-s0: measured with 10 images already; --again measures it anew" in kept
    assert "already" not in command(*lesion, *landscape, "--again", "--dry-run")
    assert files(study) == before
    assert "already" not in command(*lesion, "--blocks", "residual", "--again")
    counts = pd.read_csv(study.folder / "probes" / "lesion.csv").groupby("block")["images"].unique()
    assert {block: list(images) for block, images in counts.items()} == {"plain": [10], "residual": [5]}
    before = files(study)
    command(*lesion, "--blocks", "residual", "--again")  # as asked for already
    assert files(study) == before


def test_only_whole_measurements_of_the_same_weights_are_kept(study, data_dir, monkeypatch):
    finish(study, asked(study, "responses"), data_dir)
    plain, residual = asked(study, "responses", wish=Wish(images=5))
    assert plain.otherwise.asked["images"] == 20
    assert plain.otherwise.done
    retrain(study.runs[0], data_dir)
    residual.path.write_text(residual.path.read_text()[:-5])
    parts = asked(study, "responses", wish=Wish(images=5))
    assert probe.keep(parts) == (parts, [])
    finish(study, parts, data_dir)
    monkeypatch.setattr(probe, "__version__", "0.0.0")
    parts = asked(study, "responses")
    assert probe.keep(parts) == (parts, [])


@pytest.mark.parametrize("damage", ["nothing\n1\n", "", "block,depth,seed,id,init\nplain,8,0,plain-8-s0,0\n"])
def test_a_damaged_table_stops_no_other_figure(study, data_dir, cli, tmp_path, damage):
    finish(study, asked(study, "responses", "lesion"), data_dir)
    shutil.copytree(study.folder, tmp_path / "results" / "t")
    (study.folder / "probes" / "odd.csv").write_text("a,b\n1,2\n")
    table = study.folder / "probes" / "lesion.csv"
    table.write_text(damage)
    result = cli("plot", tmp_path / "results", "--formats", "svg")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"degrade: left out: {table} is not a table of degrade probe's (")
    assert "odd.csv" not in result.stderr
    drawn = {p.relative_to(tmp_path / "results").as_posix() for p in (tmp_path / "results").rglob("*.svg")}
    assert {"s/figures/responses.svg", "t/figures/responses.svg", "t/figures/lesion.svg"} <= drawn
    assert "s/figures/lesion.svg" not in drawn
    shutil.rmtree(study.folder / "figures")
    command = ["probe", study.folder, "--probes", "responses", "--data-dir", data_dir, "--threads", "1"]
    result = cli(*command, "--formats", "svg")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"degrade: left out: {table} is not a table")
    assert (study.folder / "figures" / "responses.svg").exists()


def test_weights_that_change_after_the_plan_was_made_are_not_measured_for_the_others(study, data_dir):
    parts = asked(study, "responses")
    run = parts[0].run
    (last, *_) = commit.checkpoints(run.folder / store.CHECKPOINTS)
    training = Training(run.config, load_splits(run.config, data_dir, "cpu"))
    training.restore(last.read_bytes())
    with torch.no_grad():
        training.net.linear.bias += 1
    last.unlink()
    commit.write_checkpoint(last.parent, training.step, training.state(), epochs=len(training.epochs))
    with pytest.raises(Failure, match="its weights have changed since the plan was made"):
        finish(study, parts, data_dir)
    assert not (study.folder / "probes" / "responses.csv").exists()


def test_check_looks_at_what_was_probed(study, data_dir, cli):
    finish(study, asked(study, "responses", "bn"), data_dir)
    folder = study.folder / "probes"
    table, part = folder / "responses.csv", next((folder / "responses").glob("plain-*.csv"))
    told = cli("check", study.folder)
    assert (told.exit_code, "nothing wrong" in told.stdout) == (0, True), told
    for path, text, problem in (
        (table, "", "the header is not degrade's"),
        (table, table.read_text().replace("plain,8,0", "plain,8,1", 1), "row 1 is not degrade's"),
        (table, table.read_text() + "junk", "is not degrade's"),
        (table, table.read_text()[:-1], "is not degrade's"),
        (table, table.read_text().replace(",conv,0,", ",conv,1,"), f"is not of its part {part.stem}; degrade probe"),
        (part, part.read_text()[:-1], "is not what was measured; degrade probe measures it anew"),
        (part.with_suffix(".json"), "[]", "is not a JSON object; degrade probe measures it anew"),
    ):
        before = path.read_bytes()
        path.write_text(text)
        told = cli("check", study.folder)
        assert told.exit_code == 1, problem
        assert f"{path}\n" in told.stdout
        assert problem in told.stdout
        with commit.hold(folder / store.LOCK):  # who probes writes one after the other
            assert cli("check", study.folder).exit_code == 0
        path.write_bytes(before)
    table.write_text("".join(line for line in table.read_text().splitlines(keepends=True) if "plain-" not in line))
    assert cli("check", study.folder).exit_code == 1
    shutil.rmtree(study.folder / CONFIGS[0].run_id)  # whose rows are no part of the table any more
    assert cli("check", study.folder).exit_code == 0
    shutil.rmtree(folder / "responses")  # parts stay out of git
    assert cli("check", study.folder).exit_code == 0


def test_what_is_measured(study, data_dir):
    run = study.runs[0]
    (last, *others) = commit.checkpoints(run.folder / store.CHECKPOINTS)
    for other in others:
        other.unlink()
    training = Training(run.config, load_splits(run.config, data_dir, "cpu"))
    training.update()
    commit.keep_checkpoint(last.parent, 1, training.state())  # as a slow machine leaves
    assert [step for step, _ in recorded(run)] == [1, 6]
    finish(study, asked(study), data_dir)
    steps = set(pd.read_csv(study.folder / "probes" / "gradients.csv")["step"])
    assert steps == {0, 6}
    for path in commit.checkpoints(run.folder / store.CHECKPOINTS):  # as a sweep with --snapshots keeps them
        state = read_state(path.read_bytes())
        commit.make_folder(run.folder / store.SNAPSHOTS)
        commit.keep_checkpoint(run.folder / store.SNAPSHOTS, state.step, path.read_bytes(), epochs=len(state.epochs))
    (part,) = [part for part in asked(study, "gradients") if part.run.folder == run.folder]
    assert list(part.asked["weights"]) == ["0", "1", "6"]
    log = {run.folder.name: run.epochs[-1] for run in study.runs}
    lesions = pd.read_csv(study.folder / "probes" / "lesion.csv")
    for row in lesions[lesions["deleted"] == 0].itertuples():
        assert (row.error, row.images) == (pytest.approx(log[row.id].test_error), 10)
    bn = pd.read_csv(study.folder / "probes" / "bn.csv")
    for row in bn[(bn["split"] == "train") & (bn["statistics"] == "running")].itertuples():
        assert (row.error, row.loss) == (pytest.approx(log[row.id].train_error), pytest.approx(log[row.id].train_loss))
    there = pd.read_csv(study.folder / "probes" / "landscape.csv")
    for row in there[(there["x"] == 0) & (there["y"] == 0)].itertuples():
        assert row.loss == pytest.approx(log[row.id].train_loss)
    assert set(there.groupby(["id", "dimension"]).size()) == {7, 9}


def test_interrupted_after_any_row_it_ends_with_the_same_bytes(study, data_dir, monkeypatch):
    parts = asked(study, "lesion", "landscape")
    whole = finish(study, parts, data_dir)
    shutil.rmtree(study.folder / "probes")
    monkeypatch.setattr(probe, "COMMIT_SECONDS", -1.0)
    records, skips = probe.records, []
    monkeypatch.setattr(probe, "records", lambda part, splits, skip: skips.append(skip) or records(part, splits, skip))
    for _ in range(sum(part.rows + 2 for part in parts)):
        events = probe_parts(parts, data_dir, "cpu")
        for _ in range(2):
            next(events, None)  # a row more than there was
        events.close()
    assert finish(study, parts, data_dir) == whole
    assert set(skips) == set(range(max(part.rows for part in parts)))


KILLED = """
import os, signal, sys
from pathlib import Path
from degrade import probe
from degrade.store import Study
probe.COMMIT_SECONDS = -1.0
study = Study.open(Path(sys.argv[1]))
wish = probe.Wish(points=3)
parts, _ = probe.find_parts(study, study.runs, ["landscape"], wish)
for part, rows in probe.probe_parts(probe.with_points(parts, wish, lambda config: 1e-3), Path(sys.argv[2]), "cpu"):
    if rows == 11:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_a_landscape(study, data_dir):
    parts = asked(study, "landscape")
    whole = finish(study, parts, data_dir)
    shutil.rmtree(study.folder / "probes")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, study.folder, data_dir], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert parts[0].begun.count("\n") == 1 + 11
    assert finish(study, parts, data_dir) == whole


@pytest.mark.parametrize("damage", ["weights", "csv", "json", "cut", "version", "images"])
def test_what_the_rows_depend_on_is_measured_anew(study, data_dir, damage, monkeypatch):
    (part, other) = asked(study, "responses")
    before = finish(study, [part, other], data_dir)
    assert part.done
    wish = WISH
    if damage == "weights":
        retrain(study.runs[0], data_dir)
    elif damage == "csv":
        part.path.write_text(part.path.read_text().replace("0.", "1.", 1))
    elif damage == "json":
        part.path.with_suffix(".json").write_text("{")
    elif damage == "cut":
        part.path.write_text(part.path.read_text()[:-5])
    elif damage == "version":
        monkeypatch.setattr(probe, "__version__", "0.0.0")
    else:
        wish = Wish(images=5, points=3)
    again = asked(study, "responses", wish=wish)
    assert [p.done for p in again] == [False, damage not in ("version", "images")]
    after = finish(study, again, data_dir)
    changed = damage in ("weights", "images")
    assert (
        after[part.path.relative_to(study.folder / "probes")] != before[part.path.relative_to(study.folder / "probes")]
    ) == changed
    assert all(p.done for p in again)


def retrain(run: Run, data_dir):
    """Other weights of the same run."""
    (newest, *_) = paths = commit.checkpoints(run.folder / store.CHECKPOINTS)
    training = Training(run.config, load_splits(run.config, data_dir, "cpu"))
    training.restore(newest.read_bytes())
    with torch.no_grad():
        training.net.conv.weight.mul_(2)
        training.net.stages[0][0].bn1.weight.mul_(3)
    for path in paths:
        path.unlink()
    commit.write_checkpoint(newest.parent, training.step, training.state(), epochs=len(training.epochs))


def test_rows_of_other_weights_are_never_gone_on_with(study, data_dir, monkeypatch):
    monkeypatch.setattr(probe, "COMMIT_SECONDS", -1.0)
    (part, _) = asked(study, "lesion")
    events = probe_parts([part], data_dir, "cpu")
    for _ in range(4):
        next(events)
    events.close()
    assert part.begun
    retrain(study.runs[0], data_dir)
    (part, _) = asked(study, "lesion")
    assert not part.begun
    finish(study, [part], data_dir)
    assert len(pd.read_csv(part.path)) == part.rows == lesion_rows(3)


@pytest.mark.parametrize(
    ("passes", "most", "points", "choice"),
    [
        (10**9, 1000, None, (25, 1000)),
        (26**2 * 300, 1000, None, (25, 300)),
        (26**2 * 100, 1000, None, (25, 100)),
        (26**2 * 99, 1000, None, (23, 116)),
        (100 * 10**2, 1000, None, (9, 100)),
        (1, 1000, None, (5, 100)),
        (1, 20, None, (5, 20)),
        (26**2 * 50, 50, None, (25, 50)),
        (4**2 * 200, 1000, 3, (3, 200)),
        (1, 1000, 51, (51, 100)),
    ],
)
def test_what_a_budget_buys(passes, most, points, choice):
    assert choose(passes, most, points) == choice
    side = choice[0]
    assert (side + 1) ** 2 == landscape_rows(side, 2) + landscape_rows(2 * side + 1, 1)


def test_the_budget_is_for_all_landscapes_together(study):
    wish = Wish(budget=2 * 26**2 * 15 * SLOW)  # of two nets, 15 images each
    assert {(p.asked["points"], p.asked["images"]) for p in asked(study, "landscape", wish=wish)} == {(21, 20)}


def test_a_choice_is_kept_whatever_the_timings_are_later(study, data_dir):
    wish = Wish(budget=1.0)
    parts = asked(study, "landscape", wish=wish, seconds=1e-3)
    next(probe_parts(parts, data_dir, "cpu"))
    for seconds in (1e-5, 1.0):
        assert asked(study, "landscape", wish=wish, seconds=seconds) == parts
    other = asked(study, "landscape", wish=Wish(budget=100.0), seconds=1e-3)
    assert Landscapes(other[0].asked["points"], other[0].asked["images"]) == (25, 20)


@pytest.mark.parametrize("init", ["he", "zero-gamma"])
def test_a_fresh_net_is_the_one_that_training_starts_from(data_dir, init):
    config = micro("residual", seed=3, init=init)
    training = Training(config, load_splits(config, data_dir, "cpu"))
    mine = fresh(config, torch.zeros(3, 32, 32)).net.state_dict()
    theirs = training.net.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_at_init_needs_no_weights(study, data_dir, cli):
    for folder in study.folder.glob("*/checkpoints"):
        shutil.rmtree(folder)
    command = ["probe", study.folder, "--at-init", "--data-dir", data_dir, "--points", "3", "--formats", "svg"]
    result = cli(*command, "--threads", "1", "--probes", "responses,landscape")
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(study.folder / "probes" / "responses.csv")
    assert set(table["init"]) == {1}
    assert (study.folder / "figures" / "responses-at-init.svg").exists()
    assert sorted(p.name for p in (study.folder / "probes" / "responses").glob("*.csv")) == [
        f"{config.run_id}.init.csv" for config in CONFIGS
    ]
    there = json.loads((study.folder / "probes" / "responses" / f"{CONFIGS[0].run_id}.init.json").read_text())
    assert list(there["weights"]) == ["0"]


def test_runs_without_weights_are_named_and_left_out(study, data_dir, cli):
    shutil.rmtree(study.runs[0].folder / "checkpoints")
    command = ["probe", study.folder, "--probes", "responses", "--data-dir", data_dir, "--threads", "1"]
    result = cli(*command, "--formats", "svg")
    assert result.exit_code == 1
    assert f"left out: {study.runs[0].folder} has no weights" in result.stderr
    assert set(pd.read_csv(study.folder / "probes" / "responses.csv")["block"]) == {"residual"}
    shutil.rmtree(study.runs[1].folder / "checkpoints")
    result = cli(*command)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "has no weights" in result.stderr


def test_a_dry_run_writes_nothing(study, cli, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = cli("probe", study.folder, "--dry-run", "--data-dir", tmp_path / "nowhere", "--budget", "1s")
    assert result.exit_code == 0
    assert {name for name in probe.PROBES if name in result.stdout} == {*probe.PROBES} - {"ten-crop"}
    assert re.search(r" \d+x\d+ ", result.stdout)
    assert "About" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["--probes", "lesions"],
            2,
            "--probes must be of responses, gradients, lesion, landscape, bn, ten-crop; got 'lesions'",
        ),
        (["--probes", "bn,,lesion"], 2, "--probes must be separated by commas"),
        (["--at-init", "--probes", "lesion"], 2, "lesion needs trained nets"),
        (["--budget", "10"], 2, "--budget must be like 90s, 10m or 2h; got '10'"),
        (["--budget", "0s"], 2, "--budget must be like 90s, 10m or 2h; got '0s'"),
        (["--points", "4"], 2, "points must be odd"),
        (["--points", "1001"], 2, "points must be at most 999; got 1001"),
        (["--images", "0"], 2, "--images"),
        (["--formats", "gif"], 2, "--formats must be of png, svg, pdf; got 'gif'"),
        (["--depths", "a"], 2, "--depths must be whole numbers"),
        (["--depths", "20"], 2, "holds no such run"),
        (["--device", "abacus"], 2, "device must be"),
        (["--threads", "0"], 2, "threads must be"),
    ],
)
def test_bad_input_is_one_line(study, cli, tmp_path, arguments, code, line):
    before = sorted(tmp_path.rglob("*"))
    result = cli("probe", study.folder, *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
    assert line in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_two_at_once(study, data_dir, cli):
    commit.make_folder(study.folder / "probes")
    with commit.hold(study.folder / "probes" / store.LOCK):
        result = cli("probe", study.folder, "--probes", "responses", "--data-dir", data_dir, "--threads", "1")
    assert result.exit_code == 1
    assert f"{study.folder / 'probes'} is held by process {os.getpid()}" in result.stderr


def test_help_needs_no_torch():
    code = (
        "import atexit, sys; sys.argv = ['degrade', 'probe', '--help']; from degrade.cli import main;"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--budget" in printed
    assert printed.endswith("False\n")
