"""The plain and residual nets of He et al., "Deep Residual Learning" (arXiv:1512.03385), sections 3.3, 4.1 and 4.2.

A plain and a residual net of one depth are the same modules in the same order; the residual one adds each
block's input to its output. With shortcut A they have exactly the same parameters. "preact" is the residual
net with full pre-activation blocks of the follow-up paper (arXiv:1603.05027).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from degrade.config import BLOCKS, BOTTLENECKS, SHORTCUTS, RunConfig, blocks_of


class PadShortcut(nn.Module):
    """Option A: every second pixel, extra channels zero and appended. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.extra = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without bias.

    Of numbers of channels that are no multiple of 8 it is a matrix product: on processors without AVX-512 oneDNN writes
    past the end of the gradient of the weights then (torch 2.15: "double free or corruption", or a segmentation fault).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels % 8 == 0 and self.out_channels % 8 == 0:
            return super().forward(x)
        pixels = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)  # (B, H, W, C)
        return F.linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A: identity, zero padded where the shape changes. B: projection there. C: projection everywhere."""
    same_shape = stride == 1 and in_channels == out_channels
    if option == "C" or (option == "B" and not same_shape):
        return nn.Sequential(Pointwise(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    return nn.Identity() if same_shape else PadShortcut(in_channels, out_channels, stride)


class PostActivation(nn.Module, ABC):
    """A block of convolutions that BN and ReLU follow: of the plain net, or of the residual net with a shortcut.

    The ReLU that follows a block is done by the next one, on its way in (by the net, after the last). That is
    the same net, and faster block by block: a compiled block that ended in a ReLU would store its derivative.
    """

    residual: bool
    shortcut: nn.Module  # registered last, as data comes to it

    @abstractmethod
    def layers(self, x: Tensor) -> Tensor:
        """The block's convolutions with their BNs, and the ReLUs between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out = self.layers(x)
        if self.residual:
            out = out + self.shortcut(x)
        return out

    def without_layers(self, x: Tensor) -> Tensor:
        """What is left when its layers are deleted: the shortcut; in a plain net that of option A."""
        out: Tensor = self.shortcut(F.relu(x))
        return out


