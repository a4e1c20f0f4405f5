"""Write genuine CIFAR-10 as folders of images: as it is, in grey, and at half its size.

Command:   python experiments/cifar10_folders.py DATA DEST
           DATA: the folder that holds cifar-10-batches-py; DEST: gets cifar10/, cifar10-grey/ and cifar10-half/
           degrade sweep experiments/demo.toml --dataset folder:DEST/cifar10-grey
           degrade sweep experiments/demo.toml --dataset folder:DEST/cifar10-half --image-size 16
Expected:  the same as with --dataset cifar10: plain-56 behind plain-20, residual-56 much less behind residual-20
Source:    no publication; "a general phenomenon, observed in many data sets", as far as variants of one can tell
Measured:  see results/cifar10-grey-demo and results/cifar10-half-demo
Hardware:  2 CPU cores, a minute; then as demo.toml, the half size a quarter of that
"""

import sys
from pathlib import Path

from PIL import Image

from degrade.data import OFFICIAL

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main() -> None:
    data, dest = map(Path, sys.argv[1:])
    for split, (images, labels) in zip(("train", "test"), OFFICIAL["cifar10"].load(data), strict=True):
        for name in CLASSES:
            for variant in ("cifar10", "cifar10-grey", "cifar10-half"):
                (dest / variant / split / name).mkdir(parents=True, exist_ok=True)
        for i, (pixels, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)):
            place = Path(split, CLASSES[label], f"{i:05d}.png")  # in the official order
            image = Image.fromarray(pixels)
            image.save(dest / "cifar10" / place, compress_level=1)
            image.convert("L").save(dest / "cifar10-grey" / place, compress_level=1)
            image.resize((16, 16), Image.Resampling.BICUBIC).save(dest / "cifar10-half" / place, compress_level=1)


if __name__ == "__main__":
    main()
