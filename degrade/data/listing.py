"""Folders of images: which file is of which class, how one is read, and how a data set is called by what is in it."""

import contextlib
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from degrade.config import FOLDER
from degrade.engine.process import cores

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision's folders
TEST_FOLDERS = ("test", "val", "valid", "validation")

T = TypeVar("T")
R = TypeVar("R")


class Prepared(NamedTuple):
    """A folder of images under its full name, with what there is to say of it, a line each."""

    dataset: str
    notes: tuple[str, ...]


class File(NamedTuple):
    """One image."""

    path: Path
    label: int


class Listing(NamedTuple):
    """What lies in a folder: the images of each split, ordered by file name over all classes."""

    classes: list[str]
    train: list[File]
    test: list[File]
    notes: list[str]


def list_images(path: Path) -> Listing:
    """
    Raises:
        ValueError: it is not laid out as `train/<class>/*` and `test/<class>/*`.
    """
    layout = "images must lie in train/<class>/ and test/<class>/ (or val/<class>/)"
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; {layout}")
    tests = [name for name in TEST_FOLDERS if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        lacking = "train" if tests else "test" if (path / "train").is_dir() else "train and test"
        raise ValueError(f"{path} has no folder {lacking}; {layout}")
    notes = [f"tested on {tests[0]}; {', '.join(tests[1:])} is not used"] if tests[1:] else []
    found, others = {}, Counter[str]()
    for split in ("train", tests[0]):
        found[split] = dict(_classes(path / split, others))
    classes = sorted(name for name, files in found["train"].items() if files)
    if len(classes) < 2:
        raise ValueError(f"{path / 'train'} must hold images of at least two classes; {layout}")
    if empty := sorted(name for name, files in found["train"].items() if not files):
        notes.append(f"classes without training images: {', '.join(empty)}")
    tested = {name: files for name, files in found[tests[0]].items() if files}
    if unknown := sorted(set(tested) - set(classes)):
        left = sum(len(tested[name]) for name in unknown)
        notes.append(f"left out, since no net can learn them: {count(left, 'test image')} of {', '.join(unknown)}")
    if untested := [name for name in classes if name not in tested]:
        notes.append(f"classes without test images: {', '.join(untested)}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        notes.append(f"passed over, as they are no images by their names: {kinds}")
    splits = [_ordered(files, classes) for files in (found["train"], tested)]
    if not splits[1]:
        raise ValueError(f"{path / tests[0]} holds no image of a class that is in train; {layout}")
    counts = Counter(file.label for file in splits[0])
    low, high = min(counts.values()), max(counts.values())
    if high > 1.5 * low:
        notes.append(f"from {low:,} to {high:,} training images a class")
    return Listing(classes, splits[0], splits[1], notes)


def _classes(split: Path, others: Counter[str]) -> Iterator[tuple[str, list[Path]]]:
    """The images of each class; `others` counts what else lies there, by its kind."""
    for entry in sorted(os.scandir(split), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield entry.name, list(_images(entry, others, (split.stat().st_ino,)))
        else:
            others[_kind(entry)] += 1


def _images(folder: os.DirEntry[str], others: Counter[str], above: tuple[int, ...]) -> Iterator[Path]:
    """The images in a folder and those below it; links that lead back up are not followed."""
    here = (*above, folder.stat().st_ino)
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.stat().st_ino not in here:
                yield from _images(entry, others, here)
        elif entry.is_file() and _kind(entry) in IMAGES:
            yield Path(entry.path)
        else:
            others[_kind(entry)] += 1


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not entry.is_file():
        return "links to nowhere"
    return os.path.splitext(entry.name)[1].lower() or "without a suffix"  # noqa: PTH122


def _ordered(files: dict[str, list[Path]], classes: Sequence[str]) -> list[File]:
    every = [File(path, label) for label, name in enumerate(classes) for path in files.get(name, ())]
    return sorted(every, key=lambda file: (file.path.name, file.label, str(file.path)))


def name_of(path: Path) -> str:
    """What a folder is called in the name of its data set."""
    return spelt(path.resolve().name)


def spelt(name: str) -> str:
    """As it may stand in the name of a data set."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())[:40].strip("-") or "images"


def is_passing(error: Exception) -> bool:
    """Whether the disk, the network or a lack of memory is to blame, and not the image."""
    if isinstance(error, OSError) and error.errno:
        return error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)
    return isinstance(error, MemoryError)


def known(data_dir: Path, kind: str) -> list[str]:
    """The full names of the data sets of a kind, "folder" or "imagenet", that were ever prepared."""
    names = set()
    for record in data_dir.glob(f"{kind}-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.add(str(json.loads(record.read_text())["dataset"]))
    return sorted(filter(FOLDER.fullmatch, names))


def rgb(path: Path) -> Image.Image:
    """An image file as RGB, upright, before white where it is transparent."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        elif image.mode.startswith("I"):  # 16 bits a pixel, of which convert would clip all above 255
            image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def in_parallel(function: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """What `function` gives for each item, in order, by a thread a core, with a progress bar."""
    with ThreadPoolExecutor(cores()) as pool, tqdm(desc=what, total=len(items)) as bar:
        for start in range(0, len(items), 1024):  # so that not all of them wait in memory
            for result in pool.map(function, items[start : start + 1024]):
                bar.update()
                yield result


def first_few(broken: Sequence[str]) -> str:
    """The first of what is wrong, so that a message stays a line."""
    return "; ".join([*broken[:3], *(["..."] if len(broken) > 3 else [])])


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
