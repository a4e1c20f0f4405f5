"""Error and loss of one net on one set of images."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.data.images import Images
from degrade.data.plan import normalise
from degrade.data.stream import Stream
from degrade.engine.group import ALONE, Group
from degrade.engine.process import autocast, send

BATCH_SIZES = {"cpu": 128, "cuda": 1000}  # activations of 128 images stay in a CPU's cache; a GPU wants more
SMALLEST = {"cpu": 32, "cuda": 256}  # however large the images are


def evaluation_batch(device: torch.device | str, size: int) -> int:
    """Images of so many pixels a side that are evaluated at a time."""
    kind = torch.device(device).type
    many = BATCH_SIZES.get(kind, 128)
    return max(many * 32**2 // max(size, 32) ** 2, SMALLEST.get(kind, 32))


class Evaluation:
    """One pass over one split in eval mode, a batch a call of `step`, which waits for nothing.

    Every batch has the same size, for what is compiled or captured; the surplus of the last one is not counted.

    Args:
        net: takes normalised float images to logits.
        split: the images, on the net's device or on the disk.
        mean: the per-pixel mean of the training images, (3, H, W).
        precision: of `RunConfig`.
        group: each of its processes evaluates every so-manieth batch; their results are to be added.
    """

    def __init__(
        self,
        net: nn.Module,
        split: Images | Stream,
        mean: Tensor,
        precision: str = "fp32",
        group: Group = ALONE,
    ):
        self.net, self.split, self.mean = net, split, mean
        device = mean.device
        self.batch_size = min(evaluation_batch(device, mean.shape[-1]), len(split))
        every = -(-len(split) // self.batch_size)
        self.group = group
        self.batches = len(range(group.rank, every, group.size))  # of this process
        self.labels = split.labels.to(device)
        self.images: Tensor | None = None  # those of the next batch, where they come from the disk
        if isinstance(split, Stream):
            self.images = torch.zeros(self.batch_size, *mean.shape, dtype=torch.uint8, device=device)
        self.autocast = partial(autocast, precision, device)
        self.first = torch.arange(self.batch_size, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the batch
        self.losses = torch.zeros(every, device=device)  # summed over each batch
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that `step` changes; the last two are the result."""
        return [self.number, self.losses, self.wrong]

    def start(self) -> None:
        """Begin the pass."""
        self.number.fill_(self.group.rank)
        self.losses.zero_()
        self.wrong.zero_()
        if isinstance(self.split, Stream):
            self.coming = self.split.middles(self.batch_size, self.group.rank, self.group.size)

    def feed(self) -> None:
        """Put the images of the next batch where `step` finds them, if they are not there anyhow."""
        if self.images is not None:
            send(next(self.coming), self.images)

    @torch.no_grad()
    def step(self) -> None:
        """Evaluate the next batch."""
        if self.net.training:
            self.net.eval()
        index = self.first + self.number * self.batch_size
        counted = index < len(self.split)
        index = index.clamp(max=len(self.split) - 1)
        y = self.labels[index]
        images = self.split.images[index] if isinstance(self.split, Images) else self.images
        assert images is not None  # a stream has a place for them
        x = normalise(images, self.mean).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.net(x).float()
        losses = F.cross_entropy(logits, y, reduction="none")
        self.losses.index_copy_(0, self.number, torch.where(counted, losses, 0).sum(0, keepdim=True))
        self.wrong += (counted & (logits.argmax(1) != y)).sum()
        self.number += self.group.size

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
    for _ in range(evaluation.batches):  # nothing to feed: they are in memory
        evaluation.step()
    net.train(was_training)
    return evaluation.result(evaluation.losses.cpu(), evaluation.wrong.cpu())
