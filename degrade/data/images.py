"""Images in memory, and arrays out of files that may be damaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


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

    part = take  # which stays on the disk where the whole does

    def to(self, device: torch.device | str) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, which may be damaged; whether they are those that were written, a checksum tells.

    Raises:
        ValueError: they cannot be read, with the reason.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:  # NumPy and zipfile meet malformed bytes with almost any
        raise ValueError(f"{type(error).__name__}: {error}") from None
