"""The loop that most public CIFAR-10 trainers run, written anew after akamaster/pytorch_resnet_cifar10's trainer.py.

NCHW fp32, PIL flip and crop in 4 DataLoader workers, `cudnn.benchmark`, loss and accuracy read from the device at
every step, a line every 50 steps. Only what a CPU cannot do (`.cuda()`) is conditional here. The net is
`degrade.nets.cifar_net`, whose operations are the same: what differs is the loop.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from degrade.nets import cifar_net


class AverageMeter:
    def __init__(self) -> None:
        self.val = self.sum = self.count = 0.0

    def update(self, val: float, n: int = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.sum / self.count


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    _, predicted = output.topk(1, 1, True, True)
    correct = predicted.t().eq(target.view(1, -1))
    return correct[:1].reshape(-1).float().sum(0) * (100.0 / target.size(0))


def public_loop(data_dir: Path, block: str, depth: int, device: str = "cpu") -> Iterator[float]:
    """Train epoch after epoch; yields the seconds of each step, waiting for its images included."""
    torch.backends.cudnn.benchmark = True
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    augmented = transforms.Compose(
        [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4), transforms.ToTensor(), normalize]
    )
    train_loader = DataLoader(
        CIFAR10(root=str(data_dir), train=True, transform=augmented),
        batch_size=128,
        shuffle=True,
        num_workers=4,
        pin_memory=device != "cpu",
    )
    model = cifar_net(depth, block).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    model.train()
    while True:
        losses, top1 = AverageMeter(), AverageMeter()
        end = time.perf_counter()
        for i, (inputs, targets) in enumerate(train_loader):
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            output = model(inputs)
            loss = criterion(output, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), inputs.size(0))
            top1.update(accuracy(output.data, targets).item(), inputs.size(0))
            now = time.perf_counter()
            if i % 50 == 0:
                print(f"[{i}/{len(train_loader)}] Loss {losses.val:.4f} ({losses.avg:.4f}) Prec@1 {top1.avg:.3f}")
            yield now - end
            end = now
