"""Figures of the probes: DataFrames to figures. Errors are drawn in percent. Imports no torch.

The frames are those of results/<study>/probes/<probe>.csv. Where there are several seeds, lines are their mean and
bands go from the lowest to the highest.
"""

import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from degrade import store
from degrade.config import BLOCKS, PROBES, matches_protocol, short_name
from degrade.plots import COLOURS, MARKERS

if TYPE_CHECKING:
    import pandas as pd

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
GREY = "0.4"


def of_study(study: store.Study) -> tuple[dict[str, Figure], list[str]]:
    """The figures of all that was probed of a study, by name, and a line for each table that is damaged."""
    import pandas as pd

    changed = "" if matches_protocol(study.shared, study.protocol) else ", changed"
    protocol, width = f"protocol {study.protocol}{changed}", f"width {study.shared['width']}"
    about = f"{study.name}: {short_name(study.shared['dataset'])}, {protocol}, {width}"
    drawn: dict[str, Figure] = {}
    damaged = []
    for probe in PROBES:
        path = study.folder / store.PROBES / f"{probe}.csv"
        if not path.exists():
            continue
        try:
            drawn |= figures(probe, pd.read_csv(path), about)
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            damaged.append(f"{path} is not a table of degrade probe's ({why})")
    return drawn, damaged


def figures(probe: str, rows: "pd.DataFrame", about: str) -> dict[str, Figure]:
    """The figures of one probe of one study, by name. Those of fresh nets have names of their own.

    Args:
        probe: of `degrade probe`.
        rows: of its table.
        about: the study, for the titles.
    """
    if probe == "gradients":
        correlation = rows[rows["kind"] == "correlation"].dropna(subset="value")
        norms = rows[rows["kind"] == "norm"]
        drawn = {"gradients": draw_norms(norms, about)} if len(norms) else {}
        return drawn | ({"gradient-correlation": draw_correlation(correlation, about)} if len(correlation) else {})
    if probe == "lesion":
        return {"lesion": draw_lesion(rows, about)} if len(rows) else {}
    if probe == "bn":
        return {"bn": draw_bn(rows, about)} if len(rows) else {}
    if probe == "ten-crop":
        return {"ten-crop": draw_ten_crop(rows, about)} if len(rows) else {}
    drawn = {}
    for init, suffix, when in ((0, "", ""), (1, "-at-init", ", fresh initialisations")):
        mine = rows[rows["init"] == init]
        if mine.empty:
            continue
        if probe == "responses":
            drawn[f"responses{suffix}"] = draw_responses(mine, about + when)
        else:
            drawn[f"landscape{suffix}"] = draw_landscape(mine[mine["dimension"] == 2], about + when)
            drawn[f"landscape-line{suffix}"] = draw_line(mine[mine["dimension"] == 1], about + when)
    return drawn


def draw_responses(rows: "pd.DataFrame", about: str) -> Figure:
    """Fig. 7 of He et al. 2015: std of each layer's output, in order (top) and sorted by size (bottom)."""
    blocks, depths = blocks_of(rows), sorted(set(rows["depth"]))
    figure = Figure(figsize=(4.3 * len(blocks) + 1.4, 6.2), layout="constrained")
    axes = figure.subplots(2, len(blocks), sharex=True, sharey=True, squeeze=False)
    colours = depth_colours(depths)
    for column, block in enumerate(blocks):
        order, ranked = axes[:, column]
        for depth in depths:
            nets = rows[(rows["block"] == block) & (rows["depth"] == depth)]
            if nets.empty:
                continue
            by_layer = nets.pivot(index="layer", columns="seed", values="std")
            line(order, by_layer, color=colours[depth], label=f"{depth} layers")
            first = nets.groupby("stage")["layer"].min().iloc[2:]  # the first follows the stem
            order.plot(first, by_layer.mean(axis=1)[first], "|", color=colours[depth], markersize=11, markeredgewidth=2)
            sizes = by_layer.apply(lambda column: sorted(column, reverse=True), result_type="broadcast")
            line(ranked, sizes, color=colours[depth])
        order.set_title(f"{block} nets", fontsize=10)
        order.set_xlabel("layer, in order")
        order.tick_params(labelbottom=True)
        ranked.set_xlabel("layer, largest first")
    for ax in axes.flat:
        tidy(ax).set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for ax in axes[:, 0]:
        ax.set_ylabel("standard deviation")
    keys = [Line2D([], [], color=colours[depth], linewidth=1.8, label=f"{depth} layers") for depth in depths]
    keys.append(
        Line2D([], [], color=GREY, marker="|", markersize=11, markeredgewidth=2, linestyle="", label="a stage begins")
    )
    finish(figure, "Responses: std of each layer's output after BN, before ReLU and addition", rows, about, keys)
    return figure


