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
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from degrade.commit import hold, make_folder, write_file
from degrade.config import FOLDER, short_name
from degrade.engine.process import cores
from degrade.errors import Failure

TEST_FOLDERS = ("test", "val", "valid", "validation")
SIZES = (8, 512)  # pixels, from the smallest that three stages can halve to more than memory likes
LIMIT = 64 << 30  # bytes of decoded images
VERSION = 1  # of how they are decoded

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
        known = json.loads(record.read_text())
        dataset, notes = str(known["dataset"]), [str(line) for line in known["notes"]]
        if FOLDER.fullmatch(dataset) and cache(dataset, data_dir).is_file():
            return Prepared(dataset, (*listing.notes, *notes))
    splits, broken = _decode(path, listing, image_size)
    if broken and not skip_broken:
        raise Failure(
            f"{_count(len(broken), 'file')} cannot be decoded: {first_few(broken)}. "
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
    names = set()
    for record in data_dir.glob("folder-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.add(str(json.loads(record.read_text())["dataset"]))
    return sorted(name for name in names if FOLDER.fullmatch(name) and cache(name, data_dir).is_file())


def load(dataset: str, data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, uint8 (N, 3, S, S), with labels (N,).

    Raises:
        Failure: they are not in the cache, or not those that the name says.
    """
    path = cache(dataset, data_dir)
    if not path.exists():
        raise Failure(_advice(dataset, f"is not in {data_dir}"))
    try:
        arrays = read_arrays(path, ("train_images", "train_labels", "test_images", "test_labels", "classes"))
    except ValueError as error:
        raise Failure(_advice(dataset, f"is damaged in {path} ({error})")) from None
    if _digest(arrays) != dataset.rpartition(":")[2]:
        raise Failure(_advice(dataset, f"is damaged in {path}: its checksum is another"))
    train, test = (
        (torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
        for split in ("train", "test")
    )
    return train, test


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


def _advice(dataset: str, what: str) -> str:
    match = FOLDER.fullmatch(dataset)
    size = match[5] if match else "32"
    return (
        f"the decoded images of {short_name(dataset)} {what}. Decode the folder again with "
        f"degrade data fetch folder:PATH --image-size {size}, or name the folder that holds them with --data-dir"
    )


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
        notes.append(f"left out, since no net can learn them: {_count(left, 'test image')} of {', '.join(unknown)}")
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
        elif entry.is_file() and _kind(entry) in IMG_EXTENSIONS:
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


def _state(path: Path, listing: Listing, image_size: int, skip_broken: bool) -> str:
    """A hash that changes when any file is another, by its size and time."""
    digest = hashlib.sha256(json.dumps([VERSION, image_size, skip_broken, str(path.resolve())]).encode())
    for file in (*listing.train, *listing.test):
        status = file.path.stat()
        name = os.fsencode(file.path.relative_to(path))
        digest.update(b"%s\0%d\0%d\n" % (name, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:12]


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


def name_of(path: Path) -> str:
    """What a folder is called in the name of its data set."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower())[:40].strip("-") or "images"


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


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
