"""One run's configuration, the named protocols, and run ids. Standard library only."""

import hashlib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property, lru_cache
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple, Self

BLOCKS = ("plain", "residual", "preact")
SHORTCUTS = ("A", "B", "C")
DECAYS = ("all", "conv")
PRECISIONS = ("fp32", "tf32", "bf16")
INITS = ("he", "zero-gamma")
PADDINGS = ("mean", "black")
PROBES = ("responses", "gradients", "lesion", "landscape", "bn", "ten-crop")  # what `degrade probe` measures
ZERO_CHANNELS = ("appended", "both-sides")  # of option A, in weights that are imported
IDENTITY = re.compile(r"identity:[a-z]+-[0-9]+-s[0-9]+-[0-9a-f]{8}:[0-9a-f]{12}")  # the run, and a hash of its weights


AUGMENTS = {"cifar": ("crop-flip", "crop", "none"), "imagenet": ("scale-color", "none")}
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels / 255, as most public trainers have it


class Dataset(NamedTuple):
    """How many images and classes a data set has, their height and width, and how they are usually augmented."""

    train_images: int
    test_images: int
    num_classes: int
    image_size: int = 32
    augment: str = "crop-flip"


DATASETS = {
    "cifar10": Dataset(50_000, 10_000, 10),
    "cifar100": Dataset(50_000, 10_000, 100),
    "svhn": Dataset(73_257, 26_032, 10, augment="crop"),  # digits: mirrored, they are no digits
    "fashion-mnist": Dataset(60_000, 10_000, 10, 28),
    "mnist": Dataset(60_000, 10_000, 10, 28, "crop"),
    "shapes": Dataset(10_000, 2_000, 10),
}
# KIND:NAME:TRAINING+TEST IMAGES:CLASSES:SIZE:HASH, where the hash is of what is in the folder
FOLDER = re.compile(
    r"(?:folder|imagenet):([a-z0-9._-]{1,40}):([0-9]{1,9})\+([0-9]{1,9}):([0-9]{1,6}):([0-9]{1,4}):([0-9a-f]{12})"
)
GENUINE_IMAGENET = re.compile(r"imagenet:[^:]+:1281167\+50000:1000:224:[0-9a-f]{12}")  # by its numbers
# Blocks of each stage in the nets of ImageNet, by depth: Table 1. From 50 layers on they are bottlenecks.
TABLE_1 = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECKS = (50, 101, 152)
SHALLOW = {"cifar": 20, "imagenet": 18}  # depths of the nets that the paper begins with
MAX_DEPTH = 10_000
LIMITS = {"steps": 10**9, "batch_size": 2**16, "width": 2**10}  # far beyond any use
MAX_SEED = 2**32 - 1

# What may differ between the runs of one study. Everything else is the study's protocol.
SWEPT = ("block", "depth", "seed")


def dataset_of(name: str) -> Dataset:
    """A data set by its name; of a folder of images, the name itself says how many there are.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in DATASETS:
        if match := FOLDER.fullmatch(name):
            train, test, classes, size = map(int, match.groups()[1:5])
            return Dataset(train, test, classes, size, usual_augment(name))
        if kind := re.match("folder:|imagenet:", name):
            raise ValueError(f"a folder of images is known by what is in it, {kind[0]}NAME:...; got {name!r}")
        check_is_one_of(DATASETS, "dataset", name)
    return DATASETS[name]


def family_of(dataset: str) -> str:
    """Of the nets that are trained on a data set: "imagenet" or "cifar", whose stems and stages differ."""
    return "imagenet" if dataset.startswith("imagenet:") else "cifar"


def usual_augment(dataset: str) -> str:
    return AUGMENTS[family_of(dataset)][0]


def short_name(dataset: str) -> str:
    """What a data set is called where there is little room: `flowers` for `folder:flowers:...`."""
    match = FOLDER.fullmatch(dataset)
    return match[1] if match else dataset


def blocks_per_stage(depth: int) -> int:
    """n of depth = 6n+2.

    Raises:
        ValueError: if depth is not 6n+2 with n >= 1, or above 10,000.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n+2 (8, 20, 32, 44, 56, 110, ...); got {depth}")
    if depth > MAX_DEPTH:
        raise ValueError(f"depth must be at most {MAX_DEPTH:,}; got {depth}")
    return (depth - 2) // 6


