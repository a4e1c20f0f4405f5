import math
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from degrade.nets import PadShortcut, Pointwise, TwoLayers, cifar_net, imagenet_net, parameter_count, zero_gamma


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize(
    ("depth", "count"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_exact_parameter_counts(block, depth, count):
    with torch.device("meta"):
        net = cifar_net(depth, block)
    assert parameter_count(net) == count


@pytest.mark.parametrize(("shortcut", "count"), [("A", 269_722), ("B", 272_474), ("C", 283_962)])
def test_parameters_of_the_shortcuts(shortcut, count):
    # B: 16x32 + 32x64 weights and two BNs more than A. C: projections in the other seven blocks as well.
    b = 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64
    c = b + 3 * (16 * 16 + 2 * 16) + 2 * (32 * 32 + 2 * 32) + 2 * (64 * 64 + 2 * 64)
    assert count == 269_722 + {"A": 0, "B": b, "C": c}[shortcut]
    assert parameter_count(cifar_net(20, "residual", shortcut=shortcut)) == count
    assert parameter_count(cifar_net(20, "plain", shortcut=shortcut)) == 269_722


@pytest.mark.parametrize("depth", [8, 20, 56])
@pytest.mark.parametrize("block", ["plain", "residual", "preact"])
def test_depth_counts_the_weight_layers(depth, block):
    net = cifar_net(depth, block, width=2)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == depth
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


def shapes_seen(net, size=32):
    """(type, output shape) of every layer with parameters, in the order data passes through them."""
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: seen.append((m, tuple(out.shape[1:]))))
    net.eval()(torch.zeros(1, 3, size, size))
    return seen


@pytest.mark.parametrize(
    ("block", "shortcut"), [("plain", "A"), ("residual", "A"), ("residual", "B"), ("residual", "C"), ("preact", "A")]
)
def test_modules_are_registered_in_the_order_data_passes_through(block, shortcut):
    net = cifar_net(14, block, shortcut=shortcut)
    registered = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    assert [m for m, _ in shapes_seen(net)] == registered


def test_stages_have_the_papers_maps_and_channels():
    maps = [shape for m, shape in shapes_seen(cifar_net(20, "plain")) if isinstance(m, nn.Conv2d)]
    assert maps == [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6


def reference_forward(net, x, residual):
    """The net as section 4.2 writes it, from the bare parameters and without this project's modules."""
    p = dict(net.named_parameters()) | dict(net.named_buffers())

    def layer(x, conv, bn, stride=1):
        x = F.conv2d(x, p[f"{conv}.weight"], stride=stride, padding=1)
        stats = (p[f"{bn}.running_mean"], p[f"{bn}.running_var"])
        return F.batch_norm(x, *stats, p[f"{bn}.weight"], p[f"{bn}.bias"])

    x = F.relu(layer(x, "conv", "bn"))
    for s in range(3):
        i = 0
        while f"stages.{s}.{i}.conv1.weight" in p:
            name = f"stages.{s}.{i}"
            stride = 2 if s and i == 0 else 1
            out = F.relu(layer(x, f"{name}.conv1", f"{name}.bn1", stride))
            out = layer(out, f"{name}.conv2", f"{name}.bn2")
            if residual:
                skip = x[:, :, ::stride, ::stride]
                zeros = torch.zeros(len(x), out.shape[1] - skip.shape[1], *out.shape[2:])
                out = out + torch.cat([skip, zeros], dim=1)  # option A: zero channels appended
            x = F.relu(out)
            i += 1
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), p["linear.weight"], p["linear.bias"])


def with_statistics(block):
    """A net of 20 layers in eval mode, whose running statistics are not those that it begins with."""
    torch.manual_seed(0)
    net = cifar_net(20, block).eval()
    for name, buffer in net.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.1)
        elif "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_forward_equals_the_definition(block):
    net = with_statistics(block)
    x = torch.randn(4, 3, 32, 32)
    logits = net(x)
    assert logits.std() > 0.1  # a dead net would equal any other
    torch.testing.assert_close(logits, reference_forward(net, x, block == "residual"), rtol=1e-4, atol=1e-3)


