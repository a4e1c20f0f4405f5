"""The loss around a net, on a line or a plane through its weights.

Source: section 4 of Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv:1712.09913): Gaussian
directions of which each filter is scaled to the norm of the net's own, so that nets with weights of different scale
compare. A row of the linear layer is a filter; biases and BN's scale and shift stay as they are, as in the paper's
code. In which mode BN is, the paper does not say: here, as there, eval mode with the net's own running statistics,
which belong to its centre.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice, product

import torch
from torch import Tensor, nn

from degrade.evaluate import evaluate


def directions(weights: list[Tensor], count: int, seed: int) -> list[list[Tensor]]:
    """`count` random directions, each a tensor a weight; the first is the same whatever the count."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randn(weight.shape, generator=generator) for weight in weights] for _ in range(count)]
    return [
        [d.to(w.device) * (lengths(w) / lengths(d).to(w.device)) for d, w in zip(direction, weights, strict=True)]
        for direction in drawn
    ]


def lengths(weight: Tensor) -> Tensor:
    """The L2 norm of each filter, or row of the linear layer, (filters, 1, ...)."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norm


def landscape_rows(points: int, dimension: int) -> int:
    """How many rows `landscape` gives, each the time of one evaluation.

    Raises:
        ValueError: `points` is even or below 3, or `dimension` is neither 1 nor 2.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd, for the net itself to be one of them, and at least 3; got {points}")
    if dimension not in (1, 2):
        raise ValueError(f"dimension must be 1 or 2; got {dimension}")
    return int(points**dimension)


def landscape(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    *,
    points: int,
    extent: float = 1.0,
    dimension: int,
    seed: int,
    skip: int = 0,
) -> Iterator[dict[str, object]]:
    """A row for each point of the grid, y running fastest: dimension, x, y (0 on a line), loss, error, images.

    The weights there are w + x d1 + y d2. A loss that is not finite is given as it is.

    Args:
        net: takes normalised float images to logits; stays as it is.
        images, labels, mean: as for `evaluate`.
        points: along each axis, odd: the middle one is the net itself.
        extent: the axes run from -extent to extent; at 1 a direction is as long as the weights.
        dimension: 1 or 2.
        seed: of the directions.
        skip: rows that are there already; the others are what they would be without it.

    Raises:
        ValueError: see `landscape_rows`.
    """
    landscape_rows(points, dimension)
    copy = deepcopy(net)
    weights = [parameter.detach() for parameter in copy.parameters() if parameter.ndim > 1]
    centre = [weight.clone() for weight in weights]
    along = directions(centre, dimension, seed)
    axis = [extent * (2 * i - (points - 1)) / (points - 1) for i in range(points)]
    for place in islice(product(axis, repeat=dimension), skip, None):
        for weight, start, *steps in zip(weights, centre, *along, strict=True):
            weight.copy_(start + sum(x * step for x, step in zip(place, steps, strict=True)))
        loss, error = evaluate(copy, images, labels, mean)
        x, y = (*place, 0.0)[:2]
        yield {"dimension": dimension, "x": x, "y": y, "loss": loss, "error": error, "images": len(images)}
