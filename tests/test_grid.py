"""`sweep --grid`, and studies that differ in one field side by side: `plot`, `verdict`."""

import json
import math
from itertools import product

import numpy as np
import pytest
from conftest import smoke, write_run

import degrade
from degrade import bench, plots, store
from degrade.analysis.verdict import Grid, best_verdicts, grid_verdicts, grids
from degrade.config import RunConfig
from degrade.terminal import best_lines

SMALL = ("--width", "1", "--train-images", "20", "--test-images", "10", "--batch-size", "10", "--milestones", "3")
MICRO = {"width": 1, "train_images": 20, "test_images": 10, "batch_size": 10, "milestones": (3,), "steps": 6}


@pytest.fixture
def sweep(cli, tmp_path, data_dir, monkeypatch):
    """`degrade sweep` of plain-8 on `shapes`, into results/, with nothing timed."""
    monkeypatch.setattr(bench, "estimate", lambda configs, _: {config.run_id: 60.0 for config in configs})
    base = ["--dataset", "shapes", "--protocol", "smoke", "--depths", "8", "--blocks", "plain", "--jobs", "1"]
    base += ["--threads", "1", "--out", tmp_path / "results", "--data-dir", data_dir]
    return lambda *arguments: cli("sweep", *base, *arguments)


def studies(tmp_path):
    found, damaged = store.find_studies(tmp_path / "results")
    assert not damaged
    return {study.name: study for study in found}


