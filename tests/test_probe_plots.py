import re
from itertools import product

import numpy as np
import pandas as pd
import pytest

from degrade import plots, probe_plots

ABOUT = "a study: shapes, protocol smoke, width 4"
NETS = {
    "one run": [("plain", 8, 0)],
    "two blocks, two depths, three seeds": [*product(("plain", "residual"), (8, 14), (0, 1, 2))],
    "pre-activation too": [*product(("plain", "residual", "preact"), (8,), (0,))],
    "a net is missing": [("plain", 8, 0), ("residual", 14, 0), ("residual", 14, 1)],
}
TITLES = {
    "responses": "Responses: std of each layer's output",
    "gradients": "Gradient of the training loss in each weight layer",
    "gradient-correlation": "Correlation of input gradients",
    "lesion": "test error of trained nets without one block",
    "landscape": "Loss landscape: on a plane",
    "landscape-line": "Loss landscape: along one",
    "bn": "Error with the statistics of BN",
}


def own(probe, depth, seed):
    """Rows of one net, as `degrade probe` stores them."""
    if probe == "responses":
        n = (depth - 2) // 3
        return [
            {"layer": i, "name": f"c{i}", "stage": -(-i // n), "std": 1 + (i * 7 + seed) % 5} for i in range(depth - 1)
        ]
    if probe == "gradients":
        norms = [
            {"kind": "norm", "step": step, "layer": i, "value": 10.0 ** (i % 3), "relative": 1.0}
            for step in (0, 20, 24)
            for i in range(depth)
        ]
        return norms + [
            {"kind": "correlation", "step": step, "distance": d, "value": 1 / (1 + d * depth) + step / 100}
            for step in (0, 20, 24)
            for d in (0.01, 0.1)
        ]
    if probe == "lesion":
        rows = [{"deleted": 0, "blocks": "", "changes_shape": 0, "draw": 0, "error": 0.1}]
        n = (depth - 2) // 2
        rows += [
            {
                "deleted": 1,
                "blocks": str(i),
                "changes_shape": int(i in (n // 3, 2 * n // 3)),
                "draw": 0,
                "error": 0.2 + 0.01 * i,
            }
            for i in range(n)
        ]
        return rows + [
            {"deleted": 2, "blocks": "0+2", "changes_shape": 0, "draw": draw, "error": 0.4 + 0.1 * draw}
            for draw in (0, 1)
        ]
    if probe == "landscape":
        plane = [(2, x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)]
        line = [(1, x / 3, 0.0) for x in range(-3, 4)]
        return [
            {"dimension": n, "x": x, "y": y, "loss": 0.1 + x * x + 9 * y * y, "error": 0.3} for n, x, y in line + plane
        ]
    return [
        {"split": split, "statistics": statistics, "error": error}
        for split, statistics, error in (
            ("train", "running", 0.04),
            ("train", "recalibrated", 0.02),
            ("test", "running", 0.09),
            ("test", "recalibrated", 0.08),
        )
    ]


def table(probe, nets, init=0):
    return pd.DataFrame(
        [
            {"block": block, "depth": depth, "seed": seed, "id": f"{block}-{depth}-s{seed}", "init": init, "images": 64}
            | row
            for block, depth, seed in nets
            for row in own(probe, depth, seed)
        ]
    )


def drawn(probe, nets=NETS["two blocks, two depths, three seeds"]):
    return probe_plots.figures(probe, table(probe, nets), ABOUT)


@pytest.mark.parametrize("nets", NETS)
@pytest.mark.parametrize("probe", ["responses", "gradients", "lesion", "landscape", "bn"])
def test_figures_of_any_nets(tmp_path, probe, nets):
    figures = drawn(probe, NETS[nets])
    extra = {"gradients": {"gradient-correlation"}, "landscape": {"landscape-line"}}
    assert set(figures) == {probe} | extra.get(probe, set())
    for name, figure in figures.items():
        title = figure.get_suptitle().replace("\n", " ")
        assert TITLES[name] in title
        assert ABOUT in title
        words = title + " ".join(ax.get_xlabel() for ax in figure.axes)
        assert "64 images" in words
        assert ("1 seed" if nets in ("one run", "pre-activation too") else "seeds") in title
        (path,) = plots.save(figure, tmp_path, name, ["svg"])
        assert path.stat().st_size > 5000
        assert not re.search(r"[> ]nan[< ]", path.read_text())


def test_the_colours_are_those_of_the_other_figures():
    for probe in ("gradients", "lesion", "landscape", "bn"):
        for name, figure in drawn(probe, NETS["pre-activation too"]).items():
            if name != "landscape":
                used = {line.get_color() for ax in figure.axes for line in ax.get_lines()}
                assert set(plots.COLOURS.values()) <= used, name


def test_responses_are_drawn_in_order_and_by_size():
    figure = drawn("responses")["responses"]
    plain, residual, plain_ranked, residual_ranked = figure.axes
    assert [plain.get_title(), residual.get_title()] == ["plain nets", "residual nets"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    (eight, *_) = plain.get_lines()
    np.testing.assert_allclose(
        eight.get_ydata(), np.mean([[1 + (i * 7 + s) % 5 for i in range(7)] for s in range(3)], 0)
    )
    (ranked, *_) = plain_ranked.get_lines()
    assert list(ranked.get_ydata()) == sorted(ranked.get_ydata(), reverse=True)
    stages = [line for line in plain.get_lines() if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in stages] == [[3, 5], [5, 9]]
    assert residual_ranked.get_xlabel() == "layer, largest first"


def test_gradients_are_those_of_the_first_and_the_last_step():
    figure = drawn("gradients")["gradient-correlation"]
    fresh, trained = figure.axes[0], figure.axes[2]
    assert fresh.get_ylabel() == "freshly initialised\ncorrelation"
    assert trained.get_ylabel() == "trained\ncorrelation"
    np.testing.assert_allclose(fresh.get_lines()[0].get_ydata(), [1 / 1.08, 1 / 1.14])
    np.testing.assert_allclose(trained.get_lines()[0].get_ydata(), [1 / 1.08 + 0.24, 1 / 1.14 + 0.24])


def test_fresh_nets_measured_twice_are_drawn_once():
    nets = [("plain", 8, 0), ("plain", 14, 0)]
    again = table("gradients", nets, init=1)
    rows = pd.concat([table("gradients", nets), again[again["step"] == 0]])
    figure = probe_plots.figures("gradients", rows, ABOUT)["gradient-correlation"]
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), [1 / 1.08, 1 / 1.14])


def test_lesions_mark_the_intact_error_and_the_blocks_that_change_the_shape():
    single, several = drawn("lesion")["lesion"].axes[:2]
    intact = [line.get_ydata()[0] for line in single.get_lines() if line.get_linestyle() == "--"]
    assert intact == pytest.approx([0.1, 0.1])
    left = {round(patch.get_x() + patch.get_width() / 2) for patch in single.patches}
    assert left == {1, 2}
    np.testing.assert_allclose(several.get_lines()[0].get_xydata(), [[0, 0.1], [1, 0.21], [2, 0.45]])
    assert single.yaxis.get_major_formatter()(0.2) == "20%"


def test_a_landscape_has_one_scale_and_survives_infinity():
    rows = table("landscape", NETS["two blocks, two depths, three seeds"])
    rows.loc[(rows["x"] == 1) & (rows["y"] == 1), "loss"] = np.inf
    figure = probe_plots.figures("landscape", rows, ABOUT)["landscape"]
    limits = {
        collection.get_clim()
        for ax in figure.axes[:4]
        for collection in ax.collections
        if collection.get_array() is not None
    }
    assert {ax.get_title() for ax in figure.axes[:4]} == {
        f"{b}, {d} layers" for b in ("plain", "residual") for d in (8, 14)
    }
    filled = max(limits)
    assert len(limits) == 2  # the contours' and the lines'
    assert filled == pytest.approx((-1, np.log10(10.1)))
    figure.canvas.draw()


def test_fresh_nets_have_figures_of_their_own():
    rows = pd.concat([table("responses", NETS["one run"]), table("responses", NETS["one run"], init=1)])
    figures = probe_plots.figures("responses", rows, ABOUT)
    assert list(figures) == ["responses", "responses-at-init"]
    assert "fresh initialisations" in figures["responses-at-init"].get_suptitle().replace("\n", " ")
    assert "fresh" not in figures["responses"].get_suptitle()


def test_bn_joins_the_two_errors_of_a_net():
    train, test = drawn("bn")["bn"].axes
    assert list(train.get_lines()[0].get_xdata()) == pytest.approx([0.04, 0.02])
    assert list(test.get_lines()[0].get_xdata()) == pytest.approx([0.09, 0.08])
    assert [label.get_text() for label in train.get_yticklabels()] == [
        "plain-8",
        "plain-14",
        "residual-8",
        "residual-14",
    ]
