"""Published data sets, under the names, addresses and checksums that torchvision has for them.

Checksums come first: no other bytes are unpickled, parsed, or taken from an archive. So any mirror is safe.
"""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from degrade.commit import hold, leavings, make_folder, remove, write_file
from degrade.data.download import download
from degrade.errors import Failure

Labelled = tuple[Tensor, Tensor]  # uint8 images (N, 3, H, W) and int64 labels (N,)

LIMIT = 256 << 20  # bytes read of any file, be it a bomb; the largest archive unpacks to 186 MB
# What an array is made of in a pickle, by the names of NumPy 1 and 2.
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
MEMBERS = 100  # looked at in an archive; the official ones have 9 at most


class About(NamedTuple):
    """What a data set is called in messages, the size of its download, and what its authors say of it."""

    title: str
    megabytes: float
    licence: str
    source: str


class Official(ABC):
    """A published data set: files with known checksums, in a folder where torchvision has them too.

    Args:
        about: the data set.
        folder: of the files, in the data folder.
        name: of torchvision's class, which knows addresses and checksums.
    """

    def __init__(self, about: About, folder: str, name: str):
        self.about, self.folder, self.name = about, folder, name

    @property
    def theirs(self) -> Any:
        """torchvision's class; its import takes a second, which few commands need."""
        from torchvision import datasets

        return getattr(datasets, self.name)

    @abstractmethod
    def checksums(self) -> dict[str, str]:
        """The MD5 of each file, by its name."""

    @abstractmethod
    def mend(self, data_dir: Path, names: Collection[str], mirror: str | None) -> None:
        """Write the files of these names, from the internet if need be; the caller holds a lock."""

    @abstractmethod
    def decode(self, files: dict[str, bytes]) -> tuple[Labelled, Labelled]:
        """Training and test images of the genuine files."""

    def load(self, data_dir: Path) -> tuple[Labelled, Labelled]:
        """Training and test images, uint8 (N, 3, H, W), with labels (N,).

        Raises:
            Failure: missing or damaged; then nothing was unpickled or parsed.
        """
        files, problems = self._read(data_dir)
        for name, problem in problems.items():
            raise Failure(self._advice(data_dir, f"{name}: {problem}; no download was tried"))
        return self.decode(files)

    def check(self, data_dir: Path) -> None:
        """
        Raises:
            Failure: it is missing or damaged.
        """
        for name, problem in self.problems(data_dir).items():
            raise Failure(self._advice(data_dir, f"{name}: {problem}"))

    def is_there(self, data_dir: Path) -> bool:
        """Whether any of its files is, genuine or not."""
        return any(os.path.lexists(data_dir / self.folder / name) for name in self.checksums())

    def problems(self, data_dir: Path) -> dict[str, str]:
        """What is wrong with each file that is not genuine, by its name."""
        return self._read(data_dir)[1]

    def fetch(self, data_dir: Path, mirror: str | None = None) -> None:
        """Write the files that are missing or damaged, downloaded unless they are there. One process at a time.

        Args:
            data_dir: the data folder.
            mirror: an address of a folder with the official files, to be tried before the official one.

        Raises:
            Failure: they cannot be had.
        """
        if not self.problems(data_dir):  # a read-only folder will do
            return
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with hold(data_dir / ".lock", wait=True):
                if problems := self.problems(data_dir):  # none, where another process has fetched them meanwhile
                    # The folder may be the user's link to another disk, so it is followed; no archive can make one.
                    for path in leavings(data_dir / self.folder):  # of a process that was killed here
                        remove(path)
                    self.mend(data_dir, problems, mirror)
        except (OSError, RuntimeError) as error:
            raise Failure(self._advice(data_dir, " ".join(str(error).split()))) from None

    def get(self, official: Collection[str], mirror: str | None, path: Path, md5: str) -> None:
        """Download one file, if it is not there with the right checksum."""
        if self._md5_of(path) == md5:
            return
        download([*([f"{mirror.rstrip('/')}/{path.name}"] if mirror else []), *official], path, md5, LIMIT)

    def _md5_of(self, path: Path) -> str:
        if not path.is_file():  # a pipe would have us wait
            return ""
        with path.open("rb") as file:
            return _md5(file.read(LIMIT))

    def _read(self, data_dir: Path) -> tuple[dict[str, bytes], dict[str, str]]:
        """The genuine files, and what is wrong with the others, by name."""
        files, problems = {}, {}
        for name, md5 in self.checksums().items():
            path, data = data_dir / self.folder / name, b""
            try:
                if path.is_file():
                    with path.open("rb") as file:
                        data = file.read(LIMIT)
                if _md5(data) == md5:
                    files[name] = data
                else:
                    problems[name] = "missing or damaged"
            except OSError as error:
                problems[name] = error.strerror or str(error)
        return files, problems

    def _advice(self, data_dir: Path, reason: str) -> str:
        state = "damaged" if self.is_there(data_dir) else "missing"
        files = f"{self.folder} folder" if self.folder else f"files {', '.join(self.checksums())}"
        return (
            f"{self.about.title} is {state} in {data_dir} ({reason}). Put the official {files} there, or name the "
            "folder that holds it with --data-dir or DEGRADE_DATA, or try degrade data fetch with --mirror; "
            "--dataset shapes needs no download"
        )


