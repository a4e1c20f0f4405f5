"""CIFAR-10 through torchvision, whose checksums are verified before anything is unpickled."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from degrade.commit import hold
from degrade.errors import Failure

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = torchvision.datasets.CIFAR10.base_folder


def _read(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    # torchvision compares the MD5 of every file before it opens any, and raises RuntimeError.
    data = torchvision.datasets.CIFAR10(str(data_dir), train=train, download=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets)


def load(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, uint8 (N, 3, 32, 32), with labels (N,).

    Raises:
        Failure: missing or damaged.
    """
    try:
        return _read(data_dir, train=True), _read(data_dir, train=False)
    except RuntimeError:
        raise Failure(_advice(data_dir, "no download was tried")) from None


def fetch(data_dir: Path) -> None:
    """Download CIFAR-10 (170 MB) unless its files are there with the right checksums. One process at a time.

    Raises:
        Failure: it cannot be had.
    """
    try:
        torchvision.datasets.CIFAR10(str(data_dir), download=False)  # checks every file; a read-only folder will do
        return
    except RuntimeError:
        pass
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with hold(data_dir / ".lock", wait=True):
            torchvision.datasets.CIFAR10(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise Failure(_advice(data_dir, str(error) or type(error).__name__)) from None


def _advice(data_dir: Path, reason: str) -> str:
    state = "damaged" if (data_dir / FOLDER).is_dir() else "missing"
    return (
        f"CIFAR-10 is {state} in {data_dir} ({reason}). Put the official {FOLDER} folder there, or name the "
        "folder that holds it with --data-dir or DEGRADE_DATA; --dataset shapes needs no download"
    )
