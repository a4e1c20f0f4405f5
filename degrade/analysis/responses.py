"""How strongly each layer responds: the standard deviation of its outputs.

Source: Fig. 7 of He et al. 2015 (arXiv:1512.03385), the outputs of each 3x3 layer after BN and before what is not
linear there, ReLU or addition. The paper does not say over which images: here over all that are given, as they are,
and over all channels and positions. Nor does it say in which mode of BN: here with the running statistics, or with
those of each batch, for a net that has no running statistics yet.

In a pre-activation block no BN follows the second convolution: there the convolution's own output is measured, which is
what the block adds to its shortcut.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from degrade.data.plan import normalise
from degrade.nets import Bottleneck, Net, PreActivation

BATCH = 128  # the training's, since batch statistics depend on it


def weight_layers(net: Net) -> dict[str, nn.Conv2d | nn.Linear]:
    """The 6n+2 layers that `depth` counts, by name, in the order data passes through them: no projection shortcuts."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and ".shortcut." not in name
    }


def measured(net: Net) -> list[nn.Module]:
    """The modules whose outputs are the responses of the blocks' layers, in the order data passes through them."""
    modules: list[nn.Module] = [net.bn]
    for block in net.blocks:
        if isinstance(block, PreActivation):
            modules += [block.bn2, block.conv2]
        else:
            modules += [block.bn1, block.bn2, *([block.bn3] if isinstance(block, Bottleneck) else [])]
    return modules


def add_moments(total: Tensor, module: nn.Module, inputs: object, output: Tensor) -> None:
    """A forward hook: add the number of elements, their sum and that of their squares to `total`, (3,), float64."""
    total[0] += output.numel()
    total[1] += output.sum(dtype=torch.float64)
    total[2] += torch.linalg.vector_norm(output, dtype=torch.float64).square()


@torch.no_grad()
def measure(net: Net, images: Tensor, mean: Tensor) -> list[float]:
    """The standard deviation of each 3x3 layer's output over all images; hooks are left on the net."""
    totals = []
    for module in measured(net):
        totals.append(torch.zeros(3, dtype=torch.float64, device=mean.device))
        module.register_forward_hook(partial(add_moments, totals[-1]))
    for part in torch.split(images, BATCH):
        net(normalise(part, mean).contiguous(memory_format=torch.channels_last))
    count, first, second = torch.stack(totals).cpu().unbind(1)
    stds: list[float] = (second / count - (first / count).square()).clamp(min=0).sqrt().tolist()
    return stds


def responses(net: Net, images: Tensor, mean: Tensor, *, batch_statistics: bool = False) -> Iterator[dict[str, object]]:
    """A row for each 3x3 layer: layer (0 for the stem's), name (the convolution's), stage (0 for the stem), std.

    Args:
        net: stays as it is.
        images: uint8 (N, 3, H, W), taken 128 at a time.
        mean: the per-pixel mean of the training images, (3, H, W).
        batch_statistics: normalise by the statistics of each batch, as in training, for a freshly initialised net.
    """
    copy = deepcopy(net).train(batch_statistics)  # the running statistics that this changes are the copy's
    names = [*weight_layers(net)][:-1]
    for layer, (name, std) in enumerate(zip(names, measure(copy, images, mean), strict=True)):
        stage = int(name.split(".")[1]) + 1 if layer else 0  # of "stages.0.2.conv1"
        yield {"layer": layer, "name": name, "stage": stage, "std": std}
