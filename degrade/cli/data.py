"""`degrade data`: what data sets there are, and what of them is here."""

from pathlib import Path
from typing import Annotated

import typer

from degrade.cli.app import Plain, app, count, dataset_named, note, say, say_table
from degrade.cli.options import DataDir, ImageSize, SkipBroken, argument, option
from degrade.config import DATASETS, FOLDER, Dataset, dataset_of, short_name
from degrade.errors import Failure
from degrade.terminal import make_table

data_app = typer.Typer(invoke_without_command=True)
app.add_typer(data_app, name="data")


@data_app.callback()
def group(context: typer.Context) -> None:
    """Data sets: what there are, what of them is here, and how to get them.

    \b
    Example: degrade data list
    Example: degrade data fetch cifar10
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help="Of degrade data list; folder:PATH, your own; imagenet:PATH.")
]


@data_app.command("list", cls=Plain)
def list_(data_dir: DataDir = None) -> None:
    """Every data set: images, licence, source, and whether it is here.

    \b
    Example: degrade data list
    """
    from degrade import data

    folder = data_dir or data.default_data_dir()
    numbers = make_table("data set", ">training", ">test", ">classes", ">pixels", ">download", "here")
    words = make_table("data set", "licence, source")
    for name, known in DATASETS.items():
        about = data.OFFICIAL[name].about if name in data.OFFICIAL else None
        size = f"{about.megabytes:.1f} MB" if about else "-"
        numbers.add_row(name, *_sizes(known), size, data.state(name, folder))
        words.add_row(name, about.licence if about else "MIT")
        words.add_row("", about.source if about else "drawn by degrade")
    own = make_table("your own", "here")
    for name in [*data.folder.cached(folder), *data.known(folder, "imagenet")]:
        own.add_row(name, data.state(name, folder))
    say(f"In {folder}:")
    for table in (numbers, words, own):
        if table.row_count:
            say_table(table)
            print()


@data_app.command(cls=Plain)
def fetch(
    datasets: Names,
    data_dir: DataDir = None,
    mirror: Annotated[
        str | None, option("URL", "A folder with the official files, tried first: any will do, hashes are compared.")
    ] = None,
    image_size: ImageSize = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Download data sets, or decode a folder of images. What broke off goes on; what is here is left alone.

    \b
    Example: degrade data fetch cifar10
    Example: degrade data fetch cifar100 --mirror https://example.org/cifar
    Example: degrade data fetch folder:flowers --image-size 64
    """
    from degrade import data

    folder = data_dir or data.default_data_dir()
    for text in dict.fromkeys(datasets):
        size = image_size if ":" in text else None
        name = dataset_named(text, folder, size, skip_broken=skip_broken)
        dataset_of(name)
        if mirror and name not in data.OFFICIAL:
            raise ValueError(f"--mirror is for what is downloaded; {short_name(name)} is not")
        try:
            data.fetch(name, folder, mirror)
        except Failure:
            if name == text or not name.startswith("folder:"):
                raise
            data.folder.cache(name, folder).unlink(missing_ok=True)  # it is damaged, and the images themselves are here
            data.fetch(dataset_named(text, folder, size, skip_broken=skip_broken), folder)
        say(f"{short_name(name)}: {data.state(name, folder)}, in {folder}")


@data_app.command(cls=Plain)
def check(
    datasets: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="All that are here, if none is named.")
    ] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
) -> None:
    """Compare every byte with its checksum. Nothing is downloaded and nothing written; exit code 1 if any is wrong.

    \b
    Example: degrade data check
    Example: degrade data check cifar10
    Example: degrade data check folder:flowers
    """
    from degrade import data

    folder = data_dir or data.default_data_dir()
    here = [name for name in DATASETS if data.state(name, folder) != "no"]
    names = datasets or [*here, *data.folder.cached(folder), *data.known(folder, "imagenet")]
    wrong = 0
    for text in dict.fromkeys(names):
        size = image_size if ":" in text and not FOLDER.fullmatch(text) else None
        try:
            name = dataset_named(text, folder, size, write=False)
            dataset_of(name)
            if name == text:
                data.check(name, folder)
            elif text.startswith("imagenet:"):
                data.imagenet.check_folder(Path(text.removeprefix("imagenet:")).expanduser())
            elif data.folder.cache(name, folder).is_file():  # else all images have been decoded by now
                data.check(name, folder)
        except Failure as error:
            wrong += 1
            note(str(error))
        else:
            say(f"{short_name(name)}: {'genuine' if name in data.OFFICIAL else 'sound'}")
    if not names:
        say(f"{folder} holds no data set")
    if wrong:
        raise Failure(f"{count(wrong, 'data set')} of {len(names)} missing or damaged")


@data_app.command(cls=Plain)
def pack(
    images: Annotated[Path, argument("IMAGES", "The folder that holds train/<class>/* and val/<class>/*.")],
    store: Annotated[Path, argument("STORE", "A new folder, on a fast disk.")],
    short_side: Annotated[int, option("N", "Resize the shorter side to that, where it is longer; 0: never.")] = 480,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out what cannot be decoded.")] = False,
) -> None:
    """Decode the images of a large folder once, into a store that keeps a GPU busy. Then: --dataset imagenet:STORE.

    ImageNet takes some 750 GB as it is, and 340 GB with a shorter side of 256, from which large crops are enlarged.

    \b
    Example: degrade data pack /data/imagenet /fast/imagenet
    """
    from degrade.data import pack as room

    about, notes = room.pack(images, store, short_side=short_side, skip_broken=skip_broken)
    for line in notes:
        note(f"{images}: {line}")
    size = sum(path.stat().st_size for path in store.glob("*.bin")) / 1e9
    say(f"{store}: {about.counts[0]:,} training and {about.counts[1]:,} test images, {size:.2f} GB")
    say(f"Next: degrade sweep --dataset imagenet:{store} --depths 18,34")


def _sizes(known: Dataset) -> list[str]:
    return [
        f"{known.train_images:,}",
        f"{known.test_images:,}",
        f"{known.num_classes:,}",
        f"{known.image_size}x{known.image_size}",
    ]