def reference_preact(net, x):
    """He et al. 2016b from the bare parameters: BN and ReLU, then convolution; nothing after the addition."""
    p = dict(net.named_parameters()) | dict(net.named_buffers())

    def active(x, bn):
        stats = (p[f"{bn}.running_mean"], p[f"{bn}.running_var"])
        return F.relu(F.batch_norm(x, *stats, p[f"{bn}.weight"], p[f"{bn}.bias"]))

    x = active(F.conv2d(x, p["conv.weight"], padding=1), "bn")
    for s in range(3):
        i = 0
        while (name := f"stages.{s}.{i}") + ".conv1.weight" in p:
            stride = 2 if s and i == 0 else 1
            out = x if s == i == 0 else active(x, f"{name}.bn1")  # the stem's serves the first block
            out = F.conv2d(out, p[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(active(out, f"{name}.bn2"), p[f"{name}.conv2.weight"], padding=1)
            skip = x[:, :, ::stride, ::stride]
            x = out + torch.cat([skip, torch.zeros(len(x), out.shape[1] - skip.shape[1], *out.shape[2:])], dim=1)
            i += 1
    x = active(x, "last_bn")
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), p["linear.weight"], p["linear.bias"])


def test_preact_forward_equals_the_definition():
    net = with_statistics("preact")
    x = torch.randn(4, 3, 32, 32)
    logits = net(x)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, reference_preact(net, x), rtol=1e-4, atol=1e-3)


def test_parameters_of_preact_differ_by_the_bn_that_moved():
    # The first block has no BN of its own before its first convolution, and one follows the last block: 64 channels.
    # In stages 2 and 3 the first BN of the first block is of the channels that come in: 16 and 32 fewer.
    moved = 2 * (64 - 16 - 16 - 32)
    assert parameter_count(cifar_net(20, "preact")) == 269_722 + moved


@pytest.mark.parametrize("block", ["plain", "residual", "preact"])
def test_a_block_without_its_layers_is_its_shortcut(block):
    net = cifar_net(14, block, width=4)
    assert len(net.blocks) == 6
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(net.blocks[0].without_layers(x), x.clamp(min=0))
    passed = x if block == "preact" else x.clamp(min=0)  # a pre-activation shortcut sees what comes, as it is
    assert torch.equal(net.blocks[1].without_layers(x), passed)
    assert torch.equal(net.blocks[2].without_layers(x)[:, :4], passed[:, :, ::2, ::2])
    assert not net.blocks[2].without_layers(x)[:, 4:].any()


def test_zero_gamma_makes_every_residual_block_its_shortcut_and_leaves_plain_nets_alone():
    torch.manual_seed(0)
    net, plain = cifar_net(14, "residual", width=4), cifar_net(14, "plain", width=4)
    before = plain.state_dict()
    zero_gamma(net)
    zero_gamma(plain)
    x = torch.randn(2, 3, 32, 32)
    through = net.stem(x)
    for block in net.blocks:
        through = block.without_layers(through)
    assert torch.equal(net(x), net.head(through))
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


def test_option_a_takes_every_second_pixel_and_appends_zero_channels():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    out = PadShortcut(2, 4, stride=2)(x)
    assert out[0, :2].tolist() == [[[0, 2], [8, 10]], [[16, 18], [24, 26]]]
    assert torch.equal(out[0, 2:], torch.zeros(2, 2, 2))


def test_a_residual_block_with_zero_gamma_is_the_identity():
    block = TwoLayers(4, 4, 1, "A")
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block.eval()(x), x)


def test_he_normal_init_fan_out():
    torch.manual_seed(0)
    net = cifar_net(20, "plain", width=64)
    conv = net.stages[2][1].conv1.weight  # 256 -> 256 channels, 3x3
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)
    down = net.stages[1][0].conv1.weight  # 64 -> 128: fan_out counts the 128
    assert down.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)
    assert net.linear.weight.std().item() == pytest.approx(math.sqrt(2 / 10), rel=0.05)
    assert torch.equal(net.linear.bias, torch.zeros(10))
    assert abs(conv.mean().item()) < 1e-4
    assert conv.abs().max() > 4 * conv.std()  # normal, not uniform


def test_one_seed_gives_plain_and_residual_the_same_weights():
    nets = []
    for block in ("plain", "residual"):
        torch.manual_seed(7)
        nets.append(cifar_net(20, block).state_dict())
    assert nets[0].keys() == nets[1].keys()
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_other_widths_and_classes():
    assert cifar_net(8, "residual", width=4, num_classes=100).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((21, "plain"), "depth must be 6n\\+2"),
        ((20, "Plain"), "block must be one of plain, residual, preact; got 'Plain'"),
        ((20, "residual", {"shortcut": "a"}), "shortcut must be one of A, B, C; got 'a'"),
        ((20, "plain", {"width": 0}), "width must be at least 1; got 0"),
        ((20, "plain", {"num_classes": 0}), "num_classes must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments, rule):
    *args, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=rule):
        cifar_net(*args, **options)


