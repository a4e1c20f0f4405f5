"""One run, readable top to bottom.

for epoch in train(RunConfig(block="plain", depth=20, seed=0)):
    print(epoch.epoch, epoch.train_error, epoch.test_error)
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from degrade.config import INITS, RunConfig
from degrade.data import Splits, Stream, fetch, load, stratified
from degrade.data.images import Images
from degrade.data.plan import Batch, SamplePlan, augment, normalise
from degrade.engine.compiled import compile_modules
from degrade.engine.group import ALONE, Group
from degrade.engine.process import autocast, send, set_precision
from degrade.engine.queue import make_queue
from degrade.evaluate import Evaluation
from degrade.log import Epoch, from_csv, to_csv
from degrade.nets import Block, make_net


def train(config: RunConfig, *, data_dir: Path | None = None, device: str = "cpu") -> Iterator[Epoch]:
    """Train one net and yield a row of its log at the end of each epoch. Nothing is written but a data set fetched.

    Raises:
        ValueError: its initial weights are another run's, which only a sweep finds.
        Failure: the data set is missing or damaged and cannot be had.
    """
    if config.init not in INITS:
        raise ValueError(f"init is {config.init}: degrade identity makes such a run, and a sweep trains it")
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
        input_mean=config.input_mean,
        data_dir=data_dir,
        device=device,
    )


class Training:
    """One run that can be stopped after any step: iterate to train, `snapshot` and `restore` to go on later.

    Iterating yields an `Epoch` at the end of each epoch and None after every update, and whenever there is
    nothing to do but wait for the device. It ends after the last step, or at the end of the epoch in which
    the training loss stops being finite.

    Args:
        config: of the run.
        splits: the images, on the device.
        device: where the net lives.
        compiled: compile the blocks.
        graphs: replay CUDA graphs, on a CUDA device; otherwise the same function is called at each step.
        group: the processes that train the run together, each of which makes the same calls.

    Raises:
        ValueError: the group cannot share a batch out in parts of `bn_batch_size`.
    """

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        device: torch.device | str = "cpu",
        *,
        compiled: bool = False,
        graphs: bool = True,
        group: Group = ALONE,
    ):
        check_shares(config, group)
        self.config = config
        self.group = group
        self.splits = splits
        self.device = torch.device(device)
        self.plan = SamplePlan(len(splits.train), config.batch_size, config.seed, config.augment)
        self.step = 0
        self.epochs: list[Epoch] = []
        # DDP orders its sums anew after the first update, which is therefore one that leaves no trace.
        self.queue = make_queue(self.device, graphs=graphs and group.size == 1, warm=compiled or group.size > 1)
        with self.queue.on():
            self._build(compiled)
        self._update = self.queue.capture(self._one_update, self._changed())
        self._evaluate = {split: self.queue.capture(e.step, e.tensors) for split, e in self.evaluations.items()}

    def _build(self, compiled: bool) -> None:
        config, device = self.config, self.device
        set_precision(config.precision)
        torch.manual_seed(config.seed)
        self.net = make_net(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            compile_modules(self.net, Block)
        self.shared_net = self.group.wrap(self.net)
        # In tensors, so that a graph reads what they hold when it is replayed, not what they held once.
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.net, config.weight_decay, config.decay),
            lr=self.lr,
            momentum=config.momentum,
            fused=True,
        )
        for parameter in self.net.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # The choices and learning rates of as many updates as an epoch has, a row each, and the row of the next one.
        rows = config.epoch_end(1)
        self.choices = Batch(*(table.repeat(rows, 1).to(device) for table in vars(self.plan.batches(0, 1)).values()))
        self.lrs = torch.zeros(rows, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.filled = 0  # the step up to which they go
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)  # in this epoch's batches so far
        splits = self.splits
        self.evaluations = {
            name: Evaluation(self.net, split, splits.mean, config.precision, self.group)
            for name, split in (("train", measured(splits, config)), ("test", splits.test), ("val", splits.val))
            if len(split)
        }
        # The images of the next update, their labels and colours, where they come from the disk.
        self.images = torch.zeros(0, dtype=torch.uint8, device=device)
        self.coming: Iterator[tuple[Tensor, ...]] | None = None
        if isinstance(splits.train, Stream):
            self.images = torch.zeros(self._share, *splits.mean.shape, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(len(self.images), dtype=torch.int64, device=device)
        self.colors = torch.zeros(len(self.images), 3, device=device)

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over or the run has diverged."""
        return bool(self.epochs) and (self.epochs[-1].step >= self.config.steps or self.epochs[-1].diverged)

    def __iter__(self) -> Iterator[Epoch | None]:
        while not self.finished:
            if self.step < self.config.epoch_end(len(self.epochs) + 1):
                self.update()
                yield None
            else:
                yield from self.end_epoch()
                yield self.epochs[-1]

    def update(self) -> None:
        """One step of SGD; on a GPU it is only issued here."""
        if self.step == self.filled:
            with self.queue.on():
                self._fill_tables()
        if isinstance(self.splits.train, Stream):
            self._read(self.splits.train)
        self._update()
        self.step += 1

    def _one_update(self) -> None:
        """The same for every device, and all of it in tensors: the choices, the batch, the gradient, the update."""
        if not self.net.training:
            self.net.train()
        if len(self.images):
            x, y = normalise(self.images, self.splits.mean).add_(self.colors[:, :, None, None]), self.labels
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            batch = self.choices.row(self.row).part(self.group.rows(self.config.batch_size))
            x, y = training_batch(self.splits, batch, self.config.padding)
        self.lr.copy_(self.lrs.index_select(0, self.row)[0])
        self.optimizer.zero_grad()
        size = self.config.bn_batch_size or len(x)
        parts = len(x) // size
        before = self.wrong.clone() if self.group.size > 1 else self.wrong
        with averaged(self.net, parts) as next_part:
            for number, part in enumerate(zip(torch.split(x, size), torch.split(y, size), strict=True), start=1):
                with self._exchanging(number == parts):
                    self._one_pass(*part, parts)
                next_part()
        if self.group.size > 1:
            self.group.mean(list(self.net.buffers()))
            self.group.sum([self.wrong.sub_(before)])
            self.wrong.add_(before)
        self.optimizer.step()
        self.row += 1

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged with the group's other processes in the last pass of a batch alone."""
        net = self.shared_net
        return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()

    @property
    def _share(self) -> int:
        """How many images of each batch are this process's."""
        return self.config.batch_size // self.group.size

    def _one_pass(self, x: Tensor, y: Tensor, parts: int) -> None:
        """Add the gradient of one of so many equal parts of a batch, and count its errors."""
        with autocast(self.config.precision, self.device):
            logits = self.shared_net(x).float()
        loss = F.cross_entropy(logits, y)
        (loss / parts if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        self.wrong += (logits.argmax(1) != y).sum()

    def _read(self, images: Stream) -> None:
        """Put the next images where the update finds them."""
        if self.coming is None:
            rows = self.group.rows(self.config.batch_size)
            self.coming = images.training_batches(self.plan, self.step, self.config.steps, rows)
        batch = next(self.coming)
        with self.queue.on():
            for here, value in zip((self.images, self.labels, self.colors), batch, strict=True):
                send(value, here)

    def _fill_tables(self) -> None:
        """Put the choices and learning rates of the next updates where these find them."""
        self.filled = self.step + len(self.lrs)
        send(torch.tensor([self.config.lr_at(step) for step in range(self.step, self.filled)]), self.lrs)
        if isinstance(self.splits.train, Images):
            batches = self.plan.batches(self.step, self.filled)
            for table, values in zip(vars(self.choices).values(), vars(batches).values(), strict=True):
                send(values, table)
        self.row.zero_()

    def evaluate(self) -> Iterator[None]:
        """Measure the net on every split; on a GPU it is only issued here, a batch at a time."""
        with self.queue.on():
            for evaluation in self.evaluations.values():
                evaluation.start()
        for split, evaluation in self.evaluations.items():
            for _ in range(evaluation.batches):
                with self.queue.on():
                    evaluation.feed()
                self._evaluate[split]()
                yield None
            self.group.sum(evaluation.tensors[1:])

    def end_epoch(self) -> Iterator[None]:
        """Measure the net, append a row to `epochs` and start the next running count."""
        yield from self.evaluate()
        fetched = self.queue.fetch([self.wrong, *(t for e in self.evaluations.values() for t in e.tensors[1:])])
        while not fetched.ready():
            yield None
        wrong, *totals = fetched.tensors
        results = {
            split: evaluation.result(*totals[2 * i : 2 * i + 2])
            for i, (split, evaluation) in enumerate(self.evaluations.items())
        }
        start = self.epochs[-1].step if self.epochs else 0
        row = Epoch(
            epoch=len(self.epochs) + 1,
            step=self.step,
            lr=self.config.lr_at(self.step - 1),
            train_loss=results["train"][0],
            train_error=results["train"][1],
            train_error_running=wrong.item() / ((self.step - start) * self.config.batch_size),
            test_loss=results["test"][0],
            test_error=results["test"][1],
            val_loss=results["val"][0] if "val" in results else None,
            val_error=results["val"][1] if "val" in results else None,
        )
        with self.queue.on():
            self.wrong.zero_()
        self.epochs.append(row)

    def _momentum(self) -> list[Tensor]:
        return [self.optimizer.state[parameter]["momentum_buffer"] for parameter in self.net.parameters()]

    def _changed(self) -> list[Tensor]:
        """All that an update changes."""
        return [*self.net.parameters(), *self.net.buffers(), *self._momentum(), self.lr, self.row, self.wrong]

    def state(self) -> bytes:
        """Everything the rest of the run depends on. The same steps give the same bytes, on every device alike."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], bytes]:
        """Take the state as it is now; the function returned gives its bytes, in any thread, at any later time."""
        net, momentum = self.net.state_dict(), self._momentum()
        fetched = self.queue.fetch([self.wrong, *net.values(), *momentum])
        about = {
            "config": self.config.as_dict(),
            "step": self.step,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }

        def state() -> bytes:
            fetched.wait()
            wrong, *values = fetched.tensors
            file = io.BytesIO()
            torch.save(
                {
                    # As text, since a pickle of strings and dicts depends on which of them are one object.
                    "about": json.dumps(about | {"wrong": wrong.item()}),
                    "net": dict(zip(net, values, strict=False)),
                    "momentum": values[len(net) :],
                },
                file,
            )
            return file.getvalue()

        return state

    def restore(self, state: bytes) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it is not the state of a run of this configuration; nothing has changed then.
        """
        there = read_state(state)
        if there.config != self.config:
            raise ValueError(f"it is of {there.config.run_id}, not of {self.config.run_id}")
        net = self.net.state_dict()
        if list(net) != list(there.net):
            raise ValueError("its tensors have other names than the net's")
        mine, theirs = [*net.values(), *self._momentum()], [*there.net.values(), *there.momentum]
        if [(t.shape, t.dtype) for t in mine] != [(t.shape, t.dtype) for t in theirs]:
            raise ValueError("its tensors have other shapes than the net's")
        with self.queue.on(), torch.no_grad():  # into the tensors that are there: a graph knows no others
            for here, value in zip(mine, theirs, strict=True):
                here.copy_(value)
            self.wrong.fill_(there.wrong)
        self.step = self.filled = there.step
        self.epochs, self.coming = there.epochs, None


class State(NamedTuple):
    """What `Training.snapshot` stores: the names are those of `Training`."""

    config: RunConfig
    step: int
    epochs: list[Epoch]
    wrong: int
    net: dict[str, Tensor]
    momentum: list[Tensor]


def read_state(state: bytes) -> State:
    """The inverse of `Training.snapshot`. Whatever the bytes are, none of them is executed.

    Raises:
        ValueError: they are not a state.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(state)) as archive:
            if any(record.compress_type or record.file_size > len(state) for record in archive.infolist()):
                raise ValueError("it unpacks to more than it is")
        values = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        about = json.loads(values["about"])
        config = RunConfig.from_dict(about["config"])
        step, wrong = int(about["step"]), int(about["wrong"])
        epochs = [Epoch(**row) for row in about["epochs"]]
        ends = [config.epoch_end(e) for e in range(1, len(epochs) + 1)]
        tensors = [*values["net"].values(), *values["momentum"]]
        sound = all(type(t) is Tensor and t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
        start, end = max(ends, default=0), config.epoch_end(len(epochs) + 1)
        fits = start <= step <= end and 0 <= wrong <= (step - start) * config.batch_size
        if not (sound and fits and [e.step for e in epochs] == ends):
            raise ValueError("its parts do not fit each other")
        if repr(from_csv(to_csv(epochs, validation=config.val_images > 0))) != repr(epochs):  # repr, for NaN
            raise ValueError("its rows are not those of a log")
        return State(config, step, epochs, wrong, values["net"], values["momentum"])
    except Exception as error:  # of the unpickler, and of whatever else it may hold instead
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]  # without torch's advice
        reason = "".join(c if c.isprintable() else " " for c in reason)
        raise ValueError(f"it is not a checkpoint of degrade's ({type(error).__name__}: {reason[:200]})") from None


def check_shares(config: RunConfig, group: Group) -> None:
    """
    Raises:
        ValueError: the group cannot share a batch out in parts of `bn_batch_size`.
    """
    if group.size == 1:
        return
    share, rest = divmod(config.batch_size, group.size)
    if rest or config.bn_batch_size is None or share % config.bn_batch_size:
        raise ValueError(
            f"{group.size} processes share each batch of {config.batch_size}, and BN takes its statistics in each: "
            f"bn_batch_size must divide {config.batch_size / group.size:g}; got {config.bn_batch_size}"
        )


def measured(splits: Splits, config: RunConfig) -> Images | Stream:
    """The images on which the training error is measured: all; of those on the disk as many as there are for the test.

    Reading all of ImageNet's once more each epoch would cost half of the training.
    """
    train = splits.train
    if isinstance(train, Images) or len(train) <= len(splits.test):
        return train
    return train.part(stratified(train.labels, len(splits.test), config.split_seed))


@contextmanager
def averaged(net: nn.Module, parts: int) -> Iterator[Callable[[], None]]:
    """BN's running statistics move by the mean of the moves that each part of a batch makes from where they are.

    Call what this gives after each part. With one part it does nothing: they move as they always do.
    """
    if parts == 1:
        yield lambda: None
        return
    statistics = list(net.buffers())
    before = [value.clone() for value in statistics]
    total = [torch.zeros_like(value) for value in statistics]

    @torch.no_grad()
    def next_part() -> None:
        torch._foreach_add_(total, statistics)
        torch._foreach_copy_(statistics, before)

    yield next_part
    with torch.no_grad():
        torch._foreach_div_(total, parts)
        torch._foreach_copy_(statistics, total)


def training_batch(splits: Splits, batch: Batch, padding: str = "mean") -> tuple[Tensor, Tensor]:
    """Normalised, cropped and flipped images (B, 3, H, W) and their labels (B,); all on one device."""
    assert isinstance(splits.train, Images)  # what is on the disk, a Training reads itself
    images, labels = splits.train.images[batch.index], splits.train.labels[batch.index]
    if padding == "black":
        return augment(images.float().div_(255), batch).sub_(splits.mean), labels
    return augment(normalise(images, splits.mean), batch), labels


def parameter_groups(net: nn.Module, weight_decay: float, decay: str) -> list[dict[str, object]]:
    """`decay` "all": weight decay on every parameter; "conv": not on BN's scale and shift, nor on biases."""
    if decay == "all":
        return [{"params": list(net.parameters()), "weight_decay": weight_decay}]
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