def draw_norms(rows: "pd.DataFrame", about: str) -> Figure:
    """Norm of the gradient in each weight layer: freshly initialised (top) and at the last step (bottom), by depth."""
    moments, depths = moments_of(rows), sorted(set(rows["depth"]))
    figure = Figure(figsize=(2.9 * len(depths) + 2.2, 2.7 * len(moments) + 0.8), layout="constrained")
    axes = figure.subplots(len(moments), len(depths), sharex="col", sharey=True, squeeze=False)
    for (when, there), line_of_axes in zip(moments.items(), axes, strict=True):
        for depth, ax in zip(depths, line_of_axes, strict=True):
            for block in blocks_of(rows):
                nets = there[(there["block"] == block) & (there["depth"] == depth)]
                line(ax, nets.pivot(index="layer", columns="seed", values="value"), color=COLOURS[block])
            tidy(ax).set_yscale("log")
            ax.set_title(f"{depth} layers, {when}", fontsize=10)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        line_of_axes[0].set_ylabel("L2 norm of the gradient")
    for ax in axes[-1]:
        ax.set_xlabel("weight layer")
    finish(figure, "Gradient of the training loss in each weight layer (training mode)", rows, about, block_keys(rows))
    return figure


def draw_correlation(rows: "pd.DataFrame", about: str) -> Figure:
    """Correlation of input gradients v depth: a column a distance, freshly initialised and at the last step."""
    moments, distances = moments_of(rows), sorted(set(rows["distance"]))
    figure = Figure(figsize=(1.9 * len(distances) + 2.2, 2.3 * len(moments) + 0.9), layout="constrained")
    axes = figure.subplots(len(moments), len(distances), sharex=True, sharey=True, squeeze=False)
    for (when, there), line_of_axes in zip(moments.items(), axes, strict=True):
        for distance, ax in zip(distances, line_of_axes, strict=True):
            for block in blocks_of(rows):
                nets = there[(there["block"] == block) & (there["distance"] == distance)]
                by_depth = nets.pivot(index="depth", columns="seed", values="value")
                line(ax, by_depth, color=COLOURS[block], marker=MARKERS[block])
            tidy(ax).axhline(0, color=GREY, linewidth=0.8)
            ax.set_title(f"noise of {100 * distance:g} %", fontsize=10)
            ax.set_xticks(sorted(set(rows["depth"])))
        line_of_axes[0].set_ylabel(f"{when}\ncorrelation")
    for ax in axes[-1]:
        ax.set_xlabel("depth")
    title = "Correlation of input gradients at an image and at the image with noise, in percent of its length"
    finish(figure, title, rows, about, block_keys(rows, markers=True))
    return figure


