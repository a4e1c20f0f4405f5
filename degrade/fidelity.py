"""How a study's protocol departs from the published one, field by field. Imports no torch.

The published protocol is section 4.2 of He et al. 2015 (arXiv:1512.03385), the defaults of `RunConfig`; for the nets of
ImageNet section 3.4.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from degrade import paper
from degrade.config import GENUINE_IMAGENET, PAPER_ON_IMAGENET, dataset_of, family_of, short_name


class Departure(NamedTuple):
    """One difference from the published protocol, or one choice it leaves open.

    Args:
        field: what it is about.
        published: what the paper says of it; empty where an imported run's own list does not say.
        here: what is done here.
        kind: "explicit", where something published is done otherwise; or "assumed", where it leaves a choice open.
    """

    field: str
    published: str
    here: str
    kind: str


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _images(value: Any) -> str:
    return "all" if value is None else f"{value:,} of them"


def _mean(value: Any) -> str:
    return f"one of each colour: {', '.join(map(str, value))}" if value else "of each pixel, over the training images"


def _steps(value: Any) -> str:
    return " and ".join(f"{step:,}" for step in value) or "never"


def _init(value: Any) -> str:
    if str(value).startswith("identity:"):
        return f"copied from {str(value).split(':')[1]}, the extra layers set to identity"
    return {"he": "He's", "zero-gamma": "He's, with 0 for the scale of each residual block's last BN"}[str(value)]


def _shortcut(value: Any) -> str:
    where = {"A": "identity, zero padded", "B": "projections where the shape changes", "C": "projections everywhere"}
    return f"{value}: {where[value]}"


def _augment(value: Any) -> str:
    crop = "random crops from 4 pixels of padding"
    return {
        "crop-flip": f"{crop}, mirrored or not",
        "crop": f"{crop}, never mirrored",
        "scale-color": "random scale, crop and mirroring, and shifted colours",
        "none": "none",
    }[str(value)]


def _dataset(value: Any) -> str:
    size = f", crops of {dataset_of(value).image_size} pixels" if str(value).startswith("imagenet:") else ""
    return f"{short_name(str(value))}{size}"


def _precision(value: Any) -> str:
    return f"{value}{' (convolutions, on GPUs)' if value == 'tf32' else ''}"


# field: what it is called, its published value, and how either is said
PUBLISHED: dict[str, tuple[str, Any, Callable[[Any], str]]] = {
    "dataset": ("data set", "cifar10", _dataset),
    "width": ("channels of the first stage", 16, _number),
    "shortcut": ("shortcuts", "A", _shortcut),
    "init": ("initial weights", "he", _init),
    "train_images": ("training images", None, _images),
    "test_images": ("test images", None, _images),
    "input_mean": ("mean subtracted from the input", [], _mean),
    "steps": ("steps", paper.STEPS, _number),
    "batch_size": ("batch size", 128, _number),
    "lr": ("learning rate", 0.1, _number),
    "milestones": ("learning rate divided by 10 at steps", [32_000, 48_000], _steps),
    "warmup_depth": ("nets that warm up, layers at least", 110, _number),
    "warmup_lr": ("learning rate of the warm-up", 0.01, _number),
    "warmup_steps": ("steps of the warm-up", 400, _number),
    "momentum": ("momentum", 0.9, _number),
    "weight_decay": ("weight decay", 1e-4, _number),
    "precision": ("precision", "fp32", _precision),
    "augment": ("augmentation", "crop-flip", _augment),
}


# Where section 3.4 says otherwise. The learning rate falls when the error plateaus, which leaves open when that is.
ON_IMAGENET: dict[str, Any] = {
    "dataset": "imagenet",
    "width": 64,
    "steps": PAPER_ON_IMAGENET["steps"],
    "batch_size": 256,
    "warmup_steps": 0,
    "augment": "scale-color",
}
NOT_ON_IMAGENET = ("milestones", "warmup_depth", "warmup_lr")


def departures(shared: Mapping[str, Any], imported: Mapping[str, Any] | None = None) -> list[Departure]:
    """Where a study departs from the published protocol, and what it does where that leaves a choice open.

    Args:
        shared: the fields that all its runs have in common, as `RunConfig.shared` gives them; more do no harm.
        imported: the imported.json of a run whose weights come from elsewhere. Its own list is taken then, and
            what degrade would have chosen while training is left out.

    Returns:
        The explicit ones first, in the order of the configuration's fields.
    """
    values: dict[str, Any] = {n: list(value) if isinstance(value, tuple) else value for n, value in shared.items()}
    table = PUBLISHED
    if imagenet := family_of(values["dataset"]) == "imagenet":
        there = {name: row for name, row in PUBLISHED.items() if name not in NOT_ON_IMAGENET}
        table = {name: (title, ON_IMAGENET.get(name, value), say) for name, (title, value, say) in there.items()}
    explicit = [
        Departure(title, say(published), say(values[name]), "explicit")
        for name, (title, published, say) in table.items()
        if values[name] != published and not (name == "dataset" and GENUINE_IMAGENET.fullmatch(values[name]))
    ]
    if imported is not None:
        own = imported.get("departures")
        lines = [str(line) for line in own] if isinstance(own, list) else []
        return explicit + [Departure("as imported", "", line, "explicit") for line in lines]
    choices = _choices_on_imagenet(values) if imagenet else _choices(values)
    return explicit + [Departure(*choice, "assumed") for choice in [*choices, *_choices_anywhere(values)]]


def _choices(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, what the paper says, what is done here): of section 4.2."""
    held_out = values["val_images"]
    size = values["train_images"] or dataset_of(values["dataset"]).train_images - held_out
    padded = {"mean": "after", "black": "before"}[values["padding"]]
    choices = [
        (
            "images to train on",
            "45,000 in the search for the schedule; not said of the final nets",
            f"{size:,}; {f'{held_out:,} held out for validation' if held_out else 'none held out'}",
        ),
        ("padding", "not said whether before or after the mean is subtracted", f"zeros, {padded} it"),
        (
            "training error",
            "not said how it was measured",
            "of the whole training set, clean images, in eval mode, after each epoch",
        ),
    ]
    if values["warmup_steps"]:
        choices.append(
            (
                "end of the warm-up",
                "residual-110: once training error is below 80 %, about 400 steps; not said of plain-110",
                f"after {values['warmup_steps']:,} steps, for all blocks of at least {values['warmup_depth']} layers",
            )
        )
    return choices


