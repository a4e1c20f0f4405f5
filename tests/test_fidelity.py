from dataclasses import fields

import pytest
from conftest import smoke

from degrade import fidelity, paper
from degrade.config import RunConfig, protocol_fields
from degrade.fidelity import departures

PAPER = RunConfig(block="residual", depth=110, seed=0)

# Another value of every field of the protocol, and what the list then says is done here.
OTHERS = {
    "dataset": ("shapes", "shapes"),
    "width": (8, "8"),
    "shortcut": ("B", "projections where"),
    "init": ("zero-gamma", "with 0"),
    "train_images": (4_000, "4,000"),
    "val_images": (5_000, "45,000; 5,000 held out"),
    "test_images": (1_000, "1,000"),
    "input_mean": ((0.49, 0.48, 0.45), "0.49, 0.48, 0.45"),
    "steps": (500, "500"),
    "batch_size": (32, "32"),
    "lr": (0.02, "0.02"),
    "milestones": ((250, 375), "250 and 375"),
    "warmup_depth": (56, "56"),
    "warmup_lr": (0.02, "0.02"),
    "warmup_steps": (100, "100"),
    "momentum": (0.8, "0.8"),
    "weight_decay": (5e-4, "0.0005"),
    "decay": ("conv", "only"),
    "padding": ("black", "zeros, before it"),
    "precision": ("bf16", "bf16"),
    "augment": ("crop", "never mirrored"),
    "bn_batch_size": (32, "of 32 images each"),
}


def config(**values):
    return RunConfig(**{"block": "residual", "depth": 110, "seed": 0} | values)


def said(**values):
    return set(departures(config(**values).shared()))


NOT_PROTOCOL = {"block", "depth", "seed", "split_seed"}  # which run of the study, or which images a subset holds
OPEN = {"val_images", "decay", "padding", "bn_batch_size"}  # not published: they change the text of an assumed choice


def test_every_field_is_compared_or_open_or_no_part_of_the_protocol():
    """A new field of RunConfig fails here until it is dealt with."""
    groups = [set(fidelity.PUBLISHED), OPEN, NOT_PROTOCOL]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert set.union(*groups) == {field.name for field in fields(RunConfig)}
    assert set(OTHERS) == groups[0] | groups[1]


def test_the_published_protocol_is_the_default():
    shared = PAPER.shared()
    assert {name: shared[name] for name in fidelity.PUBLISHED} == {
        name: published for name, (_, published, _) in fidelity.PUBLISHED.items()
    }
    assert fidelity.PUBLISHED["steps"][1] == paper.STEPS


def test_the_papers_protocol_departs_in_nothing_but_assumes_what_is_open():
    found = departures(PAPER.shared())
    assert {departure.kind for departure in found} == {"assumed"}
    text = " ".join(" ".join(departure) for departure in found)
    words = ["45,000", "decays", "fan-out", "last batch", "appended", "warm-up", "mean is subtracted", "eval mode"]
    for word in [*words, "Caffe"]:
        assert word in text, word


@pytest.mark.parametrize("field", OTHERS)
def test_another_value_is_told(field):
    value, here = OTHERS[field]
    new = said(**{field: value}) - said()
    assert any(here in departure.here for departure in new), new
    kinds = {departure.kind for departure in new}
    assert kinds == {"assumed"} if field in OPEN else "explicit" in kinds


def test_what_does_not_apply_is_not_told():
    fields = {d.field for d in said(shortcut="B", warmup_steps=0, momentum=0.0, milestones=())}
    assert not fields & {"zero channels of option A", "end of the warm-up", "momentum where the learning rate changes"}
    copied = said(init="identity:plain-20-s0-d3cb7045:0123456789ab")
    assert not any("fan-out" in departure.here for departure in copied)
    assert any("plain-20-s0-d3cb7045" in departure.here for departure in copied)


def test_a_whole_configuration_will_do_as_well():
    config = smoke("plain", 8, 3)
    assert departures(config.as_dict()) == departures(config.shared())


def test_an_imported_run_lists_its_own():
    found = departures(config(width=8).shared(), {"departures": ["per-channel mean", "best epoch on test"]})
    assert [(d.here, d.kind) for d in found] == [
        ("8", "explicit"),
        ("per-channel mean", "explicit"),
        ("best epoch on test", "explicit"),
    ]


@pytest.mark.parametrize("own", [None, "all of them", 3, {"a": 1}])
def test_an_imported_run_whose_list_is_none(own):
    assert departures(PAPER.shared(), {"departures": own}) == []


IMAGENET = "imagenet:ilsvrc2012:1281167+50000:1000:224:0123456789ab"


def on_imagenet(dataset=IMAGENET, **values):
    fields = protocol_fields("paper", values, dataset)
    return departures(RunConfig(block="plain", depth=34, seed=0, dataset=dataset, **fields).shared())


def test_the_paper_s_protocol_on_imagenet_departs_in_the_mean_alone():
    explicit = [departure.field for departure in on_imagenet() if departure.kind == "explicit"]
    assert explicit == ["mean subtracted from the input"]
    said = {departure.field: departure for departure in on_imagenet() if departure.kind == "assumed"}
    assert said["learning rate divided by 10"].here == "at steps 150,000 and 300,000"
    assert "50,000 training images" in said["training error"].here
    assert "padding" not in said


def test_images_of_one_s_own_and_another_schedule_are_departures():
    own = "imagenet:mini:30+15:3:64:0123456789ab"
    said = {
        departure.field: departure.here for departure in on_imagenet(own, steps=100) if departure.kind == "explicit"
    }
    assert said["data set"] == "mini, crops of 64 pixels"
    assert said["steps"] == "100"


def test_what_is_measured_on_imagenet_is_said_as_it_is():
    said = {departure.field: departure.here for departure in on_imagenet(test_images=1_000)}
    assert said["training error"].startswith("of 1,000 training images")
    assert said["shortcuts of 50 layers and more"].startswith("A")
    assert "shortcuts of 50 layers and more" not in {departure.field for departure in on_imagenet(shortcut="B")}