class TwoLayers(PostActivation):
    """Two 3x3 convolutions. Source: Fig. 5, left."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.residual = shortcut is not None
        self.shortcut = make_shortcut(shortcut or "A", in_channels, out_channels, stride)

    def layers(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out


class Bottleneck(PostActivation):
    """1x1, 3x3 and 1x1 convolutions: the first narrows to a quarter of the block's channels, the last widens again.

    The stride is the 3x3 convolution's, as in torchvision and fb.resnet.torch; the authors' own nets have it in the
    first 1x1 convolution. Source: Fig. 5, right, and Table 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str | None):
        super().__init__()
        narrow = out_channels // 4
        self.conv1 = Pointwise(in_channels, narrow)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = Pointwise(narrow, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.residual = shortcut is not None
        self.shortcut = make_shortcut(shortcut or "A", in_channels, out_channels, stride)

    def layers(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        widened: Tensor = self.bn3(self.conv3(out))
        return widened


class PreActivation(nn.Module):
    """Two 3x3 convolutions, each preceded by BN and ReLU, and a shortcut that nothing but addition touches.

    The stem's BN and ReLU serve the first block of the net, before its shortcut branches off.
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), Fig. 4e and section 4.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, *, first: bool):
        super().__init__()
        self.bn1 = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn1 is None:
            x = active = F.relu(x)
        else:
            active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + self.shortcut(x)
        return out

    def without_layers(self, x: Tensor) -> Tensor:
        """What is left when its two layers are deleted: the shortcut."""
        out: Tensor = self.shortcut(F.relu(x) if self.bn1 is None else x)
        return out


Block = TwoLayers | Bottleneck | PreActivation


class Net(nn.Module):
    """A stem, stages of blocks of which each but the first begins with stride 2, average pooling, a linear layer.

    Args:
        stem: "3x3": one convolution, for the small images of CIFAR-10; "7x7": one of stride 2 and max pooling.
        counts: blocks of each stage.
        width: channels of the stem, and of the first stage's 3x3 convolutions; they double from stage to stage.
        block, shortcut, num_classes: as of `cifar_net`.
        bottleneck: whether blocks have three layers, and give four times as many channels.
    """

    def __init__(
        self,
        stem: str,
        counts: Sequence[int],
        width: int,
        block: str,
        shortcut: str,
        num_classes: int,
        *,
        bottleneck: bool = False,
    ):
        super().__init__()
        if stem == "3x3":
            self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        else:
            self.conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if stem == "3x3" else nn.MaxPool2d(3, 2, padding=1)
        self.stages = nn.Sequential()
        channels, option = width, shortcut if block == "residual" else None
        for stage, count in enumerate(counts):
            out_channels = width * 2**stage * (4 if bottleneck else 1)
            blocks = nn.Sequential()
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                if block == "preact":
                    blocks.append(PreActivation(channels, out_channels, stride, shortcut, first=stage == i == 0))
                elif bottleneck:
                    blocks.append(Bottleneck(channels, out_channels, stride, option))
                else:
                    blocks.append(TwoLayers(channels, out_channels, stride, option))
                channels = out_channels
            self.stages.append(blocks)
        self.last_bn = nn.BatchNorm2d(channels) if block == "preact" else nn.Identity()
        self.linear = nn.Linear(channels, num_classes)

    @property
    def blocks(self) -> list[Block]:
        """In the order data passes through them."""
        return [block for stage in self.stages.children() for block in stage.children()]  # type: ignore[misc]

    def stem(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to what the first block takes, (B, width, H, W), or a quarter of H and W.

        Max pooling comes before the ReLU, which the first block does; they can be exchanged.
        """
        out: Tensor = self.pool(self.bn(self.conv(x)))
        return out

    def head(self, x: Tensor) -> Tensor:
        """What the last block gives, (B, C, h, w), to logits (B, num_classes)."""
        logits: Tensor = self.linear(F.relu(self.last_bn(x)).mean(dim=(2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        return self.head(self.stages(self.stem(x)))


def he_init(net: nn.Module) -> None:
    """He normal init, fan_out, for convolutions and the linear layer; biases 0; BN scale 1 and shift 0.

    Draws from torch's global generator. Source: arXiv:1502.01852, eq. 14 (the backward form).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def zero_gamma(net: nn.Module) -> None:
    """Set the scale of the last BN of each residual block to 0, so that the block begins as its shortcut.

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.
    """
    for module in net.modules():
        if isinstance(module, TwoLayers | Bottleneck) and module.residual:
            nn.init.zeros_(last_norm(module).weight)


def last_norm(block: TwoLayers | Bottleneck) -> nn.BatchNorm2d:
    """The BN after the last convolution of a block."""
    return block.bn3 if isinstance(block, Bottleneck) else block.bn2


def cifar_net(depth: int, block: str, *, width: int = 16, shortcut: str = "A", num_classes: int = 10) -> Net:
    """The net of section 4.2 with `depth` weight layers, freshly initialised from torch's global generator.

    Args:
        depth: 6n+2: one stem convolution, 6n convolutions in three stages, one linear layer.
        block: "plain", "residual" or "preact".
        width: channels of the first stage; the others have 2 and 4 times as many.
        shortcut: "A", "B" or "C" (a plain net has none).
        num_classes: outputs of the linear layer.

    Returns:
        A module taking float images (batch, 3, height, width), 32x32 in the paper, to logits
        (batch, num_classes). Its modules are registered in the order data passes through them.

    Raises:
        ValueError: a depth that is not 6n+2, an unknown block or shortcut, a width or number of classes below 1.
    """
    return _checked("3x3", "cifar", depth, block, width, shortcut, num_classes)


def imagenet_net(depth: int, block: str, *, width: int = 64, shortcut: str = "A", num_classes: int = 1000) -> Net:
    """A net of Table 1 with `depth` weight layers, freshly initialised from torch's global generator.

    Args:
        depth: 18 or 34, of two-layer blocks; 50, 101 or 152, of bottleneck blocks.
        block: "plain" or "residual".
        width: channels of the stem, 64 in the paper.
        shortcut: "A", "B" or "C" (a plain net has none). The paper's 18 and 34 have A, its deeper ones B.
        num_classes: outputs of the linear layer.

    Returns:
        A module taking float images (batch, 3, height, width), 224x224 in the paper, to logits
        (batch, num_classes). Its modules are registered in the order data passes through them.

    Raises:
        ValueError: another depth, an unknown block or shortcut, a width or number of classes below 1.
    """
    if block == "preact":
        raise ValueError("block must be plain or residual in the nets of ImageNet; got 'preact'")
    return _checked("7x7", "imagenet", depth, block, width, shortcut, num_classes)


def _checked(stem: str, family: str, depth: int, block: str, width: int, shortcut: str, num_classes: int) -> Net:
    counts = blocks_of(family, depth)
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}; got {block!r}")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}; got {shortcut!r}")
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    bottleneck = family == "imagenet" and depth in BOTTLENECKS
    net = Net(stem, counts, width, block, shortcut, num_classes, bottleneck=bottleneck)
    he_init(net)
    return net


FAMILIES = {"cifar": cifar_net, "imagenet": imagenet_net}


def make_net(config: RunConfig) -> Net:
    """The net of a configuration, initialised as `config.init` says; BN without the counter that nobody reads."""
    net = FAMILIES[config.family](
        config.depth, config.block, width=config.width, shortcut=config.shortcut, num_classes=config.num_classes
    )
    if config.init == "zero-gamma":
        zero_gamma(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # it costs a kernel a layer
    return net


def parameter_count(net: nn.Module) -> int:
    """Number of trainable parameters (BN scale and shift included, running statistics not)."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
