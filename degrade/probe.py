"""Probes of nets: what is asked for, measured, and stored so that it can be taken up again.

results/<study>/probes/<probe>.csv                    the rows of all its parts
                       <probe>/<run id>[.init].csv    those of one net
                       <probe>/<run id>[.init].json   what they depend on, and their SHA-256 once they are all there
                       lock                           held while the study is probed
"""

import csv
import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from degrade import __version__, commit, store
from degrade.analysis.crops import ten_crop
from degrade.analysis.gradients import DISTANCES, correlation, norms
from degrade.analysis.landscape import landscape, landscape_rows
from degrade.analysis.lesion import lesion, lesion_rows
from degrade.analysis.responses import responses
from degrade.analysis.statistics import bn_rows, recalibrated
from degrade.bench import median_seconds
from degrade.config import INITS, PROBES, RunConfig, blocks_of
from degrade.data import Splits, Stream, stratified
from degrade.data.images import Images
from degrade.data.plan import Batch, SamplePlan, normalise
from degrade.engine.process import set_precision
from degrade.errors import Failure
from degrade.evaluate import evaluation_batch
from degrade.nets import FAMILIES, Net, make_net
from degrade.store import Run, Study, read_json, to_json
from degrade.train import load_splits, training_batch
from degrade.weights import Trained, load_weights

OF_FRESH_NETS = ("responses", "gradients", "landscape")  # the others need a net that is better than chance
IMAGES = {"responses": 1000, "gradients": 512, "lesion": 1000, "landscape": 1000}  # bn, ten-crop: all
IN_MEMORY = 10_000  # images at most, of those that stay on the disk
BATCH = 128  # the paper's, whatever the run's: what batch normalisation does depends on it
RECALIBRATION = 5000  # training images at least: the statistics of a few batches are worse than the running ones
MAX_POINTS, MIN_POINTS, MIN_IMAGES = 25, 5, 100  # of a landscape that has to fit a budget
LIMIT = 999  # points, far beyond any use
COMMIT_SECONDS = 5.0
FIRST = ("block", "depth", "seed", "id", "init")  # columns of every table
SETTINGS = ("images", "points", "asked")  # of what a part depends on: how finely it is measured


class Landscapes(NamedTuple):
    """How fine the landscapes are: points a side of the plane (the line has twice as many and one), and images."""

    points: int
    images: int


class Wish(NamedTuple):
    """What was asked for.

    Args:
        at_init: probe freshly initialised nets of the same designs instead of the trained ones.
        images: at most so many; None for the probe's own number.
        budget: seconds for all landscapes together.
        points: a side of the plane, odd; None for as many as the budget allows.
    """

    at_init: bool = False
    images: int | None = None
    budget: float = 600.0
    points: int | None = None


@dataclass(frozen=True)
class Part:
    """One probe of one net.

    Args:
        study, run: whose net it is.
        probe: of `PROBES`.
        init: whether it is of the freshly initialised net.
        asked: all that the rows depend on, as JSON knows it.
    """

    study: Study
    run: Run
    probe: str
    init: bool
    asked: dict[str, Any]

    @property
    def path(self) -> Path:
        """Of its CSV; its JSON lies beside it."""
        name = self.run.folder.name + (".init" if self.init else "")
        return folder_of(self.study) / self.probe / f"{name}.csv"

    @cached_property
    def rows(self) -> int:
        """How many there will be."""
        depth, points = self.run.config.depth, self.asked.get("points", 0)
        if self.probe == "responses":
            return depth - 1
        if self.probe == "gradients":
            return len(self.asked["weights"]) * (depth + len(DISTANCES))
        if self.probe == "lesion":
            return lesion_rows(sum(blocks_of(self.run.config.family, depth)))
        if self.probe == "landscape":
            return landscape_rows(2 * points + 1, 1) + landscape_rows(points, 2)
        return 4 if self.probe == "bn" else 2

    @property
    def passes(self) -> int:
        """Forward passes of one image that it takes, a backward pass counted as two."""
        images: int = self.asked["images"]
        if self.probe == "gradients":
            return len(self.asked["weights"]) * images * 3 * (2 + len(DISTANCES))
        if self.probe == "bn":
            train, test = bn_images(self.run.config, images)
            return recalibration_images(self.run.config, images) + 2 * (train + test)
        if self.probe == "ten-crop":
            return 10 * images
        return images * (self.rows if self.probe in ("lesion", "landscape") else 1)

    @property
    def done(self) -> bool:
        """Whether its rows are all there, are those asked for, and are as they were written."""
        stored, text = read_part(self.path)
        return stored == self.asked | {"csv": digest(text)}

    @property
    def otherwise(self) -> "Part | None":
        """The part as it is stored, if it is complete and of the same weights, but with other images or points."""
        stored, text = read_part(self.path)
        complete = stored.pop("csv", None) == digest(text)
        same = stored.keys() == self.asked.keys() and all(
            stored[key] == value for key, value in self.asked.items() if key not in SETTINGS
        )
        return replace(self, asked=stored) if complete and same and stored != self.asked else None

    @property
    def begun(self) -> str:
        """The CSV of the rows that an interrupted measurement has left; empty where there are none."""
        stored, text = read_part(self.path)
        return text if stored == self.asked | {"csv": None} and text.endswith("\n") else ""


