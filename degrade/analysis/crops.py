"""Ten crops of each test image, whose predictions are averaged, beside the one in the middle.

Source: Krizhevsky et al. 2012, section 4.1, whom He et al. 2015 follow in Table 2.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.data import Stream
from degrade.data.plan import normalise
from degrade.data.stream import TEST, View

IMAGES = 16  # at a time, ten crops each
PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # the middle and the corners: y, x


def ten_views(images: int) -> View:
    """Of each image ten entries, one after the other: the middle and the four corners, then all five mirrored."""
    y, x = (np.tile([place[axis] for place in PLACES * 2], images) for axis in (0, 1))
    flip = np.tile([False] * 5 + [True] * 5, images)
    return View(np.full(10 * images, TEST), y, x, flip, np.zeros((10 * images, 3)))


@torch.no_grad()
def ten_crop(net: nn.Module, images: Stream, mean: Tensor) -> Iterator[dict[str, object]]:
    """Two rows: crops (1, the middle, or 10), loss in nats, error, images (how many).

    Args:
        net: in eval mode, on the device of `mean`; takes normalised float images to logits.
        images: with their labels.
        mean: what is subtracted from pixels / 255, (3, H, W).
    """
    loss, wrong = {1: 0.0, 10: 0.0}, {1: 0, 10: 0}
    parts = [np.arange(start, min(start + IMAGES, len(images))) for start in range(0, len(images), IMAGES)]
    asked = ((np.repeat(part, 10), ten_views(len(part))) for part in parts)
    for part, (pixels, _, _) in zip(parts, images.batches(asked), strict=True):
        y = images.labels[part].to(mean.device)
        x = normalise(pixels.to(mean.device), mean).contiguous(memory_format=torch.channels_last)
        chances = F.log_softmax(net(x).float(), dim=1).view(len(part), 10, -1)
        for crops, predicted in ((1, chances[:, 0]), (10, chances.logsumexp(1) - math.log(10))):
            loss[crops] += F.nll_loss(predicted, y, reduction="sum").item()
            wrong[crops] += int((predicted.argmax(1) != y).sum())
    for crops in (1, 10):
        yield {
            "crops": crops,
            "loss": loss[crops] / len(images),
            "error": wrong[crops] / len(images),
            "images": len(images),
        }
