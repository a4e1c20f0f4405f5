"""Does training error rise with depth? Differences of final training errors with intervals over seeds.

Imports no torch: a verdict is read off the logs.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from degrade import paper
from degrade.config import BLOCKS, PROTOCOLS, TYPES, dataset_of, matches_protocol, short_name, spelt, usual_milestones
from degrade.store import FINISHED, Study

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.005  # how far above 0 an interval that does not lie above 0 may end without being undecided
CONFIDENCE = 0.95
CONTRAST = "plain-residual"
ORDER = (*BLOCKS, CONTRAST)
WITH_DATASET = ("dataset", "augment", "train_images", "test_images")  # what goes with the data set


@dataclass(frozen=True)
class Verdict:
    """One comparison of final training errors, deeper minus shallower.

    Args:
        study: its name; of the best of a grid, the names of those compared.
        block: "plain", "residual", "preact", or "plain-residual": the plain nets' difference minus the residual nets'.
        shallow, deep: the two depths.
        seeds: the smallest number of seeds among the groups compared.
        difference: of the mean errors, a fraction; positive where the deeper net is worse.
        low, high: Welch's 95 % interval; None with one seed, or where every shallow run diverged.
        verdict: "degrades" (low > 0), "does not degrade" (high <= 0.005) or "undecided".
        steps: updates of the protocol.
        diverged: run ids counted at chance error.
        field: that the grid is over, where the comparison is one of a grid's.
        value: of that field in the study.
        best: of the best of a grid, the value each net is best with: {"plain-56": 0.05, "plain-20": 0.1}.
    """

    study: str
    block: str
    shallow: int
    deep: int
    seeds: int
    difference: float
    low: float | None
    high: float | None
    verdict: str
    steps: int
    diverged: tuple[str, ...]
    field: str | None = None
    value: Any = None
    best: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"diverged": list(self.diverged), "early": self.early}

    @property
    def words(self) -> str:
        """The verdict as a table shows it: of the contrast it is said which of the two degrades more."""
        if self.block != CONTRAST:
            return self.verdict
        return {"degrades": "plain degrades more", "does not degrade": "plain degrades no more"}.get(
            self.verdict, self.verdict
        )

    def place(self) -> tuple[int, int]:
        """By which comparisons are sorted: the nets, then the depth."""
        return ORDER.index(self.block), self.deep

    @property
    def early(self) -> bool:
        """Whether the protocol is shorter than the paper's."""
        return self.steps < paper.STEPS