def folder_of(study: Study) -> Path:
    return study.folder / store.PROBES


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_part(path: Path) -> tuple[dict[str, Any], str]:
    """What is stored of a part: its JSON and its CSV, empty where they are not there or cannot be read."""
    try:
        stored = read_json(path.with_suffix(".json"))
        return stored, path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError, Failure):
        return {}, ""


def find_parts(study: Study, runs: Sequence[Run], probes: Sequence[str], wish: Wish) -> tuple[list[Part], list[str]]:
    """The parts asked for, probe by probe, and why any of the runs are left out. Landscapes still lack their points.

    Args:
        study: whose runs they are.
        runs: to be probed.
        probes: of `PROBES`; none for all that there are.
        wish: what else was asked for.

    Raises:
        ValueError: a probe of fresh nets that needs trained ones, or a number of points that no landscape has.
    """
    asked_for = bool(probes)
    probes = probes or (OF_FRESH_NETS if wish.at_init else PROBES)
    if wish.at_init and (trained := [probe for probe in probes if probe not in OF_FRESH_NETS]):
        raise ValueError(f"{trained[0]} needs trained nets: a fresh one is at chance whatever is done to it")
    if wish.points is not None:
        landscape_rows(wish.points, 2)
        if wish.points > LIMIT:
            raise ValueError(f"points must be at most {LIMIT}; got {wish.points}")
    found, left_out = [], []
    for run in runs:
        try:
            if not (wish.at_init or run.status == "done"):
                raise Failure(f"{run.folder} is not done ({run.status})")
            nets = [fresh(run.config, no_mean())] if wish.at_init else steps_of(run, no_mean())
        except Failure as error:
            left_out.append(str(error))
            continue
        for probe in probes:
            if probe == "ten-crop" and run.config.family != "imagenet":
                if asked_for:
                    left_out.append(f"{run.folder}: ten crops are taken of images that are larger than the net's input")
                continue
            asked = {
                "probe": probe,
                "run": run.folder.name,
                "init": wish.at_init,
                "weights": {str(net.step): net.sha256 for net in (nets if probe == "gradients" else nets[-1:])},
                "seed": run.config.seed,
                "images": image_count(run.config, probe, wish.images),
                "degrade": __version__,
            }
            if probe == "landscape":
                asked["asked"] = {"budget": wish.budget, "points": wish.points, "images": wish.images}
            found.append(Part(study, run, probe, wish.at_init, asked))
    return sorted(found, key=lambda part: probes.index(part.probe)), left_out


def image_count(config: RunConfig, probe: str, most: int | None) -> int:
    """How many images a probe takes; of bn the larger of its two numbers."""
    tested = config.test_set_size
    sizes = {"lesion": tested, "ten-crop": tested, "bn": max(bn_images(config, None))}
    size, most = sizes.get(probe, config.training_set_size), most or IMAGES.get(probe)
    return size if most is None else min(size, most)


def bn_images(config: RunConfig, most: int | None) -> tuple[int, int]:
    """Training and test images."""
    sizes = config.training_set_size, config.test_set_size
    if config.family == "imagenet":
        most = min(most or IN_MEMORY, IN_MEMORY)
    return sizes if most is None else (min(sizes[0], most), min(sizes[1], most))


def recalibration_images(config: RunConfig, images: int) -> int:
    """How many training images BN is recalibrated on, where the error is measured on so many."""
    return min(config.training_set_size, max(images, RECALIBRATION))