TABLE_1 = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}  # with shortcut B


class TestImageNet:
    @pytest.mark.parametrize("depth", TABLE_1)
    def test_parameters_and_layers(self, depth):
        with torch.device("meta"):
            net, plain = imagenet_net(depth, "residual", shortcut="B"), imagenet_net(depth, "plain")
        assert parameter_count(net) == TABLE_1[depth]
        layers = [m for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth
        with torch.device("meta"):
            assert parameter_count(imagenet_net(depth, "residual")) == parameter_count(plain)

    def test_the_papers_maps(self):
        """Table 1: 112, 56, 28, 14 and 7 pixels; 64, 128, 256 and 512 channels."""
        maps = [shape for m, shape in shapes_seen(imagenet_net(34, "plain"), 224) if isinstance(m, nn.Conv2d)]
        wanted = [(64, 112, 112)]
        for channels, size, count in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
            wanted += [(channels, size, size)] * 2 * count
        assert maps == wanted

    @pytest.mark.parametrize("depth", [18, 34, 50])
    def test_residual_nets_are_torchvisions_with_shortcut_b(self, depth):
        """Its weights copied over in the order in which data passes through, the outputs are equal to the last bit.

        In 50 layers the stride is that of the 3x3 convolutions, in torchvision (its v1.5) as here.
        """
        torch.manual_seed(0)
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        ours = imagenet_net(depth, "residual", shortcut="B")
        copy_in_order(theirs, ours)
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            theirs.train()(x), ours.train()(x)  # running statistics too
            assert torch.equal(theirs.eval()(x), ours.eval()(x))

    def test_gradients_are_torchvisions(self):
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(num_classes=7).double()
        ours = imagenet_net(18, "residual", shortcut="B", num_classes=7).double()
        copy_in_order(theirs, ours)
        x, y = torch.randn(4, 3, 64, 64).double(), torch.tensor([0, 3, 6, 1])
        for net in (theirs, ours):
            F.cross_entropy(net.train()(x), y).backward()
        assert torch.allclose(theirs.conv1.weight.grad, ours.conv.weight.grad, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("shortcut", ["A", "C"])
    @pytest.mark.parametrize("depth", [18, 50])
    def test_every_shortcut_fits(self, depth, shortcut):
        net = imagenet_net(depth, "residual", width=8, shortcut=shortcut, num_classes=5).eval()
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)

    def test_zero_gamma_makes_a_bottleneck_its_shortcut(self):
        net = imagenet_net(50, "residual", width=8, num_classes=5)
        zero_gamma(net)
        x = torch.randn(2, 32, 4, 4)
        assert torch.equal(net.blocks[1](x), F.relu(x))
        assert torch.equal(net.blocks[1].without_layers(x), F.relu(x))

    @pytest.mark.parametrize(
        ("arguments", "rule"),
        [
            ((20, "plain"), "depth must be one of 18, 34, 50, 101, 152 on ImageNet; got 20"),
            ((18, "preact"), "block must be plain or residual in the nets of ImageNet; got 'preact'"),
        ],
    )
    def test_what_there_is_not(self, arguments, rule):
        with pytest.raises(ValueError, match=re.escape(rule)):
            imagenet_net(*arguments)


def copy_in_order(theirs, ours):
    """Weights and statistics; torchvision registers a block's projection last, as data comes to it here."""
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.Linear
    pairs = [[m for m in net.modules() if isinstance(m, kinds)] for net in (theirs, ours)]
    for a, b in zip(*pairs, strict=True):
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 8), (1, 3), (12, 16), (16, 32)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_of_any_number_of_channels_is_the_convolution(in_channels, out_channels, stride):
    """And its gradient is within its own bounds: channels that are no multiple of 8 broke oneDNN on AVX2."""
    conv = Pointwise(in_channels, out_channels, stride)
    x = torch.randn(5, in_channels, 9, 8).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), conv.weight.double(), stride=stride)
    torch.testing.assert_close(conv(x).double(), expected, atol=1e-5, rtol=1e-5)
    conv(x).square().sum().backward()
    assert conv.weight.grad.shape == (out_channels, in_channels, 1, 1)