def interval(groups: Sequence[Sequence[float]], signs: Sequence[int]) -> tuple[float, float | None, float | None]:
    """The signed sum of the groups' means, with Welch's interval (unequal variances, Satterthwaite's freedom).

    With two groups and signs (1, -1) this is Welch's t interval of a difference (Welch 1947, Biometrika 34).

    Returns:
        The sum, and its interval's ends: None where a group has fewer than two values.
    """
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats has it too, and takes a second more

    total = float(sum(sign * np.mean(group) for sign, group in zip(signs, groups, strict=True)))
    if min(len(group) for group in groups) < 2:
        return total, None, None
    squares = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    variance = sum(squares)
    if variance == 0:
        return total, total, total
    freedom = variance**2 / sum(s**2 / (len(group) - 1) for s, group in zip(squares, groups, strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return total, total - half, total + half


def decide(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "undecided"
    return "degrades" if low > 0 else "does not degrade" if high <= MARGIN else "undecided"


def chance_error(dataset: str) -> float:
    """The error of guessing: 1 - 1 / classes."""
    return 1 - 1 / dataset_of(dataset).num_classes


def final_epochs(epochs: "pd.DataFrame") -> "pd.DataFrame":
    """The last row of each run; the errors of a diverged run are set to chance."""
    last = epochs[epochs["epoch"] == epochs.groupby(["study", "id"])["epoch"].transform("max")].copy()
    diverged = last["status"] == "diverged"
    chance = last["dataset"].map(chance_error)
    for column in ("train_error", "test_error"):
        last[column] = last[column].mask(diverged, chance)
    return last


def finished(epochs: "pd.DataFrame") -> "pd.DataFrame":
    """`final_epochs` of the runs that are done or diverged."""
    final = final_epochs(epochs)
    return final[final["status"].isin(FINISHED)]


def from_trained(init: str) -> bool:
    """Whether runs with this `init` began from trained weights (`degrade identity`): they show no degradation."""
    return init.startswith("identity:")


def verdicts(epochs: "pd.DataFrame") -> list[Verdict]:
    """Every comparison the runs allow: per study and block, each deeper net minus the shallowest, and the contrast.

    Args:
        epochs: as `store.load` gives it. Only runs that are done or diverged count, and none that began from trained
            weights.
    """
    if epochs.empty:
        return []
    studies = [runs for _, runs in finished(epochs).groupby("study", sort=True)]
    return [v for runs in studies if not from_trained(runs["init"].iloc[0]) for v in _comparisons(runs)]


def deepest(found: Sequence[Verdict]) -> list[Verdict]:
    """Of each block, and of the contrast, the deepest comparison that has an interval, else the deepest.

    So one run of a yet deeper net does not hide what several seeds show. `found` comes by depth.
    """
    last = {v.block: v for v in found}
    return list((last | {v.block: v for v in found if v.low is not None}).values())


@dataclass(frozen=True)
class Grid:
    """Studies that differ in one field of the protocol alone; or in the data set, and what goes with it.

    Args:
        field: its name.
        values: of each study, by its name; rising.
    """

    field: str
    values: dict[str, Any]


def grids(studies: Mapping[str, Mapping[str, Any]]) -> list[Grid]:
    """Those among studies in one folder, by field; a study may be in several.

    Milestones at half and three quarters of the steps go with the steps. Two data sets make no grid, since their
    errors do not compare; nor do studies of which two have the same value, nor any that began from trained weights.

    Args:
        studies: the fields that the runs of each have in common (`Study.shared`), by name.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name, shared in studies.items():
        if from_trained(shared["init"]):
            continue
        usual = shared["milestones"] == list(usual_milestones(shared["steps"]))
        described = dict(shared) | {"milestones": "usual" if usual else shared["milestones"]}
        for field in described.keys() - {"dataset"}:
            others = {other: value for other, value in described.items() if other != field}
            key = f"{PurePath(name).parent}: {json.dumps(others, sort_keys=True)}"
            alike.setdefault((field, key), []).append(name)
    found = []
    for field, key in sorted(alike, key=lambda group: (list(TYPES).index(group[0]), min(alike[group]))):
        values = {name: studies[name][field] for name in alike[field, key]}
        if len(values) > 1 and len(set(map(spelt, values.values()))) == len(values):
            rising = sorted(values.items(), key=lambda pair: (pair[1] is None, pair[1]))  # None: all images
            found.append(Grid(field, dict(rising)))
    return found


def grids_of(studies: Iterable[Study]) -> dict[str, Grid]:
    """The grids among the studies that were trained here and have an epoch, by the names of their figures."""
    begun = [study for study in studies if not study.imported and any(run.last for run in study.runs)]
    return _named([(f"grid-{grid.field}", grid) for grid in grids({study.name: study.shared for study in begun})])


def data_sets_of(studies: Iterable[Study]) -> dict[str, Grid]:
    """Studies in one folder that are alike but for the data set, two at least, by the names of their figures.

    How many images there are and how they are augmented goes with the data set. Of several studies of one, that of
    the protocol itself stands for it, else the one with most finished runs. None that was imported, began from trained
    weights, or has no finished run.

    Returns:
        Grids whose values are the data sets' short names, with the hash where two folders have the same.
    """
    alike: dict[str, dict[str, Study]] = {}
    for study in sorted(studies, key=_standing):
        if study.imported or from_trained(study.shared["init"]) or not _count_finished(study):
            continue
        others = {name: value for name, value in study.shared.items() if name not in WITH_DATASET}
        key = f"{PurePath(study.name).parent}: {json.dumps(others, sort_keys=True)}"
        alike.setdefault(key, {}).setdefault(study.shared["dataset"], study)
    found = []
    for chosen in alike.values():
        if len(chosen) < 2:
            continue
        short = Counter(map(short_name, chosen))
        values = {}
        for dataset, study in sorted(chosen.items(), key=lambda pair: (short_name(pair[0]), pair[0])):
            own = f" {dataset.rpartition(':')[2]}" if short[short_name(dataset)] > 1 else ""
            values[study.name] = short_name(dataset) + own
        protocol = next(iter(chosen.values())).protocol
        stem = f"data-sets-{protocol}" if protocol in PROTOCOLS else "data-sets"
        found.append((stem, Grid("dataset", values)))
    return _named(found)


def _standing(study: Study) -> tuple[bool, int, str]:
    """By which the studies of one data set are sorted; the first stands for it."""
    return not matches_protocol(study.shared, study.protocol), -_count_finished(study), study.name


def _count_finished(study: Study) -> int:
    return sum(run.status in FINISHED for run in study.runs)


def _named(found: Sequence[tuple[str, Grid]]) -> dict[str, Grid]:
    """Each by its stem, with a study's name behind it where several have the same."""
    stems = Counter(stem for stem, _ in found)
    return {stem if stems[stem] == 1 else f"{stem}-{min(g.values).replace('/', '-')}": g for stem, g in found}


def grid_verdicts(epochs: "pd.DataFrame", grid: Grid) -> list[Verdict]:
    """The verdicts of the grid's studies, comparison by comparison, each at every value."""
    mine = verdicts(epochs[epochs["study"].isin(list(grid.values))])
    mine.sort(key=lambda v: (v.place(), list(grid.values).index(v.study)))
    return [replace(v, field=grid.field, value=grid.values[v.study]) for v in mine]


def best_verdicts(epochs: "pd.DataFrame", grid: Grid) -> list[Verdict]:
    """The comparisons of the best with the best: of each net, the runs with the value whose mean error is lowest.

    That is to each net's own advantage, so a deeper net that is worse all the same was not mistuned in this field, as
    far as its values go. The best are chosen on the runs compared, which the intervals do not allow for.
    """
    final = finished(epochs)
    final = final[final["study"].isin(list(grid.values))]
    chosen = []
    best: dict[str, Any] = {}
    for (block, depth), runs in final.groupby(["block", "depth"]):
        means = runs.groupby("study")["train_error"].mean()
        study = min((name for name in grid.values if name in means), key=means.__getitem__)
        best[f"{block}-{depth}"] = grid.values[study]
        chosen.append(runs[runs["study"] == study])
    if not chosen:
        return []
    import pandas as pd

    found = []
    for v in _comparisons(pd.concat(chosen)):
        nets = [f"{block}-{depth}" for block in v.block.split("-") for depth in (v.deep, v.shallow)]
        values = {net: best[net] for net in nets}
        studies = [name for name, value in grid.values.items() if value in values.values()]
        found.append(replace(v, study=", ".join(studies), field=grid.field, best=values))
    return found


def _comparisons(runs: "pd.DataFrame") -> list[Verdict]:
    """Of each block each deeper net minus the shallowest, and the contrast; a row a run, each net's of one study."""
    results = []
    depths = {block: sorted(set(runs.loc[runs["block"] == block, "depth"])) for block in BLOCKS}
    for block in BLOCKS:
        results += [_compare(runs, (block,), depths[block][0], deep) for deep in depths[block][1:]]
    both = [depth for depth in depths["plain"] if depth in depths["residual"]]
    return results + [_compare(runs, ("plain", "residual"), both[0], deep) for deep in both[1:]]


def _compare(runs: "pd.DataFrame", blocks: Sequence[str], shallow: int, deep: int) -> Verdict:
    """Deep minus shallow of the first block; less that of the second, if there are two."""
    groups, signs, diverged, lost = [], [], [], False
    for block, block_sign in zip(blocks, (1, -1), strict=False):
        for depth, depth_sign in ((deep, 1), (shallow, -1)):
            group = runs[(runs["block"] == block) & (runs["depth"] == depth)]
            groups.append(group["train_error"].tolist())
            lost = lost or (depth == shallow and set(group["status"]) == {"diverged"})
            signs.append(block_sign * depth_sign)
            diverged += group.loc[group["status"] == "diverged", "id"].tolist()
    difference, low, high = interval(groups, signs)
    if lost:  # nothing was learnt at the depth compared with, so there is nothing to degrade from
        low = high = None
    return Verdict(
        study=str(runs["study"].iloc[0]),
        block=blocks[0] if len(blocks) == 1 else CONTRAST,
        shallow=int(shallow),
        deep=int(deep),
        seeds=min(map(len, groups)),
        difference=difference,
        low=low,
        high=high,
        verdict=decide(low, high),
        steps=int(runs["steps"].min()),
        diverged=tuple(diverged),
    )
