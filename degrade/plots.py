"""DataFrames to figures. Errors are drawn in percent. Imports no torch."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from degrade import paper
from degrade.analysis.verdict import CONTRAST, Grid, chance_error, deepest, finished, from_trained, verdicts
from degrade.commit import make_folder, write_file
from degrade.config import BLOCKS, short_name, spelt
from degrade.log import Epoch
from degrade.store import FINISHED

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("png", "svg", "pdf")
COLOURS = {"plain": "#d55e00", "residual": "#0072b2", "preact": "#009e73"}  # Okabe and Ito's, told apart by everyone
MARKERS = {"plain": "s", "residual": "o", "preact": "^"}
MEASURES = {
    "train_error": "training error (clean images, eval mode)",
    "test_error": "test error",
    "gap": "test error minus training error",
}


def figures(epochs: "pd.DataFrame") -> dict[str, Figure]:
    """The figures of one study, by name; none of one that began from trained weights, which `draw_identity` is for.

    Args:
        epochs: rows of one study, as `store.load` gives them. The figures v depth take finished runs
            only; diverged ones stand at chance, and have no gap.
    """
    if from_trained(epochs["init"].iloc[0]):
        return {}
    final = finished(epochs).copy()
    final["gap"] = (final["test_error"] - final["train_error"]).mask(final["status"] == "diverged")
    drawn = {"curves": draw_curves(epochs)}
    for name, measure in (("training-error", "train_error"), ("test-error", "test_error"), ("gap", "gap")):
        known = final[final[measure].notna()]
        if len(known):
            drawn[name] = draw_by_depth(known, measure)
    return drawn


def draw_by_depth(final: "pd.DataFrame", measure: str) -> Figure:
    """The final `measure` v depth, all blocks in one figure."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    by_depth(figure.add_subplot(), final, measure)
    figure.suptitle(f"Final {MEASURES[measure]} v depth\n{_describe(final)}", fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def by_depth(ax: Axes, final: "pd.DataFrame", measure: str) -> Axes:
    """Draw each seed's final `measure` as a dot, the mean as a line and lowest to highest seed as a band.

    Published numbers are overlaid, dotted, where the study is of the paper's own protocol, or imported and close to
    it. Where the errors span more than a factor of 30 the axis is logarithmic, so that nothing has to be cut off.

    Args:
        ax: to draw on.
        final: one row a run, with block, depth and `measure`, a fraction.
        measure: a column of `final`.
    """
    drawn = list(final[measure])
    for block in BLOCKS:
        runs = final[final["block"] == block]
        if runs.empty:
            continue
        by = runs.groupby("depth")[measure]
        mean, low, high = by.mean(), by.min(), by.max()
        colour = COLOURS[block]
        ax.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(mean.index, mean, marker=MARKERS[block], color=colour, label=block, markersize=7)
        ax.plot(runs["depth"], runs[measure], "o", color=colour, markeredgecolor="white", markersize=4.5, zorder=3)
    depths = set(final["depth"])
    row = final.iloc[0]
    alike = row["protocol"] == "paper" or (row["imported"] and row["protocol"] == "paper, changed")
    if row["dataset"] == "cifar10" and alike:
        for block in (block for block in BLOCKS if (final["block"] == block).any()):
            nets = [p for p in paper.CIFAR10 if p.block == block]
            points = [(p.depth, value) for p in nets if (value := _published(p, measure)) is not None]
            if not points:
                continue
            depths |= {depth for depth, _ in points}
            drawn += [value for _, value in points]
            x, y = zip(*points, strict=True)
            label, marker = f"{block}, {nets[0].source.partition(',')[0]}", MARKERS[block]
            ax.plot(x, y, color=COLOURS[block], marker=marker, markerfacecolor="none", linestyle=":", label=label)
    ax.plot([], [], "o", color="0.4", markeredgecolor="white", markersize=4.5, label="one seed")
    if _several_seeds(final):
        ax.fill_between([], [], [], color="0.4", alpha=0.25, linewidth=0, label="lowest to highest seed")
    ax.set_xticks(sorted(depths))
    ax.set_xlabel("depth (weight layers)")
    ax.set_ylabel({"train_error": "training error", "test_error": "test error", "gap": "difference in points"}[measure])
    if measure == "gap":
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_ylim(min([-0.01, *final[measure] * 1.1]), max([0.01, *final[measure] * 1.1]))
    return _error_axis(ax, drawn, str(row["dataset"]), linear=measure == "gap")


def draw_grid(epochs: "pd.DataFrame", grid: Grid) -> Figure | None:
    """Was the deeper net mistuned? The final errors of each net v the value of the field that a grid is over.

    None where fewer than two of its studies have a finished run.

    Args:
        epochs: rows of the grid's studies, and maybe of others, as `store.load` gives them.
        grid: which studies, and their values.
    """
    final = finished(epochs)
    final = final[final["study"].isin(list(grid.values))]
    if final["study"].nunique() < 2:
        return None
    figure = Figure(figsize=(10.2, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, measure in zip(axes, ("train_error", "test_error"), strict=True):
        by_value(ax, final, grid, measure).set_title(MEASURES[measure], fontsize=10)
        _error_axis(ax, final[["train_error", "test_error"]].to_numpy().ravel(), str(final["dataset"].iloc[0]))
    axes[0].set_ylabel("error")
    figure.suptitle(f"Final errors v {grid.field}\n{_describe(final, grid.field, 'protocol')}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def by_value(ax: Axes, final: "pd.DataFrame", grid: Grid, measure: str) -> Axes:
    """Draw each seed's final `measure` as a dot and each net's means as a line over the grid's values, evenly spaced.

    The deeper, the darker. A ring marks the value with which a net's mean training error is lowest.

    Args:
        ax: to draw on.
        final: one row a run, with study, block, depth, train_error and `measure`, fractions.
        grid: the values of the studies.
        measure: a column of `final`.
    """
    final = final.assign(place=final["study"].map({study: x for x, study in enumerate(grid.values)}))
    nets = [(block, depth) for block in BLOCKS for depth in sorted(set(final.loc[final["block"] == block, "depth"]))]
    for i, (block, depth) in enumerate(nets):
        depths = [depth for other, depth in nets if other == block]
        strength = 1 - 0.6 * (len(depths) - 1 - depths.index(depth)) / max(len(depths) - 1, 1)
        colour = tuple(1 - strength * (1 - part) for part in to_rgb(COLOURS[block]))
        runs = final[(final["block"] == block) & (final["depth"] == depth)]
        by, beside = runs.groupby("place"), 0.05 * (i - (len(nets) - 1) / 2)  # so that nets do not hide each other
        mean, best = by[measure].mean(), by["train_error"].mean().idxmin()
        ax.plot(mean.index + beside, mean, marker=MARKERS[block], color=colour, label=f"{block}-{depth}", markersize=5)
        ax.plot(runs["place"] + beside, runs[measure], ".", color=colour, markersize=4)
        ax.plot(best + beside, mean[best], "o", color=colour, markersize=13, markerfacecolor="none")
    ax.plot([], [], "o", color="0.4", markersize=13, markerfacecolor="none", label="best of a net,\nby training error")
    ax.plot([], [], ".", color="0.4", markersize=4, label="one seed")
    ax.set_xticks(range(len(grid.values)), [spelt(value) for value in grid.values.values()])
    ax.set_xlim(-0.6, len(grid.values) - 0.4)
    ax.set_xlabel(grid.field)
    return ax


def draw_data_sets(epochs: "pd.DataFrame", grid: Grid) -> Figure:
    """Is it so in other data sets? The final training error v depth, a panel a data set, and what follows from it.

    Args:
        epochs: rows of the studies, and maybe of others, as `store.load` gives them.
        grid: which studies, and the names of their data sets: one of `verdict.data_sets_of`.
    """
    epochs = epochs[epochs["study"].isin(list(grid.values))]
    final = finished(epochs)
    differ = [name for name in ("protocol", "train_images") if final[name].nunique(dropna=False) > 1]
    count = len(grid.values)
    rows = math.ceil(count / 3)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(3.6 * columns + 1.9, 3.6 * rows + 0.8))
    figure.set_layout_engine("constrained", h_pad=0.12)
    for i, (study, dataset) in enumerate(grid.values.items()):
        runs = final[final["study"] == study]
        row = runs.iloc[0]
        own = {"protocol": f"protocol {row['protocol']}", "train_images": _images(row["train_images"])}
        said = [
            f"{v.block} {v.deep} v {v.shallow}: {v.verdict} ({100 * v.difference:+.2f} points)"
            for v in deepest(verdicts(epochs[epochs["study"] == study]))
            if v.block != CONTRAST
        ]
        if lost := int((runs["status"] == "diverged").sum()):
            said.append(f"diverged, at chance: {lost} of {len(runs)} runs")
        ax = by_depth(figure.add_subplot(rows, columns, i + 1), runs, "train_error")
        ax.set_title(f"{dataset}\n{', '.join(own[name] for name in differ)}".strip(), fontsize=10)
        ax.set_xlabel("\n".join([ax.get_xlabel(), *said]), fontsize=9)
        ax.set_ylabel("" if i % columns else ax.get_ylabel(), fontsize=9)
        ax.tick_params(labelsize=9)
    figure.suptitle(f"Final {MEASURES['train_error']} v depth\n{_describe(final, 'dataset', *differ)}", fontsize=10)
    _legend(figure)
    return figure


def draw_curves(epochs: "pd.DataFrame") -> Figure:
    """The error curves of Fig. 6, on one scale: a panel for each block, plain on the left."""
    epochs = _comparable(epochs)
    there = set(epochs["block"].unique())
    blocks = [block for block in BLOCKS if block in there]
    figure = Figure(figsize=(4.4 * len(blocks) + 1.4, 4.2), layout="constrained")
    axes = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for ax, block in zip(axes, blocks, strict=True):
        curves(ax, epochs, block).set_title(f"{block} nets", fontsize=10)
    axes[0].set_ylabel("error")
    how = "as its source logged it" if epochs["imported"].iloc[0] else "clean images, eval mode"
    figure.suptitle(f"Training error ({how}) and test error\n{_describe(epochs)}", fontsize=10)
    _legend(figure)
    return figure


def curves(ax: Axes, epochs: "pd.DataFrame", block: str) -> Axes:
    """Draw error v step of every depth of `block`: mean over seeds, training thin and dashed, test bold.

    The band runs from the lowest to the highest seed of the test error. Of imported runs the last training error is
    drawn alone: it was measured here, on clean images, whatever the log before it is of. A diverged run stays at
    chance from its last epoch on; otherwise a step is drawn where every seed has it.

    Args:
        ax: to draw on.
        epochs: rows of one study, as `store.load` gives them.
        block: of `config.BLOCKS`.
    """
    depths = sorted(epochs["depth"].unique())
    colours = matplotlib.colormaps["viridis"]
    of_block = epochs[epochs["block"] == block]
    imported = bool(epochs["imported"].iloc[0])
    for i, depth in enumerate(depths):
        runs = of_block[of_block["depth"] == depth]
        if runs.empty:
            continue
        colour = colours(0.75 * i / max(len(depths) - 1, 1))
        test, train = _by_step(runs, "test_error"), _by_step(runs, "train_error")
        ax.fill_between(test.index, test.min(axis=1), test.max(axis=1), color=colour, alpha=0.15, linewidth=0)
        ax.plot(test.index, test.mean(axis=1), color=colour, linewidth=2, label=f"{depth} layers")
        mean = train.mean(axis=1)
        if imported:  # the last is of clean images, and no point of the log's curve
            ax.plot(mean.index[-1:], mean[-1:], "x", color=colour, markersize=6, zorder=3)
            mean = mean[:-1]
        ax.plot(mean.index, mean, color=colour, linewidth=0.9, linestyle="--")
    for label, width, style in (
        ("test error", 2, "-"),
        ("training error", 0.9, "--"),
        ("learning rate / 10", 0.8, ":"),
    ):
        ax.plot([], [], color="0.4", linewidth=width, linestyle=style, label=label)
    if imported:
        ax.plot([], [], "x", color="0.4", markersize=6, label="training error of clean\nimages, measured here")
    if _several_seeds(epochs):
        ax.fill_between([], [], [], color="0.4", alpha=0.25, linewidth=0, label="test error, lowest\nto highest seed")
    for milestone in epochs["milestones"].iloc[0]:
        ax.axvline(milestone, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_xlabel("step")
    return _error_axis(ax, epochs[["train_error", "test_error"]].to_numpy().ravel(), str(epochs["dataset"].iloc[0]))


def _error_axis(ax: Axes, errors: "Sequence[float] | np.ndarray", dataset: str, *, linear: bool = False) -> Axes:
    """Percent, from 0; logarithmic where the errors drawn span more than a factor of 30. Chance, where it is near."""
    drawn = np.asarray(errors)
    positive = drawn[drawn > 0]
    formatter: Formatter = PercentFormatter(1.0)  # with as many decimals as the ticks need
    if not linear:
        if positive.size and positive.max() > 30 * positive.min():
            ax.set_yscale("log")
            ax.set_ylim(0.8 * positive.min(), 1.2 * positive.max())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
            formatter = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
        else:
            ax.set_ylim(bottom=0)
        chance = chance_error(dataset)
        if (drawn > 0.6 * chance).any():
            ax.axhline(chance, color="0.4", linewidth=0.8, linestyle=(0, (6, 4)))
            ax.annotate(
                "chance",
                xy=(1, chance),
                xycoords=("axes fraction", "data"),
                xytext=(0, 7),  # clear of the marker of a net that is there
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
            low, top = ax.get_ylim()
            room = (chance / low) ** 0.08 if low else 1.08  # for the word: 8 % of the axis, logarithmic or not
            ax.set_ylim(top=max(room * chance, top))
    ax.yaxis.set_major_formatter(formatter)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _comparable(epochs: "pd.DataFrame") -> "pd.DataFrame":
    """The finished runs of each net; all of them where none is finished yet."""
    finished = epochs["status"].isin(FINISHED)
    some = finished.groupby([epochs["block"], epochs["depth"]]).transform("any")
    return epochs[finished | ~some]


def _by_step(runs: "pd.DataFrame", measure: str) -> "pd.DataFrame":
    """`measure` of one net, a row a step and a column a seed."""
    table = runs.pivot(index="step", columns="id", values=measure)
    diverged = runs[runs["status"] == "diverged"]
    if len(diverged):
        table = table.reindex(sorted({*table.index, int(runs["steps"].iloc[0])}))
    for name, rows in diverged.groupby("id"):
        table.loc[table.index >= rows["step"].max(), name] = chance_error(rows["dataset"].iloc[0])
    return table.dropna()


def draw_identity(
    record: Mapping[str, Any], continued: Sequence[Epoch], control: Sequence[Epoch], dataset: str
) -> Figure:
    """Training on from the identity construction: training error v step, beside that of the shallow net trained on
    alike, where both began, and the same depth trained from scratch.

    Args:
        record: of identity.json.
        continued: the log of the run that went on from the construction.
        control: the log of the shallow net, trained on alike; empty where it was not.
        dataset: whose chance error is drawn where the errors come near it.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = figure.add_subplot()
    colour = COLOURS[record["block"]]
    deep, shallow = f"{record['block']}-{record['deep']}", f"{record['block']}-{record['shallow']}"
    start = record["train"]["deep_error"]
    steps, errors = [0, *(e.step for e in continued)], [start, *(e.train_error for e in continued)]
    ax.plot(steps, errors, color=colour, marker=MARKERS[record["block"]], label=f"{deep}, from the construction")
    if control:
        alike = [start, *(e.train_error for e in control)]
        label = f"{shallow}, trained on alike"
        ax.plot([0, *(e.step for e in control)], alike, color="0.35", marker="o", markersize=5, label=label)
        errors += alike
    levels = [(start, f"{shallow}, and the construction", (0, (5, 3)))]
    if scratch := record["scratch"]:
        levels.append((scratch["train_error"], f"{deep}, from scratch, after {scratch['steps']:,} steps", (0, (1, 2))))
    for value, label, style in levels:
        ax.axhline(value, color="0.35", linewidth=1.2, linestyle=style, label=label, zorder=1)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_xlabel(f"steps from the construction, at lr {continued[-1].lr:g}")
    ax.set_ylabel("training error")
    figure.suptitle(f"{deep} trained on from {shallow} and identity layers ({dataset})", fontsize=10)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    _error_axis(ax, [*errors, *(level[0] for level in levels)], dataset)
    return figure


def save(figure: Figure, folder: Path, name: str, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Write the figure to `folder/name.<format>`; the same figure gives the same bytes.

    Raises:
        OSError: it cannot be written; an older file stays as it was.
    """
    make_folder(folder)
    paths = []
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    for kind in formats:
        file = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "degrade", "svg.fonttype": "none"}):
            figure.savefig(file, format=kind, dpi=160, metadata=metadata[kind])
        path = folder / f"{name}.{kind}"
        write_file(path, file.getvalue())
        paths.append(path)
    return paths


def _legend(figure: Figure) -> None:
    """What is in the panels, each label once."""
    entries: dict[str, Artist] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= {label: entries.get(label, handle) for label, handle in zip(labels, handles, strict=True)}
    figure.legend(entries.values(), entries, loc="outside right center", frameon=False, fontsize=9)


def _describe(epochs: "pd.DataFrame", *differ: str) -> str:
    """`cifar10, protocol demo: 500 of the paper's 64,000 steps`, `width 8, 4,000 images, 3 seeds`, who has diverged.

    Without the columns in which the rows `differ`: of several data sets their number, and not who has diverged.
    """
    row = epochs.iloc[0]
    counts = epochs.groupby(["study", "block", "depth"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    seeds = f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"
    several = "dataset" in differ
    of = f" of the paper's {paper.STEPS:,}" if row["dataset"] == "cifar10" and row["steps"] < paper.STEPS else ""
    steps = f"{row['steps']:,}{'' if several else of} steps"
    parts = {"steps": steps, "width": f"width {row['width']}", "train_images": _images(row["train_images"])}
    parts = {name: part for name, part in parts.items() if name not in differ}
    steps = f": {parts.pop('steps')}" if "steps" in parts else ""
    protocols = epochs["protocol"].unique()
    changed = ", changed" if "protocol" in differ else ""
    protocol = " and ".join(dict.fromkeys(name.removesuffix(changed) for name in protocols))
    what = f"{epochs['dataset'].nunique()} data sets" if several else short_name(row["dataset"])
    text = f"{what}, protocol {protocol}{steps}\n{', '.join([*parts.values(), seeds])}"
    if several:
        return text
    lost = epochs[epochs["status"] == "diverged"]
    names = sorted({f"{r.block}-{r.depth}-s{r.seed}{f' of {r.study}' if differ else ''}" for r in lost.itertuples()})
    if row["imported"]:
        text += "\nimported: trained elsewhere; the last errors are those of the weights, measured here"
    return text + (f"\ndiverged, at chance: {', '.join(names)}" if names else "")


def _images(count: float | None) -> str:
    """`4,000 images`, or `all images` for None, which is NaN in some columns of pandas."""
    return "all images" if count is None or math.isnan(count) else f"{count:,.0f} images"


def _several_seeds(epochs: "pd.DataFrame") -> bool:
    runs = epochs[["block", "depth", "seed"]].drop_duplicates()
    return bool(runs.duplicated(["block", "depth"]).any())


def _published(net: paper.Published, measure: str) -> float | None:
    if measure == "train_error":
        return net.train_error
    if measure == "test_error":
        return net.test_error
    if net.train_error is None or net.test_error is None:
        return None
    return net.test_error - net.train_error
