import dataclasses
import json

import pytest

from degrade.config import (
    PROTOCOLS,
    RunConfig,
    blocks_per_stage,
    matches_protocol,
    overridden,
    protocol_fields,
    study_name,
)

PAPER = RunConfig(block="plain", depth=56, seed=0)


def test_the_defaults_are_the_papers_protocol():
    assert PAPER.as_dict() == {
        "block": "plain",
        "depth": 56,
        "seed": 0,
        "dataset": "cifar10",
        "width": 16,
        "shortcut": "A",
        "init": "he",
        "train_images": None,
        "val_images": 0,
        "test_images": None,
        "split_seed": 0,
        "input_mean": [],
        "padding": "mean",
        "steps": 64_000,
        "batch_size": 128,
        "lr": 0.1,
        "milestones": [32_000, 48_000],
        "warmup_depth": 110,
        "warmup_lr": 0.01,
        "warmup_steps": 400,
        "momentum": 0.9,
        "weight_decay": 0.0001,
        "decay": "all",
        "precision": "fp32",
        "augment": "crop-flip",
        "bn_batch_size": None,
    }
    assert PROTOCOLS["paper"] == {}
    assert (PAPER.training_set_size, PAPER.test_set_size) == (50_000, 10_000)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)],
)
def test_learning_rate_at_each_boundary(step, lr):
    assert PAPER.lr_at(step) == lr


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize(("depth", "step", "lr"), [(110, 0, 0.01), (110, 399, 0.01), (110, 400, 0.1), (56, 0, 0.1)])
def test_depth_110_warms_up_for_400_steps(block, depth, step, lr):
    assert RunConfig(block=block, depth=depth, seed=0).lr_at(step) == lr


def test_golden_run_ids():
    """A changed id orphans everybody's results: change these only with a reason for that."""
    assert PAPER.run_id == "plain-56-s0-f4ff15be"
    assert RunConfig(block="residual", depth=20, seed=3, lr=0.05).run_id == "residual-20-s3-2fbc6894"


def test_every_field_is_in_the_run_id():
    other = {
        "block": "residual",
        "depth": 20,
        "seed": 1,
        "dataset": "shapes",
        "width": 8,
        "shortcut": "B",
        "init": "zero-gamma",
        "train_images": 1000,
        "val_images": 1,
        "test_images": 1000,
        "split_seed": 1,
        "input_mean": (0.5, 0.5, 0.5),
        "padding": "black",
        "steps": 100,
        "batch_size": 64,
        "lr": 0.2,
        "milestones": (5,),
        "warmup_depth": 56,
        "warmup_lr": 0.02,
        "warmup_steps": 1,
        "momentum": 0.8,
        "weight_decay": 0.0,
        "decay": "conv",
        "precision": "tf32",
        "augment": "none",
        "bn_batch_size": 32,
    }
    assert set(other) == {field.name for field in dataclasses.fields(RunConfig)}
    base = dataclasses.replace(PAPER, train_images=2000)
    ids = {dataclasses.replace(base, **{name: value}).run_id.rpartition("-")[2] for name, value in other.items()}
    assert len(ids | {base.run_id.rpartition("-")[2]}) == len(other) + 1


