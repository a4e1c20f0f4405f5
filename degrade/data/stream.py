"""Images that stay on the disk, as ImageNet's do: batches are read while others train.

Which image comes when, and how it is scaled, cropped, mirrored and coloured, is a function of (seed, step), as
everywhere. They are read by threads of this process: Pillow lets go of Python's lock while it decodes and resizes, and
threads, unlike processes, never outlive a run that is killed, and may be had within the processes of a sweep.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from degrade.data.images import Images
from degrade.data.listing import File, rgb
from degrade.data.plan import AUGMENT, SamplePlan, random_words
from degrade.engine.process import cores
from degrade.errors import Failure

SHORTEST, LONGEST, TEST = 256 / 224, 480 / 224, 256 / 224  # sides that images are resized to, in sides of the crop
AHEAD = 3  # batches that are read before they are needed
CHUNK = 10  # crops a thread makes at a time: those of one image, where there are ten
WORDS = 8  # random numbers an image

# Principal components of the RGB values of ImageNet, as fb.resnet.torch has them; Krizhevsky et al. 2012, section 4.1.
COLOR_STD = 0.1
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class Reader(Protocol):
    """Where the images of a split are."""

    def read(self, number: int) -> Image.Image:
        """One image as RGB, in its own size."""


@dataclass(frozen=True)
class Files:
    """Images as files."""

    files: list[File]

    def read(self, number: int) -> Image.Image:
        path = self.files[number].path
        try:
            return rgb(path)
        except Exception as error:  # Pillow meets malformed bytes with almost any
            if isinstance(error, OSError) and error.errno:  # the disk or the network, not the image
                raise
            reason = " ".join(str(error).split())[:100]
            raise Failure(
                f"{path} cannot be decoded ({reason}). Before a run begins, replace or delete "
                "it, or leave it out with degrade data pack --skip-broken; a run that has begun needs it restored"
            ) from None


class View(NamedTuple):
    """How images are seen, an entry an image.

    Args:
        side: what the shorter side is resized to, in sides of the crop.
        y, x: where the crop is, from 0 (top, left) to 1.
        flip: mirrored or not.
        color: what is added to each channel of pixels / 255, (B, 3).
    """

    side: np.ndarray
    y: np.ndarray
    x: np.ndarray
    flip: np.ndarray
    color: np.ndarray

    def part(self, rows: slice) -> "View":
        return View(*(choice[rows] for choice in self))


def random_view(seed: int, step: int, count: int) -> View:
    """Of the images of one update: scale, crop, mirroring and colour, as section 3.4 has them."""
    words = random_words(seed, AUGMENT, step, WORDS * count).reshape(count, WORDS)
    u = (words >> np.uint64(11)).astype(np.float64) / 2.0**53
    radius = np.sqrt(-2 * np.log1p(-u[:, 3:5]))  # Box and Muller: two normal numbers of two uniform ones
    angle = 2 * np.pi * u[:, 5:7]
    normal = np.stack(
        [radius[:, 0] * np.cos(angle[:, 0]), radius[:, 0] * np.sin(angle[:, 0]), radius[:, 1] * np.cos(angle[:, 1])],
        axis=1,
    )
    color = (COLOR_STD * normal * EIGENVALUES) @ EIGENVECTORS.T
    side = SHORTEST + (LONGEST - SHORTEST) * u[:, 0]
    return View(side, u[:, 1], u[:, 2], (words[:, 7] & np.uint64(1)).astype(bool), color)


def middle_view(count: int) -> View:
    """Of images that are tested: the shorter side 256 for a crop of 224, and the middle."""
    half = np.full(count, 0.5)
    return View(np.full(count, TEST), half, half, np.zeros(count, bool), np.zeros((count, 3)))


def crop(image: Image.Image, size: int, side: float, y: float, x: float, flip: bool) -> np.ndarray:
    """Resize the shorter side to `side` crops, cut one out and mirror it: uint8 (3, size, size).

    Resizing and cutting out are one step: Pillow resizes the part of the image that the crop shows.
    """
    width, height = image.size
    shown = min(width, height) / side
    left, top = x * (width - shown), y * (height - shown)
    seen = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + shown, top + shown))
    pixels = np.asarray(seen)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@dataclass(frozen=True)
class Stream:
    """Images that stay on the disk, in place of `degrade.data.Images`.

    Args:
        reader: of a whole split.
        which: those of its images that belong to this one, (N,).
        labels: of these, int64 (N,).
        size: of the crops, in pixels.
    """

    reader: Reader
    which: np.ndarray
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, which: Tensor) -> "Stream":
        """The images at these indices, or where this mask is true; they stay on the disk."""
        return Stream(self.reader, self.which[which.numpy()], self.labels[which], self.size)

    def batches(self, asked: Iterable[tuple[np.ndarray, View]]) -> Iterator[tuple[Tensor, np.ndarray, View]]:
        """uint8 (B, 3, S, S) for each set of indices and views, in this order, read ahead; with what was asked for.

        Raises:
            Failure: an image is broken.
        """
        pool = ThreadPoolExecutor(cores(), "reader")
        ahead: deque[tuple[list[Future[None]], np.ndarray, np.ndarray, View]] = deque()

        def finished() -> tuple[Tensor, np.ndarray, View]:
            jobs, images, index, view = ahead.popleft()
            for job in jobs:
                job.result()
            return torch.from_numpy(images), index, view

        try:
            for index, view in asked:
                images = np.empty((len(index), 3, self.size, self.size), np.uint8)
                rows = [slice(start, start + CHUNK) for start in range(0, len(index), CHUNK)]
                jobs = [pool.submit(self._fill, images[r], index[r], view.part(r)) for r in rows]
                ahead.append((jobs, images, index, view))
                if len(ahead) > AHEAD:
                    yield finished()
            while ahead:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, images: np.ndarray, index: np.ndarray, view: View) -> None:
        last = None
        for row, number in enumerate(self.which[index]):
            side, y, x, flip, _ = (choice[row] for choice in view)
            if number != last:
                whole, last = self.reader.read(int(number)), number
            images[row] = crop(whole, self.size, float(side), float(y), float(x), bool(flip))

    def training_batches(self, plan: SamplePlan, start: int, stop: int, rows: slice) -> Iterator[tuple[Tensor, ...]]:
        """Of updates `start` to `stop`, not included: uint8 (b, 3, S, S), labels (b,) and colour shifts (b, 3).

        Args:
            plan: of the run.
            start, stop: updates, counted from 0.
            rows: of each batch.
        """

        def choices(step: int) -> tuple[np.ndarray, View]:
            scaled = plan.augment == "scale-color"
            view = random_view(plan.seed, step, plan.batch_size) if scaled else middle_view(plan.batch_size)
            return plan.index(step)[rows], view.part(rows)

        for images, index, view in self.batches(choices(step) for step in range(start, stop)):
            yield images, self.labels[index], torch.from_numpy(view.color).float()

    def middles(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[Tensor]:
        """The middle of every image, in order: uint8 (B, 3, S, S), the last batch filled up with the last image.

        Args:
            batch_size: images of each batch.
            first, step: every `step`th batch only, from the `first` on.
        """
        starts = range(first * batch_size, len(self), step * batch_size)
        indices = (np.arange(start, start + batch_size).clip(max=len(self) - 1) for start in starts)
        return (images for images, _, _ in self.batches((index, middle_view(batch_size)) for index in indices))

    def take(self, which: Tensor) -> Images:
        """The middles of the images at these indices, in memory."""
        part = self.part(which)
        return Images(torch.cat(list(part.middles(min(len(part), 256))))[: len(part)], part.labels)

    def to(self, device: torch.device | str) -> "Stream":
        """Itself: each batch goes to the device when it is needed."""
        return self
