"""Do gradients vanish, or do they shatter? Their norms in each layer, and how alike they are at nearby inputs.

Norms: section 4.1 of He et al. 2015 (arXiv:1512.03385) says of plain nets that "the backward propagated gradients
exhibit healthy norms with BN" and shows no numbers; here they are.

Correlation: Balduzzi et al. 2017, "The Shattered Gradients Problem" (arXiv:1702.08591): gradients with respect to the
input decorrelate over ever shorter distances in deeper plain nets, far less so with skips. The theory there is of
fully connected nets at initialisation and of correlation over random weights. For trained nets on images the paper
leaves the measure open. Here it is, for one image, Pearson's correlation over the pixels and colours of two gradients
of the true class's logit: at the image, and at the image plus Gaussian noise of a given relative length; then the mean
over images. The noise has one direction an image, so that distances are compared along one line.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.analysis.responses import weight_layers
from degrade.nets import Net

BATCH = 128
DISTANCES = (0.01, 0.03, 0.1, 0.3, 1.0)


def norms(net: Net, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[dict[str, object]]:
    """A row for each of the 6n+2 weight layers: value, the L2 norm of its gradient, and relative to its weights' norm.

    The gradient is that of a batch's mean cross-entropy in training mode; the norm is the mean over the batches.

    Args:
        net: stays as it is.
        batches: normalised images (B, 3, H, W) and labels (B,), augmented as in training.

    Raises:
        ValueError: no batches.
    """
    copy = deepcopy(net).train().requires_grad_()
    layers = weight_layers(copy)
    weights = [layer.weight for layer in layers.values()]
    found = []
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(copy(x), y), weights)
        found.append(torch.stack([length(gradient) for gradient in gradients]))
    if not found:
        raise ValueError("gradients need at least one batch; got 0")
    values = torch.stack(found).mean(0).tolist()
    relative = [value / length(weight).item() for value, weight in zip(values, weights, strict=True)]
    for layer, name in enumerate(layers):
        yield row("norm", layer=layer, name=name, value=values[layer], relative=relative[layer])


def correlation(
    net: nn.Module, x: Tensor, labels: Tensor, *, distances: Sequence[float] = DISTANCES, seed: int
) -> Iterator[dict[str, object]]:
    """A row for each distance: value, the mean correlation of the gradient at an image with that at a distance from it.

    In eval mode, or the gradient at one image would depend on the others: recalibrate a fresh net's statistics first.
    A gradient that is zero everywhere has no correlation, and the mean is then NaN.

    Args:
        net: takes normalised float images to logits; stays as it is.
        x: normalised images (N, 3, H, W).
        labels: int64 (N,).
        distances: lengths of the noise, each relative to that of the image.
        seed: of the noise.
    """
    copy = deepcopy(net).eval().requires_grad_(False)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    noise *= lengths(x) / lengths(noise)
    here = standardised(input_gradients(copy, x, labels))
    for distance in distances:
        there = standardised(input_gradients(copy, x + distance * noise, labels))
        yield row("correlation", distance=distance, value=(here * there).sum(1).mean().item())


def row(
    kind: str,
    *,
    value: float,
    layer: int | None = None,
    name: str | None = None,
    distance: float | None = None,
    relative: float | None = None,
) -> dict[str, object]:
    return {"kind": kind, "layer": layer, "name": name, "distance": distance, "value": value, "relative": relative}


def input_gradients(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's own logit with respect to the image, float64 (N, 3 H W); the net is in eval mode."""
    gradients = []
    for part, y in zip(torch.split(x, BATCH), torch.split(labels, BATCH), strict=True):
        part = part.clone(memory_format=torch.channels_last).requires_grad_()
        (gradient,) = torch.autograd.grad(net(part).gather(1, y[:, None]).sum(), part)
        gradients.append(gradient.flatten(1).double())
    return torch.cat(gradients)


def standardised(rows: Tensor) -> Tensor:
    """Each row less its mean, at length 1: the correlation of two rows is then their product's sum."""
    rows = rows - rows.mean(1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm


def length(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def lengths(images: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norm