def test_configuration_survives_json():
    config = RunConfig(block="plain", depth=20, seed=0, lr=1, milestones=(3, 9), train_images=10)
    again = RunConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.run_id == dataclasses.replace(config, lr=1.0).run_id


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"depth": 21}, "depth must be 6n+2 (8, 20, 32, 44, 56, 110, ...); got 21"),
        ({"depth": 2}, "depth must be 6n+2"),
        ({"depth": -4}, "depth must be 6n+2"),
        ({"depth": 60_002}, "depth must be at most 10,000; got 60002"),
        ({"block": "dense"}, "block must be one of plain, residual, preact; got 'dense'"),
        ({"shortcut": "D"}, "shortcut must be one of A, B, C; got 'D'"),
        (
            {"dataset": "cifar"},
            "dataset must be one of cifar10, cifar100, svhn, fashion-mnist, mnist, shapes; got 'cifar'; "
            "did you mean cifar10?",
        ),
        ({"dataset": "folder:flowers"}, "a folder of images is known by what is in it"),
        ({"augment": "flip"}, "augment must be one of crop-flip, crop, none; got 'flip'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0; got nan"),
        ({"lr": "fast"}, "lr must be a number; got 'fast'"),
        ({"width": 1.5}, "width must be a whole number; got 1.5"),
        ({"width": True}, "width must be a whole number; got True"),
        ({"momentum": 1.0}, "momentum must be below 1; got 1.0"),
        ({"milestones": (5, 5)}, "milestones must be rising steps"),
        ({"milestones": tuple(range(301))}, "milestones must be at most 300; got 301"),
        ({"lr": 10**400}, "lr must be below 1e308; got a larger number"),
        ({"input_mean": [1, 2, 10**400]}, "input_mean must be below 1e308; got a larger number"),
        ({"milestones": "5"}, "milestones must be a list of whole numbers; got '5'"),
        ({"seed": -1}, "seed must be from 0 to 4294967295; got -1"),
        ({"val_images": 50_000}, "train_images + val_images must be at most the 50000 of cifar10; got 1 + 50000"),
        ({"test_images": 10_001}, "test_images must be at most the 10000 of cifar10; got 10001"),
    ],
)
def test_bad_values_name_the_field_the_rule_and_the_value(fields, rule):
    with pytest.raises(ValueError) as error:
        RunConfig(**({"block": "plain", "depth": 20, "seed": 0} | fields))
    assert rule in str(error.value)


def test_from_dict_refuses_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="unknown field nesterov"):
        RunConfig.from_dict(PAPER.as_dict() | {"nesterov": True})
    with pytest.raises(ValueError, match="missing field block, depth"):
        RunConfig.from_dict({"seed": 0})


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110, 1202])
def test_depth_is_6n_plus_2(depth):
    assert 6 * blocks_per_stage(depth) + 2 == depth


def test_steps_move_the_milestones_unless_they_are_given():
    assert protocol_fields("paper", {"steps": 1000})["milestones"] == (500, 750)
    assert protocol_fields("paper", {"steps": 1000, "milestones": [10]})["milestones"] == [10]
    assert "milestones" not in protocol_fields("paper", {"lr": 0.2})
    with pytest.raises(ValueError, match="protocol must be one of paper, short, demo, smoke; got 'long'"):
        protocol_fields("long", {})


@pytest.mark.parametrize("protocol", ["short", "demo", "smoke"])
def test_named_protocols_keep_the_papers_shape(protocol):
    fields = PROTOCOLS[protocol]
    assert fields["milestones"] == (fields["steps"] // 2, fields["steps"] * 3 // 4)
    config = RunConfig(block="plain", depth=20, seed=0, **fields)
    assert matches_protocol(config.shared(), protocol)
    assert not matches_protocol(config.shared(), "paper")
    assert not matches_protocol(dataclasses.replace(config, lr=0.3).shared(), protocol)


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("dataset", "shapes", True),
        ("precision", "tf32", True),
        ("input_mean", (0.49, 0.48, 0.45), False),
        ("padding", "black", False),
    ],
)
def test_a_protocol_is_whatever_the_data_set_and_the_precision(field, value, same):
    assert matches_protocol(dataclasses.replace(PAPER, **{field: value}).shared(), "paper") is same


def test_overrides_that_change_nothing_do_not_count():
    assert overridden("smoke", {"lr": 0.02, "width": 4, "steps": 24, "milestones": [12, 18]}) == {}
    assert overridden("smoke", {"lr": 0.03, "width": 4}) == {"lr": 0.03}
    assert overridden("paper", {"train_images": 50}) == {"train_images": 50}


def test_study_names():
    assert study_name("cifar10", "paper", {}) == "cifar10-paper"
    assert study_name("shapes", "demo", {"lr": 0.05, "decay": "conv"}) == "shapes-demo-decayconv-lr0.05"
    assert study_name("cifar10", "paper", {"milestones": [1, 2]}) == "cifar10-paper-milestones1-2"