class TestSweep:
    def test_a_study_for_each_value_one_after_the_other(self, sweep, tmp_path):
        result = sweep("--grid", "lr=0.1,0.02", "--study", "s", *SMALL, "--steps", "6")
        assert result.exit_code == 0, result
        there = studies(tmp_path)
        assert {name: study.shared["lr"] for name, study in there.items()} == {"s-lr0.1": 0.1, "s-lr0.02": 0.02}
        for study in there.values():
            assert [run.status for run in study.runs] == ["done"]
            assert study.runs[0].config == smoke(**MICRO | {"lr": study.shared["lr"]})
        assert "In all about 2 min, the 2 studies one after the other" in result.stdout
        assert result.stdout.count("done") >= 2
        assert f"Next: degrade plot {tmp_path / 'results'};" in result.stdout

    def test_the_same_command_goes_on(self, sweep, tmp_path):
        arguments = (*SMALL, "--steps", "6", "--study", "s")
        assert sweep("--grid", "lr=0.1", *arguments).exit_code == 0
        before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.*") if path.is_file()}
        result = sweep("--grid", "lr=0.1,0.05", *arguments)
        assert result.exit_code == 0
        first, second, *_ = [line for line in result.stdout.splitlines() if " to train" in line]
        assert first.endswith("s-lr0.1: 1 run, 0 to train")
        assert second.endswith("s-lr0.05: 1 run, 1 to train")
        assert {path: path.read_bytes() for path in before} == before
        assert set(studies(tmp_path)) == {"s-lr0.1", "s-lr0.05"}

    def test_a_study_that_diverges_does_not_keep_the_next_from_training(self, sweep, tmp_path):
        result = sweep("--grid", "lr=1e30,0.02", *SMALL, "--steps", "6", "--study", "s")
        assert result.exit_code == 1
        assert result.stderr == "degrade: 1 of 2 runs not done (diverged)\n"
        assert [study.runs[0].status for study in studies(tmp_path).values()] == ["done", "diverged"]

    def test_the_product_of_several_and_the_default_names(self, sweep, tmp_path):
        """A value of the protocol's own is the protocol's own study, not another of the same."""
        result = sweep("--grid", "lr=0.02,0.1", "--grid", "weight-decay=0.0001,0", "--dry-run")
        assert result.exit_code == 0
        for name, fields in (
            ("shapes-smoke", {}),
            ("shapes-smoke-weightdecay0.0", {"weight_decay": 0.0}),
            ("shapes-smoke-lr0.1", {"lr": 0.1}),
            ("shapes-smoke-lr0.1-weightdecay0.0", {"lr": 0.1, "weight_decay": 0.0}),
        ):
            assert f"Study {tmp_path / 'results' / name}: 1 run, 1 to train\n" in result.stdout
            assert smoke(**fields).run_id in result.stdout
        assert "the 4 studies one after the other" in result.stdout
        assert not (tmp_path / "results").exists()

    def test_milestones_go_with_the_steps(self, sweep):
        result = sweep("--grid", "steps=24,72", "--dry-run")
        assert smoke(steps=72, milestones=(36, 54)).run_id in result.stdout

    def test_a_grid_over_data_sets(self, cli, tmp_path):
        spec = tmp_path / "spec.toml"
        spec.write_text(
            'depths = [8]\nblocks = ["plain"]\nprotocol = "smoke"\ngrid = {dataset = ["shapes", "cifar10"]}'
        )
        result = cli("sweep", spec, "--dry-run", "--device", "cpu", "--out", tmp_path / "r")
        for dataset in ("shapes", "cifar10"):
            assert f"{dataset}-smoke: 1 run" in result.stdout
            assert smoke(dataset=dataset).run_id in result.stdout

    @pytest.mark.parametrize(
        ("text", "flags", "expected"),
        [
            ("[grid]\nlr = [0.1, 0.5]", [], [{"lr": 0.1}, {"lr": 0.5}]),
            ("[grid]\nlr = [0.1, 0.5]", ["--grid", "lr=1"], [{"lr": 1.0}]),
            ("[grid]\nlr = [0.1, 0.5]", ["--lr", "0.3"], [{"lr": 0.3}]),
            ("lr = 0.3", ["--grid", "lr=0.1,0.5"], [{"lr": 0.1}, {"lr": 0.5}]),
            ("[grid]\nlr = [0.1]\nwidth = [2, 3]", ["--grid", "width=5"], [{"lr": 0.1, "width": 5}]),
            ("[grid]\nbatch-size = [4]", ["--grid", "split_seed=1"], [{"batch_size": 4, "split_seed": 1}]),
            ("[grid]\nmilestones = [[3], [3, 6]]", [], [{"milestones": (3,)}, {"milestones": (3, 6)}]),
            ('[grid]\ninit = ["he", "zero-gamma"]', [], [{}, {"init": "zero-gamma"}]),
        ],
    )
    def test_a_file_has_a_grid_and_flags_win_field_by_field(self, sweep, tmp_path, text, flags, expected):
        spec = tmp_path / "spec.toml"
        spec.write_text(text)
        result = sweep(spec, *flags, "--dry-run")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.count("Study ") == len(expected)
        for fields in expected:
            assert smoke(**fields).run_id in result.stdout

    def test_another_protocol_in_one_of_them_is_refused_before_anything_is_written(self, sweep, tmp_path):
        write_run(tmp_path / "results" / "s-lr0.05", smoke(lr=0.5), [])
        result = sweep("--grid", "lr=0.1,0.05", "--study", "s")
        assert result.exit_code == 2
        assert "study s-lr0.05 was run with another protocol: lr 0.5 there, 0.05 here" in result.stderr
        assert set(studies(tmp_path)) == {"s-lr0.05"}

    def test_what_trains_alike_is_timed_once(self, sweep, monkeypatch):
        timed = []

        def estimate(configs, _):
            timed.append([(config.width, config.lr) for config in configs])
            return {config.run_id: 60.0 for config in configs}

        monkeypatch.setattr(bench, "estimate", estimate)
        sweep("--grid", "lr=0.1,0.2", "--grid", "width=2,3", "--dry-run")
        assert sorted(map(sorted, timed)) == [[(2, 0.1), (2, 0.2)], [(3, 0.1), (3, 0.2)]]


