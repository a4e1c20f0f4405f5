"""ImageNet, or any folder like it: too large for memory, so that batches are read from the disk while others train.

`train/<class>/*` and `val/<class>/*`, as torchvision has them; or a store that `degrade data pack` has made of them:
the decoded pixels in one file a split, so that nothing is decoded again. Which image comes when, and how it is scaled,
cropped, mirrored and coloured, is a function of (seed, step), as everywhere.

Images are read by threads of this process: Pillow lets go of Python's lock while it decodes and resizes, and threads,
unlike processes, never outlive a run that is killed, and may be had within the processes of a sweep.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from degrade.commit import Held, hold, make_folder, write_file
from degrade.config import FOLDER, short_name
from degrade.data.folder import File, Listing, Prepared, first_few, in_parallel, list_images, name_of, read_arrays, rgb
from degrade.data.images import Images
from degrade.data.plan import AUGMENT, SamplePlan, random_words
from degrade.engine.process import cores
from degrade.errors import Failure

SHORTEST, LONGEST, TEST = 256 / 224, 480 / 224, 256 / 224  # sides that images are resized to, in sides of the crop
SIZES = (32, 512)
AHEAD = 3  # batches that are read before they are needed
CHUNK = 10  # crops a thread makes at a time: those of one image, where there are ten
WORDS = 8  # random numbers an image

# Principal components of the RGB values of ImageNet, as fb.resnet.torch has them; Krizhevsky et al. 2012, section 4.1.
COLOR_STD = 0.1
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class Reader(Protocol):
    """Where the images of a split are."""

    def read(self, number: int) -> Image.Image:
        """One image as RGB, in its own size."""


@dataclass(frozen=True)
class Files:
    """Images as files."""

    files: list[File]

    def read(self, number: int) -> Image.Image:
        path = self.files[number].path
        try:
            return rgb(path)
        except Exception as error:  # Pillow meets malformed bytes with almost any
            if isinstance(error, OSError) and error.errno:  # the disk or the network, not the image
                raise
            reason = " ".join(str(error).split())[:100]
            raise Failure(
                f"{path} cannot be decoded ({reason}). Before a run begins, replace or delete "
                "it, or leave it out with degrade data pack --skip-broken; a run that has begun needs it restored"
            ) from None


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


class View(NamedTuple):
    """How images are seen, an entry an image.

    Args:
        side: what the shorter side is resized to, in sides of the crop.
        y, x: where the crop is, from 0 (top, left) to 1.
        flip: mirrored or not.
        color: what is added to each channel of pixels / 255, (B, 3).
    """

    side: np.ndarray
    y: np.ndarray
    x: np.ndarray
    flip: np.ndarray
    color: np.ndarray

    def part(self, rows: slice) -> "View":
        return View(*(choice[rows] for choice in self))


def random_view(seed: int, step: int, count: int) -> View:
    """Of the images of one update: scale, crop, mirroring and colour, as section 3.4 has them."""
    words = random_words(seed, AUGMENT, step, WORDS * count).reshape(count, WORDS)
    u = (words >> np.uint64(11)).astype(np.float64) / 2.0**53
    radius = np.sqrt(-2 * np.log1p(-u[:, 3:5]))  # Box and Muller: two normal numbers of two uniform ones
    angle = 2 * np.pi * u[:, 5:7]
    normal = np.stack(
        [radius[:, 0] * np.cos(angle[:, 0]), radius[:, 0] * np.sin(angle[:, 0]), radius[:, 1] * np.cos(angle[:, 1])],
        axis=1,
    )
    color = (COLOR_STD * normal * EIGENVALUES) @ EIGENVECTORS.T
    side = SHORTEST + (LONGEST - SHORTEST) * u[:, 0]
    return View(side, u[:, 1], u[:, 2], (words[:, 7] & np.uint64(1)).astype(bool), color)


def middle_view(count: int) -> View:
    """Of images that are tested: the shorter side 256 for a crop of 224, and the middle."""
    half = np.full(count, 0.5)
    return View(np.full(count, TEST), half, half, np.zeros(count, bool), np.zeros((count, 3)))


def crop(image: Image.Image, size: int, side: float, y: float, x: float, flip: bool) -> np.ndarray:
    """Resize the shorter side to `side` crops, cut one out and mirror it: uint8 (3, size, size).

    Resizing and cutting out are one step: Pillow resizes the part of the image that the crop shows.
    """
    width, height = image.size
    shown = min(width, height) / side
    left, top = x * (width - shown), y * (height - shown)
    seen = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + shown, top + shown))
    pixels = np.asarray(seen)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@dataclass(frozen=True)
class Stream:
    """Images that stay on the disk, in place of `degrade.data.Images`.

    Args:
        reader: of a whole split.
        which: those of its images that belong to this one, (N,).
        labels: of these, int64 (N,).
        size: of the crops, in pixels.
    """

    reader: Reader
    which: np.ndarray
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, which: Tensor) -> "Stream":
        """The images at these indices, or where this mask is true; they stay on the disk."""
        return Stream(self.reader, self.which[which.numpy()], self.labels[which], self.size)

    def batches(self, asked: Iterable[tuple[np.ndarray, View]]) -> Iterator[tuple[Tensor, np.ndarray, View]]:
        """uint8 (B, 3, S, S) for each set of indices and views, in this order, read ahead; with what was asked for.

        Raises:
            Failure: an image is broken.
        """
        pool = ThreadPoolExecutor(cores(), "reader")
        ahead: deque[tuple[list[Future[None]], np.ndarray, np.ndarray, View]] = deque()

        def finished() -> tuple[Tensor, np.ndarray, View]:
            jobs, images, index, view = ahead.popleft()
            for job in jobs:
                job.result()
            return torch.from_numpy(images), index, view

        try:
            for index, view in asked:
                images = np.empty((len(index), 3, self.size, self.size), np.uint8)
                rows = [slice(start, start + CHUNK) for start in range(0, len(index), CHUNK)]
                jobs = [pool.submit(self._fill, images[r], index[r], view.part(r)) for r in rows]
                ahead.append((jobs, images, index, view))
                if len(ahead) > AHEAD:
                    yield finished()
            while ahead:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, images: np.ndarray, index: np.ndarray, view: View) -> None:
        last = None
        for row, number in enumerate(self.which[index]):
            side, y, x, flip, _ = (choice[row] for choice in view)
            if number != last:
                whole, last = self.reader.read(int(number)), number
            images[row] = crop(whole, self.size, float(side), float(y), float(x), bool(flip))

    def training_batches(self, plan: SamplePlan, start: int, stop: int, rows: slice) -> Iterator[tuple[Tensor, ...]]:
        """Of updates `start` to `stop`, not included: uint8 (b, 3, S, S), labels (b,) and colour shifts (b, 3).

        Args:
            plan: of the run.
            start, stop: updates, counted from 0.
            rows: of each batch.
        """

        def choices(step: int) -> tuple[np.ndarray, View]:
            scaled = plan.augment == "scale-color"
            view = random_view(plan.seed, step, plan.batch_size) if scaled else middle_view(plan.batch_size)
            return plan.index(step)[rows], view.part(rows)

        for images, index, view in self.batches(choices(step) for step in range(start, stop)):
            yield images, self.labels[index], torch.from_numpy(view.color).float()

    def middles(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[Tensor]:
        """The middle of every image, in order: uint8 (B, 3, S, S), the last batch filled up with the last image.

        Args:
            batch_size: images of each batch.
            first, step: every `step`th batch only, from the `first` on.
        """
        starts = range(first * batch_size, len(self), step * batch_size)
        indices = (np.arange(start, start + batch_size).clip(max=len(self) - 1) for start in starts)
        return (images for images, _, _ in self.batches((index, middle_view(batch_size)) for index in indices))

    def take(self, which: Tensor) -> Images:
        """The middles of the images at these indices, in memory."""
        part = self.part(which)
        return Images(torch.cat(list(part.middles(min(len(part), 256))))[: len(part)], part.labels)

    def to(self, device: torch.device | str) -> "Stream":
        """Itself: each batch goes to the device when it is needed."""
        return self


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
        about = _read_index(path)
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


def known(data_dir: Path) -> list[str]:
    """The full names of the folders and stores whose places are remembered."""
    names = set()
    for record in data_dir.glob("imagenet-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.add(str(json.loads(record.read_text())["dataset"]))
    return sorted(filter(FOLDER.fullmatch, names))


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
        about = _read_index(path)
        streams, digest = [_open_store(path, split, size) for split in SPLITS], about.hash
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


INDEX = "index.json"
SPLITS = ("train", "test")
FORMAT = "degrade's images, 1"


class Index(NamedTuple):
    """What index.json says of a store."""

    name: str
    counts: tuple[int, int]
    classes: list[str]
    short_side: int
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
    if (store / INDEX).exists():
        raise ValueError(f"{store} is there already, and stays as it is; choose another folder, or delete it")
    if short_side and not SIZES[0] <= short_side <= 4096:
        raise ValueError(f"short_side must be 0, or from {SIZES[0]} to 4096 pixels; got {short_side}")
    listing = list_images(path)
    make_folder(store)
    notes, checksums, counts = list(listing.notes), {}, []
    if 0 < short_side < 480:
        notes.append(f"crops of 224 pixels are cut from sides of up to 480, to which {short_side} are enlarged")
    with _alone(store):
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
    return _read_index(store), notes


@contextlib.contextmanager
def _alone(store: Path) -> Iterator[None]:
    """
    Raises:
        Failure: another process packs images into this store.
    """
    try:
        with hold(store / ".lock"):
            yield
    except Held as error:
        raise Failure(f"{store}: {error}") from None


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


def _read_index(store: Path) -> Index:
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
            name_of(Path(str(about["name"]))),
            (int(train), int(test)),
            list(map(str, about["classes"])),
            int(about["short_side"]),
            sums,
            digest,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{store / INDEX} is damaged ({type(error).__name__}); pack the images again") from None


def _open_store(store: Path, split: str, size: int) -> Stream:
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
        for name, sha256 in _read_index(path).sha256.items():
            if _sha256(path / name) != sha256:
                raise Failure(f"{path / name} is damaged: its checksum is another; pack the images again")
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
