"""The probes of trained nets, each against the same thing done by hand."""

import io
import math
from copy import deepcopy
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from degrade.analysis.gradients import DISTANCES, correlation, norms
from degrade.analysis.landscape import directions, landscape, landscape_rows
from degrade.analysis.lesion import COUNTS, lesion, lesion_rows
from degrade.analysis.responses import responses
from degrade.analysis.statistics import bn_rows, recalibrated
from degrade.data.images import Images
from degrade.data.plan import normalise
from degrade.evaluate import evaluate
from degrade.nets import cifar_net, imagenet_net

BLOCKS = ["plain", "residual", "preact"]
GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.randint(0, 10, (300,), generator=GENERATOR)
MEAN = torch.rand((3, 16, 16), generator=GENERATOR)
X = normalise(IMAGES, MEAN)
BATCHES = [(X[:128], LABELS[:128]), (X[128:200], LABELS[128:200])]
SPLIT = (IMAGES, LABELS, MEAN)


def trained(block="plain", depth=8, width=3, shortcut="A"):
    """A net that no symmetry protects: random scales, shifts and statistics; without the counter, as in training."""
    torch.manual_seed(0)
    net = cifar_net(depth, block, width=width, shortcut=shortcut)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
            nn.init.uniform_(module.weight, 0.3, 2)
            nn.init.uniform_(module.bias, -0.5, 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 3)
    nn.init.uniform_(net.linear.bias, -0.5, 0.5)
    return net


