"""The statistics that batch normalisation uses in eval mode: those of training, or taken anew for the final weights.

In training they are running averages that forget with momentum 0.1: noisy, and of weights that have moved since. A deep
plain net might be worse in eval mode for that alone; recalibration tells. Source: Izmailov et al. 2018
(arXiv:1803.05407), whose averaged weights have no statistics either, and torch.optim.swa_utils.update_bn: a pass over
training batches, of whose statistics the mean is taken, each batch with the same weight.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from degrade.data.images import Images
from degrade.evaluate import evaluate
from degrade.nets import Net


@torch.no_grad()
def recalibrated(net: Net, batches: Iterable[Tensor]) -> Net:
    """A copy of the net, in eval mode, whose BN statistics are the means of those of the batches.

    Means of the batches' means and of their unbiased variances, each layer's taken while those before it normalise
    by the batch, all in one pass.

    Args:
        net: stays as it is.
        batches: normalised training images (B, 3, H, W), augmented as in training, or not.

    Raises:
        ValueError: no batches.
    """
    copy = deepcopy(net).train()
    norms = [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()  # if it is NaN, no weight of 0 removes it
        norm.running_var.zero_()
    count = 0
    for count, x in enumerate(batches, start=1):
        for norm in norms:
            norm.momentum = 1 / count  # the running average is then the mean of all so far
        copy(x)
    if count == 0:
        raise ValueError("recalibration needs at least one batch; got 0")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return copy.eval()


def bn_rows(
    net: Net, train: Images, test: Images, mean: Tensor, batches: Iterable[Tensor]
) -> Iterator[dict[str, object]]:
    """Four rows, running statistics first, training images first: split, statistics, loss, error, images (how many).

    Args:
        net: stays as it is.
        train, test: the images to evaluate on.
        mean: the per-pixel mean of the training images, (3, H, W).
        batches: as for `recalibrated`.

    Raises:
        ValueError: no batches.
    """
    for statistics in ("running", "recalibrated"):
        evaluated = deepcopy(net) if statistics == "running" else recalibrated(net, batches)
        for split, images in (("train", train), ("test", test)):
            loss, error = evaluate(evaluated, images.images, images.labels, mean)
            yield {"split": split, "statistics": statistics, "loss": loss, "error": error, "images": len(images)}
