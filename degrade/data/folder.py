"""Your own images: `train/<class>/*` and `test/<class>/*` (or `val`), decoded once into a checked cache.

prepared = prepare(Path("flowers"), data_dir)
load(prepared.dataset, data_dir)

Its full name, `folder:NAME:TRAINING+TEST IMAGES:CLASSES:SIZE:HASH`, says what is in it, wherever it lies: the hash is
of the decoded images, their labels and the classes' names. So a run's configuration names no path.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from degrade.commit import hold, make_folder, write_file
from degrade.config import FOLDER, short_name
from degrade.data.images import read_arrays
from degrade.data.listing import (
    Listing,
    Prepared,
    count,
    first_few,
    in_parallel,
    is_passing,
    known,
    list_images,
    name_of,
    rgb,
)
from degrade.errors import Failure

SIZES = (8, 512)  # pixels, from the smallest that three stages can halve to more than memory likes
LIMIT = 64 << 30  # bytes of decoded images
VERSION = 1  # of how they are decoded


def prepare(
    path: Path, data_dir: Path, *, image_size: int = 32, skip_broken: bool = False, write: bool = True
) -> Prepared:
    """Decode the images, unless that was done before and no file has changed since.

    Each becomes RGB: what is grey gets three equal channels, what is transparent a white background, and cameras'
    rotations are applied. Where it is not square and of the size asked for, its shorter side is resized to that
    (bicubic, antialiased) and its middle taken.

    Args:
        path: the folder that holds `train` and `test`.
        data_dir: of the cache.
        image_size: height and width to decode to.
        skip_broken: leave out files that cannot be decoded.
        write: keep the images in the cache; `load` needs that.

    Raises:
        ValueError: the folder is not laid out so, or the size is out of bounds.
        Failure: files are broken, or the images are too many for memory.
        OSError: the cache cannot be written.
    """
    if not SIZES[0] <= image_size <= SIZES[1]:
        raise ValueError(f"image_size must be from {SIZES[0]} to {SIZES[1]} pixels; got {image_size}")
    listing = list_images(path)
    name = name_of(path)
    record = data_dir / f"folder-{name}-{_state(path, listing, image_size, skip_broken)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record_of = json.loads(record.read_text())
        dataset, notes = str(record_of["dataset"]), [str(line) for line in record_of["notes"]]
        if FOLDER.fullmatch(dataset) and cache(dataset, data_dir).is_file():
            return Prepared(dataset, (*listing.notes, *notes))
    splits, broken = _decode(path, listing, image_size)
    if broken and not skip_broken:
        raise Failure(
            f"{count(len(broken), 'file')} cannot be decoded: {first_few(broken)}. "
            "Replace or delete them, or leave them out with --skip-broken"
        )
    notes = [f"left out, broken: {'; '.join(broken)}"] if broken else []
    arrays = {
        "train_images": splits[0][0],
        "train_labels": splits[0][1],
        "test_images": splits[1][0],
        "test_labels": splits[1][1],
        "classes": np.array(listing.classes, dtype=np.str_),
    }
    counts = f"{len(splits[0][1])}+{len(splits[1][1])}:{len(listing.classes)}:{image_size}"
    dataset = f"folder:{name}:{counts}:{_digest(arrays)}"
    if write:
        make_folder(data_dir)
        with hold(data_dir / ".lock", wait=True):
            _keep(cache(dataset, data_dir), arrays)
            write_file(record, json.dumps({"dataset": dataset, "notes": notes}, indent=1).encode())
    return Prepared(dataset, (*listing.notes, *notes))


def cache(dataset: str, data_dir: Path) -> Path:
    """The file of the decoded images of a folder with this full name."""
    return data_dir / f"folder-{short_name(dataset)}-{dataset.rpartition(':')[2]}.npz"


def cached(data_dir: Path) -> list[str]:
    """The full names of the folders whose decoded images are in the cache."""
    return [name for name in known(data_dir, "folder") if cache(name, data_dir).is_file()]


def load(dataset: str, data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, uint8 (N, 3, S, S), with labels (N,).

    Raises:
        Failure: they are not in the cache, or not those that the name says.
    """
    path = cache(dataset, data_dir)
    if not path.exists():
        raise Failure(_advice(dataset, f"are not in {data_dir}"))
    try:
        arrays = read_arrays(path, ("train_images", "train_labels", "test_images", "test_labels", "classes"))
    except ValueError as error:
        raise Failure(_advice(dataset, f"are damaged in {path} ({error})")) from None
    if _digest(arrays) != dataset.rpartition(":")[2]:
        raise Failure(_advice(dataset, f"are damaged in {path}: their checksum is another"))
    train, test = (
        (torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
        for split in ("train", "test")
    )
    return train, test


def _advice(dataset: str, what: str) -> str:
    match = FOLDER.fullmatch(dataset)
    size = match[5] if match else "32"
    return (
        f"the decoded images of {short_name(dataset)} {what}. Decode the folder again with "
        f"degrade data fetch folder:PATH --image-size {size}, or name the folder that holds them with --data-dir"
    )


def _state(path: Path, listing: Listing, image_size: int, skip_broken: bool) -> str:
    """A hash that changes when any file is another, by its size and time."""
    digest = hashlib.sha256(json.dumps([VERSION, image_size, skip_broken, str(path.resolve())]).encode())
    for file in (*listing.train, *listing.test):
        status = file.path.stat()
        name = os.fsencode(file.path.relative_to(path))
        digest.update(b"%s\0%d\0%d\n" % (name, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:12]


def _decode(path: Path, listing: Listing, size: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """Images (N, 3, S, S) and labels (N,) of both splits; and what is wrong with each file that is broken."""
    files = [*listing.train, *listing.test]
    if (needed := len(files) * 3 * size * size) > LIMIT:
        raise Failure(
            f"{len(files):,} images of {size}x{size} pixels take {needed >> 30} GiB of memory; "
            "choose a smaller --image-size"
        )
    images = np.empty((len(files), 3, size, size), np.uint8)
    problems: dict[int, str] = {}

    def decode(place: int) -> None:
        try:
            images[place] = read_image(files[place].path, size)
        except Exception as error:  # Pillow meets malformed bytes with almost any
            if is_passing(error):
                raise
            reason = " ".join(str(error).replace(str(files[place].path), "it").split()) or type(error).__name__
            problems[place] = f"{files[place].path.relative_to(path)} ({reason[:100]})"

    for _ in in_parallel(decode, range(len(files)), f"decoding {path.name}"):
        pass
    splits = []
    for start, split in ((0, listing.train), (len(listing.train), listing.test)):
        sound = [place for place in range(start, start + len(split)) if place not in problems]
        labels = np.array([files[place].label for place in sound], np.int64)
        whole = images[start : start + len(split)]
        splits.append((whole if len(sound) == len(split) else images[sound], labels))
    if not all(len(labels) for _, labels in splits):
        raise Failure(f"{path}: no image can be decoded: {'; '.join(list(problems.values())[:3])}")
    return splits, [problems[place] for place in sorted(problems)]


def read_image(path: Path, size: int) -> np.ndarray:
    """One image, uint8 (3, size, size)."""
    image = rgb(path)
    width, height = image.size
    if (width, height) != (size, size):
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        names = array.dtype.kind == "U"
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(json.dumps(array.tolist()).encode() if names else np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def _keep(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache whole or not at all; it may be larger than what memory has left."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
