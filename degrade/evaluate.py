"""Error and loss of one net on one set of images."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.data import Images
from degrade.data.plan import normalise
from degrade.engine.process import autocast

BATCH_SIZES = {"cpu": 128, "cuda": 1000}  # activations of 128 images stay in a CPU's cache; a GPU wants more


class Evaluation:
    """One pass over one split in eval mode, a batch a call of `step`, which waits for nothing.

    Every batch has the same size, for what is compiled or captured; the surplus of the last one is not counted.

    Args:
        net: takes normalised float images to logits.
        split: the images, on the net's device.
        mean: the per-pixel mean of the training images, (3, H, W).
        precision: of `RunConfig`.
    """

    def __init__(self, net: nn.Module, split: Images, mean: Tensor, precision: str = "fp32"):
        self.net, self.split, self.mean = net, split, mean
        device = mean.device
        self.batch_size = min(BATCH_SIZES.get(device.type, 128), len(split))
        self.batches = -(-len(split) // self.batch_size)
        self.autocast = partial(autocast, precision, device)
        self.first = torch.arange(self.batch_size, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the batch
        self.losses = torch.zeros(self.batches, device=device)  # summed over each batch
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that `step` changes; the last two are the result."""
        return [self.number, self.losses, self.wrong]

    def start(self) -> None:
        """Begin the pass."""
        self.number.zero_()
        self.wrong.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Evaluate the next batch."""
        if self.net.training:
            self.net.eval()
        index = self.first + self.number * self.batch_size
        counted = index < len(self.split)
        index = index.clamp(max=len(self.split) - 1)
        y = self.split.labels[index]
        x = normalise(self.split.images[index], self.mean).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.net(x).float()
        losses = F.cross_entropy(logits, y, reduction="none")
        self.losses.index_copy_(0, self.number, torch.where(counted, losses, 0).sum(0, keepdim=True))
        self.wrong += (counted & (logits.argmax(1) != y)).sum()
        self.number += 1

    def result(self, losses: Tensor, wrong: Tensor) -> tuple[float, float]:
        """Mean cross-entropy in nats and error in [0, 1], from the two tensors as copied to the CPU."""
        return losses.double().sum().item() / len(self.split), wrong.item() / len(self.split)


def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and error in [0, 1], in eval mode. The net's mode and statistics stay as they were.

    Args:
        net: takes normalised float images to logits.
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        mean: the per-pixel mean of the training images, (3, H, W).
    """
    was_training = net.training
    evaluation = Evaluation(net, Images(images, labels), mean)
    for _ in range(evaluation.batches):
        evaluation.step()
    net.train(was_training)
    return evaluation.result(evaluation.losses.cpu(), evaluation.wrong.cpu())
