"""The construction argument: a deeper net that computes what a trained shallower one computes.

"There exists a solution by construction to the deeper model: the added layers are identity mapping, and the other
layers are copied from the learned shallower model" (He et al. 2015, arXiv:1512.03385, section 1). Here it is built:
each stage keeps the shallow net's blocks, and the blocks that the depth adds follow them. An added block of a plain
net has Dirac kernels and BNs that change nothing, and its ReLUs leave alone what a ReLU has passed already. One of a
residual net has 0 for the scale of its last BN (not a last convolution of zeros: its BN would divide by no variance
at all, and blow gradients up by 1 / sqrt(eps)); one of a pre-activation net, where no BN follows, ends in a
convolution of zeros.

In eval mode the two nets give the same logits. In training mode BN uses the statistics of the batch, and a plain
net's added BNs cannot undo that exactly, whatever their parameters: `stage_statistics` gives those that come close.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.data.images import Images
from degrade.data.plan import normalise
from degrade.nets import Block, Bottleneck, Net, PreActivation, last_norm

BATCH_SIZE = 128


class Statistics(NamedTuple):
    """Mean and unbiased variance of each channel of a map, (C,)."""

    mean: Tensor
    variance: Tensor


class Comparison(NamedTuple):
    """A shallow and a deep net on the same images.

    Args:
        images: how many.
        differing: for how many of them any bit of any logit differs.
        max_difference: the largest difference of two logits.
        shallow_error, deep_error: fractions.
        shallow_loss, deep_loss: mean cross-entropy in nats.
    """

    images: int
    differing: int
    max_difference: float
    shallow_error: float
    deep_error: float
    shallow_loss: float
    deep_loss: float


@torch.no_grad()
def deepen(shallow: Net, deep: Net, statistics: list[Statistics] | None = None) -> None:
    """Make `deep` compute what `shallow` computes.

    Args:
        shallow: trained; it stays as it is.
        deep: a net of the same block, width, shortcut and number of classes, freshly initialised.
        statistics: of each stage's map, for the added BNs, as `stage_statistics` gives them. Without them, the
            added BNs are exactly the identity in eval mode, and far from it in training mode.

    Raises:
        ValueError: `deep` has fewer blocks a stage than `shallow`.
    """
    for part in ("conv", "bn", "last_bn", "linear"):
        getattr(deep, part).load_state_dict(getattr(shallow, part).state_dict())
    for stage, (old, new) in enumerate(zip(_stages(shallow), _stages(deep), strict=True)):
        if len(new) < len(old):
            raise ValueError(f"a net of {len(new)} blocks a stage cannot hold one of {len(old)}")
        for mine, theirs in zip(new, old, strict=False):
            mine.load_state_dict(theirs.state_dict())
        for added in new[len(old) :]:
            _make_identity(added, statistics[stage] if statistics else None)


def _stages(net: Net) -> list[list[Block]]:
    return [list(stage.children()) for stage in net.stages.children()]  # type: ignore[arg-type]


def _make_identity(block: Block, statistics: Statistics | None) -> None:
    if isinstance(block, PreActivation):
        nn.init.zeros_(block.conv2.weight)
    elif block.residual:
        nn.init.zeros_(last_norm(block).weight)
    elif isinstance(block, Bottleneck):
        raise ValueError("a plain bottleneck block narrows what it is given, so that it cannot be the identity")
    else:
        for convolution, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
            _pass_through(convolution, norm, statistics)
    if isinstance(block.shortcut, nn.Sequential):  # option C
        _pass_through(block.shortcut[0], block.shortcut[1], statistics)  # type: ignore[arg-type]


def _pass_through(convolution: nn.Conv2d, norm: nn.BatchNorm2d, statistics: Statistics | None) -> None:
    """Dirac kernels; a BN whose scale and shift undo its normalisation."""
    nn.init.dirac_(convolution.weight)
    assert norm.running_mean is not None  # each BN here has running statistics
    assert norm.running_var is not None
    if statistics is None:
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)  # so that the divisor is exactly 1
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    else:
        norm.running_mean.copy_(statistics.mean)
        norm.running_var.copy_(statistics.variance)
        norm.weight.copy_((statistics.variance + norm.eps).sqrt())
        norm.bias.copy_(statistics.mean)


@torch.no_grad()
def stage_statistics(net: Net, batches: Iterable[Tensor]) -> list[Statistics]:
    """Of what the last block of each stage gives to a block added behind it, averaged over the batches.

    Args:
        net: in training mode while this runs, but its running statistics stay as they are.
        batches: normalised training images (B, 3, H, W).
    """
    means: list[list[Tensor]] = [[] for _ in net.stages]
    variances: list[list[Tensor]] = [[] for _ in net.stages]

    def note(stage: int, output: Tensor) -> None:
        if not isinstance(net.blocks[-1], PreActivation):
            output = F.relu(output)  # it is the next block that does it
        means[stage].append(output.mean(dim=(0, 2, 3)))
        variances[stage].append(output.transpose(0, 1).flatten(1).var(dim=1))

    hooks = [
        stage.register_forward_hook(lambda module, inputs, output, number=number: note(number, output))
        for number, stage in enumerate(net.stages.children())
    ]
    try:
        for _ in _in_training_mode(net, batches):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Statistics(torch.stack(mean).mean(0), torch.stack(variance).mean(0))
        for mean, variance in zip(means, variances, strict=True)
    ]


def _in_training_mode(net: Net, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The logits of each batch, normalised by its own statistics; the net is as before afterwards."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    was_training, momenta = net.training, [norm.momentum for norm in norms]
    try:
        net.train()
        for norm in norms:
            norm.momentum = 0.0
        for x in batches:
            yield net(x)
    finally:
        net.train(was_training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def compare(shallow: Net, deep: Net, batches: Iterable[tuple[Tensor, Tensor]], *, training: bool = False) -> Comparison:
    """Logits, errors and losses of two nets that should agree, on the same images.

    Args:
        shallow, deep: left in the mode that they are measured in, and otherwise as they are.
        batches: normalised images (B, 3, H, W) and labels (B,).
        training: let BN use the statistics of each batch, as in training; otherwise in eval mode.
    """
    images = differing = 0
    largest = 0.0
    wrong, losses = [0, 0], [0.0, 0.0]
    for x, y in batches:
        logits = [next(_in_training_mode(net, [x])) if training else net.eval()(x) for net in (shallow, deep)]
        for i, scores in enumerate(logits):
            wrong[i] += int((scores.argmax(1) != y).sum())
            losses[i] += F.cross_entropy(scores, y, reduction="sum").item()
        images += len(y)
        differing += int((logits[0] != logits[1]).any(dim=1).sum())
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
    return Comparison(
        images=images,
        differing=differing,
        max_difference=largest,
        shallow_error=wrong[0] / images,
        deep_error=wrong[1] / images,
        shallow_loss=losses[0] / images,
        deep_loss=losses[1] / images,
    )


def normalised(images: Images, mean: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images as a net takes them, (B, 3, H, W), and their labels (B,), in order."""
    for x, y in zip(torch.split(images.images, BATCH_SIZE), torch.split(images.labels, BATCH_SIZE), strict=True):
        yield normalise(x, mean).contiguous(memory_format=torch.channels_last), y
