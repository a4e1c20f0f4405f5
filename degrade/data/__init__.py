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

from degrade.config import dataset_of
from degrade.data import folder, shapes
from degrade.data.official import CIFAR10, CIFAR100, FASHION_MNIST, MNIST, SVHN
from degrade.data.plan import random_words
from degrade.errors import Failure

OFFICIAL = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN, "fashion-mnist": FASHION_MNIST, "mnist": MNIST}
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
    train, test = (Images(*arrays) for arrays in _load_all(dataset, data_dir or default_data_dir()))
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
    return Splits(train.to(device), val.to(device), test.to(device), mean.to(device), dataset_of(dataset).num_classes)


def _load_all(dataset: str, data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if dataset in OFFICIAL:
        return OFFICIAL[dataset].load(data_dir)
    return shapes.load(data_dir) if dataset == "shapes" else folder.load(dataset, data_dir)


def pixel_mean(images: Tensor) -> Tensor:
    """Per-pixel mean of uint8 images (N, 3, H, W), divided by 255, float (3, H, W)."""
    parts = torch.split(images, 1000)  # as int64, which is exact, all at once would take a gigabyte
    total = torch.stack([part.sum(0, dtype=torch.int64) for part in parts]).sum(0)
    return (total.double() / (255 * len(images))).float()


def fetch(dataset: str, data_dir: Path | None = None, mirror: str | None = None) -> None:
    """Make sure that the data set is there: download it, or draw it, once.

    Args:
        dataset: of `RunConfig`.
        data_dir: where data are; None for the default.
        mirror: an address of a folder with the official files, tried first.

    Raises:
        Failure: it is missing or damaged and cannot be had; of a folder of images, its decoded images are.
    """
    data_dir = data_dir or default_data_dir()
    if dataset in OFFICIAL:
        OFFICIAL[dataset].fetch(data_dir, mirror)
    elif dataset == "shapes":
        shapes.fetch(data_dir)
    else:
        folder.load(dataset, data_dir)


def check(dataset: str, data_dir: Path) -> None:
    """Compare what is there with its checksums; nothing is downloaded or written.

    Raises:
        Failure: it is missing or damaged.
    """
    if dataset in OFFICIAL:
        OFFICIAL[dataset].check(data_dir)
    elif dataset != "shapes":
        folder.load(dataset, data_dir)


def state(dataset: str, data_dir: Path) -> str:
    """`yes`, `no`, `damaged` or `built in`: whether a data set is there."""
    if dataset == "shapes":
        return "built in"
    if dataset in OFFICIAL and not OFFICIAL[dataset].is_there(data_dir):
        return "no"
    try:
        check(dataset, data_dir)
    except Failure:
        return "damaged" if dataset in OFFICIAL or folder.cache(dataset, data_dir).exists() else "no"
    return "yes"