def draw_lesion(rows: "pd.DataFrame", about: str) -> Figure:
    """Test error without each block (left) and without ever more random ones (right), a row a depth."""
    depths = sorted(set(rows["depth"]))
    figure = Figure(figsize=(10.6, 2.7 * len(depths) + 0.9), layout="constrained")
    axes = figure.subplots(len(depths), 2, sharey=True, squeeze=False, gridspec_kw={"width_ratios": (1.7, 1)})
    for depth, (single, several) in zip(depths, axes, strict=True):
        for block in blocks_of(rows):
            nets = rows[(rows["block"] == block) & (rows["depth"] == depth)]
            if nets.empty:
                continue
            intact = nets[nets["deleted"] == 0]["error"].mean()
            alone = nets[nets["deleted"] == 1].astype({"blocks": int})
            by_block = alone.pivot(index="blocks", columns="seed", values="error")
            line(single, by_block, color=COLOURS[block], marker=MARKERS[block], linewidth=0.8)
            dashes = (5 * BLOCKS.index(block), (5, 5))  # where two lie on each other, both are seen
            single.axhline(intact, color=COLOURS[block], linestyle=dashes, linewidth=1)
            by_count = nets.groupby("deleted")["error"]
            several.fill_between(
                by_count.min().index, by_count.min(), by_count.max(), color=COLOURS[block], alpha=0.15, linewidth=0
            )
            several.plot(
                by_count.mean().index, by_count.mean(), color=COLOURS[block], marker=MARKERS[block], markersize=5
            )
            for place in alone[alone["changes_shape"] == 1]["blocks"].unique():
                single.axvspan(place - 0.45, place + 0.45, color="0.9", linewidth=0, zorder=0)
        for ax, xlabel in ((single, "deleted block"), (several, "number of deleted blocks")):
            tidy(ax).yaxis.set_major_formatter(PERCENT)
            ax.set_ylim(0, 1.03)
            ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
            ax.set_title(f"{depth} layers", fontsize=10)
            ax.set_xlabel(xlabel)
        single.set_ylabel("test error")
    keys = [
        *block_keys(rows, markers=True),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="intact"),
        Patch(color="0.9", label="block that\nchanges the shape"),
        Patch(color=GREY, alpha=0.25, linewidth=0, label="lowest to highest\n(right: of blocks\nor draws)"),
    ]
    finish(
        figure,
        "Lesions: test error of trained nets without one block, and without several at random",
        rows,
        about,
        keys,
    )
    return figure


def draw_line(rows: "pd.DataFrame", about: str) -> Figure:
    """Training loss (top) and error (bottom) along one random direction, a column a depth."""
    depths = sorted(set(rows["depth"]))
    figure = Figure(figsize=(2.9 * len(depths) + 2.2, 5.6), layout="constrained")
    axes = figure.subplots(2, len(depths), sharex=True, sharey="row", squeeze=False)
    for depth, (loss, error) in zip(depths, axes.T, strict=True):
        for block in blocks_of(rows):
            nets = rows[(rows["block"] == block) & (rows["depth"] == depth)]
            for ax, measure in ((loss, "loss"), (error, "error")):
                line(ax, nets.pivot(index="x", columns="seed", values=measure), color=COLOURS[block])
        tidy(loss).set_yscale("log")
        tidy(error).yaxis.set_major_formatter(PERCENT)
        error.set_ylim(bottom=0)
        loss.set_title(f"{depth} layers", fontsize=10)
        error.set_xlabel("distance, in lengths of the weights")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("training error")
    title = "Loss landscape: along one random, filter-normalised direction"
    finish(figure, title, rows, about, block_keys(rows))
    return figure


