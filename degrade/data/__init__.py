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

from degrade.config import IMAGENET_MEAN, dataset_of, family_of
from degrade.data import folder, imagenet, shapes
from degrade.data.images import Images
from degrade.data.listing import known
from degrade.data.official import CIFAR10, CIFAR100, FASHION_MNIST, MNIST, SVHN
from degrade.data.plan import random_words
from degrade.data.stream import Stream
from degrade.errors import Failure

__all__ = [
    "OFFICIAL",
    "Images",
    "Splits",
    "Stream",
    "check",
    "default_data_dir",
    "fetch",
    "folder",
    "imagenet",
    "in_memory",
    "known",
    "load",
    "pixel_mean",
    "state",
    "stratified",
]

OFFICIAL = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN, "fashion-mnist": FASHION_MNIST, "mnist": MNIST}
SPLIT = 2  # a stream of the split seed, beside those of plan.py


@dataclass(frozen=True)
class Splits:
    """The images a run sees.

    Args:
        train, val, test: val has no images unless a validation split was asked for.
        mean: what is subtracted from the input: the per-pixel mean of the training images, divided by 255, or
            the `input_mean` asked for; float (3, H, W).
        num_classes: how many labels there are.
    """

    train: Images | Stream
    val: Images | Stream
    test: Images | Stream
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
    seen = labels.numpy()[shuffled]
    order = np.argsort(seen, kind="stable")  # class by class, each in its shuffled order
    sizes = np.bincount(seen)
    starts = np.cumsum(sizes) - sizes
    of = seen[order]
    place = np.empty(len(labels))
    place[shuffled[order]] = (np.arange(len(labels)) - starts[of] + 0.5) / sizes[of]
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
    train, test = _load_all(dataset, data_dir or default_data_dir())
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[stratified(train.labels, val_images, split_seed)] = True
    train, val = train.part(~held_out), train.part(held_out)
    if train_images is not None:
        train = train.part(stratified(train.labels, train_images, split_seed))
    if test_images is not None:
        test = test.part(stratified(test.labels, test_images, split_seed))
    if input_mean or isinstance(train, Stream):
        size = dataset_of(dataset).image_size
        mean = torch.tensor(input_mean or IMAGENET_MEAN).view(-1, 1, 1).expand(3, size, size).contiguous()
    else:
        mean = pixel_mean(train.images)
    return Splits(train.to(device), val.to(device), test.to(device), mean.to(device), dataset_of(dataset).num_classes)


def in_memory(images: Images | Stream, seed: int = 0, most: int = 10_000) -> Images:
    """Images as they are; of those that stay on the disk, the middles of at most so many, each class with its share."""
    if isinstance(images, Images):
        return images
    return images.take(stratified(images.labels, min(most, len(images)), seed))


def _load_all(dataset: str, data_dir: Path) -> tuple[Images, Images] | tuple[Stream, Stream]:
    """All training and test images."""
    if family_of(dataset) == "imagenet":
        return imagenet.load(dataset, data_dir)
    if dataset in OFFICIAL:
        train, test = OFFICIAL[dataset].load(data_dir)
    elif dataset == "shapes":
        train, test = shapes.load(data_dir)
    else:
        train, test = folder.load(dataset, data_dir)
    return Images(*train), Images(*test)


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
    elif family_of(dataset) == "imagenet":
        imagenet.place(dataset, data_dir)
    else:
        folder.load(dataset, data_dir)


def check(dataset: str, data_dir: Path) -> None:
    """Compare what is there with its checksums; nothing is downloaded or written.

    Raises:
        Failure: it is missing or damaged.
    """
    if dataset in OFFICIAL:
        OFFICIAL[dataset].check(data_dir)
    elif family_of(dataset) == "imagenet":
        imagenet.check(dataset, data_dir)
    elif dataset != "shapes":
        folder.load(dataset, data_dir)


def state(dataset: str, data_dir: Path) -> str:
    """`yes`, `no`, `damaged` or `built in`: whether a data set is there."""
    if dataset == "shapes":
        return "built in"
    if dataset in OFFICIAL and not OFFICIAL[dataset].is_there(data_dir):
        return "no"
    try:
        if family_of(dataset) == "imagenet":  # which it would take an hour to check
            imagenet.place(dataset, data_dir)
        else:
            check(dataset, data_dir)
    except (Failure, OSError):
        return "damaged" if dataset in OFFICIAL or folder.cache(dataset, data_dir).exists() else "no"
    return "yes"
