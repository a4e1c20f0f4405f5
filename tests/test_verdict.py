import math

import numpy as np
import pandas as pd
import pytest
from conftest import smoke, write_run
from scipy import stats

import degrade
from degrade import store
from degrade.analysis.verdict import decide, deepest, interval, verdicts


def study(tmp_path, errors, steps=24, **kwargs):
    """`errors`: {(block, depth): [final training error a seed]}"""
    for (block, depth), finals in errors.items():
        for seed, error in enumerate(finals):
            write_run(tmp_path / "s", smoke(block, depth, seed, steps=steps), [(1.0, 1.0), (error, 0.5)], **kwargs)
    return {(v.block, v.shallow, v.deep): v for v in verdicts(degrade.load(tmp_path))}


def test_two_groups_give_welchs_interval():
    rng = np.random.default_rng(0)
    for n, m in ((2, 2), (3, 5), (10, 4)):
        a, b = rng.normal(0.3, 0.02, n), rng.normal(0.2, 0.08, m)
        reference = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        difference, low, high = interval([a, b], [1, -1])
        assert difference == pytest.approx(a.mean() - b.mean())
        assert (low, high) == pytest.approx(tuple(reference))


def test_the_contrasts_interval_covers_the_truth():
    """Four groups of three seeds: 95 % intervals hold the true difference of differences about 95 % of the time."""
    rng = np.random.default_rng(1)
    truth, held = 0.25 - 0.15 - (0.12 - 0.1), 0
    for _ in range(1000):
        groups = [rng.normal(mean, sd, 3) for mean, sd in ((0.25, 0.05), (0.15, 0.01), (0.12, 0.03), (0.1, 0.01))]
        _, low, high = interval(groups, [1, -1, -1, 1])
        held += low <= truth <= high
    assert 930 <= held <= 985


def test_equal_values_have_an_interval_of_no_width():
    assert interval([[0.5, 0.5], [0.25, 0.25]], [1, -1]) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.2, "degrades"),
        (0.0, 0.2, "undecided"),
        (-0.1, 0.005, "does not degrade"),
        (-0.1, 0.0051, "undecided"),
        (-0.3, -0.2, "does not degrade"),
        (None, None, "undecided"),
    ],
)
def test_the_rule(low, high, verdict):
    assert decide(low, high) == verdict


def test_degradation_is_found_and_its_absence(tmp_path):
    found = study(
        tmp_path,
        {
            ("plain", 8): [0.50, 0.51, 0.52],
            ("plain", 14): [0.60, 0.61, 0.62],
            ("residual", 8): [0.50, 0.501, 0.502],
            ("residual", 14): [0.40, 0.401, 0.402],
        },
    )
    assert set(found) == {("plain", 8, 14), ("residual", 8, 14), ("plain-residual", 8, 14)}
    plain, residual, contrast = found.values()
    assert (plain.verdict, residual.verdict, contrast.verdict) == ("degrades", "does not degrade", "degrades")
    assert plain.difference == pytest.approx(0.1)
    assert residual.difference == pytest.approx(-0.1)
    assert contrast.difference == pytest.approx(0.2)
    assert contrast.low < 0.2 < contrast.high
    assert plain.seeds == 3
    assert contrast.words == "plain degrades more"


def test_every_deeper_net_is_compared_with_the_shallowest(tmp_path):
    found = study(tmp_path, {("plain", d): [e] for d, e in ((8, 0.1), (14, 0.2), (20, 0.4))})
    assert {key: round(v.difference, 9) for key, v in found.items()} == {("plain", 8, 14): 0.1, ("plain", 8, 20): 0.3}


def test_one_seed_is_undecided_with_its_difference(tmp_path):
    v = study(tmp_path, {("plain", 8): [0.1], ("plain", 14): [0.9, 0.9]})["plain", 8, 14]
    assert v.verdict == "undecided"
    assert v.difference == pytest.approx(0.8)
    assert (v.low, v.high, v.seeds) == (None, None, 1)
    assert v.early


def test_what_is_said_first_is_the_deepest_comparison_that_has_an_interval(tmp_path):
    errors = {("plain", 8): [0.50, 0.51], ("plain", 14): [0.6, 0.61], ("plain", 20): [0.9]}
    found = study(tmp_path, errors | {("residual", 8): [0.5], ("residual", 14): [0.4], ("residual", 20): [0.3]})
    said = {v.block: v.deep for v in deepest(list(found.values()))}
    assert said == {"plain": 14, "residual": 20, "plain-residual": 20}
    assert list(said) == ["plain", "residual", "plain-residual"]


def test_a_full_length_study_is_not_called_early(tmp_path):
    v = study(tmp_path, {("plain", 8): [0.1], ("plain", 14): [0.9]}, steps=64_000)["plain", 8, 14]
    assert not v.early


def test_a_diverged_run_counts_as_chance_and_is_named(tmp_path):
    write_run(tmp_path / "s", smoke("plain", 14, 7), [(0.2, 0.2)], loss=math.nan)
    v = study(tmp_path, {("plain", 8): [0.1, 0.1], ("plain", 14): [0.5]})["plain", 8, 14]
    assert v.difference == pytest.approx((0.5 + 0.9) / 2 - 0.1)
    assert v.diverged == (smoke("plain", 14, 7).run_id,)