def blocks_of(family: str, depth: int) -> tuple[int, ...]:
    """How many blocks each stage of a net has: n in each of three, or those of Table 1.

    Args:
        family: of nets, "cifar" or "imagenet".
        depth: weight layers.

    Raises:
        ValueError: there is no net of this depth.
    """
    if family == "cifar":
        return (blocks_per_stage(depth),) * 3
    if depth not in TABLE_1:
        raise ValueError(f"depth must be one of {', '.join(map(str, TABLE_1))} on ImageNet; got {depth}")
    return TABLE_1[depth]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that changes a run's result. The defaults are the paper's protocol.

    Args:
        block: "plain", "residual", or "preact": residual with BN and ReLU before the convolutions (He et al. 2016b).
        depth: weight layers, 6n+2; on ImageNet 18, 34, 50, 101 or 152.
        seed: of the initial weights and of the order, crops and flips of the images.
        dataset: "cifar10", "cifar100", "svhn", "fashion-mnist", "mnist", "shapes", or the full name of a folder of
            images (`degrade.data.folder.prepare`, `degrade.data.imagenet.prepare`).
        width: channels of the first stage.
        shortcut: "A" (zero padding), "B" (projection where the shape changes) or "C" (everywhere);
            plain nets have none.
        init: of the weights. "he"; "zero-gamma": He's, with 0 for the scale of the last BN of each residual block
            (plain and preact blocks have none that could be 0, and keep He's); or
            "identity:<run id>:<hash>": a shallower run's, the extra layers set to identity (`degrade identity`).
        train_images: how many training images, in equal shares of the classes; None for all.
        val_images: how many of the training images are held out for validation, likewise.
        test_images: how many test images, likewise; None for all.
        split_seed: of the choice of training, validation and test images; the same for every seed.
        input_mean: of pixels / 255, a number each for red, green and blue, subtracted from the input; none of them
            for the paper's per-pixel mean of the training images, or on ImageNet for the usual three.
        padding: of the crops: "mean" (zeros, after the mean was subtracted) or "black" (zeros, before).
        steps: updates.
        batch_size: images per update.
        lr: learning rate; divided by 10 at each milestone.
        milestones: the steps from which the learning rate is lower; update s counts from 0.
        warmup_depth: nets at least this deep warm up.
        warmup_lr: learning rate while warming up.
        warmup_steps: updates of the warm-up.
        momentum: of SGD, not Nesterov's.
        weight_decay: of SGD, an L2 penalty's gradient.
        decay: "all" parameters, or "conv": the weights of convolutions and the linear layer only.
        precision: "fp32"; "tf32" (of convolutions, on GPUs that have it); or "bf16" (of convolutions and the
            linear layer, with weights, gradients and statistics in fp32).
        augment: of the training images: "crop-flip", the paper's: 4 pixels of padding on each side, a random crop,
            mirrored or not; "crop": the same, never mirrored; "none"; or "", which becomes what is usual for the
            data set, "crop" for digits, "crop-flip" for all others. On ImageNet "scale-color", the paper's: the shorter
            side resized to a random length, a random crop, mirrored or not, and the colours shifted; or "none", the
            middle of each image.
        bn_batch_size: images over which BN takes its statistics in training: a part of each batch, so that batches can
            be gathered from several passes or several GPUs; None for the whole batch.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    block: str
    depth: int
    seed: int
    dataset: str = "cifar10"
    width: int = 16
    shortcut: str = "A"
    init: str = "he"
    train_images: int | None = None
    val_images: int = 0
    test_images: int | None = None
    split_seed: int = 0
    input_mean: tuple[float, ...] = ()
    padding: str = "mean"
    steps: int = 64_000
    batch_size: int = 128
    lr: float = 0.1
    milestones: tuple[int, ...] = (32_000, 48_000)
    warmup_depth: int = 110
    warmup_lr: float = 0.01
    warmup_steps: int = 400
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: str = "all"
    precision: str = "fp32"
    augment: str = ""
    bn_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in KINDS.items():
            if type(value := getattr(self, name)) not in kinds:
                object.__setattr__(self, name, typed(name, value))
        known = dataset_of(self.dataset)
        blocks_of(self.family, self.depth)
        check_is_one_of(BLOCKS, "block", self.block)
        object.__setattr__(self, "augment", self.augment or known.augment)
        if self.family == "imagenet":
            object.__setattr__(self, "input_mean", self.input_mean or IMAGENET_MEAN)
            check_is_one_of(("plain", "residual"), "block on ImageNet", self.block)
        _check_is_seed("seed", self.seed)
        _check_common(common(self))

    @property
    def training_set_size(self) -> int:
        """How many images the net trains on."""
        return self.train_images or dataset_of(self.dataset).train_images - self.val_images

    @property
    def test_set_size(self) -> int:
        """How many images the net is tested on."""
        return self.test_images or dataset_of(self.dataset).test_images

    @property
    def family(self) -> str:
        """Of the net: "cifar" or "imagenet"."""
        return family_of(self.dataset)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return dataset_of(self.dataset).image_size

    @property
    def num_classes(self) -> int:
        return dataset_of(self.dataset).num_classes

    @property
    def epochs(self) -> int:
        """How many rows the log has in the end; the last epoch may be partial."""
        if self.batch_size >= self.training_set_size:
            return self.steps
        return (self.steps - 1) * self.batch_size // self.training_set_size + 1

    def epoch_end(self, epoch: int) -> int:
        """The number of updates done at the end of an epoch, counted from 1: ceil(epoch * N / B), or all.

        An epoch passes N images on average. Where a batch has more, each update ends an epoch.
        """
        return min(max(-(-epoch * self.training_set_size // self.batch_size), epoch), self.steps)

    def lr_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if self.depth >= self.warmup_depth and step < self.warmup_steps:
            return self.warmup_lr
        return float(self.lr / 10 ** sum(step >= milestone for milestone in self.milestones))

    @cached_property
    def run_id(self) -> str:
        """`<block>-<depth>-s<seed>-<hash>`; the hash is over every field, defaults included."""
        return run_id(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows it."""
        values = ((name, getattr(self, name)) for name in TYPES)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value that breaks a rule.
        """
        if unknown := sorted(set(values) - set(TYPES)):
            near = did_you_mean(unknown[0], TYPES)
            raise ValueError(f"unknown field {', '.join(unknown)}; the fields are {', '.join(sorted(TYPES))}{near}")
        if missing := sorted(set(SWEPT) - set(values)):
            raise ValueError(f"missing field {', '.join(missing)}")
        return cls(**values)

    def shared(self) -> dict[str, Any]:
        """The fields that all runs of a study have in common: all but block, depth and seed."""
        return {name: value for name, value in self.as_dict().items() if name not in SWEPT}


def run_id(values: Mapping[str, Any]) -> str:
    """The run id of a configuration as `RunConfig.as_dict` gives it, of this version of degrade or an older one."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{values['block']}-{values['depth']}-s{values['seed']}-{digest[:8]}"


@lru_cache(256)  # a study's runs have these fields in common, and there may be thousands of them
def _check_common(values: tuple[Any, ...]) -> None:
    """
    Args:
        values: of a configuration's COMMON fields, of their own types.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    its = SimpleNamespace(**dict(zip(COMMON, values, strict=True)))
    known, name = dataset_of(its.dataset), short_name(its.dataset)
    for field, allowed in (
        ("shortcut", SHORTCUTS),
        ("padding", PADDINGS),
        ("decay", DECAYS),
        ("precision", PRECISIONS),
        ("augment", AUGMENTS[family_of(its.dataset)]),
    ):
        check_is_one_of(allowed, field, getattr(its, field))
    if not IDENTITY.fullmatch(its.init):
        check_is_one_of(INITS, "init", its.init)
    for field in ("width", "train_images", "test_images", "steps", "batch_size"):
        value = getattr(its, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} must be at least 1; got {value}")
    for field, limit in LIMITS.items():
        if getattr(its, field) > limit:
            raise ValueError(f"{field} must be at most {limit:,}; got {getattr(its, field)}")
    for field in ("val_images", "warmup_steps", "warmup_depth"):
        if getattr(its, field) < 0:
            raise ValueError(f"{field} must be at least 0; got {getattr(its, field)}")
    _check_is_seed("split_seed", its.split_seed)
    for field in ("lr", "warmup_lr", "weight_decay", "momentum"):
        value = getattr(its, field)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field} must be a finite number of at least 0; got {value}")
    if its.val_images + (its.train_images or 1) > known.train_images:
        asked = f"{its.train_images or 1} + {its.val_images}"
        raise ValueError(f"train_images + val_images must be at most the {known.train_images} of {name}; got {asked}")
    if (its.test_images or 1) > known.test_images:
        raise ValueError(f"test_images must be at most the {known.test_images} of {name}; got {its.test_images}")
    if len(its.input_mean) not in (0, 3) or not all(map(math.isfinite, its.input_mean)):
        raise ValueError(f"input_mean must be three numbers, such as 0.49,0.48,0.45; got {list(its.input_mean)}")
    if its.bn_batch_size is not None and (its.bn_batch_size < 1 or its.batch_size % its.bn_batch_size):
        raise ValueError(f"bn_batch_size must divide the batch_size {its.batch_size}; got {its.bn_batch_size}")
    if its.momentum >= 1:
        raise ValueError(f"momentum must be below 1; got {its.momentum}")
    if list(its.milestones) != sorted(set(its.milestones)) or (its.milestones and its.milestones[0] < 0):
        raise ValueError(f"milestones must be rising steps, such as 32000,48000; got {list(its.milestones)}")
    if len(its.milestones) > 300:  # 10 to the power of their number divides the learning rate
        raise ValueError(f"milestones must be at most 300; got {len(its.milestones)}")


def _check_is_seed(name: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"{name} must be from 0 to {MAX_SEED}; got {value}")


def check_is_one_of(allowed: Iterable[str], name: str, value: str) -> None:
    """
    Raises:
        ValueError: it is not; the nearest one is suggested.
    """
    if value not in (words := list(allowed)):
        raise ValueError(f"{name} must be one of {', '.join(words)}; got {value!r}{did_you_mean(value, words)}")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about a word that is not allowed: the nearest that is, or nothing."""
    folded = {other.lower(): other for other in allowed}
    near = get_close_matches(word.lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]}?" if near else ""


def typed(name: str, value: Any) -> Any:
    """`value` as the own type of RunConfig's field `name`, so that 1 and 1.0 give one run id.

    Raises:
        ValueError: it is of another type.
    """
    kind = TYPES[name]
    if value is None and kind == OPTIONAL:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _real(name, value)
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, OPTIONAL) and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == INTS and isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    if kind == FLOATS and isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value):
        return tuple(_real(name, v) for v in value)
    words = {float: "a number", str: "text", int: "a whole number", OPTIONAL: "a whole number"}
    wanted = words.get(kind, "a list of whole numbers")
    raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _real(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be below 1e308; got a larger number") from None


TYPES: dict[str, Any] = {field.name: field.type for field in fields(RunConfig)}
OPTIONAL, INTS, FLOATS = int | None, tuple[int, ...], tuple[float, ...]
KINDS = {name: (int, NoneType) if kind == OPTIONAL else (kind,) for name, kind in TYPES.items()}  # to be left as is
COMMON = tuple(name for name in TYPES if name not in SWEPT)
common = operator.attrgetter(*COMMON)  # of a RunConfig: as `shared`, but as a tuple, which is quickly compared

# What each named protocol changes of the paper's. Milestones stay at half and three quarters.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {},
    "short": {"steps": 2_000, "milestones": (1_000, 1_500)},
    "demo": {
        "width": 8,
        "train_images": 4_000,
        "test_images": 1_000,
        "steps": 500,
        "milestones": (250, 375),
        "batch_size": 32,
        "lr": 0.02,
        "warmup_steps": 0,
    },
    "smoke": {
        "width": 4,
        "train_images": 256,
        "test_images": 128,
        "steps": 24,
        "milestones": (12, 18),
        "batch_size": 32,
        "lr": 0.02,
        "warmup_steps": 0,
    },
}


# Section 3.4. The learning rate falls "when the error plateaus", which Fig. 4 shows near these steps.
PAPER_ON_IMAGENET: dict[str, Any] = {
    "width": 64,
    "steps": 600_000,
    "milestones": (150_000, 300_000),
    "batch_size": 256,
    "warmup_steps": 0,
}


def protocol_fields(protocol: str, overrides: Mapping[str, Any], dataset: str = "cifar10") -> dict[str, Any]:
    """The shared fields of a study: the protocol's, then `overrides`.

    `steps` given without `milestones` moves the milestones to half and three quarters of it. Where the data set has
    fewer images than the protocol takes, all are taken.

    Raises:
        ValueError: an unknown protocol or data set.
    """
    check_is_one_of(PROTOCOLS, "protocol", protocol)
    known = dataset_of(dataset)
    values = (PAPER_ON_IMAGENET if family_of(dataset) == "imagenet" else {}) | PROTOCOLS[protocol]
    for name, there in (("train_images", known.train_images), ("test_images", known.test_images)):
        if values.get(name, 0) > there:
            del values[name]
    values |= overrides
    if "steps" in overrides and "milestones" not in overrides and isinstance(values["steps"], int):
        values["milestones"] = usual_milestones(values["steps"])
    return values


def usual_milestones(steps: int) -> tuple[int, ...]:
    """The paper's in proportion: at half and three quarters of the steps."""
    return tuple(sorted({steps // 2, steps * 3 // 4} - {0}))


def overridden(protocol: str, fields: Mapping[str, Any], dataset: str = "cifar10") -> dict[str, Any]:
    """The `fields` that differ from the protocol's own, on this data set.

    Raises:
        ValueError: an unknown protocol or data set.
    """
    base = _shared(protocol, dataset)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}  # as JSON
    return {name: fields[name] for name, value in plain.items() if value != base[name]}


def _shared(protocol: str, dataset: str) -> dict[str, Any]:
    """The shared fields of a study of the protocol itself."""
    values = protocol_fields(protocol, {}, dataset)
    return RunConfig(block="plain", depth=SHALLOW[family_of(dataset)], seed=0, dataset=dataset, **values).shared()


def study_name(dataset: str, protocol: str, overrides: Mapping[str, Any]) -> str:
    """The default name of a study: data set, protocol and what is overridden, such as `cifar10-demo-lr0.05`."""
    return "-".join([short_name(dataset), protocol, *name_parts(overrides)])


def name_parts(overrides: Mapping[str, Any]) -> list[str]:
    """What each override adds to a study's name: `lr0.05`."""
    values = {name: short_name(value) if name == "dataset" else value for name, value in overrides.items()}
    return [f"{name.replace('_', '')}{spelt(value)}" for name, value in sorted(values.items())]


def spelt(value: Any) -> str:
    """A field's value in names, tables and figures: `0.05`, `250-375`, `all` images, `none` of the milestones."""
    if isinstance(value, list | tuple):
        return "-".join(map(str, value)) or "none"
    return "all" if value is None else str(value)


def matches_protocol(shared: Mapping[str, Any], protocol: str) -> bool:
    """Whether a study's shared fields are exactly the protocol's on its data set, whatever the precision."""
    if protocol not in PROTOCOLS:
        return False
    return set(overridden(protocol, shared, str(shared["dataset"]))) <= {"precision"}
