import matplotlib
import numpy as np
import pytest
from conftest import smoke, write_run
from matplotlib.figure import Figure

import degrade
from degrade import paper, plots
from degrade.config import RunConfig


@pytest.fixture
def epochs(tmp_path):
    for block, rise in (("plain", 0.2), ("residual", 0.01)):
        for depth in (8, 14):
            for seed in (0, 1, 2):
                final = 0.4 + rise * (depth == 14) + 0.01 * seed
                write_run(tmp_path / "s", smoke(block, depth, seed), [(0.9, 0.95), (final, final + 0.05)])
    return degrade.load(tmp_path)


def lines(figure):
    return {line.get_label(): line for ax in figure.axes for line in ax.get_lines()}


def texts(figure):
    return " ".join([*(ax.get_title() for ax in figure.axes), *figure.get_suptitle().split()])


def test_the_four_figures(epochs):
    assert list(plots.figures(epochs)) == ["curves", "training-error", "test-error", "gap"]


@pytest.mark.parametrize(("name", "offset"), [("training-error", 0.0), ("test-error", 0.05)])
def test_what_is_drawn_is_the_mean_over_seeds(epochs, name, offset):
    drawn = lines(plots.figures(epochs)[name])
    np.testing.assert_allclose(drawn["plain"].get_xydata(), [[8, 0.41 + offset], [14, 0.61 + offset]])
    np.testing.assert_allclose(drawn["residual"].get_xydata(), [[8, 0.41 + offset], [14, 0.42 + offset]])


def test_the_gap_is_test_minus_train(epochs):
    np.testing.assert_allclose(lines(plots.figures(epochs)["gap"])["plain"].get_ydata(), [0.05, 0.05])


def test_every_seed_is_seen_and_the_band_spans_them(epochs):
    ax = plots.figures(epochs)["training-error"].axes[0]
    dots = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in dots) == 12
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.4, 0.62))


def test_the_curves_of_fig_6(epochs):
    figure = plots.figures(epochs)["curves"]
    plain, residual = figure.axes
    assert plain.get_title() == "plain nets"
    assert residual.get_title() == "residual nets"
    assert plain.get_ylim() == residual.get_ylim()
    bold = next(line for line in plain.get_lines() if line.get_label() == "14 layers")
    np.testing.assert_allclose(bold.get_xydata(), [[12, 0.95], [24, 0.66]])
    thin = [line for line in plain.get_lines() if line.get_linestyle() == "--"]
    assert any(np.allclose(line.get_ydata(), [0.9, 0.61]) for line in thin)
    milestones = {
        line.get_xdata()[0] for line in plain.get_lines() if line.get_linestyle() == ":" and len(line.get_xdata())
    }
    assert milestones == {12, 18}


def test_each_figure_names_its_measure_and_seeds(epochs):
    for name, figure in plots.figures(epochs).items():
        assert "3 seeds" in texts(figure)
        assert "shapes, protocol smoke: 24 steps width 4, 256 images, 3 seeds" in texts(figure)
        assert {"gap": "test error minus", "test-error": "test error"}.get(name, "raining error") in texts(figure)


def test_published_numbers_only_beside_the_papers_own_protocol(tmp_path, epochs):
    assert not any("He et al." in label for label in lines(plots.figures(epochs)["training-error"]))
    for depth, fields in ((20, {}), (56, {})):
        config = RunConfig(block="plain", depth=depth, seed=0, **fields)
        write_run(tmp_path / "p", config, [(0.5, 0.5), (0.02, 0.1)], protocol="paper")
    drawn = lines(plots.figures(degrade.load(tmp_path / "p"))["training-error"])
    published = {p.depth: p.train_error for p in paper.CIFAR10 if p.block == "plain"}
    np.testing.assert_allclose(drawn["plain, He et al. 2015"].get_xydata(), list(published.items()))
    config = RunConfig(block="plain", depth=20, seed=0, lr=0.05)
    write_run(tmp_path / "q", config, [(0.5, 0.5)], protocol="paper")
    figure = plots.figures(degrade.load(tmp_path / "q"))["training-error"]
    assert not any("He et al." in label for label in lines(figure))
    assert "protocol paper, changed" in texts(figure)


def test_published_numbers_beside_imported_runs_close_to_the_protocol_which_the_title_says(tmp_path):
    for folder, fields, imported in (
        ("trained", {"padding": "black"}, False),
        ("imported", {"padding": "black", "input_mean": (0.5, 0.5, 0.5)}, True),
    ):
        write_run(
            tmp_path / folder, RunConfig(block="plain", depth=20, seed=0, **fields), [(0.1, 0.1)], protocol="paper"
        )
        epochs = degrade.load(tmp_path / folder).assign(imported=imported)
        figure = plots.figures(epochs)["training-error"]
        assert ("plain, He et al. 2015" in lines(figure)) is imported
        assert "protocol paper, changed" in texts(figure)
        assert ("imported: trained elsewhere" in texts(figure)) is imported