def test_a_grid_of_folders_of_images(cli, tmp_path, monkeypatch):
    """They are called what the folders are; two of one name are refused before anything is trained."""
    monkeypatch.setattr(bench, "estimate", lambda configs, _: {config.run_id: 60.0 for config in configs})
    one, other = (f"folder:flowers:40+20:2:32:0123456789a{digit}" for digit in "bc")
    base = ["sweep", "--protocol", "smoke", "--depths", "8", *SMALL, "--out", tmp_path / "results", "--dry-run"]
    result = cli(*base, "--grid", f"dataset=shapes,{one}", "--study", "s")
    assert result.exit_code == 0, result
    assert "s-datasetflowers" in result.stdout
    for named in ([], ["--study", "s"]):
        result = cli(*base, "--grid", f"dataset={one},{other}", *named)
        refused(result, "two studies of the grid would be called ", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "lr"], "--grid must be a field and its values, such as lr=0.1,0.05; got 'lr'"),
        (["--grid", ""], "--grid must be a field and its values"),
        (["--grid", "=1"], "a grid is over fields of the protocol (dataset, width, "),
        (["--grid", "nesterov=1"], "a grid is over fields of the protocol (dataset, width, "),
        (["--grid", "lr="], "--grid lr must be separated by commas, with nothing empty and no space; got ''"),
        (["--grid", "lr=0.1,,0.2"], "--grid lr must be separated by commas, with nothing empty"),
        (["--grid", "lr=0.1,fast"], "lr must be a number; got 'fast'"),
        (["--grid", "lr=0.1,nan"], "lr must be a finite number of at least 0; got nan"),
        (["--grid", "width=2,0"], "width must be at least 1; got 0"),
        (["--grid", "width=2.5"], "width must be a whole number; got '2.5'"),
        (["--grid", "init=he,she"], "init must be one of he, zero-gamma; got 'she'"),
        (["--grid", "lr=0.1,0.10"], "the grid's lr must be distinct values; got 0.1 twice"),
        (["--grid", "lr=0.1", "--grid", "lr=0.2"], "--grid has lr twice; name all of its values in one"),
        (["--grid", "lr=0.1", "--lr", "0.2"], "lr is in the grid and has a value besides; choose one of them"),
        (["--grid", "depth=8,14"], "depth cannot be in a grid, since one study holds several: --depths"),
        (["--grid", "blocks=plain"], "blocks cannot be in a grid, since one study holds several: --blocks"),
        (["--grid", "seed=0,1"], "seed cannot be in a grid, since one study holds several: --seeds"),
        (
            ["--grid", "milestones=3,6"],
            "--grid cannot have milestones, whose values are lists; a TOML file's [grid] can",
        ),
        (["--grid", f"split_seed={','.join(map(str, range(101)))}"], "a grid must make at most 100 studies; got 101"),
        (["--grid", "lr=0.1", "--study", "../up"], "a study's name must be up to 100 of"),
    ],
)
def test_bad_grids_on_the_command_line(sweep, tmp_path, arguments, message):
    refused(sweep(*arguments), message, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = 3", "grid must be a table of fields and their values; got 3"),
        ("[grid]\nlr = 0.1", "the grid's lr must be a list of values, not empty; got 0.1"),
        ("[grid]\nlr = []", "the grid's lr must be a list of values, not empty; got []"),
        ("[grid]\nlr = [1, 1.0]", "the grid's lr must be distinct values; got 1.0 twice"),
        ("[grid]\nlr = [true]", "lr must be a number; got True"),
        ("[grid]\ndepths = [8]", "depths cannot be in a grid, since one study holds several: --depths"),
        ("[grid]\nnesterov = [1]", "a grid is over fields of the protocol"),
        ("lr = 0.1\n[grid]\nlr = [0.1]", "lr is in the grid and has a value besides"),
        ("[grid]\nmilestones = [3]", "milestones must be a list of whole numbers; got 3"),
    ],
)
def test_bad_grids_in_a_file(sweep, tmp_path, text, message):
    spec = tmp_path / "spec.toml"
    spec.write_text(text)
    refused(sweep(spec), message, tmp_path)


def refused(result, message, tmp_path):
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not (tmp_path / "results").exists()


def write_study(folder, finals, **fields):
    """`finals`: {(block, depth): [final training error a seed]}"""
    for (block, depth), errors in finals.items():
        for seed, error in enumerate(errors):
            write_run(folder, smoke(block, depth, seed, **fields), [(0.9, 0.9), (error, error + 0.05)])


@pytest.fixture
def mistuned(tmp_path):
    """plain-8 is best at lr 0.1, plain-14 at 0.05, and still worse there."""
    for lr, shallow, deep in ((0.1, 0.30, 0.70), (0.05, 0.35, 0.45), (0.02, 0.40, 0.60)):
        finals = {("plain", 8): [shallow, shallow + 0.01], ("plain", 14): [deep, deep + 0.01]}
        write_study(tmp_path / f"s-lr{lr}", finals, lr=lr)
    return tmp_path


def shared(**fields):
    return RunConfig(block="plain", depth=8, seed=0, **{"dataset": "shapes"} | fields).shared()


