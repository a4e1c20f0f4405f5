"""Images and labels of one data set, split and on a device.

splits = load("cifar10", data_dir=Path("~/data").expanduser())
splits.train.images  # uint8 (50000, 3, 32, 32)
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from degrade.data import cifar10, shapes
from degrade.data.plan import random_words

SOURCES = {"cifar10": cifar10, "shapes": shapes}
SPLIT = 2  # a stream of the split seed, beside those of plan.py


@dataclass(frozen=True)
class Images:
    """uint8 images (N, 3, H, W) and int64 labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Tensor) -> "Images":
        """The images at these indices, or where this mask is true."""
        return Images(self.images[which], self.labels[which])

    def to(self, device: torch.device | str) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """The images a run sees.

    Args:
        train, val, test: val has no images unless a validation split was asked for.
        mean: what is subtracted from the input: the per-pixel mean of the training images, divided by 255, or
            the `input_mean` asked for; float (3, H, W).
        num_classes: how many labels there are.
    """

    train: Images
    val: Images
    test: Images
    mean: Tensor
    num_classes: int


def default_data_dir() -> Path:
    """`DEGRADE_DATA`, else `degrade` in the user's cache folder."""
    if folder := os.environ.get("DEGRADE_DATA"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "degrade"


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Rising indices (count,) of a seeded random choice in which each class keeps its share, to within one image.

    Raises:
        ValueError: fewer labels than `count`.
    """
    if count > len(labels):
        raise ValueError(f"{count:,} images were asked for, {len(labels):,} are there")
    shuffled = np.argsort(random_words(seed, SPLIT, 0, len(labels)), kind="stable")
    place = np.empty(len(labels))
    for label in np.unique(labels.numpy()):
        mine = shuffled[labels.numpy()[shuffled] == label]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    chosen = np.argsort(place, kind="stable")[:count]
    return torch.from_numpy(np.sort(chosen))


@lru_cache(maxsize=1)  # the runs of a study share one copy
def load(
    dataset: str,
    *,
    train_images: int | None = None,
    val_images: int = 0,
    test_images: int | None = None,
    split_seed: int = 0,
    input_mean: tuple[float, ...] = (),
    data_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Splits:
    """Load a data set that is there (see `fetch`), and take the images asked for.

    The validation images are taken from the training images first, then `train_images` of the rest.

    Raises:
        Failure: the data set is missing or damaged.
        ValueError: more images asked for than there are.
    """
    source = SOURCES[dataset]
    train, test = (Images(*arrays) for arrays in source.load(data_dir or default_data_dir()))
    num_classes = len(source.CLASSES)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[stratified(train.labels, val_images, split_seed)] = True
    train, val = train.take(~held_out), train.take(held_out)
    if train_images is not None:
        train = train.take(stratified(train.labels, train_images, split_seed))
    if test_images is not None:
        test = test.take(stratified(test.labels, test_images, split_seed))
    mean = pixel_mean(train.images)
    if input_mean:
        mean = torch.tensor(input_mean).view(-1, 1, 1).expand_as(mean).contiguous()
    return Splits(train.to(device), val.to(device), test.to(device), mean.to(device), num_classes)


def pixel_mean(images: Tensor) -> Tensor:
    """Per-pixel mean of uint8 images (N, 3, H, W), divided by 255, float (3, H, W)."""
    parts = torch.split(images, 1000)  # as int64, which is exact, all at once would take a gigabyte
    total = torch.stack([part.sum(0, dtype=torch.int64) for part in parts]).sum(0)
    return (total.double() / (255 * len(images))).float()


def fetch(dataset: str, data_dir: Path | None = None) -> None:
    """Make sure that the data set is there: download it, or draw it, once.

    Raises:
        Failure: it is missing or damaged and cannot be had.
    """
    SOURCES[dataset].fetch(data_dir or default_data_dir())