def test_where_every_shallow_run_diverged_nothing_can_degrade(tmp_path):
    for depth in (8, 14):
        for seed in (0, 1):
            write_run(tmp_path / "s", smoke("plain", depth, seed), [(0.2, 0.2)], loss=math.nan)
    (v,) = verdicts(degrade.load(tmp_path))
    assert (v.verdict, v.low, v.high) == ("undecided", None, None)
    assert len(v.diverged) == 4


def test_runs_under_way_do_not_count(tmp_path):
    config = smoke("plain", 14, 1)
    run = write_run(tmp_path / "s", config, [(0.2, 0.2), (0.1, 0.1)])
    log = run.folder / "log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    v = study(tmp_path, {("plain", 8): [0.1], ("plain", 14): [0.5]})["plain", 8, 14]
    assert v.difference == pytest.approx(0.4)


@pytest.mark.parametrize("folders", [("a", "b"), ("a/s", "b/s")])
def test_studies_are_never_mixed(tmp_path, folders):
    write_run(tmp_path / folders[0], smoke("plain", 8), [(0.1, 0.1)])
    write_run(tmp_path / folders[1], smoke("plain", 14, lr=0.5), [(0.9, 0.1)])
    assert verdicts(degrade.load(tmp_path)) == []


class TestFromTrainedWeights:
    """What `degrade identity` leaves: the deeper net, and the shallow one as its control."""

    @pytest.fixture
    def constructed(self, tmp_path):
        for depth, error in ((8, 0.2), (14, 0.7)):
            config = smoke(depth=depth, init="identity:plain-8-s0-01234567:0123456789ab")
            write_run(tmp_path / "c", config, [(0.3, 0.3), (error, 0.5)])
        return tmp_path / "c"

    def write(self, folder, **changes):
        source = {"study": "s", "run": "plain-8-s0-01234567", "weights": "0123456789ab"}
        record = {"source": source, "block": "plain", "shallow": 8, "deep": 14, "train": {"deep_error": 0.1}}
        (folder / store.IDENTITY).write_bytes(store.to_json(record | changes))

    def test_no_degradation_is_read_off_them(self, constructed):
        assert verdicts(degrade.load(constructed)) == []
        found = study(constructed.parent, {("plain", 8): [0.1], ("plain", 14): [0.5]})
        assert {v.study for v in found.values()} == {"s"}

    def test_a_line_says_what_was_found(self, constructed, cli):
        begun = cli("verdict", constructed)
        assert (begun.exit_code, begun.stdout) == (0, "c: begun from trained weights: see its identity.json\n")
        self.write(constructed, finding="It left the solution.")
        assert cli("verdict", constructed).stdout == "c: It left the solution.\n"
        assert cli("verdict", constructed, "--json").stdout == "[]\n"
        study(constructed.parent, {("plain", 8): [0.1], ("plain", 14): [0.5]})
        both = cli("verdict", constructed.parent).stdout.splitlines()
        assert both[:2] == ["c: It left the solution.", both[1]]
        assert both[1].startswith("s: final training error")

    def test_a_construction_without_a_run(self, tmp_path, cli):
        shared = smoke(init="identity:plain-8-s0-01234567:0123456789ab").shared()
        store.Study(tmp_path / "c", "c", "smoke", shared).create([])
        self.write(tmp_path / "c", finding="It is no worse.")
        for command in ("verdict", "show"):
            assert cli(command, tmp_path).exit_code == 0
        assert cli("verdict", tmp_path).stdout == "c: It is no worse.\n"
        study(tmp_path, {("plain", 8): [0.1], ("plain", 14): [0.5]})
        assert cli("plot", tmp_path, "--formats", "png").exit_code == 0
        assert "s: final training error" in cli("verdict", tmp_path).stdout

    @pytest.mark.parametrize("text", ["[]", "{", '{"source": [1]}', '{"source": {}}', '{"finding": 3}'])
    def test_a_damaged_record_is_named_and_left_out(self, constructed, cli, text):
        (constructed / store.IDENTITY).write_text(text)
        for command in (("verdict",), ("plot", "--formats", "png")):
            told = cli(*command, constructed)
            assert told.exit_code == 1
            assert f"left out: {constructed / store.IDENTITY} is not" in told.stderr
        assert not (constructed / store.FIGURES).exists()

    def test_only_the_figure_of_the_construction_is_drawn(self, constructed, cli):
        self.write(constructed)
        assert cli("plot", constructed, "--formats", "png").exit_code == 0
        assert [path.name for path in (constructed / store.FIGURES).iterdir()] == ["identity.png"]


def test_no_epoch_has_no_verdict():
    assert verdicts(pd.DataFrame()) == []


def test_records_are_plain(tmp_path):
    import json

    study(tmp_path, {("plain", 8): [0.1, 0.2], ("plain", 14): [0.9, 0.9]})
    (record,) = json.loads(json.dumps([v.as_dict() for v in verdicts(degrade.load(tmp_path))]))
    assert {"study", "block", "shallow", "deep", "seeds", "difference", "low", "high", "verdict"} <= set(record)
    assert isinstance(pd.DataFrame([record]).loc[0, "low"], float)