class TestGrids:
    def test_studies_that_differ_in_one_field(self):
        found = grids({"b": shared(lr=0.1), "a": shared(lr=0.02), "c": shared(lr=0.05)})
        assert found == [Grid("lr", {"a": 0.02, "c": 0.05, "b": 0.1})]
        assert list(found[0].values) == ["a", "c", "b"]

    def test_in_several_fields_they_make_none(self):
        assert grids({"a": shared(), "b": shared(lr=0.2, width=8)}) == []

    def test_two_data_sets_make_none(self):
        assert grids({"a": shared(), "b": shared(dataset="cifar10")}) == []

    def test_two_folders_make_none(self):
        assert grids({"x/a": shared(), "y/b": shared(lr=0.2)}) == []
        assert grids({"x/a": shared(), "x/b": shared(lr=0.2)}) == [Grid("lr", {"x/a": 0.1, "x/b": 0.2})]

    def test_nor_two_studies_of_the_same(self):
        assert grids({"a": shared(), "b": shared()}) == []
        assert grids({"a": shared(), "b": shared(), "c": shared(lr=0.2)}) == []

    def test_one_study_may_be_in_several(self):
        found = grids({"base": shared(), "lr": shared(lr=0.2), "init": shared(init="zero-gamma")})
        assert found == [
            Grid("init", {"base": "he", "init": "zero-gamma"}),
            Grid("lr", {"base": 0.1, "lr": 0.2}),
        ]

    def test_of_a_product_each_line(self):
        found = grids({f"{lr}-{w}": shared(lr=lr, width=w) for lr, w in product((0.1, 0.2), (2, 4))})
        assert [(grid.field, list(grid.values)) for grid in found] == [
            ("width", ["0.1-2", "0.1-4"]),
            ("width", ["0.2-2", "0.2-4"]),
            ("lr", ["0.1-2", "0.2-2"]),
            ("lr", ["0.1-4", "0.2-4"]),
        ]

    def test_milestones_in_proportion_go_with_the_steps(self):
        base = shared(steps=100, milestones=(50, 75))
        longer = shared(steps=300, milestones=(150, 225))
        assert grids({"a": longer, "b": base}) == [Grid("steps", {"b": 100, "a": 300})]
        assert grids({"a": shared(steps=300, milestones=(10,)), "b": base}) == []
        other = shared(steps=100, milestones=(10,))
        assert grids({"a": other, "b": base}) == [Grid("milestones", {"a": [10], "b": [50, 75]})]

    def test_nor_those_that_began_from_trained_weights(self):
        one, other = (f"identity:plain-8-s{seed}-01234567:0123456789ab" for seed in (0, 1))
        assert grids({"a": shared(init=one), "b": shared(init=other), "c": shared()}) == []
        assert grids({"a": shared(init=one), "b": shared(init=one, lr=0.7)}) == []

    def test_all_images_are_the_most(self):
        (found,) = grids({"a": shared(), "b": shared(train_images=500)})
        assert list(found.values.items()) == [("b", 500), ("a", None)]


LRS = Grid("lr", {"s-lr0.02": 0.02, "s-lr0.05": 0.05, "s-lr0.1": 0.1})


