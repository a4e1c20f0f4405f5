"""Does training error rise with depth? Differences of final training errors with intervals over seeds.

Imports no torch: a verdict is read off the logs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from degrade import paper
from degrade.config import BLOCKS, DATASETS
from degrade.store import FINISHED

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.005  # a rise of at most half a percentage point does not count as degradation
CONFIDENCE = 0.95
CONTRAST = "plain-residual"


@dataclass(frozen=True)
class Verdict:
    """One comparison of final training errors, deeper minus shallower.

    Args:
        study: its name.
        block: "plain", "residual", or "plain-residual": the plain nets' difference minus the residual nets'.
        shallow, deep: the two depths.
        seeds: the smallest number of seeds among the groups compared.
        difference: of the mean errors, a fraction; positive where the deeper net is worse.
        low, high: Welch's 95 % interval; None with one seed, or where every shallow run diverged.
        verdict: "degrades" (low > 0), "does not degrade" (high <= 0.005) or "undecided".
        steps: updates of the protocol.
        diverged: run ids counted at chance error.
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
    from scipy import stats

    total = float(sum(sign * np.mean(group) for sign, group in zip(signs, groups, strict=True)))
    if min(len(group) for group in groups) < 2:
        return total, None, None
    squares = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    variance = sum(squares)
    if variance == 0:
        return total, total, total
    freedom = variance**2 / sum(s**2 / (len(group) - 1) for s, group in zip(squares, groups, strict=True))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return total, total - half, total + half


def decide(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "undecided"
    return "degrades" if low > 0 else "does not degrade" if high <= MARGIN else "undecided"


def chance_error(dataset: str) -> float:
    """The error of guessing: 1 - 1 / classes."""
    return 1 - 1 / DATASETS[dataset].num_classes


def final_epochs(epochs: "pd.DataFrame") -> "pd.DataFrame":
    """The last row of each run; the errors of a diverged run are set to chance."""
    last = epochs.sort_values("epoch").groupby(["study", "id"], sort=False).tail(1).copy()
    diverged = last["status"] == "diverged"
    chance = last["dataset"].map(chance_error)
    for column in ("train_error", "test_error"):
        last[column] = last[column].mask(diverged, chance)
    return last


def verdicts(epochs: "pd.DataFrame") -> list[Verdict]:
    """Every comparison the runs allow: per study and block, each deeper net minus the shallowest, and the contrast.

    Args:
        epochs: as `store.load` gives it. Only runs that are done or diverged count.
    """
    results = []
    final = final_epochs(epochs)
    for _, runs in final[final["status"].isin(FINISHED)].groupby("study", sort=True):
        depths = {block: sorted(set(runs.loc[runs["block"] == block, "depth"])) for block in BLOCKS}
        for block in BLOCKS:
            results += [_compare(runs, (block,), depths[block][0], deep) for deep in depths[block][1:]]
        both = [depth for depth in depths["plain"] if depth in depths["residual"]]
        results += [_compare(runs, ("plain", "residual"), both[0], deep) for deep in both[1:]]
    return results


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
        steps=int(runs["steps"].iloc[0]),
        diverged=tuple(diverged),
    )
