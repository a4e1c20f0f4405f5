"""ImageNet, or any folder like it: known by what is in it, and found again where it was.

`train/<class>/*` and `val/<class>/*`, as torchvision has them; or a store that `degrade data pack` has made of them.
Its full name is `imagenet:NAME:TRAINING+TEST IMAGES:CLASSES:SIZE:HASH`; the hash is of the names and sizes of all
files, or of the store's index.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from degrade.commit import hold, make_folder, write_file
from degrade.config import short_name
from degrade.data.listing import File, Listing, Prepared, first_few, in_parallel, list_images, name_of
from degrade.data.pack import INDEX, SPLITS, check_store, open_store, read_index
from degrade.data.stream import Files, Stream
from degrade.errors import Failure

SIZES = (32, 512)  # pixels of the crops


def prepare(path: Path, data_dir: Path, *, image_size: int = 224, write: bool = True) -> Prepared:
    """List the images of a folder, or of a store, and remember where it is.

    Args:
        path: the folder that holds `train` and `val`, or the store.
        data_dir: where the path is remembered, under what is in it: names and sizes of all files.
        image_size: of the crops.
        write: remember it; `load` needs that.

    Raises:
        ValueError: the folder is not laid out so, or the size is out of bounds.
        Failure: the store is damaged.
    """
    if not SIZES[0] <= image_size <= SIZES[1]:
        raise ValueError(f"image_size must be from {SIZES[0]} to {SIZES[1]} pixels; got {image_size}")
    if (path / INDEX).is_file():
        about = read_index(path)
        name, counts, classes, digest, notes = about.name, about.counts, len(about.classes), about.hash, []
    else:
        listing = list_images(path)
        name, classes, notes = name_of(path), len(listing.classes), listing.notes
        counts, digest = (len(listing.train), len(listing.test)), _listing_hash(path, listing)
    dataset = f"imagenet:{name}:{counts[0]}+{counts[1]}:{classes}:{image_size}:{digest}"
    if write:
        make_folder(data_dir)
        record = {"dataset": dataset, "path": str(path.resolve())}
        with hold(data_dir / ".lock", wait=True):
            write_file(_record(dataset, data_dir), json.dumps(record).encode())
    return Prepared(dataset, tuple(notes))


def place(dataset: str, data_dir: Path) -> Path:
    """Where a data set is; what is in it is compared with its name by `load` alone.

    Raises:
        Failure: it is not known, or not there any more.
    """
    try:
        path = Path(json.loads(_record(dataset, data_dir).read_text())["path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Failure(_advice(dataset, f"are not known in {data_dir}")) from None
    if not path.is_dir():
        raise Failure(_advice(dataset, f"are not in {path} any more"))
    return path


def load(dataset: str, data_dir: Path) -> tuple[Stream, Stream]:
    """Training and test images, which stay where they are.

    Raises:
        Failure: they are not where they were, or not what they were.
    """
    path = place(dataset, data_dir)
    size, known_hash = int(dataset.split(":")[-2]), dataset.rpartition(":")[2]
    if (path / INDEX).is_file():
        about = read_index(path)
        streams, digest = [open_store(path, split, size) for split in SPLITS], about.hash
    else:
        try:
            listing = list_images(path)
        except ValueError as error:
            raise Failure(_advice(dataset, f"are not in {path} any more ({error})")) from None
        streams, digest = (
            [_open_files(files, size) for files in (listing.train, listing.test)],
            _listing_hash(path, listing),
        )
    if digest != known_hash:
        raise Failure(_advice(dataset, f"in {path} are others by now"))
    return streams[0], streams[1]


def _open_files(files: list[File], size: int) -> Stream:
    return Stream(Files(files), np.arange(len(files)), torch.tensor([file.label for file in files]), size)


def _record(dataset: str, data_dir: Path) -> Path:
    size, digest = dataset.split(":")[-2:]
    return data_dir / f"imagenet-{short_name(dataset)}-{size}-{digest}.json"


def _advice(dataset: str, what: str) -> str:
    return (
        f"the images of {short_name(dataset)} {what}. Say where they are with degrade data fetch imagenet:PATH, "
        "or name another data folder with --data-dir"
    )


def _listing_hash(path: Path, listing: Listing) -> str:
    """Of the names, sizes and classes of all files, in their order."""
    digest = hashlib.sha256(json.dumps(listing.classes).encode())
    for split in (listing.train, listing.test):
        digest.update(b"split\n")
        for file in split:
            digest.update(b"%s\0%d\n" % (os.fsencode(file.path.relative_to(path)), file.path.stat().st_size))
    return digest.hexdigest()[:12]


def check(dataset: str, data_dir: Path) -> None:
    """
    Raises:
        Failure: its images are not where they were, or are damaged.
    """
    load(dataset, data_dir)
    check_folder(place(dataset, data_dir))


def check_folder(path: Path) -> None:
    """Compare a store with its checksums, or decode every file of a folder.

    Raises:
        ValueError: the folder is not laid out as it should be.
        Failure: an image or the store is damaged.
    """
    if (path / INDEX).is_file():
        check_store(path)
        return
    listing = list_images(path)
    files = [*listing.train, *listing.test]
    reader = Files(files)

    def problem(number: int) -> str:
        try:
            reader.read(number)
        except (Failure, OSError) as error:
            return str(error).partition(". Before")[0]
        return ""

    if broken := list(filter(None, in_parallel(problem, range(len(files)), f"decoding {path.name}"))):
        raise Failure(
            f"{len(broken)} of {len(files)} images: {first_few(broken)}. Replace or delete them, or leave them out "
            "with degrade data pack --skip-broken"
        )