def test_published_numbers_have_the_year_of_their_paper(tmp_path):
    for block in ("residual", "preact"):
        write_run(tmp_path / "p", RunConfig(block=block, depth=110, seed=0), [(0.1, 0.1)], protocol="paper")
    drawn = lines(plots.figures(degrade.load(tmp_path))["test-error"])
    assert [label for label in drawn if "He et al." in label] == ["residual, He et al. 2015", "preact, He et al. 2016"]
    np.testing.assert_allclose(drawn["preact, He et al. 2016"].get_xydata(), [[110, 0.0637]])


def test_runs_that_began_from_trained_weights_are_in_none_of_them(tmp_path):
    for depth in (8, 14):
        config = smoke(depth=depth, init="identity:plain-8-s0-01234567:0123456789ab")
        write_run(tmp_path / "s", config, [(0.3, 0.3), (0.2, 0.2)])
    assert plots.figures(degrade.load(tmp_path)) == {}


def test_diverged_runs_stand_at_chance(tmp_path):
    write_run(tmp_path / "s", smoke("plain", 8), [(0.5, 0.5)])
    write_run(tmp_path / "s", smoke("plain", 14), [(0.3, 0.3)], loss=float("nan"))
    drawn = lines(plots.figures(degrade.load(tmp_path))["training-error"])
    np.testing.assert_allclose(drawn["plain"].get_ydata(), [0.5, 0.9])


def test_a_diverged_seed_stays_in_the_curves_at_chance(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "s", smoke(seed=seed), [(0.8, 0.8), (0.4, 0.4), (0.2, 0.2)])
    run = write_run(tmp_path / "s", smoke(seed=2), [(0.8, 0.8), (0.6, 0.6), (0.6, 0.6)])
    log = run.folder / "log.csv"
    rows = log.read_text().splitlines(keepends=True)[:3]
    log.write_text("".join(rows[:2]) + rows[2].replace("1.0", "nan"))
    curve = lines(plots.figures(degrade.load(tmp_path))["curves"])["8 layers"]
    np.testing.assert_allclose(curve.get_xydata(), [[8, 0.8], [16, (0.4 + 0.4 + 0.9) / 3], [24, (0.2 + 0.2 + 0.9) / 3]])


def test_a_run_under_way_does_not_bend_the_mean_of_the_finished(tmp_path):
    write_run(tmp_path / "s", smoke(), [(0.8, 0.8), (0.4, 0.4)])
    run = write_run(tmp_path / "s", smoke(seed=1), [(0.2, 0.2), (0.2, 0.2)])
    log = run.folder / "log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    figure = plots.figures(degrade.load(tmp_path))["curves"]
    np.testing.assert_allclose(lines(figure)["8 layers"].get_ydata(), [0.8, 0.4])
    assert "1 seed" in texts(figure)


def test_errors_of_all_sizes_are_seen_at_once(tmp_path):
    for depth, error in ((20, 0.01), (56, 0.0004), (110, 0.85)):
        config = RunConfig(block="plain", depth=depth, seed=0)
        write_run(tmp_path / "p", config, [(0.9, 0.9), (error, error)], protocol="paper")
    for name, figure in plots.figures(degrade.load(tmp_path)).items():
        low, high = figure.axes[0].get_ylim()
        if name != "gap":
            assert figure.axes[0].get_yscale() == "log"
            assert 0 < low < 0.0004
            assert high > 0.9


def test_a_diverged_run_is_named(tmp_path):
    write_run(tmp_path / "s", smoke("plain", 8), [(0.5, 0.5)])
    write_run(tmp_path / "s", smoke("plain", 14), [(0.3, 0.3)], loss=float("nan"))
    for name, figure in plots.figures(degrade.load(tmp_path)).items():
        assert ("diverged, at chance: plain-14-s0" in texts(figure)) is (name != "gap")


def test_where_no_seed_is_finished_the_mean_ends_with_the_shortest(tmp_path):
    for seed, rows in ((0, 4), (1, 3)):
        run = write_run(tmp_path / "s", smoke(seed=seed), [(0.9, 0.9 - 0.2 * seed)] * 4)
        log = run.folder / "log.csv"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:rows]))
    curve = lines(plots.figures(degrade.load(tmp_path))["curves"])["8 layers"]
    np.testing.assert_allclose(curve.get_xydata(), [[6, 0.8], [12, 0.8]])


def test_one_block_alone_and_unfinished_runs(tmp_path):
    run = write_run(tmp_path / "s", smoke("residual", 8), [(0.5, 0.5), (0.4, 0.4)])
    log = run.folder / "log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert list(plots.figures(degrade.load(tmp_path))) == ["curves"]


def test_the_same_figure_is_the_same_bytes(epochs, tmp_path):
    before = dict(matplotlib.rcParams)
    for folder in ("one", "two"):
        for name, figure in plots.figures(epochs).items():
            paths = plots.save(figure, tmp_path / folder, name)
            assert [path.suffix for path in paths] == [".png", ".svg", ".pdf"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_plot_functions_take_and_return_axes(epochs):
    ax = Figure().add_subplot()
    assert plots.curves(ax, epochs, "plain") is ax
