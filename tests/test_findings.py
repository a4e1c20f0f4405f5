"""The findings in results/a-martyn/README.md, held to account by the files beside it.

A function for each paragraph, in its order: it asserts what is said there in words, and yields what is said in numbers,
computed anew. A digit that none of them yields, and that is not part of a net's name, a link or a citation, fails.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import minimum_filter
from scipy.spatial import Delaunay

import degrade
from degrade.paper import CIFAR10

RESULTS = Path(__file__).parents[1] / "results"
STUDY = RESULTS / "a-martyn"
CONSTRUCTED = {block: RESULTS / f"a-martyn-identity-{block}-20-56-s0" for block in ("plain", "residual")}
NO_FINDING = r"\]\([^)]*\)|et al\. \d{4}|Fig\. \d|CIFAR-10|(?i:plain|residual)-(?:20|56)"


def read(path):
    return json.loads(path.read_text())


def probe(name):
    """The rows of a probe by block and depth, errors in percent, and on how many images each of them was measured."""
    rows = pd.read_csv(STUDY / "probes" / f"{name}.csv").set_index(["block", "depth"])
    (images,) = set(rows.pop("images"))
    return rows.assign(error=100 * rows["error"]) if "error" in rows else rows, images


def training_error(folder):
    """In percent, by block, depth and step."""
    return 100 * degrade.load(folder).set_index(["block", "depth", "step"])["train_error"]


def listed(values, form):
    return ", ".join(format(value, form) for value in values)


def the_nets():
    logs = degrade.load(STUDY)
    assert len(logs.groupby("id")) == len(logs.groupby(["block", "depth"])) == 8
    assert set(logs["block"]) == {"plain", "residual"}
    (source,) = {read(path)["source"] for path in STUDY.glob("*/imported.json")}
    link, rest = source.split(", ", 1)
    yield f"[a-martyn/resnet]({link}) ({rest})"
    (epochs,) = set(logs.groupby("id")["epoch"].count())
    yield f"{logs['depth'].min()} to {logs['depth'].max()} layers, trained for {epochs} epochs, one seed each"
    probed = {name: set(probe(name)[0].index) for name in ("gradients", "landscape", "bn")}
    shallow, deep = sorted({depth for nets in probed.values() for _, depth in nets})
    assert [len(nets) for nets in probed.values()] == [4, 4, 4]
    yield f"gradients, landscapes and BN statistics are of the four with {shallow} and {deep} layers"


def the_import():
    logs = degrade.load(STUDY)
    measured = logs.groupby("id").tail(1).set_index("id")
    records = {path.parent.name: read(path) for path in STUDY.glob("*/imported.json")}
    claimed = pd.DataFrame({run: record["claimed"] for run, record in records.items()}).T.loc[measured.index]
    assert (measured["test_error"] == claimed["test_error"]).all()
    assert {record["weights_of"] for record in records.values()} == {"last"}
    assert (measured["test_error"] > logs.groupby("id")["test_error"].min()).all()  # "not its best"
    assert (measured["train_error"] < claimed["train_error"]).all()
    nets = pd.MultiIndex.from_frame(measured[["block", "depth"]])
    test, clean, augmented = (
        (100 * errors).set_axis(nets)
        for errors in (measured["test_error"], measured["train_error"], claimed["train_error"])
    )
    yield f"plain {listed(test['plain'], '.2f')} %; residual {listed(test['residual'], '.2f')} %"
    yield f"plain {listed(clean['plain'], '.2f')} %; residual {listed(clean['residual'], '.2f')} %"
    assert 4 < clean["plain", 56] / clean["plain", 20] < 5
    assert 1 / 12 < clean["residual", 56] / clean["residual", 20] < 1 / 10
    yield (
        "plain-56 has more than four times the training error of plain-20, "
        "and residual-56 less than a tenth of residual-20's"
    )
    assert clean["plain"].diff().idxmax() == augmented["plain"].diff().idxmax() == 44
    paper = {net.depth: 100 * net.train_error for net in CIFAR10 if net.block == "plain"}
    yield (
        f"rises most from 32 to 44 layers, and by {clean['plain', 56] - clean['plain', 44]:.2f} points from 44 to 56 "
        f"({augmented['plain', 56] - augmented['plain', 44]:.2f} on augmented images), "
        f"where the paper's rises from {paper[44]:.1f} to {paper[56]:.1f} %"
    )


def responses():
    rows, images = probe("responses")
    yield f"{images:,} training images"
    mean = rows.groupby(["block", "depth"])["std"].apply(lambda layers: layers.iloc[:-1].mean())
    plain, residual = mean["plain"], mean["residual"]
    assert plain.is_monotonic_decreasing
    assert residual.is_monotonic_decreasing
    assert (residual < plain).all()
    yield f"falls with depth in residual nets ({listed(residual, '.2f')})"
    yield f"below that of plain nets ({listed(plain, '.2f')})"
    layers = rows.reset_index().pivot(index=["depth", "stage", "layer"], columns="block", values="std")
    smaller = layers["residual"] < layers["plain"]
    yield f"below residual-56's in {(~smaller[56, 3]).sum()} of {len(smaller[56, 3])} layers"
    ranked = layers.groupby("depth").transform(np.sort)
    by_size = ranked["residual"] < ranked["plain"]
    yield f"for {by_size.sum()} of {len(by_size)} layers sorted by size, and for {smaller.sum()} layer by layer"


def lesions():
    rows, images = probe("lesion")
    yield f"{images:,} test images"
    intact, alone, pairs = (rows[rows["deleted"] == count] for count in (0, 1, 2))
    whole, median = intact["error"], alone.groupby(["block", "depth"])["error"].median()
    plain, residual = (alone.loc[(block, 56)]["error"] for block in ("plain", "residual"))
    yield (
        f"Deleting one block of plain-56 gives {plain.min():.0f} to {plain.max():.0f} % test error "
        f"(median {median['plain', 56]:.0f} %, intact {whole['plain', 56]:.0f} %); of residual-56 {residual.min():.0f} "
        f"to {residual.max():.0f} %, with a median of {median['residual', 56]:.1f} % "
        f"(intact {whole['residual', 56]:.1f} %)"
    )
    changes = alone.loc[("residual", 56)]["changes_shape"].to_numpy() == 1
    (first, second), last, others = residual[changes], residual.iloc[-1], residual[~changes].iloc[:-1]
    assert others.max() < min(first, second, last)
    yield (
        f"exceptions in residual-56 are the blocks that change the shape ({first:.0f} and {second:.0f} %) and the very "
        f"last ({last:.0f} %); the other {len(others)} leave {others.min():.0f} to {others.max():.0f} %"
    )
    cost = median - whole
    assert cost["residual"].is_monotonic_decreasing
    *costs, least = cost["residual"]
    shallow, deep = (pairs.loc[("residual", depth)]["error"] for depth in (20, 56))
    assert len(shallow) == len(deep)
    yield (
        f"nets of {min(cost['residual'].index)} to {max(cost['residual'].index)} layers the median block costs "
        f"{listed(costs, '.0f')} and {least:.0f} points (in plain ones {cost['plain'].min():.0f} to "
        f"{cost['plain'].max():.0f}), and two at random leave {shallow.mean():.0f} % error in residual-20, "
        f"{deep.mean():.0f} % in residual-56 (mean of {len(deep)} draws)"
    )


def gradients():
    rows, images = probe("gradients")
    yield f"{images} training images"
    norms = rows[rows["kind"] == "norm"]
    fresh = norms[norms["step"] == 0]["value"]
    shallow, plain, residual = fresh["plain", 20], fresh["plain", 56], fresh["residual", 56]
    assert plain.iloc[-1] == plain.min()  # "do not vanish"
    assert plain.iloc[0] == plain.max() > 100 * shallow.max()  # "explode with depth"
    yield (
        f"in plain-56 grows from {plain.iloc[-1]:.1f} in the linear layer to {round(plain.iloc[0], -2):,.0f} in the "
        f"first one; in residual-56 it stays between {residual.min():.1f} and {residual.max():.0f}, "
        f"and in plain-20 below {math.ceil(shallow.max())}"
    )
    trained = norms[norms["step"] > 0].groupby(["block", "depth"])["value"]
    times = trained.max() / trained.min()
    yield f"the largest is {times.min():.1f} to {times.max():.1f} times the smallest"
    correlation = rows[rows["kind"] == "correlation"]
    nearest = correlation[correlation["distance"] == correlation["distance"].min()].set_index("step", append=True)
    before, after = (nearest["value"].xs(step, level="step") for step in sorted({*nearest.index.levels[2]}))
    assert (before["plain"] < before["residual"]).all()  # shattered as Balduzzi et al. found
    assert before["plain", 56] < before["plain", 20]
    yield f"with {100 * nearest['distance'].iloc[0]:.0f} % of noise"
    (a, b, c, d), (*trained, last) = before, after
    yield f"by {a:.2f} in plain-20, {b:.2f} in plain-56, {c:.2f} in residual-20 and {d:.2f} in residual-56"
    assert [*after.index] == [("plain", 20), ("plain", 56), ("residual", 20), ("residual", 56)]
    yield f"After training that is {listed(trained, '.2f')} and {last:.2f}"


def landscapes():
    rows, images = probe("landscape")
    plain, residual = (
        rows[rows["dimension"] == 2].loc[(block, 56)].pivot(index="y", columns="x", values="loss").to_numpy()
        for block in ("plain", "residual")
    )
    assert plain.shape == residual.shape
    yield f"{plain.shape[0]} x {plain.shape[1]} points, {images} training images"
    assert residual.min() < plain.min() == plain[tuple(side // 2 for side in plain.shape)]
    low, middle, high = levels = (0.1, 1, 10)
    near, far = ([100 * np.mean(loss < level) for loss in (residual, plain)] for level in (low, high))
    assert near[0] > near[1]
    yield (
        f"around residual-56 is deeper and wider than that around plain-56: the loss is below {low} on {near[0]:.1f} % "
        f"of the plane against {near[1]:.1f} %"
    )
    assert far[0] < far[1]
    yield f"plain-56 is the flatter one: below {high} on {far[1]:.0f} % against {far[0]:.0f} %"
    grid = np.argwhere(np.isfinite(plain))
    for level in levels:
        hull = Delaunay(np.argwhere(plain < level))
        assert (hull.find_simplex(grid) >= 0).sum() == (plain < level).sum()  # convex: the hull holds no other points
    centre, *others = sorted(plain[minimum_filter(plain, 3, mode="nearest") == plain])
    assert centre == plain.min()
    yield f"contours of plain-56 at {low}, {middle} and {high} are convex"
    yield f"other minima on this grid are dips at losses above {math.floor(min(others))}"


def bn_statistics():
    rows, images = probe("bn")
    assert images == read(CONSTRUCTED["plain"] / "identity.json")["test"]["images"]  # all of them
    yield f"{images:,} training images, all test images"
    errors = rows.set_index(["split", "statistics"], append=True)["error"].unstack()
    train, test = errors.loc[("plain", 56, "train")], errors.loc[("plain", 56, "test")]
    change = (errors["recalibrated"] - errors["running"]).abs().drop(("plain", 56))
    assert change.max() < 0.1
    assert train["recalibrated"] > 4 * errors.loc[("plain", 20, "train"), "recalibrated"]
    yield (
        f"of plain-56 from {train['running']:.2f} to {train['recalibrated']:.2f} % and its test error from "
        f"{test['running']:.2f} to {test['recalibrated']:.2f} %, and the others by less than 0.1 points"
    )
    assert read(STUDY / "study.json")["shared"]["padding"] == "black"


def the_construction():
    record = read(CONSTRUCTED["plain"] / "identity.json")
    train, test, start, scratch = (record[name] for name in ("train", "test", "start", "scratch"))
    assert train["differing"] == test["differing"] == 0
    yield f"all {train['images']:,} training and {test['images']:,} test images"
    errors = training_error(STUDY)
    assert train["deep_error"] == train["shallow_error"] == errors["plain", 20].iloc[-1] / 100
    yield f"the same {100 * train['deep_error']:.2f} % training error"
    assert scratch["train_error"] == errors["plain", 56].iloc[-1] / 100 > train["deep_error"]
    yield (
        f"a plain-56 that is no worse than plain-20 exists, and {scratch['steps']:,} steps from scratch end at "
        f"{100 * scratch['train_error']:.2f} %"
    )
    gap = start["training_mode"]
    yield (
        f"off by up to {gap['max_difference']:.2f} in a logit, but hardly in error, {100 * gap['deep_error']:.2f} "
        f"against {100 * gap['shallow_error']:.2f} % on {gap['images']:,} augmented images"
    )


def training_on():
    rates = sorted(set(degrade.load(STUDY)["lr"]))
    (lr,) = {lr for folder in CONSTRUCTED.values() for lr in degrade.load(folder)["lr"]}
    assert len(rates) == 3
    assert lr == rates[1]
    yield f"constant learning rate of {lr}"
    plain, residual = (training_error(folder)[block] for block, folder in CONSTRUCTED.items())
    (first, at_once), (last, then) = plain[56].items()
    yield (
        f"after {first} steps the constructed plain-56 is at {at_once:.2f} % training error, "
        f"after {last} at {then:.2f} %"
    )
    assert then < at_once  # "still falling"
    yield f"is at {plain[20, first]:.2f} and {plain[20, last]:.2f} %"
    start = read(CONSTRUCTED["residual"] / "identity.json")
    compared = (start["train"], start["test"], start["start"]["training_mode"])
    assert [there["differing"] for there in compared] == [0, 0, 0]  # "no logit differs"
    ((steps, deep),) = residual[56].items()
    yield f"after {steps} steps at {deep:.2f} % beside its control's {residual[20, steps]:.2f} %"
    assert 2 * steps == last
    assert then - plain[20, last] > 8
    assert deep - residual[20, steps] < 0.2  # "next to none"


FINDINGS = (
    the_nets,
    the_import,
    responses,
    lesions,
    gradients,
    landscapes,
    bn_statistics,
    the_construction,
    training_on,
)
_, *PARAGRAPHS = (STUDY / "README.md").read_text().split("\n\n")  # without the heading


@pytest.mark.parametrize(
    ("finding", "paragraph"),
    [*zip(FINDINGS, PARAGRAPHS, strict=True)],
    ids=[finding.__name__ for finding in FINDINGS],
)
def test_the_files_say_what_the_prose_says(finding, paragraph):
    text = " ".join(paragraph.split())
    for fragment in finding():
        assert fragment in text
        text = text.replace(fragment, "", 1)
    text = re.sub(NO_FINDING, "", text)
    assert not re.search(r"\d", text), text
