"""DataFrames to figures. Errors are drawn in percent. Imports no torch."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from degrade import paper
from degrade.analysis.verdict import FINISHED, chance_error, final_epochs
from degrade.commit import make_folder, write_file
from degrade.config import BLOCKS

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("png", "svg", "pdf")
COLOURS = {"plain": "#d55e00", "residual": "#0072b2"}  # Okabe and Ito's, told apart by everyone
MARKERS = {"plain": "s", "residual": "o"}
MEASURES = {
    "train_error": "training error (clean images, eval mode)",
    "test_error": "test error",
    "gap": "test error minus training error",
}


def figures(epochs: "pd.DataFrame") -> dict[str, Figure]:
    """The figures of one study, by name.

    Args:
        epochs: rows of one study, as `store.load` gives them. The figures v depth take finished runs
            only; diverged ones stand at chance.
    """
    final = final_epochs(epochs)
    final = final[final["status"].isin(FINISHED)].copy()
    final["gap"] = final["test_error"] - final["train_error"]
    drawn = {"curves": draw_curves(epochs)}
    if len(final):
        for name, measure in (("training-error", "train_error"), ("test-error", "test_error"), ("gap", "gap")):
            drawn[name] = draw_by_depth(final, measure)
    return drawn


def draw_by_depth(final: "pd.DataFrame", measure: str) -> Figure:
    """The final `measure` v depth, plain and residual in one figure."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = by_depth(figure.add_subplot(), final, measure)
    ax.set_title(f"Final {MEASURES[measure]} v depth\n{_describe(final)}", fontsize=10)
    return figure


def by_depth(ax: Axes, final: "pd.DataFrame", measure: str) -> Axes:
    """Draw each seed's final `measure` as a dot, the mean as a line and lowest to highest seed as a band.

    Published numbers are overlaid, hollow, where the study is of the paper's own protocol.

    Args:
        ax: to draw on.
        final: one row a run, with block, depth and `measure`, a fraction.
        measure: a column of `final`.
    """
    for block in BLOCKS:
        runs = final[final["block"] == block]
        if runs.empty:
            continue
        by = runs.groupby("depth")[measure]
        mean, low, high = by.mean(), by.min(), by.max()
        colour = COLOURS[block]
        ax.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(runs["depth"], runs[measure], ".", color=colour, markersize=5, alpha=0.7)
        ax.plot(mean.index, mean, marker=MARKERS[block], color=colour, label=block, markersize=6)
    row = final.iloc[0]
    if (row["dataset"], row["protocol"]) == ("cifar10", "paper"):
        for block in BLOCKS:
            points = [(p.depth, _published(p, measure)) for p in paper.CIFAR10 if p.block == block]
            points = [(depth, value) for depth, value in points if value is not None]
            ax.plot(
                *zip(*points, strict=True),
                marker=MARKERS[block],
                color=COLOURS[block],
                markerfacecolor="none",
                linestyle=":",
                label=f"{block}, He et al. 2015",
            )
    depths = sorted(set(final["depth"]))
    ax.set_xticks(depths)
    ax.set_xlabel("depth (weight layers)")
    ax.set_ylabel({"train_error": "training error", "test_error": "test error", "gap": "difference"}[measure])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if measure != "gap":
        ax.set_ylim(bottom=0)
    return _finish(ax)


def draw_curves(epochs: "pd.DataFrame") -> Figure:
    """The error curves of Fig. 6: plain on the left, residual on the right, on one scale."""
    epochs = _comparable(epochs)
    blocks = [block for block in BLOCKS if (epochs["block"] == block).any()]
    figure = Figure(figsize=(4.8 * len(blocks), 4.2), layout="constrained")
    axes = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for ax, block in zip(axes, blocks, strict=True):
        curves(ax, epochs, block).set_title(f"{block} nets", fontsize=10)
    axes[0].set_ylabel("error")
    title = "Training error (thin; clean images, eval mode) and test error (bold)"
    figure.suptitle(f"{title}\n{_describe(epochs)}", fontsize=10)
    return figure


def curves(ax: Axes, epochs: "pd.DataFrame", block: str) -> Axes:
    """Draw error v step of every depth of `block`: the mean over seeds, with a band from lowest to highest.

    A diverged run stays at chance from its last epoch on; otherwise a step is drawn where every seed has it.

    Args:
        ax: to draw on.
        epochs: rows of one study, as `store.load` gives them.
        block: "plain" or "residual".
    """
    depths = sorted(set(epochs["depth"]))
    colours = matplotlib.colormaps["viridis"]
    for i, depth in enumerate(depths):
        runs = epochs[(epochs["block"] == block) & (epochs["depth"] == depth)]
        if runs.empty:
            continue
        colour = colours(0.75 * i / max(len(depths) - 1, 1))
        for measure, width in (("train_error", 0.9), ("test_error", 2.2)):
            seeds = _by_step(runs, measure)
            mean, low, high = seeds.mean(axis=1), seeds.min(axis=1), seeds.max(axis=1)
            label = f"{block}-{depth}" if measure == "test_error" else None
            ax.fill_between(mean.index, low, high, color=colour, alpha=0.12, linewidth=0)
            ax.plot(mean.index, mean, color=colour, linewidth=width, label=label)
    for milestone in epochs["milestones"].iloc[0]:
        ax.axvline(milestone, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    late = epochs[epochs["step"] > epochs["steps"] / 4]
    if epochs["epoch"].max() > 20 and len(late):  # show where the curves end, as Fig. 6 does
        ax.set_ylim(0, 1.1 * late[["train_error", "test_error"]].max().max())
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step (dashed: learning rate / 10)")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    return _finish(ax)


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


def _describe(epochs: "pd.DataFrame") -> str:
    """`cifar10, protocol demo, 500 steps, 3 seeds`"""
    row = epochs.iloc[0]
    counts = epochs.groupby(["block", "depth"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    seeds = f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"
    return f"{row['dataset']}, protocol {row['protocol']}: {row['steps']:,} steps, width {row['width']}, {seeds}"


def _published(net: paper.Published, measure: str) -> float | None:
    if measure == "train_error":
        return net.train_error
    if measure == "test_error":
        return net.test_error
    if net.train_error is None or net.test_error is None:
        return None
    return net.test_error - net.train_error


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    return ax
