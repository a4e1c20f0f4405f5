"""Reading images that are like ImageNet's: images a second and core, and where the time goes.

Makes JPEG files of 500x375 pixels, some hundreds of each of ten classes, and reads them as a run does: from the files,
and from a store. The parts are timed one image at a time, the whole with one thread and with one a core, in turns.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from degrade.data import imagenet, pack, shapes, stream
from degrade.data.plan import SamplePlan
from degrade.data.stream import crop, random_view

CLASSES, BATCH, TURNS = 10, 64, 3


def make(root: Path, each: int) -> float:
    """So many images of each class for training, a tenth for the test; their mean size in kB."""
    sizes = []
    for split, count, seed in (("train", each * CLASSES, 1), ("val", max(each // 10, 2) * CLASSES, 2)):
        images, labels = shapes.generate(count, seed)
        noise = np.random.default_rng(seed)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            large = Image.fromarray(image.transpose(1, 2, 0)).resize((500, 375), Image.Resampling.BICUBIC)
            pixels = np.asarray(large) + noise.normal(0, 9, (375, 500, 3))  # as much detail as photographs have
            path = root / split / shapes.CLASSES[label] / f"{i:06d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            sizes.append(path.stat().st_size / 1000)
    return statistics.mean(sizes)


def milliseconds(function: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        function(i)
    return 1000 * (time.perf_counter() - start) / count


def images_per_second(images: stream.Stream, threads: int) -> float:
    plan = SamplePlan(len(images), BATCH, 0, "scale-color")
    before, stream.cores = stream.cores, lambda: threads
    steps = max(len(images) // BATCH, 8)
    start = time.perf_counter()
    for _ in images.training_batches(plan, 0, steps, slice(None)):
        pass
    stream.cores = before
    return steps * BATCH / (time.perf_counter() - start)


def main() -> None:
    each = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make(root / "images", each)
        start = time.perf_counter()
        pack.pack(root / "images", root / "store", short_side=256)
        packed = time.perf_counter() - start
        streams = {}
        for name in ("images", "store"):
            dataset = imagenet.prepare(root / name, root / "data").dataset
            streams[name], _ = imagenet.load(dataset, root / "data")
        count = len(streams["images"])
        print(f"{count} training images of 500x375 pixels, {size:.0f} kB each; packed in {packed:.0f} s")
        view = random_view(0, 0, count)
        wholes = [streams["images"].reader.read(i) for i in range(64)]

        def cut(i: int) -> np.ndarray:
            at = i % 64
            return crop(wholes[at], 224, float(view.side[i]), float(view.y[i]), float(view.x[i]), bool(view.flip[i]))

        print(f"decode a JPEG: {milliseconds(streams['images'].reader.read, min(count, 400)):.2f} ms")
        print(f"out of the store: {milliseconds(streams['store'].reader.read, min(count, 400)):.3f} ms")
        print(f"scale, crop and mirror: {milliseconds(cut, min(count, 400)):.2f} ms")
        cores = stream.cores()
        for name, images in streams.items():
            found: dict[int, list[float]] = {1: [], cores: []}
            for _ in range(TURNS):
                for threads in found:
                    found[threads].append(images_per_second(images, threads))
            for threads, speeds in found.items():
                span = f"{min(speeds):.0f} to {max(speeds):.0f}"
                print(f"{name}, threads {threads}: {statistics.median(speeds):.0f} images/s ({span})")


if __name__ == "__main__":
    main()
