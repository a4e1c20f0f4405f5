"""Delete blocks of a trained net and see what is left of it.

Source: Veit, Wilber, Belongie 2016 (arXiv:1605.06431): Fig. 3, each single block deleted from a residual and from a
plain net (there VGG), and Fig. 5a, several random ones of a residual net. A deleted residual block leaves its shortcut.
What a deleted block of a plain net leaves where it changes the shape, the paper does not say: here the same,
option A's padded subsampling. A plain and a residual net of one depth and seed lose the same blocks.

The paper says neither whether random choices of different size are related: here a draw is one random order of
the blocks, of which ever more are deleted from its start.
"""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from itertools import islice

import numpy as np
from torch import Tensor, nn

from degrade.data.plan import random_words
from degrade.evaluate import evaluate
from degrade.nets import Bottleneck, Net

LESION = 3  # a stream of the seed, beside those of data/
COUNTS = (2, 3, 5, 8, 13, 21)
DRAWS = 5


class Lesioned(nn.Module):
    """The net without the layers of these blocks."""

    def __init__(self, net: Net, deleted: Collection[int]):
        super().__init__()
        self.net = net
        self.deleted = deleted

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)
        for i, block in enumerate(self.net.blocks):
            x = block.without_layers(x) if i in self.deleted else block(x)
        return self.net.head(x)


def deletions(blocks: int, counts: Sequence[int], draws: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Draw and deleted blocks of each row: none, each one alone, then as many random ones as each count says."""
    yield 0, []
    for block in range(blocks):
        yield 0, [block]
    for count in counts:
        for draw in range(draws if count < blocks else 0):
            order = np.argsort(random_words(seed, LESION, draw, blocks), kind="stable")
            yield draw, sorted(order[:count].tolist())


def lesion_rows(blocks: int, counts: Sequence[int] = COUNTS, draws: int = DRAWS) -> int:
    """How many rows `lesion` gives for a net with so many blocks, each the time of at most one evaluation."""
    return sum(1 for _ in deletions(blocks, counts, draws, 0))


def lesion(
    net: Net,
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    *,
    seed: int,
    counts: Sequence[int] = COUNTS,
    draws: int = DRAWS,
    skip: int = 0,
) -> Iterator[dict[str, object]]:
    """A row for the intact net, for each block deleted alone, and for each random choice of several.

    Columns: deleted (how many), blocks (from 0, joined by "+"), changes_shape (1 if one of them does, else 0), draw,
    error and loss (eval mode), images (how many).

    Args:
        net: stays as it is.
        images, labels, mean: as for `evaluate`.
        seed: of the random choices.
        counts: how many blocks to delete at once; those that are not below the number of blocks are left out.
        draws: random choices a count.
        skip: rows that are there already; the others are what they would be without it.
    """
    copy = deepcopy(net)
    lasts = [block.conv3 if isinstance(block, Bottleneck) else block.conv2 for block in copy.blocks]
    shape = [block.conv1.in_channels != last.out_channels for block, last in zip(copy.blocks, lasts, strict=True)]
    for draw, deleted in islice(deletions(len(shape), counts, draws, seed), skip, None):
        loss, error = evaluate(Lesioned(copy, deleted), images, labels, mean)
        yield {
            "deleted": len(deleted),
            "blocks": "+".join(map(str, deleted)),
            "changes_shape": int(any(shape[i] for i in deleted)),
            "draw": draw,
            "error": error,
            "loss": loss,
            "images": len(images),
        }