def ends(images, batch_size, steps):
    config = RunConfig(block="plain", depth=20, seed=0, train_images=images, batch_size=batch_size, steps=steps)
    return [config.epoch_end(epoch) for epoch in range(1, config.epochs + 1)]


def test_epochs_count_steps_not_rounds():
    paper = ends(50_000, 128, 64_000)
    assert paper[:3] == [391, 782, 1172]  # ceil(e * 390.625)
    assert len(paper) == 164  # the paper's 64k steps, the last epoch partial
    assert paper[-1] == 64_000
    assert len(ends(45_000, 128, 64_000)) == 183
    assert ends(10, 32, 3) == [1, 2, 3]  # a batch larger than the training set
    assert ends(100, 10, 5) == [5]


@pytest.mark.parametrize(("images", "batch_size"), [(50, 8), (8, 8), (7, 8), (1, 3), (64, 8), (100, 7)])
@pytest.mark.parametrize("steps", [1, 2, 13, 40])
def test_epochs_end_in_rising_steps_and_the_last_with_the_run(images, batch_size, steps):
    found = ends(images, batch_size, steps)
    assert found == sorted(set(found))
    assert found[-1] == steps
    assert all(step < steps for step in found[:-1])


@pytest.mark.parametrize(("steps", "milestones"), [(1, ()), (2, (1,)), (3, (1, 2)), (4, (2, 3))])
def test_the_shortest_runs_have_milestones_too(steps, milestones):
    fields = protocol_fields("paper", {"steps": steps})
    assert fields["milestones"] == milestones
    RunConfig(block="plain", depth=20, seed=0, **fields)


@pytest.mark.parametrize(("name", "value"), [("steps", 10**9 + 1), ("batch_size", 2**16 + 1), ("width", 1025)])
def test_limits(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at most [0-9,]+; got {value}"):
        RunConfig(block="plain", depth=20, seed=0, **{name: value})


FLOWERS = "folder:flowers:900+90:7:64:0123456789ab"


def test_the_name_of_a_folder_says_what_is_in_it():
    config = smoke_of(FLOWERS)
    assert (config.training_set_size, config.test_set_size) == (900, 90)
    assert (config.num_classes, config.image_size, config.augment) == (7, 64, "crop-flip")
    assert study_name(FLOWERS, "demo", {"lr": 0.2}) == "flowers-demo-lr0.2"


def smoke_of(dataset, **fields):
    return RunConfig(block="plain", depth=8, seed=0, dataset=dataset, **fields)


def test_digits_are_not_mirrored_unless_that_is_asked_for():
    assert [smoke_of(name).augment for name in ("svhn", "mnist", "fashion-mnist", "cifar100")] == [
        "crop",
        "crop",
        "crop-flip",
        "crop-flip",
    ]
    assert smoke_of("svhn", augment="crop-flip").augment == "crop-flip"
    assert matches_protocol(smoke_of("svhn").shared(), "paper")
    assert not matches_protocol(smoke_of("svhn", augment="crop-flip").shared(), "paper")


def test_a_configuration_from_before_a_field_means_the_same():
    values = smoke_of("cifar10").as_dict()
    del values["augment"], values["bn_batch_size"]
    assert RunConfig.from_dict(values) == smoke_of("cifar10")


def test_the_short_protocol_on_imagenet_is_the_beginning_of_the_paper_s():
    fields = protocol_fields("short", {}, "imagenet:mini:5000+5000:10:64:0123456789ab")
    assert (fields["width"], fields["batch_size"], fields["warmup_steps"]) == (64, 256, 0)
    assert (fields["steps"], fields["milestones"]) == (2_000, (1_000, 1_500))


def test_a_protocol_takes_all_images_where_there_are_fewer_than_it_wants():
    assert "train_images" not in protocol_fields("demo", {}, FLOWERS)
    assert "test_images" not in protocol_fields("demo", {}, FLOWERS)
    assert protocol_fields("demo", {}, "cifar10")["train_images"] == 4_000
    assert overridden("demo", protocol_fields("demo", {}, FLOWERS), FLOWERS) == {}