class TestBest:
    def test_each_value_and_best_against_best(self, mistuned):
        epochs = degrade.load(mistuned)
        each = grid_verdicts(epochs, LRS)
        assert [(v.value, round(v.difference, 9)) for v in each] == [(0.02, 0.2), (0.05, 0.1), (0.1, 0.4)]
        (best,) = best_verdicts(epochs, LRS)
        assert best.best == {"plain-14": 0.05, "plain-8": 0.1}
        assert best.difference == pytest.approx(0.15)
        assert best.low < 0.15 < best.high
        assert (best.verdict, best.seeds, best.study) == ("degrades", 2, "s-lr0.05, s-lr0.1")
        assert {v.field for v in [*each, best]} == {"lr"}

    def test_the_mean_chooses_and_not_the_luckiest_seed(self, tmp_path):
        write_study(tmp_path / "s-lr0.02", {("plain", 8): [0.1, 0.1], ("plain", 14): [0.05, 0.55]}, lr=0.02)
        write_study(tmp_path / "s-lr0.1", {("plain", 8): [0.2, 0.2], ("plain", 14): [0.25, 0.27]}, lr=0.1)
        (best,) = best_verdicts(degrade.load(tmp_path), Grid("lr", {"s-lr0.02": 0.02, "s-lr0.1": 0.1}))
        assert best.best == {"plain-14": 0.1, "plain-8": 0.02}
        assert best.difference == pytest.approx(0.16)

    def test_a_diverged_run_counts_at_chance(self, mistuned):
        config = smoke("plain", 14, 2, lr=0.05)
        write_run(mistuned / "s-lr0.05", config, [(0.2, 0.2)], loss=math.nan)
        (best,) = best_verdicts(degrade.load(mistuned), LRS)  # 0.45, 0.46, 0.9: now worse than at 0.02 on average
        assert best.best == {"plain-14": 0.05, "plain-8": 0.1}
        assert best.diverged == (config.run_id,)
        assert best.difference == pytest.approx((0.45 + 0.46 + 0.9) / 3 - 0.305)

    def test_the_contrast_is_of_the_best_too(self, mistuned):
        for lr, error in ((0.05, 0.3), (0.1, 0.2)):
            write_study(mistuned / f"s-lr{lr}", {("residual", d): [error, error + 0.01] for d in (8, 14)}, lr=lr)
        found = {v.block: v for v in best_verdicts(degrade.load(mistuned), LRS)}
        assert found["residual"].difference == pytest.approx(0)
        contrast = found["plain-residual"]
        assert contrast.best == {"plain-14": 0.05, "plain-8": 0.1, "residual-14": 0.1, "residual-8": 0.1}
        assert contrast.difference == pytest.approx(0.15)

    def test_nothing_finished_is_nothing_to_compare(self, tmp_path):
        for lr in (0.02, 0.1):
            run = write_run(tmp_path / f"s-lr{lr}", smoke(lr=lr), [(0.5, 0.5), (0.4, 0.4)])
            log = run.folder / "log.csv"
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        grid = Grid("lr", {"s-lr0.02": 0.02, "s-lr0.1": 0.1})
        assert best_verdicts(degrade.load(tmp_path), grid) == grid_verdicts(degrade.load(tmp_path), grid) == []
        assert plots.draw_grid(degrade.load(tmp_path), grid) is None

    def test_what_is_said_of_them(self, mistuned):
        lines = best_lines(best_verdicts(degrade.load(mistuned), LRS), LRS)
        assert lines == [
            "even with the best lr of each depth, plain-14 (lr 0.05) is 15.00 points above plain-8 (lr 0.1)",
            "these best are chosen on the runs compared, which the intervals do not allow for",
            "lr 0.1, the highest tried, is the best of plain-8: one beyond it may be better still",
        ]
        write_study(mistuned / "s-lr0.1", {("plain", 14): [0.295, 0.275]}, lr=0.1)
        line = best_lines(best_verdicts(degrade.load(mistuned), LRS), LRS)[0]
        assert line == (
            "with the best lr of each depth, plain-14 (lr 0.1) is 2.00 points below plain-8 (lr 0.1): undecided"
        )