def _choices_on_imagenet(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of section 3.4."""
    known = dataset_of(values["dataset"])
    trained = values["train_images"] or known.train_images - values["val_images"]
    measured = min(trained, values["test_images"] or known.test_images)
    bottlenecks = (
        [("shortcuts of 50 layers and more", "B: projections where the shape changes", "A, as in the others")]
        if values["shortcut"] == "A"
        else []
    )
    return [
        *bottlenecks,
        (
            "learning rate divided by 10",
            "when the error plateaus; in Fig. 4 near steps 150,000 and 300,000",
            f"at steps {_steps(values['milestones'])}",
        ),
        ("colour augmentation", "the standard one", "Krizhevsky et al. 2012: shifts along principal components"),
        ("resizing", "not said how", "bilinear, antialiased (Pillow)"),
        ("test", "10 crops, or several scales", "1 crop: the shorter side 256 for a crop of 224, and the middle"),
        (
            "training error",
            "not said how it was measured",
            f"of {measured:,} training images, their middles, in eval mode, after each epoch",
        ),
        ("stride of a bottleneck", "in its first 1x1 convolution (the authors' own nets)", "in its 3x3 convolution"),
    ]


def _choices_anywhere(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    decayed = {"all": "all parameters", "conv": "weights of convolutions and the linear layer only"}[values["decay"]]
    part = values["bn_batch_size"]
    choices = [
        ("what decays", "not said; fb.resnet.torch's README: convolution weights only", decayed),
        ("range of the pixels", "not said", "divided by 255; the scale cancels in the first batch normalisation"),
        ("last batch of an epoch", "not said", "full, as all are: one stream of permutations, cut into batches"),
        ("running statistics of BN", "not said", "averages that move by 0.1 an update (PyTorch's default)"),
        (
            "statistics of BN in training",
            "not said; batches were shared by several GPUs",
            f"of {part:,} images each" if part else "of the whole batch",
        ),
        ("which step counts", "not said", "the last one, never the best on test"),
    ]
    if not values["init"].startswith("identity:"):
        how = "fan-out, the linear layer too, whose bias starts at 0"
        choices.append(("He's initialisation by", "not said whether fan-in or fan-out", how))
    if values["shortcut"] == "A":
        choices.append(("zero channels of option A", "not said on which side", "appended after the others"))
    if values["momentum"]:
        theirs, ours = "not said; the authors' Caffe: v = mu v + lr g, p -= v", "PyTorch's: v = mu v + g, p -= lr v"
        choices.append(("momentum where the learning rate changes", theirs, ours))
    return choices
