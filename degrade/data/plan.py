"""Which image comes when, and how it is cropped and flipped: a function of (seed, step), not a state."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PAD = 4
ORDER, AUGMENT = 0, 1  # streams of one seed


def random_words(seed: int, stream: int, counter: int, count: int) -> np.ndarray:
    """`count` random uint64, a function of the arguments alone. NumPy keeps raw Philox words the same for ever."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, 0, counter], np.uint64))
    return bits.random_raw(count)


@dataclass(frozen=True)
class Batch:
    """The choices of one update, each of shape (B,), or of several, (steps, B).

    Args:
        index: of the image.
        dy, dx: offsets of the crop, 0 to 8.
        flip: mirrored or not.
    """

    index: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor

    def part(self, rows: slice) -> "Batch":
        """Some of one update's choices."""
        return Batch(*(choice[rows] for choice in vars(self).values()))

    def row(self, number: Tensor) -> "Batch":
        """One update's choices; `number`, of shape (1,), is on the same device, and nothing waits for it."""
        return Batch(*(choice.index_select(0, number)[0] for choice in vars(self).values()))


class SamplePlan:
    """One continuous stream of seeded permutations of the training images, cut into batches.

    Every image is seen once in each pass over the training set, and every batch has exactly
    `batch_size` images: a batch may end one pass and start the next.

    Args:
        images: how many there are.
        batch_size: images an update.
        seed: of the run.
        augment: of `RunConfig`. The order is the same whichever it is.
    """

    def __init__(self, images: int, batch_size: int, seed: int, augment: str = "crop-flip"):
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._passes: dict[int, np.ndarray] = {}

    def index(self, step: int) -> np.ndarray:
        """Which images update `step` sees, (B,)."""
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        number, place = np.divmod(position, self.images)
        return np.concatenate([self._permutation(n)[place[number == n]] for n in range(number[0], number[-1] + 1)])

    def _permutation(self, number: int) -> np.ndarray:
        if number not in self._passes:
            if len(self._passes) > 1:
                del self._passes[min(self._passes)]
            words = random_words(self.seed, ORDER, number, self.images)
            self._passes[number] = np.argsort(words, kind="stable")
        return self._passes[number]

    def batch(self, step: int) -> Batch:
        """The choices of update `step`, counted from 0, on the CPU."""
        return self.batches(step, step + 1).row(torch.zeros(1, dtype=torch.int64))

    def batches(self, start: int, stop: int) -> Batch:
        """The choices of updates `start` (counted from 0) to `stop`, not included, a row an update, on the CPU."""
        index = np.concatenate([self.index(step) for step in range(start, stop)])
        words = np.concatenate([random_words(self.seed, AUGMENT, step, self.batch_size) for step in range(start, stop)])
        offsets = 2 * PAD + 1
        # Three disjoint ranges of bits of each word; modulo 9 of 24 bits is even to 1 in 10^6.
        dy = ((words >> np.uint64(40)) % offsets).astype(np.int64)
        dx = (((words >> np.uint64(16)) & np.uint64(0xFFFFFF)) % offsets).astype(np.int64)
        flip = (words & np.uint64(1)).astype(bool)
        if self.augment not in ("crop-flip", "crop"):
            dy, dx = np.full_like(dy, PAD), np.full_like(dx, PAD)
        if self.augment != "crop-flip":
            flip = np.zeros_like(flip)
        return Batch(*(torch.from_numpy(choice).view(-1, self.batch_size) for choice in (index, dy, dx, flip)))


def normalise(images: Tensor, mean: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to floats in [-1, 1]: divided by 255, less the per-pixel mean (3, H, W).

    The paper subtracts the mean and divides by nothing; the scale of the input cancels in the first BN.
    """
    return images.float().div_(255).sub_(mean)


def augment(images: Tensor, batch: Batch) -> Tensor:
    """Normalised images (B, 3, H, W) padded with 4 zeros a side, cropped to H x W, flipped: each image by its own.

    Returns a channels-last tensor (B, 3, H, W).
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    rows = batch.dy[:, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = batch.dx[:, None] + torch.where(batch.flip[:, None], width - 1 - columns, columns)  # (B, W)
    every = torch.arange(n, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)
