"""A store of images: the pixels of each split in one file, mapped into memory, so that nothing is decoded again."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from degrade.commit import hold_or_fail, make_folder, write_file
from degrade.data.images import read_arrays
from degrade.data.listing import File, first_few, in_parallel, is_passing, list_images, name_of, rgb, spelt
from degrade.data.stream import Stream
from degrade.errors import Failure

INDEX = "index.json"
SPLITS = ("train", "test")
FORMAT = "degrade's images, 1"
SIDES = (32, 4096)  # pixels, that the shorter side can be resized to


@dataclass(frozen=True)
class Store:
    """Images as pixels in one file: RGB, row by row, one image after the other."""

    pixels: np.ndarray  # of bytes, mapped from the file
    offsets: np.ndarray
    shapes: np.ndarray  # (N, 2), height and width

    def read(self, number: int) -> Image.Image:
        height, width = map(int, self.shapes[number])
        start = int(self.offsets[number])
        return Image.fromarray(self.pixels[start : start + 3 * height * width].reshape(height, width, 3))


class Index(NamedTuple):
    """What index.json says of a store."""

    name: str
    counts: tuple[int, int]
    classes: list[str]
    sha256: dict[str, str]
    hash: str


def pack(path: Path, store: Path, *, short_side: int = 480, skip_broken: bool = False) -> tuple[Index, list[str]]:
    """Decode the images of a folder once: all pixels of a split in one file, which is mapped into memory later.

    Args:
        path: the folder that holds `train` and `val`.
        store: a folder that is made for it.
        short_side: what the shorter side is resized to where it is longer; 0 for never.
        skip_broken: leave out files that cannot be decoded.

    Returns:
        What index.json says, and what there is to say of the images, a line each.

    Raises:
        ValueError: the folder is not laid out so, or the store is there already.
        Failure: files are broken.
        OSError: the disk is full, say; then there is no index, and packing again begins anew.
    """
    _check_is_new(store)
    if short_side and not SIDES[0] <= short_side <= SIDES[1]:
        raise ValueError(f"short_side must be 0, or from {SIDES[0]} to {SIDES[1]} pixels; got {short_side}")
    listing = list_images(path)
    make_folder(store)
    notes, checksums, counts = list(listing.notes), {}, []
    if 0 < short_side < 480:
        notes.append(f"crops of 224 pixels are cut from sides of up to 480, to which {short_side} are enlarged")
    with hold_or_fail(store / ".lock"):
        _check_is_new(store)  # another process may have packed it meanwhile
        for split, files in zip(SPLITS, (listing.train, listing.test), strict=True):
            broken = _pack_split(store, split, files, short_side)
            if broken and not skip_broken:
                raise Failure(f"{len(broken)} files of {split}: {first_few(broken)}. --skip-broken leaves them out")
            notes += [f"left out, broken: {line}" for line in broken]
            counts.append(len(files) - len(broken))
            for kind in ("bin", "npz"):
                checksums[f"{split}.{kind}"] = _sha256(store / f"{split}.{kind}")
        about = {
            "format": FORMAT,
            "name": name_of(path),
            "counts": counts,
            "classes": listing.classes,
            "short_side": short_side,
            "sha256": checksums,
        }
        write_file(store / INDEX, json.dumps(about, indent=1).encode())
    return read_index(store), notes


def _check_is_new(store: Path) -> None:
    if (store / INDEX).exists():
        raise ValueError(f"{store} is there already, and stays as it is; choose another folder, or delete it")


def _pack_split(store: Path, split: str, files: list[File], short_side: int) -> list[str]:
    """Write the pixels and where each image's are; what is wrong with each file that is broken."""
    shapes, labels, broken = [], [], []

    def decode(file: File) -> np.ndarray | str:
        try:
            image = rgb(file.path)
            width, height = image.size
            if short_side and min(width, height) > short_side:
                scale = short_side / min(width, height)
                image = image.resize(
                    (max(round(width * scale), short_side), max(round(height * scale), short_side)),
                    Image.Resampling.BILINEAR,
                )
            return np.asarray(image)
        except Exception as error:
            if is_passing(error):
                raise
            return f"{file.path} ({' '.join(str(error).split())[:100]})"

    with (store / f"{split}.bin").open("wb") as out:
        for file, pixels in zip(files, in_parallel(decode, files, f"packing {split}"), strict=True):
            if isinstance(pixels, str):
                broken.append(pixels)
            else:
                out.write(np.ascontiguousarray(pixels).data)
                shapes.append(pixels.shape[:2])
                labels.append(file.label)
        out.flush()
        os.fsync(out.fileno())
    with (store / f"{split}.npz").open("wb") as table:
        np.savez(table, shapes=np.array(shapes, np.int32).reshape(-1, 2), labels=np.array(labels, np.int64))
        table.flush()
        os.fsync(table.fileno())
    return broken


def read_index(store: Path) -> Index:
    """
    Raises:
        Failure: it is damaged, or of another kind.
    """
    try:
        text = (store / INDEX).read_bytes()
        about = json.loads(text)
        if about["format"] != FORMAT:
            raise ValueError("another format")
        train, test = about["counts"]
        digest = hashlib.sha256(text).hexdigest()[:12]
        sums = {str(name): str(value) for name, value in about["sha256"].items()}
        return Index(
            spelt(str(about["name"])),
            (int(train), int(test)),
            list(map(str, about["classes"])),
            sums,
            digest,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{store / INDEX} is damaged ({type(error).__name__}); pack the images again") from None


def open_store(store: Path, split: str, size: int) -> Stream:
    try:
        table = read_arrays(store / f"{split}.npz", ("shapes", "labels"))
        shapes, labels = table["shapes"].astype(np.int64), table["labels"]
        ends = np.cumsum(3 * shapes[:, 0] * shapes[:, 1])
        pixels = np.memmap(store / f"{split}.bin", np.uint8, mode="r")
        if len(shapes) != len(labels) or not len(labels) or len(pixels) != ends[-1]:
            raise ValueError("its files do not fit each other")
    except (OSError, ValueError, IndexError) as error:
        raise Failure(f"{store} is damaged ({split}: {error}); pack the images again") from None
    reader = Store(pixels, np.concatenate([[0], ends[:-1]]), shapes)
    return Stream(reader, np.arange(len(labels)), torch.from_numpy(labels), size)


def check_store(store: Path) -> None:
    """Compare every byte with its checksum.

    Raises:
        Failure: one is another.
    """
    for name, sha256 in read_index(store).sha256.items():
        if _sha256(store / name) != sha256:
            raise Failure(f"{store / name} is damaged: its checksum is another; pack the images again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