def draw_landscape(rows: "pd.DataFrame", about: str) -> Figure:
    """Training loss on a plane through the weights: a row a block, a column a depth, of the lowest seed of each."""
    blocks, depths = blocks_of(rows), sorted(set(rows["depth"]))
    heights = np.log10(rows["loss"].where(rows["loss"] > 0))
    finite = heights[np.isfinite(heights)]
    low, high = finite.min(), max(finite.max(), finite.min() + 0.01)
    norm, levels, decades = Normalize(low, high), np.linspace(low, high, 25), range(math.ceil(low), math.ceil(high))
    figure = Figure(figsize=(2.7 * len(depths) + 1.6, 2.7 * len(blocks) + 0.8), layout="constrained")
    axes = figure.subplots(len(blocks), len(depths), sharex=True, sharey=True, squeeze=False)
    for block, line_of_axes in zip(blocks, axes, strict=True):
        for depth, ax in zip(depths, line_of_axes, strict=True):
            nets = rows[(rows["block"] == block) & (rows["depth"] == depth)]
            ax.set_aspect("equal")
            if nets.empty:
                ax.set_axis_off()
                continue
            net = nets[nets["seed"] == nets["seed"].min()]
            plane = net.assign(height=heights.fillna(high).clip(low, high)).pivot(
                index="y", columns="x", values="height"
            )
            ax.contourf(plane.columns, plane.index, plane, levels, norm=norm, cmap="viridis")
            lines = ax.contour(
                plane.columns, plane.index, plane, [*decades], colors="white", linestyles="-", linewidths=0.7
            )
            ax.clabel(lines, fmt=lambda decade: f"{10.0**decade:g}", fontsize=8)
            ax.set_xticks((-1, 0, 1))
            ax.set_yticks((-1, 0, 1))
            ax.plot(0, 0, "+", color="white", markersize=11, markeredgewidth=3.2)
            ax.plot(0, 0, "+", color="black", markersize=9, markeredgewidth=1.2)
            ax.set_title(f"{block}, {depth} layers", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("first direction")
    for ax in axes[:, 0]:
        ax.set_ylabel("second direction")
    scale = matplotlib.cm.ScalarMappable(norm, "viridis")
    ticks = FuncFormatter(lambda decade, _: f"{10.0**decade:g}")
    bar = figure.colorbar(scale, ax=axes, label="training loss (log scale)", shrink=0.9, format=ticks)
    bar.set_ticks([*decades])
    finish(
        figure, "Loss landscape: on a plane of two random, filter-normalised directions; + is the net", rows, about, []
    )
    return figure


def draw_bn(rows: "pd.DataFrame", about: str) -> Figure:
    """Error with BN's running statistics and with recalibrated ones: training and test images, a line a net."""
    means = rows.groupby(["block", "depth", "split", "statistics"])["error"].mean().unstack()
    nets = [(block, depth) for block in BLOCKS for depth in sorted(set(rows[rows["block"] == block]["depth"]))]
    figure = Figure(figsize=(9.2, 0.32 * len(nets) + 1.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, split in zip(axes, ("train", "test"), strict=True):
        for place, (block, depth) in enumerate(nets):
            ends, colour = means.xs((block, depth, split)), COLOURS[block]
            ax.plot([ends["running"], ends["recalibrated"]], [place, place], color=colour, linewidth=1.5, zorder=2)
            ax.plot(
                ends["running"], place, MARKERS[block], color=colour, markerfacecolor="white", markersize=8, zorder=3
            )
            ax.plot(ends["recalibrated"], place, MARKERS[block], color=colour, markersize=6, zorder=4)
        tidy(ax, "x").xaxis.set_major_formatter(PERCENT)
        ax.set_yticks(range(len(nets)), [f"{block}-{depth}" for block, depth in nets])
        images = rows[rows["split"] == split]
        most = max(float(images["error"].max()), 0.001)
        ax.set_xlim(-0.03 * most, 1.05 * most)  # for whole markers
        ax.set_xlabel(f"{ {'train': 'training', 'test': 'test'}[split] } error, {image_range(images)}")
    axes[0].invert_yaxis()
    keys = [
        Line2D([], [], color=GREY, marker="o", markersize=8, markerfacecolor="white", linestyle="", label="running"),
        Line2D([], [], color=GREY, marker="o", markersize=6, linestyle="", label="recalibrated"),
    ]
    figure.suptitle(
        f"Error with the statistics of BN kept in training, and with recalibrated ones\n{about}, {seed_range(rows)}",
        fontsize=10,
    )
    figure.legend(handles=keys, loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_ten_crop(rows: "pd.DataFrame", about: str) -> Figure:
    """Test error v depth, of the middle of each image and of ten crops of it."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for block in blocks_of(rows):
        for crops, style, face in ((1, ":", "white"), (10, "-", COLOURS[block])):
            mine = rows[(rows["block"] == block) & (rows["crops"] == crops)]
            mean = mine.groupby("depth")["error"].mean()
            label = f"{block}, {'the middle' if crops == 1 else 'ten crops'}"
            ax.plot(
                mean.index, mean, style, color=COLOURS[block], marker=MARKERS[block], markerfacecolor=face, label=label
            )
    tidy(ax, "y").yaxis.set_major_formatter(PERCENT)
    ax.set_xticks(sorted(set(rows["depth"])))
    ax.set_xlabel("depth (weight layers)")
    ax.set_ylabel(f"test error, {image_range(rows)}")
    figure.suptitle(f"Test error of one crop and of ten\n{about}, {seed_range(rows)}", fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def blocks_of(rows: "pd.DataFrame") -> list[str]:
    return [block for block in BLOCKS if (rows["block"] == block).any()]


def depth_colours(depths: list[int]) -> dict[int, str]:
    """Viridis, from dark to light, as in the error curves."""
    colours = matplotlib.colormaps["viridis"]
    return {depth: to_hex(colours(0.75 * i / max(len(depths) - 1, 1))) for i, depth in enumerate(depths)}


def moments_of(rows: "pd.DataFrame") -> dict[str, "pd.DataFrame"]:
    """The rows of fresh nets, whichever command measured them, and those of each net's last step."""
    fresh = rows[rows["step"] == 0].sort_values("init")
    fresh = fresh.drop_duplicates([*("id", "kind", "layer", "distance")])
    trained = rows[rows["step"] > 0]
    last = trained[trained["step"] == trained.groupby("id")["step"].transform("max")]
    return {when: there for when, there in (("freshly initialised", fresh), ("trained", last)) if len(there)}


def line(
    ax: Axes, values: "pd.DataFrame", *, color: object, label: str = "", marker: str = "", linewidth: float = 1.8
) -> None:
    """The mean of the columns, a seed each, and a band from the lowest to the highest."""
    if values.empty:
        return
    values = values.replace([np.inf, -np.inf], np.nan)
    if values.shape[1] > 1:
        ax.fill_between(values.index, values.min(axis=1), values.max(axis=1), color=color, alpha=0.18, linewidth=0)
    ax.plot(
        values.index, values.mean(axis=1), color=color, label=label, marker=marker, markersize=5, linewidth=linewidth
    )


def tidy(ax: Axes, grid: Literal["x", "y"] = "y") -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def block_keys(rows: "pd.DataFrame", *, markers: bool = False) -> list[Artist]:
    return [
        Line2D([], [], color=COLOURS[block], marker=MARKERS[block] if markers else "", markersize=5, label=block)
        for block in blocks_of(rows)
    ]


def finish(figure: Figure, title: str, rows: "pd.DataFrame", about: str, keys: Iterable[Artist]) -> None:
    """Title and legend: what is measured, of which study, on how many images."""
    keys = list(keys)
    several = rows.groupby(["block", "depth"])["seed"].nunique().max() > 1
    if several and not any(str(key.get_label()).startswith("lowest") for key in keys):
        keys.append(Patch(color=GREY, alpha=0.25, linewidth=0, label="lowest to\nhighest seed"))
    wide = int(13 * figure.get_figwidth())  # characters
    lines = [*textwrap.wrap(title, wide), *textwrap.wrap(about, wide), f"{image_range(rows)}, {seed_range(rows)}"]
    figure.suptitle("\n".join(lines), fontsize=10)
    if keys:
        figure.legend(handles=keys, loc="outside right center", frameon=False, fontsize=9)


def image_range(rows: "pd.DataFrame") -> str:
    low, high = int(rows["images"].min()), int(rows["images"].max())
    return f"{low:,} images" if low == high else f"{low:,} to {high:,} images"


def seed_range(rows: "pd.DataFrame") -> str:
    counts = rows.groupby(["block", "depth"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"{low} seed{'' if low == 1 else 's'}" if low == high else f"{low} to {high} seeds"