def with_points(parts: Sequence[Part], wish: Wish, seconds: Callable[[RunConfig], float]) -> list[Part]:
    """The parts, with the points and images of the landscapes, which share the budget.

    What was chosen once for the same wish is kept in that study, since a choice depends on timings: its landscapes
    are all of one kind, however often they are interrupted.

    Args:
        parts: as `find_parts` gives them.
        wish: what was asked for.
        seconds: that a forward pass of one image takes.
    """
    mine = [part for part in parts if part.probe == "landscape"]
    kept: dict[Path, Landscapes] = {}
    for part in mine:
        stored, _ = read_part(part.path)
        if stored.get("asked") == part.asked["asked"] and stored.keys() >= {*Landscapes._fields}:
            kept.setdefault(part.study.folder, Landscapes(stored["points"], stored["images"]))
    chosen = None
    if any(part.study.folder not in kept for part in mine):
        most = min(part.asked["images"] for part in mine)
        chosen = choose(wish.budget / sum(seconds(part.run.config) for part in mine), most, wish.points)
    found = []
    for part in parts:
        choice = kept.get(part.study.folder, chosen) if part.probe == "landscape" else None
        found.append(replace(part, asked=part.asked | choice._asdict()) if choice else part)
    return found


def keep(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Keep what is complete with other images or points: it may have cost more than what is asked for now.

    Args:
        parts: as `with_points` gives them.

    Returns:
        The parts, with what is kept in the place of what was asked for; and what is kept alone.
    """
    kept = [part.otherwise for part in parts]
    return [old or part for old, part in zip(kept, parts, strict=True)], [old for old in kept if old]


def choose(passes: float, most: int, points: int | None = None) -> Landscapes:
    """The finest landscape of at most so many forward passes that still has 100 images; else the coarsest one.

    Args:
        passes: that each net may take.
        most: images.
        points: a side of the plane, where it was asked for.
    """
    least = min(MIN_IMAGES, most)
    for side in [points] if points else range(MAX_POINTS, MIN_POINTS - 1, -2):
        images = min(int(passes / (side + 1) ** 2), most)  # (p + 1)^2: p^2 of the plane, 2 p + 1 of the line
        if images >= least:
            break
    return Landscapes(side, max(images, least))


@lru_cache
def forward_seconds(family: str, depth: int, width: int, shortcut: str, size: int, device: str) -> float:
    """Seconds a forward pass takes, an image."""
    net = FAMILIES[family](depth, "residual", width=width, shortcut=shortcut).eval().to(device)
    count = evaluation_batch(device, size)
    images = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward() -> None:
        net(images)

    return median_seconds(forward, device, 5) / count


def image_seconds(config: RunConfig, device: str) -> float:
    """Seconds a forward pass of one image takes; of the nets of CIFAR-10 a straight line in depth through two of them.

    Those are 8 and 20 layers deep, and timed.
    """
    net = config.width, config.shortcut, config.image_size, device
    if config.family == "imagenet":
        return forward_seconds("imagenet", config.depth, *net)
    short, long = (forward_seconds("cifar", depth, *net) for depth in (8, 20))
    return max(short + (config.depth - 8) / 12 * (long - short), short)


def probe_parts(parts: Sequence[Part], data_dir: Path, device: str) -> Iterator[tuple[Part, int]]:
    """Measure the parts that are not done, a study after the other, and write the tables of their probes.

    Yields:
        A part and how many of its rows are there; all of them, once it is stored. Dropped anywhere, it goes on from
        the last rows committed when it is called again, and ends with the same bytes.

    Raises:
        Failure: another process probes the study, or data or weights are damaged.
        OSError: the disk is full, say.
    """
    for _, group in groupby(parts, key=lambda part: part.study.folder):
        mine = list(group)
        folder = folder_of(mine[0].study)
        commit.make_folder(folder)
        try:
            with commit.hold(folder / store.LOCK) as lock:
                probes = list(dict.fromkeys(part.probe for part in mine))
                for probe in probes:
                    commit.make_folder(folder / probe)
                    for path in commit.leavings(folder / probe) + commit.leavings(folder):
                        commit.remove(path)
                for part in mine:
                    if not part.done:  # another process may have been here since the plan was made
                        for rows in _measure(part, data_dir, device, lock):
                            yield part, rows
                for probe in probes:
                    lock.check()
                    commit.write_file(folder / f"{probe}.csv", table(mine[0].study, probe).encode())
        except commit.Held as held:
            raise Failure(f"{folder} is {held}, which probes this study; one at a time") from None


def table(study: Study, probe: str) -> str:
    """The CSV of all parts that are complete, by block, depth and seed.

    Of nets without a complete part here, the rows that it had before are kept: parts stay out of git, tables go in,
    and what is measured anew replaces the old rows once it is all there.
    """
    folder, found = folder_of(study), []
    kept = _rows_by_part(folder / f"{probe}.csv")
    for run in study.runs:
        for init in (0, 1):
            path = folder / probe / f"{run.folder.name}{'.init' if init else ''}.csv"
            stored, text = read_part(path)
            if stored.get("csv") == digest(text):
                found.append(text)
            elif (run.folder.name, str(init)) in kept:
                found.append(kept[run.folder.name, str(init)])
    header = found[-1].partition("\n")[0] + "\n" if found else ""
    return header + "".join(text.removeprefix(header) for text in found if text.startswith(header))


def _rows_by_part(path: Path) -> dict[tuple[str, str], str]:
    """The rows of a table by run id and init, each with the header."""
    if not path.is_file():
        return {}
    header, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    rows: dict[tuple[str, str], str] = {}
    for line in lines:
        if len(first := line.split(",")[: len(FIRST)]) == len(FIRST):
            part = first[-2], first[-1]  # its id and init
            rows[part] = rows.get(part, header) + line
    return rows


def _measure(part: Part, data_dir: Path, device: str, lock: commit.Lock) -> Iterator[int]:
    """Measure one part, committing its rows now and then.

    Yields:
        How many rows there are, before each one; and in the end, once all are committed.
    """
    text = part.begun
    if not text:  # first of all nothing may be there that could be taken for rows of this part
        lock.check()
        commit.remove(part.path)
        commit.write_file(part.path.with_suffix(".json"), to_json(part.asked | {"csv": None}))
    count = max(text.count("\n") - 1, 0)
    committed = time.monotonic()
    config = part.run.config
    first = (config.block, config.depth, config.seed, part.run.folder.name, int(part.init))
    set_precision(config.precision)
    for row in records(part, load_splits(config, data_dir, device), count):
        yield count
        row = dict(zip(FIRST, first, strict=True)) | row
        text += ("" if text else to_line(row)) + to_line(row.values())
        count += 1
        if time.monotonic() - committed > COMMIT_SECONDS:
            lock.check()
            commit.write_file(part.path, text.encode())
            committed = time.monotonic()
    lock.check()
    commit.write_file(part.path, text.encode())
    commit.write_file(part.path.with_suffix(".json"), to_json(part.asked | {"csv": digest(text)}))
    yield count


def to_line(values: Iterable[object]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(values)
    return file.getvalue()


def records(part: Part, splits: Splits, skip: int) -> Iterator[dict[str, object]]:
    """The rows of a part, less the first `skip`.

    Raises:
        Failure: its weights are not those that were asked for any more.
    """
    config, asked, mean = part.run.config, part.asked, splits.mean
    nets = [fresh(config, mean)] if part.init else steps_of(part.run, mean)
    nets = [net for net in nets if asked["weights"].get(str(net.step)) == net.sha256]
    if len(nets) < len(asked["weights"]):
        raise Failure(f"{part.run.folder}: its weights have changed since the plan was made")
    net = nets[-1]
    splits = replace(splits, mean=net.mean)
    if part.probe == "bn":
        train, test = bn_images(config, asked["images"])
        train_images, test_images = some(splits.train, train, config, mean), some(splits.test, test, config, mean)
        calibration = some(splits.train, recalibration_images(config, train), config, mean)
        batches = (x for x, _ in training_batches(replace(splits, train=calibration), config))
        yield from islice(bn_rows(net.net, train_images, test_images, net.mean, batches), skip, None)
        return
    if part.probe == "ten-crop":
        assert isinstance(splits.test, Stream)  # of no other net is it asked for
        chosen = stratified(splits.test.labels, asked["images"], config.split_seed)
        yield from islice(ten_crop(net.net, splits.test.part(chosen), net.mean), skip, None)
        return
    images = some(splits.test if part.probe == "lesion" else splits.train, asked["images"], config, mean)
    splits = replace(splits, train=images)
    if part.probe == "responses":
        rows = responses(net.net, images.images, net.mean, batch_statistics=part.init)
        yield from (row | {"images": len(images)} for row in islice(rows, skip, None))
    elif part.probe == "gradients":
        rows = (row for net in nets for row in gradient_rows(net, splits))
        yield from islice(rows, skip, None)
    elif part.probe == "lesion":
        yield from lesion(net.net, images.images, images.labels, net.mean, seed=config.seed, skip=skip)
    else:
        settled = in_eval_mode(net, splits)
        for dimension, points in ((1, 2 * asked["points"] + 1), (2, asked["points"])):
            there = landscape_rows(points, dimension)
            yield from landscape(
                settled,
                images.images,
                images.labels,
                net.mean,
                points=points,
                dimension=dimension,
                seed=config.seed,
                skip=min(skip, there),
            )
            skip = max(skip - there, 0)


def gradient_rows(net: Trained, splits: Splits) -> Iterator[dict[str, object]]:
    """Norms on augmented batches, then correlations on the images as they are; all of the training images given."""
    images = splits.train
    assert isinstance(images, Images)  # `records` has put them there
    x = normalise(images.images, net.mean).contiguous(memory_format=torch.channels_last)
    settled = in_eval_mode(net, splits)
    for rows in (
        norms(net.net, training_batches(splits, net.config)),
        correlation(settled, x, images.labels, seed=net.config.seed),
    ):
        for row in rows:
            yield {"kind": row["kind"], "step": net.step} | row | {"images": len(images)}


def in_eval_mode(net: Trained, splits: Splits) -> Net:
    """The net, or a fresh one with the statistics of these training images: it has none of its own yet."""
    return net.net if net.step else recalibrated(net.net, (x for x, _ in training_batches(splits, net.config)))


def training_batches(splits: Splits, config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised, cropped and flipped batches of 128 training images: each image once, less a last partial batch.

    Args:
        splits: of which the training images are taken.
        config: whose seed and padding they have. Statistics recalibrated on crops that are padded otherwise than
            those that the net was trained on are worse.
    """
    plan = SamplePlan(len(splits.train), min(BATCH, len(splits.train)), config.seed, config.augment)
    for step in range(len(splits.train) // plan.batch_size):
        batch = Batch(*(choice.to(splits.mean.device) for choice in vars(plan.batch(step)).values()))
        yield training_batch(splits, batch, config.padding)


def some(images: Images | Stream, count: int, config: RunConfig, mean: Tensor) -> Images:
    """So many of them, the same for every run of a study, and each class with its share, on the device of `mean`."""
    chosen = stratified(images.labels.cpu(), count, config.split_seed).to(images.labels.device)
    return images.take(chosen).to(mean.device)


def steps_of(run: Run, mean: Tensor) -> list[Trained]:
    """The nets of a run whose gradients are measured: the fresh one, unless it starts from another run's weights;
    those at the steps that `degrade sweep --snapshots` was told to keep; and the trained one of its last step.

    None of the other checkpoints: which of them are there depends on how fast the machine was.

    Raises:
        Failure: one of them is damaged, or the last one is not there.
    """
    begin = [fresh(run.config, mean)] if run.config.init in INITS else []
    kept = [load_weights(run, mean, path) for path in reversed(commit.checkpoints(run.folder / store.SNAPSHOTS))]
    last = load_weights(run, mean)
    return [*begin, *(net for net in kept if net.step < last.step), last]


def fresh(config: RunConfig, mean: Tensor) -> Trained:
    """The freshly initialised net of a configuration, as step 0, on the device of `mean`.

    Of a run that was trained here, it is the net that training started from. An imported run never started from a net
    of degrade's: its step 0 is a fresh net of the same design.

    Raises:
        Failure: it starts from another run's weights.
    """
    if config.init not in INITS:
        raise Failure(f"{config.run_id} does not start from a fresh initialisation")
    torch.manual_seed(config.seed)
    net = make_net(config)
    sha256 = hashlib.sha256()
    for tensor in net.state_dict().values():
        sha256.update(tensor.contiguous().numpy().tobytes())
    net.to(mean.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(net.eval(), config, 0, sha256.hexdigest(), mean)


def no_mean() -> Tensor:
    """For nets that are loaded for their hash only."""
    return torch.zeros(3, 32, 32)
