"""CIFAR-10 as torchvision names it. Checksums come first: no other bytes are unpickled, or taken from an archive."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Collection
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from degrade.commit import hold, leavings, make_folder, remove, write_file
from degrade.errors import Failure

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = CIFAR10.base_folder
LIMIT = 256 << 20  # bytes read of any file, be it a bomb; the archive unpacks to 186 MB
MEMBERS = 100  # looked at in an archive; the official one has 9


def load(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, uint8 (N, 3, 32, 32), with labels (N,).

    Raises:
        Failure: missing or damaged; then nothing was unpickled.
    """
    files, problems = _read(data_dir)
    for name, problem in problems.items():
        raise Failure(_advice(data_dir, f"{name}: {problem}; no download was tried"))
    train, test = ([files[name] for name, _ in batches] for batches in (CIFAR10.train_list, CIFAR10.test_list))
    return _unpickle(train), _unpickle(test)


def fetch(data_dir: Path) -> None:
    """Write the files that are missing or damaged, from the archive (170 MB), which is downloaded unless it is there.

    One process at a time.

    Raises:
        Failure: it cannot be had.
    """
    if not _read(data_dir)[1]:  # a read-only folder will do
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with hold(data_dir / ".lock", wait=True):
            if problems := _read(data_dir)[1]:  # none, where another process has fetched them meanwhile
                _mend(data_dir, problems)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())  # a server can put newlines in it
        raise Failure(_advice(data_dir, reason or type(error).__name__)) from None


def _mend(data_dir: Path, names: Collection[str]) -> None:
    archive = data_dir / CIFAR10.filename
    if not check_integrity(archive, CIFAR10.tgz_md5):
        archive.unlink(missing_ok=True)  # were it a link, the download would be written to where it points
        download_url(CIFAR10.url, data_dir, CIFAR10.filename, CIFAR10.tgz_md5)
    files = _unpack(archive, names)
    # The folder may be the user's link to another disk, so it is followed; no archive can make one. A link in place of
    # a file is replaced. The archive stays: what is damaged later is mended from it, without a network.
    make_folder(data_dir / FOLDER)
    for path in leavings(data_dir / FOLDER):  # of a process that was killed here
        remove(path)
    for name, data in files.items():
        write_file(data_dir / FOLDER / name, data)


def _unpack(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """The genuine files of these names. What else is in the archive is passed over (the official one has a readme), and
    none of its paths, links and modes is ever used.

    Raises:
        Failure: the archive is broken, or does not hold one of them.
    """
    files = {}
    try:
        with gzip.open(archive) as file:
            unpacked = io.BytesIO(file.read(LIMIT))
        with tarfile.open(fileobj=unpacked, mode="r:") as tar:
            for member in islice(tar, MEMBERS):  # a negative size can send tarfile in circles (CVE-2025-8194)
                folder, _, name = member.name.rpartition("/")
                wanted = folder == FOLDER and name in names and member.isreg() and not member.issparse()
                if wanted and (content := tar.extractfile(member)) and _is_genuine(name, data := content.read()):
                    files[name] = data
    except Exception as error:  # gzip and tarfile meet malformed bytes with almost any
        raise Failure(f"the archive is broken: {error}") from None
    if missing := [name for name in names if name not in files]:
        raise Failure(f"the archive does not hold the genuine {', '.join(missing)}")
    return files


def _read(data_dir: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The genuine files, and what is wrong with the others, by name."""
    files, problems = {}, {}
    for name in _checksums():
        path, data = data_dir / FOLDER / name, b""
        try:
            if path.is_file():  # a pipe would have us wait
                with path.open("rb") as file:
                    data = file.read(LIMIT)
            if _is_genuine(name, data):
                files[name] = data
            else:
                problems[name] = "missing or damaged"
        except OSError as error:
            problems[name] = error.strerror or str(error)
    return files, problems


def _checksums() -> dict[str, str]:
    return dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])


def _is_genuine(name: str, data: bytes) -> bool:
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == _checksums()[name]


def _unpickle(batches: list[bytes]) -> tuple[Tensor, Tensor]:
    parts = [pickle.loads(batch, encoding="latin1") for batch in batches]  # noqa: S301  _read has checked them
    images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.tensor([label for part in parts for label in part["labels"]])


def _advice(data_dir: Path, reason: str) -> str:
    state = "damaged" if os.path.isdir(data_dir / FOLDER) else "missing"  # noqa: PTH112  Path.is_dir can raise
    return (
        f"CIFAR-10 is {state} in {data_dir} ({reason}). Put the official {FOLDER} folder there, or name the "
        "folder that holds it with --data-dir or DEGRADE_DATA; --dataset shapes needs no download"
    )
