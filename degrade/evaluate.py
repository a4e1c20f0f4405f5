"""Error and loss of one net on one set of images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.data.plan import normalise

BATCH_SIZE = 128  # activations of this size stay in cache; larger batches are slower on a CPU


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and error in [0, 1], in eval mode. The net's mode and statistics stay as they were.

    Args:
        net: takes normalised float images to logits.
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        mean: the per-pixel mean of the training images, (3, H, W).
    """
    was_training = net.training
    net.eval()
    losses, wrong = [], []
    for start in range(0, len(labels), BATCH_SIZE):
        x, y = images[start : start + BATCH_SIZE], labels[start : start + BATCH_SIZE]
        logits = net(normalise(x, mean).contiguous(memory_format=torch.channels_last))
        losses.append(F.cross_entropy(logits.float(), y, reduction="sum"))
        wrong.append((logits.argmax(1) != y).sum())
    net.train(was_training)
    loss = torch.stack(losses).cpu().double().sum().item() / len(labels)
    return loss, torch.stack(wrong).sum().item() / len(labels)
