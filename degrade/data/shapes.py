"""`shapes`: a built-in data set of 10 classes of 32x32 RGB images, drawn by a seeded generator.

Each image shows one shape (disc, ring, square, ...) of random place, size, angle and colour before a
shaded background with clutter and noise. Classes k and k + 5 tend to one colour of background, which
is easy to learn and half of what there is to learn; the shape is the other half. It was made so that
short runs tell the nets apart.

Only IEEE-exact operations (+ - * / sqrt, comparisons) are used, so the bytes are the same on every
machine, and SHA256 below holds everywhere.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from degrade.commit import write_file

Floats = NDArray[np.float64]

CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "crescent", "diamond", "corner")
TRAIN, TEST = 10_000, 2_000
SIZE = 32
SAMPLES = 2  # per pixel and axis, for soft edges
TINT = 0.5  # how far a class's background is drawn to its colour
NOISE = 0.3  # peak to peak, of the full range
BATCH = 500  # images drawn at once, to bound memory


def rotation(u: Floats, quarter: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of a random angle from u in [0, 1) and a quarter turn in {0, 1, 2, 3}, without libm."""
    t = 0.8284271247461901 * u - 0.41421356237309503  # tan of half the angle: -45 to 45 degrees
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    for _ in range(3):
        turn = quarter > 0
        cos, sin = np.where(turn, -sin, cos), np.where(turn, cos, sin)
        quarter = quarter - 1
    return cos, sin


def disc(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y) - 0.9


def box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(-y - 0.6, 0.8660254037844386 * np.abs(x) + 0.5 * y - 0.55)


# Each function is negative inside the shape; x and y run from -1 to 1 over its extent.
INSIDE: tuple[Callable[[Floats, Floats], Floats], ...] = (
    disc,
    lambda x, y: np.maximum(disc(x, y), 0.5 - np.sqrt(x * x + y * y)),
    lambda x, y: box(x, y, 0.75, 0.75),
    lambda x, y: np.maximum(box(x, y, 0.8, 0.8), -box(x, y, 0.42, 0.42)),
    triangle,
    lambda x, y: np.minimum(box(x, y, 0.9, 0.25), box(x, y, 0.25, 0.9)),
    lambda x, y: box(x, y, 0.95, 0.3),
    lambda x, y: np.maximum(disc(x, y), 0.65 - np.sqrt((x - 0.45) * (x - 0.45) + y * y)),
    lambda x, y: np.abs(x) / 0.6 + np.abs(y) - 0.95,
    lambda x, y: np.minimum(box(x, y + 0.6, 0.85, 0.27), box(x + 0.6, y, 0.27, 0.85)),
)


TINTS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])  # of classes k and k + 5


class Uniform:
    """Uniform numbers in [0, 1) from raw Philox words, whose stream NumPy keeps the same for ever."""

    def __init__(self, *key: int):
        self.bits = np.random.Philox(key=np.array(key, dtype=np.uint64))

    def __call__(self, *shape: int) -> Floats:
        raw = self.bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) / 2.0**53


def draw(labels: NDArray[np.int64], uniform: Uniform) -> NDArray[np.uint8]:
    """Images (N, 3, 32, 32) of the classes `labels` (N,)."""
    n = len(labels)
    grid = (np.arange(SIZE * SAMPLES) + 0.5) / (SIZE * SAMPLES) * 2 - 1
    px, py = grid[None, None, :], grid[None, :, None]

    def coverage(kind: NDArray[np.int64], low: float, high: float, place: float) -> Floats:
        """The share (N, 32, 32) of each pixel that a shape of `kind` covers, placed and turned at random."""
        radius = low + (high - low) * uniform(n, 1, 1)
        cx, cy = (2 * uniform(n, 1, 1) - 1) * place, (2 * uniform(n, 1, 1) - 1) * place
        cos, sin = rotation(uniform(n, 1, 1), np.floor(4 * uniform(n, 1, 1)))
        x, y = (px - cx) / radius, (py - cy) / radius
        u, v = cos * x + sin * y, cos * y - sin * x
        inside = np.zeros(u.shape)
        for k, shape in enumerate(INSIDE):
            mine = kind == k
            inside[mine] = shape(u[mine], v[mine]) < 0
        blocks = inside.reshape(n, SIZE, SAMPLES, SIZE, SAMPLES)
        covered: Floats = blocks.sum(axis=(2, 4)) / SAMPLES**2  # sums of 0s and 1s, so exact in any order
        return covered

    pixel = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    base, slope_x, slope_y = (uniform(n, 3, 1, 1) for _ in range(3))
    # Two classes share a background they tend to, as birds and airplanes do: easy to learn, but only half of it.
    base = TINT * TINTS[labels % len(TINTS)][:, :, None, None] + (1 - TINT) * base
    image = 0.2 + 0.6 * base + 0.3 * (slope_x - 0.5) * pixel + 0.3 * (slope_y - 0.5) * pixel[:, None]
    for _ in range(3):  # clutter: small shapes of any class
        kind = np.floor(len(CLASSES) * uniform(n)).astype(np.int64)
        cover = coverage(kind, 0.1, 0.22, 0.95)[:, None]
        image = image * (1 - cover) + uniform(n, 3, 1, 1) * cover
    cover = coverage(labels, 0.3, 0.6, 0.4)[:, None]
    colour = uniform(n, 3, 1, 1)
    # Keep the shape visible: move its colour away from the background's, channel by channel.
    colour = np.where(colour > base, 0.35 + 0.65 * colour, 0.65 * colour)
    image = image * (1 - cover) + colour * cover
    image += NOISE * (uniform(n, 3, SIZE, SIZE) - 0.5)
    return np.floor(np.minimum(np.maximum(image, 0.0), 1.0) * 255 + 0.5).astype(np.uint8)


def generate(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` images (N, 3, 32, 32) and labels (N,) in [0, 10), classes in turn so that all are equally frequent."""
    labels = np.arange(count) % len(CLASSES)
    parts = [draw(labels[start : start + BATCH], Uniform(seed, start)) for start in range(0, count, BATCH)]
    return np.concatenate(parts), labels


# Of the bytes of all training images, then all test images.
SHA256 = "676db94549b39702841d44684105b82ff7cee59bdb582a6203d227275fac7dac"


def _draw_all() -> NDArray[np.uint8]:
    return np.concatenate([generate(TRAIN, seed=0)[0], generate(TEST, seed=1)[0]])


def _cache(data_dir: Path) -> Path:
    return data_dir / f"shapes-{SHA256[:12]}.npy"


def _images(data_dir: Path) -> NDArray[np.uint8] | None:
    """The cached images, or None where there are none with the right checksum."""
    try:
        images = np.load(_cache(data_dir), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if hashlib.sha256(images.tobytes()).hexdigest() == SHA256 else None


def fetch(data_dir: Path) -> None:
    """Draw the images once (seconds) and keep them in `data_dir`, if it can be written to."""
    if _images(data_dir) is None:
        file = io.BytesIO()
        np.save(file, _draw_all())
        with contextlib.suppress(OSError):  # a cache: `load` draws the images anew
            data_dir.mkdir(parents=True, exist_ok=True)
            write_file(_cache(data_dir), file.getvalue())


def load(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, uint8 (N, 3, 32, 32), with labels (N,)."""
    images = _images(data_dir)
    tensor = torch.from_numpy(_draw_all() if images is None else images)
    labels = torch.arange(TRAIN + TEST) % len(CLASSES)
    return (tensor[:TRAIN], labels[:TRAIN]), (tensor[TRAIN:], labels[TRAIN:])
