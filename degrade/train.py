"""One run, readable top to bottom.

for epoch in train(RunConfig(block="plain", depth=20, seed=0)):
    print(epoch.epoch, epoch.train_error, epoch.test_error)
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from degrade.config import RunConfig
from degrade.data import Images, Splits, fetch, load
from degrade.data.plan import Batch, SamplePlan, augment, normalise
from degrade.evaluate import evaluate
from degrade.log import Epoch
from degrade.nets import cifar_net


def train(config: RunConfig, *, data_dir: Path | None = None, device: str = "cpu") -> Iterator[Epoch]:
    """Train one net and yield a row of its log at the end of each epoch. Nothing is written but a data set fetched.

    Raises:
        Failure: the data set is missing or damaged and cannot be had.
    """
    fetch(config.dataset, data_dir)
    training = Training(config, load_splits(config, data_dir, device), device)
    return (epoch for epoch in training if epoch)


def load_splits(config: RunConfig, data_dir: Path | None, device: torch.device | str) -> Splits:
    """The images that a run with this configuration sees."""
    return load(
        config.dataset,
        train_images=config.train_images,
        val_images=config.val_images,
        test_images=config.test_images,
        split_seed=config.split_seed,
        data_dir=data_dir,
        device=device,
    )


class Training:
    """One run that can be stopped after any step: iterate to train, `state` and `restore` to go on later.

    Iterating yields an `Epoch` after the last step of an epoch and None after every other step. It ends
    after the last step, or at the end of the epoch in which the training loss stops being finite.
    """

    def __init__(self, config: RunConfig, splits: Splits, device: torch.device | str = "cpu"):
        self.config = config
        self.splits = splits
        self.device = torch.device(device)
        set_precision(config.precision)
        torch.manual_seed(config.seed)
        net = cifar_net(
            config.depth,
            config.block,
            width=config.width,
            shortcut=config.shortcut,
            num_classes=splits.num_classes,
        )
        self.net = net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.net, config.weight_decay, config.decay), lr=config.lr, momentum=config.momentum
        )
        self.plan = SamplePlan(len(splits.train), config.batch_size, config.seed)
        self.step = 0
        self.epochs: list[Epoch] = []
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)  # in this epoch's batches so far

    @property
    def finished(self) -> bool:
        """Whether the last step is done or the run has diverged."""
        return self.step >= self.config.steps or bool(self.epochs and self.epochs[-1].diverged)

    def __iter__(self) -> Iterator[Epoch | None]:
        while not self.finished:
            self.update()
            if self.step < self.config.epoch_end(len(self.epochs) + 1):
                yield None
            else:
                self.epochs.append(self.end_epoch())
                yield self.epochs[-1]

    def update(self) -> None:
        """One step of SGD."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        x, y = training_batch(self.splits, self.plan.batch(self.step))
        logits = self.net(x)
        self.optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.wrong += (logits.argmax(1) != y).sum()
        self.step += 1

    def end_epoch(self) -> Epoch:
        """Measure the net on every split, and start the next epoch's running count."""
        train_loss, train_error = self.evaluate(self.splits.train)
        test_loss, test_error = self.evaluate(self.splits.test)
        val_loss, val_error = self.evaluate(self.splits.val) if len(self.splits.val) else (None, None)
        start = self.epochs[-1].step if self.epochs else 0
        seen = (self.step - start) * self.config.batch_size
        train_error_running = self.wrong.item() / seen
        self.wrong.zero_()
        return Epoch(
            epoch=len(self.epochs) + 1,
            step=self.step,
            lr=self.config.lr_at(self.step - 1),
            train_loss=train_loss,
            train_error=train_error,
            train_error_running=train_error_running,
            test_loss=test_loss,
            test_error=test_error,
            val_loss=val_loss,
            val_error=val_error,
        )

    def evaluate(self, split: Images) -> tuple[float, float]:
        """Loss and error on one split."""
        return evaluate(self.net, split.images, split.labels, self.splits.mean)

    def state(self) -> bytes:
        """Everything the rest of the run depends on. The same steps give the same bytes."""
        about = {
            "config": self.config.as_dict(),
            "step": self.step,
            "wrong": self.wrong.item(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }
        momentum = [self.optimizer.state[p].get("momentum_buffer") for p in self.net.parameters()]
        file = io.BytesIO()
        # As text, since a pickle of strings and dicts depends on which of them are one object.
        torch.save({"about": json.dumps(about), "net": self.net.state_dict(), "momentum": momentum}, file)
        return file.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on from `state`.

        Raises:
            ValueError: the state is of another configuration.
        """
        values = torch.load(io.BytesIO(state), map_location=self.device, weights_only=True)
        about = json.loads(values["about"])
        if RunConfig.from_dict(about["config"]) != self.config:
            raise ValueError(f"the checkpoint is not of {self.config.run_id}")
        self.net.load_state_dict(values["net"])
        for parameter, buffer in zip(self.net.parameters(), values["momentum"], strict=True):
            self.optimizer.state[parameter] = {} if buffer is None else {"momentum_buffer": buffer}
        self.step = about["step"]
        self.wrong.fill_(about["wrong"])
        self.epochs = [Epoch(**row) for row in about["epochs"]]


def training_batch(splits: Splits, batch: Batch) -> tuple[Tensor, Tensor]:
    """Normalised, cropped and flipped images (B, 3, H, W) and their labels (B,)."""
    device = splits.train.images.device
    batch = Batch(*(choice.to(device, non_blocking=True) for choice in vars(batch).values()))
    x = normalise(splits.train.images[batch.index], splits.mean)
    return augment(x, batch), splits.train.labels[batch.index]


def parameter_groups(net: nn.Module, weight_decay: float, decay: str) -> list[dict[str, object]]:
    """`decay` "all": weight decay on every parameter; "conv": not on BN's scale and shift, nor on biases."""
    if decay == "all":
        return [{"params": list(net.parameters()), "weight_decay": weight_decay}]
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def prepare_process(threads: int) -> None:
    """Pin what changes the bits, process-wide. Call it before anything is computed: threads take it from there on."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


def set_precision(precision: str) -> None:
    """Process-wide: how GPUs that have TF32 convolve fp32 numbers, and deterministically so."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