class _Arrays(pickle.Unpickler):
    """Unpickles arrays of NumPy's and plain values. The checksums were compared before; this trusts not even them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        raise Failure(f"an official file holds no {module}.{name}: it is not unpickled")


class Cifar(Official):
    """CIFAR-10 or CIFAR-100: pickles of NumPy arrays in a .tar.gz."""

    def __init__(self, about: About, folder: str, name: str, labels: str):
        super().__init__(about, folder, name)
        self.labels = labels

    def checksums(self) -> dict[str, str]:
        theirs = self.theirs
        return dict([*theirs.train_list, *theirs.test_list, (theirs.meta["filename"], theirs.meta["md5"])])

    def mend(self, data_dir: Path, names: Collection[str], mirror: str | None) -> None:
        archive = data_dir / self.theirs.filename
        self.get([self.theirs.url], mirror, archive, self.theirs.tgz_md5)
        files = self.unpack(archive, names)
        # A link in place of a file is replaced. The archive stays: what is damaged later is mended from it.
        make_folder(data_dir / self.folder)
        for name, data in files.items():
            write_file(data_dir / self.folder / name, data)

    def unpack(self, archive: Path, names: Collection[str]) -> dict[str, bytes]:
        """The genuine files of these names. What else is in the archive is passed over (the official one has a
        readme), and none of its paths, links and modes is ever used.

        Raises:
            Failure: the archive is broken, or does not hold one of them.
        """
        files, checksums = {}, self.checksums()
        try:
            with gzip.open(archive) as file:
                unpacked = io.BytesIO(file.read(LIMIT))
            with tarfile.open(fileobj=unpacked, mode="r:") as tar:
                for member in islice(tar, MEMBERS):  # a negative size can send tarfile in circles (CVE-2025-8194)
                    folder, _, name = member.name.rpartition("/")
                    wanted = folder == self.folder and name in names and member.isreg() and not member.issparse()
                    if wanted and (content := tar.extractfile(member)):
                        data = content.read()
                        if _md5(data) == checksums[name]:
                            files[name] = data
        except Exception as error:  # gzip and tarfile meet malformed bytes with almost any
            raise Failure(f"the archive is broken: {error}") from None
        if missing := [name for name in names if name not in files]:
            raise Failure(f"the archive does not hold the genuine {', '.join(missing)}")
        return files

    def decode(self, files: dict[str, bytes]) -> tuple[Labelled, Labelled]:
        train, test = ([files[name] for name, _ in split] for split in (self.theirs.train_list, self.theirs.test_list))
        return self._unpickle(train), self._unpickle(test)

    def _unpickle(self, batches: list[bytes]) -> Labelled:
        parts = [_Arrays(io.BytesIO(batch), encoding="latin1").load() for batch in batches]
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        return torch.from_numpy(images), torch.tensor([label for part in parts for label in part[self.labels]])


class Digits(Official):
    """MNIST or what has its form: four gzipped IDX files of grey images and labels."""

    def __init__(self, about: About, name: str):
        super().__init__(about, f"{name}/raw", name)

    def checksums(self) -> dict[str, str]:
        return dict(self.theirs.resources)

    def mend(self, data_dir: Path, names: Collection[str], mirror: str | None) -> None:
        make_folder(data_dir / self.folder)
        for name in names:
            official = [f"{address}{name}" for address in self.theirs.mirrors]
            self.get(official, mirror, data_dir / self.folder / name, self.checksums()[name])

    def decode(self, files: dict[str, bytes]) -> tuple[Labelled, Labelled]:
        arrays = [_idx(gzip.decompress(files[name])) for name in self.checksums()]
        return (_rgb(arrays[0]), _labels(arrays[1])), (_rgb(arrays[2]), _labels(arrays[3]))


class HouseNumbers(Official):
    """SVHN, cropped digits: two .mat files, of training and test images. Its further images (`extra`) are left out."""

    def checksums(self) -> dict[str, str]:
        return {name: md5 for _, name, md5 in self._files()}

    def _files(self) -> list[Any]:
        return [self.theirs.split_list[split] for split in ("train", "test")]

    def mend(self, data_dir: Path, names: Collection[str], mirror: str | None) -> None:
        for url, name, md5 in self._files():
            if name in names:
                self.get([url], mirror, data_dir / name, md5)

    def decode(self, files: dict[str, bytes]) -> tuple[Labelled, Labelled]:
        from scipy.io import loadmat  # a second, which nothing else needs

        def split(name: str) -> Labelled:
            arrays = loadmat(io.BytesIO(files[name]))  # type: ignore[arg-type]
            images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
            return torch.from_numpy(images), _labels(arrays["y"].reshape(-1) % 10)  # 10 stands for the digit 0

        train, test = self.checksums()
        return split(train), split(test)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _idx(data: bytes) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type 8, the number of axes, their lengths, the bytes."""
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _rgb(grey: np.ndarray) -> Tensor:
    """Grey images (N, H, W), each in three equal channels, for the nets' three: (N, 3, H, W)."""
    return torch.from_numpy(grey.copy())[:, None].expand(-1, 3, -1, -1).contiguous()


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


KRIZHEVSKY = "none stated; its authors ask to cite Krizhevsky 2009"
CIFAR10 = Cifar(
    About("CIFAR-10", 170.5, KRIZHEVSKY, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar-10-batches-py",
    "CIFAR10",
    "labels",
)
CIFAR100 = Cifar(
    About("CIFAR-100", 169.0, KRIZHEVSKY, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar-100-python",
    "CIFAR100",
    "fine_labels",
)
SVHN = HouseNumbers(
    About("SVHN", 246.3, "for non-commercial use only", "http://ufldl.stanford.edu/housenumbers"), "", "SVHN"
)
FASHION_MNIST = Digits(
    About("Fashion-MNIST", 30.9, "MIT", "https://github.com/zalandoresearch/fashion-mnist"), "FashionMNIST"
)
MNIST = Digits(About("MNIST", 11.6, "CC BY-SA 3.0, as far as is known", "http://yann.lecun.com/exdb/mnist"), "MNIST")