class TestSideBySide:
    def test_verdict(self, cli, mistuned):
        write_study(mistuned / "other", {("plain", 8): [0.5], ("plain", 14): [0.6]}, lr=0.7, width=2)
        output = cli("verdict", mistuned).stdout
        assert "other: final training error" in output
        assert "lr in s-lr0.02, s-lr0.05, s-lr0.1: final training error" in output
        rows = [line.split()[4:6] for line in output.splitlines() if line.startswith("plain ")]
        assert rows[1:] == [["0.02", "+20.00"], ["0.05", "+10.00"], ["0.1", "+40.00"], ["best", "+15.00"]]
        assert "even with the best lr of each depth" in output
        assert "s-lr0.05: final" not in output
        assert output.count("early in training: 24 steps") == 2

    def test_the_table_fits_80_columns(self, cli, tmp_path):
        nets = list(product(("plain", "residual"), (8, 110)))
        for init, rise in (("he", 0.4), ("zero-gamma", 0.001)):
            finals = {(b, d): [0.2, 0.7] if d == 110 and rise > 0.1 else [0.2, 0.2 + rise] for b, d in nets}
            write_study(tmp_path / init, finals, init=init)
        lines = cli("verdict", tmp_path).stdout.splitlines()
        table = [line for line in lines if line.startswith(("nets", "plain", "residual"))]
        assert len(table) == 10
        assert all("…" not in line and len(line) <= 80 for line in table), table

    def test_json(self, cli, mistuned):
        records = json.loads(cli("verdict", mistuned, "--json").stdout)
        assert [(r["field"], r["value"], r["best"]) for r in records] == [
            ("lr", 0.02, None),
            ("lr", 0.05, None),
            ("lr", 0.1, None),
            ("lr", None, {"plain-14": 0.05, "plain-8": 0.1}),
        ]
        (alone,) = json.loads(cli("verdict", mistuned / "s-lr0.1", "--json").stdout)
        assert (alone["field"], alone["value"], alone["best"]) == (None, None, None)

    def test_steps_of_all_lengths_are_named(self, cli, tmp_path):
        for steps in (24, 72):
            finals = {("plain", 8): [0.3, 0.31], ("plain", 14): [0.4, 0.41]}
            write_study(tmp_path / str(steps), finals, steps=steps, milestones=(steps // 2, steps * 3 // 4))
        output = cli("verdict", tmp_path).stdout
        assert "early in training: 24 to 72 steps" in output
        assert "steps in 24, 72: final" in output

    def test_the_figure(self, mistuned):
        figure = plots.draw_grid(degrade.load(mistuned), LRS)
        left, right = figure.axes
        assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.02", "0.05", "0.1"]
        for ax, offset in ((left, 0), (right, 0.05)):
            drawn = {line.get_label(): line for line in ax.get_lines()}
            for net, errors in (("plain-8", [0.40, 0.35, 0.30]), ("plain-14", [0.60, 0.45, 0.70])):
                np.testing.assert_allclose(drawn[net].get_ydata(), np.array(errors) + 0.005 + offset)
                assert np.round(drawn[net].get_xdata()).tolist() == [0, 1, 2]
            rings = [line for line in ax.get_lines() if line.get_markersize() == 13 and len(line.get_xdata())]
            assert [(round(r.get_xdata()[0]), round(r.get_ydata()[0] - offset, 3)) for r in rings] == [
                (2, 0.305),
                (1, 0.455),
            ]
        assert left.get_ylim() == right.get_ylim()
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["plain-8", "plain-14", "best of a net,\nby training error", "one seed"]
        assert "shapes, protocol smoke: 24 steps\nwidth 4, 256 images, 2 seeds" in figure.get_suptitle()

    def test_the_field_itself_is_not_in_the_title(self, tmp_path):
        for steps in (24, 72):
            write_study(tmp_path / str(steps), {("plain", 8): [0.3]}, steps=steps)
        title = plots.draw_grid(degrade.load(tmp_path), Grid("steps", {"24": 24, "72": 72})).get_suptitle()
        assert title == "Final errors v steps\nshapes, protocol smoke\nwidth 4, 256 images, 1 seed"

    def test_a_diverged_run_is_named_with_its_study(self, mistuned):
        write_run(mistuned / "s-lr0.1", smoke("plain", 14, 2, lr=0.1), [(0.2, 0.2)], loss=math.nan)
        title = plots.draw_grid(degrade.load(mistuned), LRS).get_suptitle()
        assert title.endswith("diverged, at chance: plain-14-s2 of s-lr0.1")

    def test_plot(self, cli, mistuned):
        result = cli("plot", mistuned, "--formats", "png")
        assert result.exit_code == 0
        assert str(mistuned / "figures" / "grid-lr.png") in result.stdout
        assert [path.name for path in (mistuned / "figures").iterdir()] == ["grid-lr.png"]
        cli("plot", mistuned, "--formats", "svg", "--out", mistuned / "out")
        assert (mistuned / "out" / "grid-lr.svg").stat().st_size > 1000

    def test_two_grids_over_one_field_are_two_figures(self, cli, mistuned):
        for lr in (0.02, 0.1):
            write_study(mistuned / f"wide-lr{lr}", {("plain", 8): [0.3]}, lr=lr, width=8)
        cli("plot", mistuned, "--formats", "png")
        drawn = {path.name for path in (mistuned / "figures").iterdir()}
        assert {"grid-lr-s-lr0.02.png", "grid-lr-wide-lr0.02.png"} < drawn
        assert sum("width" in name for name in drawn) == 2  # at either lr

    def test_where_several_fields_differ_there_is_none(self, cli, tmp_path):
        write_study(tmp_path / "one", {("plain", 8): [0.3]})
        write_study(tmp_path / "other", {("plain", 8): [0.3]}, lr=0.7, width=8)
        assert cli("plot", tmp_path, "--formats", "png").exit_code == 0
        assert not (tmp_path / "figures").exists()

    def test_studies_alone_are_left_as_they_were(self, cli, mistuned):
        cli("plot", mistuned / "s-lr0.1", "--formats", "png")
        assert not [path for path in (mistuned / "s-lr0.1" / "figures").iterdir() if "grid" in path.name]