def everything(net):
    """All of the net that a probe might leave changed."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    about = [
        (m.training, getattr(m, "momentum", None), list(m._forward_hooks), [type(b) for b in m._buffers.values()])
        for m in net.modules()
    ]
    return file.getvalue(), about, [(id(p), p.requires_grad, p.grad) for p in net.parameters()]


PROBES = {
    "responses": lambda net: responses(net, IMAGES, MEAN),
    "responses of a fresh net": lambda net: responses(net, IMAGES, MEAN, batch_statistics=True),
    "norms": lambda net: norms(net, BATCHES),
    "correlation": lambda net: correlation(net, X[:5], LABELS[:5], seed=3),
    "lesion": lambda net: lesion(net, *SPLIT, seed=3, draws=2),
    "landscape": lambda net: landscape(net, *SPLIT, points=3, dimension=1, seed=3),
    "landscape in a plane": lambda net: landscape(net, *SPLIT, points=3, dimension=2, seed=3),
    "bn": lambda net: bn_rows(net, Images(*SPLIT[:2]), Images(*SPLIT[:2]), MEAN, [x for x, _ in BATCHES]),
}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("training", [False, True])
def test_a_probe_leaves_no_trace_and_depends_on_its_arguments_alone(probe, training):
    net = trained("residual").train(training).requires_grad_(not training)
    before, state = everything(net), torch.get_rng_state()
    rows = list(PROBES[probe](net))
    assert everything(net) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for stop in (1, 2):
        torch.manual_seed(stop)
        generator = PROBES[probe](net)
        first = list(islice(generator, stop))
        assert torch.is_grad_enabled()  # between rows too
        assert everything(net) == before
        generator.close()
        assert first == rows[:stop]
        assert everything(net) == before


# responses


def by_hand(net, x, batch_statistics):
    """The responses in the order of data, written out for each kind of block."""

    def norm(bn, x):
        if not batch_statistics:
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)

    found = [x := norm(net.bn, net.conv(x))]
    for i, block in enumerate(net.blocks):
        if hasattr(block, "residual"):  # plain or residual
            x = F.relu(x)
            found.append(first := norm(block.bn1, block.conv1(x)))
            found.append(second := norm(block.bn2, block.conv2(F.relu(first))))
            shortcut = block.shortcut(x)
            if isinstance(block.shortcut, nn.Sequential):
                shortcut = norm(block.shortcut[1], block.shortcut[0](x))
            x = second + shortcut if block.residual else second
        else:
            if i == 0:
                x = active = F.relu(x)
            else:
                active = F.relu(norm(block.bn1, x))
            found.append(first := norm(block.bn2, block.conv1(active)))
            found.append(second := block.conv2(F.relu(first)))
            x = second + block.shortcut(x)
    return found


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize(("block", "shortcut"), [("plain", "A"), ("residual", "A"), ("residual", "B"), ("preact", "A")])
def test_responses_by_hand(block, shortcut, batch_statistics):
    net = trained(block, depth=14, shortcut=shortcut).eval()
    with torch.no_grad():
        batches = [by_hand(net, x, batch_statistics) for x in X.split(128)]
    outputs = [torch.cat(parts).double() for parts in zip(*batches, strict=True)]
    rows = list(responses(net, IMAGES, MEAN, batch_statistics=batch_statistics))
    assert [row["std"] for row in rows] == pytest.approx([o.std(correction=0).item() for o in outputs], rel=1e-5)
    assert len({round(row["std"], 3) for row in rows}) > 8  # the layers can be told apart
    assert [row["layer"] for row in rows] == list(range(13))
    assert [row["stage"] for row in rows] == [0] + [1] * 4 + [2] * 4 + [3] * 4
    assert [row["name"] for row in rows][:4] == ["conv", "stages.0.0.conv1", "stages.0.0.conv2", "stages.0.1.conv1"]
    assert rows[-1]["name"] == "stages.2.1.conv2"


def test_stages_and_changes_of_shape_in_the_nets_of_imagenet():
    net = imagenet_net(50, "residual", width=4, shortcut="B").eval()
    stages = [row["stage"] for row in responses(net, IMAGES[:8], MEAN, batch_statistics=True)]
    assert stages == [0] + [1] * 9 + [2] * 12 + [3] * 18 + [4] * 9
    alone = list(lesion(net, IMAGES[:8], LABELS[:8], MEAN, seed=0, counts=()))[1:]
    assert [i for i, row in enumerate(alone) if row["changes_shape"]] == [0, 3, 7, 13]


def test_the_statistics_of_a_net_that_diverged_do_not_matter_to_those_of_a_batch():
    net = trained()
    expected = list(responses(net, IMAGES, MEAN, batch_statistics=True))
    net.bn.running_mean.fill_(math.nan)
    assert list(responses(net, IMAGES, MEAN, batch_statistics=True)) == expected
    assert all(math.isnan(row["std"]) for row in responses(net, IMAGES, MEAN))


# gradients


@pytest.mark.parametrize(("block", "shortcut"), [("plain", "A"), ("residual", "C"), ("preact", "A")])
def test_gradient_norms_by_hand(block, shortcut):
    net = trained(block, shortcut=shortcut)
    rows = list(norms(net, iter(BATCHES)))
    expected = []
    for x, y in BATCHES:
        other = deepcopy(net).train()
        F.cross_entropy(other(x), y).backward()
        layers = [other.conv, *(c for b in other.blocks for c in (b.conv1, b.conv2)), other.linear]
        expected.append([layer.weight.grad.norm().item() for layer in layers])
    assert expected[0] != pytest.approx(expected[1], rel=0.01)
    mean = [sum(pair) / 2 for pair in zip(*expected, strict=True)]
    assert [row["value"] for row in rows] == pytest.approx(mean, rel=1e-4)
    weights = [layer.weight.norm().item() for layer in layers]
    relative = [a / b for a, b in zip(mean, weights, strict=True)]
    assert [row["relative"] for row in rows] == pytest.approx(relative, rel=1e-4)
    assert [row["layer"] for row in rows] == list(range(8))
    assert [rows[i]["name"] for i in (0, 1, 6, 7)] == ["conv", "stages.0.0.conv1", "stages.2.0.conv2", "linear"]
    assert {(row["kind"], row["distance"]) for row in rows} == {("norm", None)}


def test_norms_need_a_batch():
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        list(norms(trained(), []))


def test_correlation_by_hand():
    net, x, y = trained("residual").eval(), X[:3], LABELS[:3]
    rows = list(correlation(net, x, y, distances=(0.1, 1.0), seed=5))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for row, distance in zip(rows, (0.1, 1.0), strict=True):
        values = []
        for i in range(3):
            gradients = []
            for z in (x[i], x[i] + distance * noise[i] * x[i].norm() / noise[i].norm()):
                z = z[None].clone().requires_grad_()
                net(z)[0, y[i]].backward()
                gradients.append(z.grad.flatten())
            values.append(torch.corrcoef(torch.stack(gradients))[0, 1].item())
        assert row["value"] == pytest.approx(sum(values) / 3, abs=1e-4)
        assert (row["kind"], row["distance"], row["layer"]) == ("correlation", distance, None)
    assert 0 < rows[1]["value"] < rows[0]["value"] - 0.05


def test_correlation_is_one_nearby_and_falls_with_distance():
    values = [row["value"] for row in correlation(trained(), X[:20], LABELS[:20], distances=(0, *DISTANCES), seed=0)]
    assert values[0] == pytest.approx(1, abs=1e-9)
    assert values[1:] == sorted(values[1:], reverse=True)
    assert values[1] > 0.9 > values[-1]


def test_correlation_of_a_linear_net_is_one_everywhere():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    rows = correlation(net, X[:5], LABELS[:5], distances=(0.1, 10), seed=0)
    assert [row["value"] for row in rows] == pytest.approx([1, 1], abs=1e-9)


def test_correlation_depends_on_the_seed_and_not_on_how_images_are_batched(monkeypatch):
    net = trained()
    values = [row["value"] for row in correlation(net, X[:20], LABELS[:20], seed=0)]
    assert [row["value"] for row in correlation(net, X[:20], LABELS[:20], seed=1)] != values
    monkeypatch.setattr("degrade.analysis.gradients.BATCH", 7)
    assert [row["value"] for row in correlation(net, X[:20], LABELS[:20], seed=0)] == pytest.approx(values, abs=1e-5)


# lesion


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_deleted_by_hand(block):
    net = trained(block, depth=14).eval()
    rows = list(lesion(net, *SPLIT, seed=0, counts=()))
    loss, error = evaluate(net, *SPLIT)
    intact = {"deleted": 0, "blocks": "", "changes_shape": 0, "draw": 0, "error": error, "loss": loss, "images": 300}
    assert rows[0] == intact
    assert [row["blocks"] for row in rows[1:]] == list("012345")
    assert [row["changes_shape"] for row in rows[1:]] == [0, 0, 1, 0, 1, 0]
    for i, row in enumerate(rows[1:]):
        x = net.bn(net.conv(X))
        for j, b in enumerate(net.blocks):
            if j != i:
                x = b(x)
                continue
            x = F.relu(x) if block != "preact" or j == 0 else x
            if i in (2, 4):
                x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], 1)
        logits = net.head(x)
        assert row["error"] == pytest.approx((logits.argmax(1) != LABELS).double().mean().item(), abs=0.004)
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
        assert row["loss"] != pytest.approx(loss, rel=1e-5)


def test_deleting_a_block_that_is_the_identity_changes_nothing():
    net = trained("residual", depth=14)
    for i in (1, 5):  # of one shape: what they add to their shortcut is 0
        nn.init.zeros_(net.blocks[i].bn2.weight)
        nn.init.zeros_(net.blocks[i].bn2.bias)
    rows = list(lesion(net, *SPLIT, seed=0, counts=()))
    same = [row["blocks"] for row in rows if (row["error"], row["loss"]) == (rows[0]["error"], rows[0]["loss"])]
    assert same == ["", "1", "5"]


def test_several_blocks_deleted_at_once():
    net = trained("residual", depth=14).eval()
    rows = list(lesion(net, *SPLIT, seed=0, counts=(2, 3, 6), draws=4))
    assert len(rows) == lesion_rows(6, (2, 3, 6), 4) == 1 + 6 + 2 * 4
    chosen = [[int(i) for i in row["blocks"].split("+")] for row in rows[7:]]
    assert [(row["deleted"], row["draw"]) for row in rows[7:]] == [(k, draw) for k in (2, 3) for draw in range(4)]
    assert [len(set(blocks)) for blocks in chosen] == [row["deleted"] for row in rows[7:]]
    assert all(blocks == sorted(blocks) for blocks in chosen)
    assert all(set(two) < set(three) for two, three in zip(chosen[:4], chosen[4:], strict=True))
    assert len({row["blocks"] for row in rows[7:]}) > 4
    assert [row["changes_shape"] for row in rows[7:]] == [int(2 in b or 4 in b) for b in chosen]
    for row, blocks in zip(rows[7:], chosen, strict=True):
        x = net.stem(X)
        for i, b in enumerate(net.blocks):
            x = b.without_layers(x) if i in blocks else b(x)
        assert row["loss"] == pytest.approx(F.cross_entropy(net.head(x), LABELS).item(), rel=1e-5)


def test_plain_and_residual_lose_the_same_blocks_and_another_seed_others():
    plain, residual, other = (
        [row["blocks"] for row in lesion(trained(block, depth=20, width=1), *SPLIT, seed=seed)]
        for block, seed in (("plain", 0), ("residual", 0), ("plain", 1))
    )
    assert plain == residual != other
    assert len(plain) == lesion_rows(9) == 1 + 9 + 4 * 5


def test_rows_of_the_papers_nets():
    assert [lesion_rows(blocks) for blocks in (3, 9, 27, 54)] == [9, 30, 58, 85]
    assert COUNTS[-1] < 27


# landscape


@pytest.mark.parametrize("block", BLOCKS)
def test_the_middle_of_the_landscape_is_the_net(block):
    net = trained(block)
    for dimension in (1, 2):
        rows = list(landscape(net, *SPLIT, points=3, extent=0.5, dimension=dimension, seed=0))
        middle = rows[len(rows) // 2]
        assert (middle["loss"], middle["error"]) == evaluate(net, *SPLIT)
        assert (middle["x"], middle["y"]) == (0, 0)
        assert len({row["loss"] for row in rows}) == len(rows) == landscape_rows(3, dimension)
        grid = [(x, y) for x in (-0.5, 0, 0.5) for y in ((-0.5, 0, 0.5) if dimension == 2 else (0,))]
        assert [(row["x"], row["y"]) for row in rows] == grid
        assert {(row["dimension"], row["images"]) for row in rows} == {(dimension, 300)}


def test_landscape_by_hand():
    net = trained("residual", shortcut="B")
    weights = [p.detach() for p in net.parameters() if p.ndim > 1]
    along = directions(weights, 2, 7)
    for row in landscape(net, *SPLIT, points=3, dimension=2, seed=7):
        other = deepcopy(net)
        moved = [p for p in other.parameters() if p.ndim > 1]
        for p, w, d1, d2 in zip(moved, weights, *along, strict=True):
            p.data = w + row["x"] * d1 + row["y"] * d2
        loss, error = evaluate(other, *SPLIT)
        assert (row["loss"], row["error"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(error, abs=0.01))
    line = {row["x"]: row["loss"] for row in landscape(net, *SPLIT, points=3, dimension=1, seed=7)}
    plane = {row["x"]: row["loss"] for row in landscape(net, *SPLIT, points=3, dimension=2, seed=7) if row["y"] == 0}
    assert line == plane


def test_each_filter_of_a_direction_has_the_norm_of_the_nets():
    net = trained("residual", shortcut="B")
    net.conv.weight.data[1] = 0
    weights = [p.detach() for p in net.parameters() if p.ndim > 1]
    (direction,) = directions(weights, 1, 0)
    assert len(direction) == 8 + 2  # with the projections
    for d, w in zip(direction, weights, strict=True):
        assert d.flatten(1).norm(dim=1).tolist() == pytest.approx(w.flatten(1).norm(dim=1).tolist(), rel=1e-5)
        assert abs(F.cosine_similarity(d.flatten(), w.flatten(), dim=0)) < 0.5
    assert not direction[0][1].any()
    assert not torch.equal(directions(weights, 1, 1)[0][0], direction[0])


def test_losses_that_are_not_finite_are_reported():
    net = trained()
    net.linear.weight.data.fill_(1e38)
    losses = [row["loss"] for row in landscape(net, *SPLIT, points=3, extent=1e6, dimension=1, seed=0)]
    assert not any(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("points", "dimension", "message"),
    [(4, 1, "points must be odd.*got 4"), (1, 1, "at least 3; got 1"), (3, 3, "dimension must be 1 or 2; got 3")],
)
def test_wrong_grids(points, dimension, message):
    with pytest.raises(ValueError, match=message):
        landscape_rows(points, dimension)
    with pytest.raises(ValueError, match=message):
        next(landscape(trained(), *SPLIT, points=points, dimension=dimension, seed=0))


@pytest.mark.parametrize(
    "probe",
    [
        lambda net, skip: lesion(net, *SPLIT, seed=2, draws=2, skip=skip),
        lambda net, skip: landscape(net, *SPLIT, points=3, dimension=1, seed=2, skip=skip),
        lambda net, skip: landscape(net, *SPLIT, points=3, dimension=2, seed=2, skip=skip),
    ],
)
def test_skipped_rows_change_nothing_about_the_rest(probe):
    net = trained("residual")
    rows = list(probe(net, 0))
    for skip in range(len(rows) + 2):
        assert list(probe(net, skip)) == rows[skip:]


# statistics


def test_recalibrated_statistics_by_hand():
    net = trained("residual")
    net.bn.running_mean.fill_(math.nan)  # what was there does not matter
    found = recalibrated(net, iter([x for x, _ in BATCHES]))
    assert not found.training
    stem = [net.conv(x) for x, _ in BATCHES]
    mean = sum(out.mean((0, 2, 3)) for out in stem) / 2
    var = sum(out.var((0, 2, 3)) for out in stem) / 2
    torch.testing.assert_close(found.bn.running_mean, mean)
    torch.testing.assert_close(found.bn.running_var, var)
    # A later layer's input is normalised by the batch.
    first = net.blocks[0]
    entered = [F.relu(F.batch_norm(out, None, None, net.bn.weight, net.bn.bias, training=True)) for out in stem]
    mean = sum(first.conv1(x).mean((0, 2, 3)) for x in entered) / 2
    torch.testing.assert_close(found.blocks[0].bn1.running_mean, mean)


@pytest.mark.parametrize("block", BLOCKS)
def test_recalibrated_as_torch_does_it(block):
    counted = cifar_net(8, block, width=3)
    uncounted = deepcopy(counted)
    for module in uncounted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    expected = deepcopy(counted)
    batches = [x for x, _ in BATCHES] * 2
    torch.optim.swa_utils.update_bn(batches, expected)
    for net in (counted, uncounted):
        found = recalibrated(net, batches).state_dict()
        assert list(found) == list(net.state_dict())
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.items())


def test_a_recalibrated_net_trains_on_as_the_other_would():
    net = trained()
    again = recalibrated(net, [X])
    assert [m.momentum for m in again.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1] * 7
    assert all(p.requires_grad and p is not q for p, q in zip(again.parameters(), net.parameters(), strict=True))


def test_recalibration_needs_a_batch():
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        recalibrated(trained(), [])


def test_bn_rows():
    net = trained("residual")
    train, test = Images(IMAGES[:200], LABELS[:200]), Images(IMAGES[200:], LABELS[200:])
    rows = list(bn_rows(net, train, test, MEAN, iter([X[:200]])))
    expected = []
    for statistics, one in (("running", net), ("recalibrated", recalibrated(net, [X[:200]]))):
        for split, images in (("train", train), ("test", test)):
            loss, error = evaluate(one, images.images, images.labels, MEAN)
            row = {"split": split, "statistics": statistics, "loss": loss, "error": error, "images": len(images)}
            expected.append(row)
    assert rows == expected
    assert len({row["loss"] for row in rows}) == 4
