import matplotlib
import numpy as np
import pytest
from conftest import smoke, write_run
from matplotlib.figure import Figure

import degrade
from degrade import paper, plots, store
from degrade.analysis.verdict import Grid, data_sets_of
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


@pytest.mark.parametrize("scale", [0.0005, 0.003, 0.011, 0.05, 0.3])
def test_the_ticks_of_the_gap_say_where_they_are(epochs, scale):
    epochs["test_error"] = epochs["train_error"] + scale * (epochs["depth"] / epochs["depth"].max() - 0.4)
    figure = plots.figures(epochs)["gap"]
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    for position, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
        written = float(label.get_text().removesuffix("%").replace("\N{MINUS SIGN}", "-")) / 100
        assert written == pytest.approx(position, abs=1e-9)


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


def test_the_last_training_error_of_imported_runs_is_no_point_of_their_logs_curve(epochs):
    figure = plots.figures(epochs.assign(imported=True))["curves"]
    plain, _ = figure.axes
    thin = [line for line in plain.get_lines() if line.get_linestyle() == "--"]
    assert any(np.allclose(line.get_xydata(), [[12, 0.9]]) for line in thin if len(line.get_xdata()))
    alone = [line for line in plain.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert any(np.allclose(line.get_xydata(), [[24, 0.61]]) for line in alone)
    assert "measured here" in texts(figure)
    bold = next(line for line in plain.get_lines() if line.get_label() == "14 layers")
    assert len(bold.get_xdata()) == 2


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


@pytest.mark.parametrize("shallow", [0.5, 0.001])  # on a linear axis and a logarithmic one
def test_a_net_at_chance_does_not_cover_the_word(tmp_path, shallow):
    write_run(tmp_path / "s", smoke("plain", 8), [(shallow, shallow)])
    write_run(tmp_path / "s", smoke("plain", 14), [(0.9, 0.9)])
    figure = plots.figures(degrade.load(tmp_path))["training-error"]
    figure.draw_without_rendering()
    (word,) = (text for text in figure.axes[0].texts if text.get_text() == "chance")
    line = lines(figure)["plain"]
    _, marker = line.get_transform().transform(line.get_xydata()[-1])
    half = (line.get_markersize() / 2 + line.get_markeredgewidth()) * figure.dpi / 72
    assert marker + half < word.get_window_extent().y0
    assert word.get_window_extent().y1 < figure.axes[0].get_window_extent().y1


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


FLOWERS = "folder:flowers:200+90:7:64:0123456789ab"


def write_study(folder, dataset, finals=((8, 0.2), (14, 0.3)), *, seeds=2, **fields):
    """Plain nets with these (depth, final training error); each seed a hundredth above the one before."""
    if dataset.startswith(("folder:", "imagenet:")):  # which has fewer images than the protocol takes
        fields |= {"train_images": None, "test_images": None}
    for depth, error in finals:
        for seed in range(seeds):
            write_run(folder, smoke("plain", depth, seed, dataset=dataset, **fields), [(error + 0.01 * seed, 0.9)])


def data_sets(folder):
    """Of each figure: the data sets, by the studies that stand for them."""
    return {name: grid.values for name, grid in data_sets_of(store.find_studies(folder)[0]).items()}


class TestDataSets:
    def test_a_panel_a_data_set_with_its_lines_and_verdict(self, tmp_path):
        write_study(tmp_path / "a", "shapes", [(8, 0.2), (14, 0.6)])
        write_study(tmp_path / "b", "cifar10", [(8, 0.01), (14, 0.005), (20, 0.0)], seeds=3)
        assert data_sets(tmp_path) == {"data-sets-smoke": {"b": "cifar10", "a": "shapes"}}
        figure = plots.draw_data_sets(degrade.load(tmp_path), Grid("dataset", {"b": "cifar10", "a": "shapes"}))
        left, right = figure.axes
        assert (left.get_title(), right.get_title()) == ("cifar10", "shapes")
        for ax, points in ((left, [[8, 0.02], [14, 0.015], [20, 0.01]]), (right, [[8, 0.205], [14, 0.605]])):
            drawn = {line.get_label(): line for line in ax.get_lines()}
            np.testing.assert_allclose(drawn["plain"].get_xydata(), points)
        assert left.get_xlabel().splitlines()[1:] == ["plain 20 v 8: undecided (-1.00 points)"]
        assert right.get_xlabel().splitlines()[1:] == ["plain 14 v 8: degrades (+40.00 points)"]
        assert left.get_ylim()[1] < 0.05 < right.get_ylim()[1]
        figure.draw_without_rendering()
        assert all(tick.get_text().endswith("%") for ax in figure.axes for tick in ax.get_yticklabels())
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["plain", "one seed", "lowest to highest seed"]
        title = figure.get_suptitle()
        assert title.endswith("v depth\n2 data sets, protocol smoke: 24 steps\nwidth 4, 256 images, 2 to 3 seeds")

    def test_one_data_set_makes_none_however_many_studies(self, tmp_path):
        write_study(tmp_path / "a", "shapes")
        write_study(tmp_path / "b", "shapes")
        write_study(tmp_path / "c", "shapes", train_images=100)
        assert data_sets(tmp_path) == {}

    def test_protocols_are_not_mixed(self, tmp_path):
        write_study(tmp_path / "a", "shapes")
        write_study(tmp_path / "b", "cifar10", lr=0.5)
        assert data_sets(tmp_path) == {}
        write_study(tmp_path / "c", "svhn")
        write_study(tmp_path / "d", "mnist", lr=0.5)
        assert data_sets(tmp_path) == {
            "data-sets-smoke-a": {"a": "shapes", "c": "svhn"},
            "data-sets-smoke-b": {"b": "cifar10", "d": "mnist"},
        }
        (tmp_path / "other").mkdir()
        (tmp_path / "c").rename(tmp_path / "other" / "c")
        assert data_sets(tmp_path) == {"data-sets-smoke": {"b": "cifar10", "d": "mnist"}}

    def test_nor_are_the_nets_of_imagenet_with_others(self, tmp_path):
        write_study(tmp_path / "a", "shapes")
        write_study(tmp_path / "b", "imagenet:some:200+90:7:64:0123456789ab", [(18, 0.2), (34, 0.3)])
        assert data_sets(tmp_path) == {}

    def test_a_protocol_that_differs_in_all_of_them_is_said_to_be_changed(self, tmp_path):
        for name, dataset in (("a", "cifar10"), ("b", "shapes")):
            write_study(tmp_path / name, dataset, lr=0.5)
        title = plots.draw_data_sets(degrade.load(tmp_path), Grid("dataset", data_sets(tmp_path)["data-sets-smoke"]))
        assert "2 data sets, protocol smoke, changed: 24 steps" in title.get_suptitle()

    def test_who_stands_for_a_data_set(self, tmp_path):
        """The protocol itself, then most finished runs, then the first by name."""
        write_study(tmp_path / "a", "shapes", seeds=3, train_images=100)
        write_study(tmp_path / "b", "shapes", seeds=1)
        write_study(tmp_path / "c", "shapes", seeds=2)
        write_study(tmp_path / "d", "shapes", seeds=2)
        write_study(tmp_path / "e", "svhn")
        assert data_sets(tmp_path) == {"data-sets-smoke": {"c": "shapes", "e": "svhn"}}

    def test_what_goes_with_a_data_set_may_differ_and_the_panels_say_it(self, tmp_path):
        write_study(tmp_path / "a", "shapes", train_images=100)
        write_study(tmp_path / "b", "svhn")
        write_study(tmp_path / "c", FLOWERS)
        grid = Grid("dataset", data_sets(tmp_path)["data-sets-smoke"])
        figure = plots.draw_data_sets(degrade.load(tmp_path), grid)
        assert [ax.get_title().replace("\n", ": ") for ax in figure.axes] == [
            "flowers: protocol smoke, all images",
            "shapes: protocol smoke, changed, 100 images",
            "svhn: protocol smoke, 256 images",
        ]
        assert "3 data sets, protocol smoke: 24 steps\nwidth 4, 2 seeds" in figure.get_suptitle()

    def test_imported_begun_from_trained_weights_or_unfinished_studies_stand_for_none(self, tmp_path):
        write_study(tmp_path / "a", "shapes")
        for name, dataset in (("b", "svhn"), ("e", "cifar100")):
            write_study(tmp_path / name, dataset, init="identity:plain-8-s0-01234567:0123456789ab")
        write_study(tmp_path / "c", "mnist")
        values = store.read_json(tmp_path / "c" / store.STUDY) | {"imported": True}
        (tmp_path / "c" / store.STUDY).write_bytes(store.to_json(values))
        run = write_run(tmp_path / "d", smoke(dataset="cifar10"), [(0.5, 0.5), (0.4, 0.4)])
        log = run.folder / "log.csv"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        assert data_sets(tmp_path) == {}

    def test_folders_of_one_name_are_told_apart(self, tmp_path):
        for name, dataset in (("a", FLOWERS), ("b", FLOWERS.replace("0123", "ffff")), ("c", "shapes")):
            write_study(tmp_path / name, dataset)
        (values,) = data_sets(tmp_path).values()
        assert values == {"a": "flowers 0123456789ab", "b": "flowers ffff456789ab", "c": "shapes"}

    def test_eight_panels_fit(self, tmp_path):
        names = ["cifar10", "cifar100", "fashion-mnist", "mnist", "shapes", "svhn", FLOWERS]
        names.append("folder:a-name-that-is-as-long-as-names-may-be..:900+90:200:32:0123456789ab")
        for name in names:
            write_study(tmp_path / name[:10], name, [(8, 0.2), (14, 0.1)])
            known = store.Study.open(tmp_path / name[:10])
            config = RunConfig(block="plain", depth=110, seed=0, **known.shared)
            write_run(known.folder, config, [(0.2, 0.2)], loss=float("nan"))
        (grid,) = data_sets_of(store.find_studies(tmp_path)[0]).values()
        figure = plots.draw_data_sets(degrade.load(tmp_path), grid)
        assert [ax.get_title().partition("\n")[0] for ax in figure.axes] == sorted(grid.values.values())
        assert "diverged, at chance: 1 of 5 runs" in figure.axes[0].get_xlabel()
        assert {ax.get_subplotspec().get_geometry()[:2] for ax in figure.axes} == {(3, 3)}
        figure.draw_without_rendering()
        boxes = [ax.get_tightbbox() for ax in figure.axes] + [figure.legends[0].get_tightbbox()]
        overlaps = [(i, j) for i, one in enumerate(boxes) for j, two in enumerate(boxes) if i < j and one.overlaps(two)]
        assert not overlaps
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)

    def test_plot_writes_them_and_says_where(self, cli, tmp_path):
        write_study(tmp_path / "a", "shapes")
        assert "data-sets" not in cli("plot", tmp_path, "--formats", "png").stdout
        write_study(tmp_path / "b", "svhn")
        result = cli("plot", tmp_path)
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == str(tmp_path / "figures" / "data-sets-smoke.{png,svg,pdf}")
        written = [tmp_path / "figures" / f"data-sets-smoke.{kind}" for kind in plots.FORMATS]
        for path, start in zip(written, (b"\x89PNG", b"<?xml", b"%PDF"), strict=True):
            assert path.read_bytes().startswith(start)
        assert sorted((tmp_path / "figures").iterdir()) == sorted(written)
        cli("plot", tmp_path, "--formats", "svg", "--out", tmp_path / "out")
        assert (tmp_path / "out" / "data-sets-smoke.svg").exists()
