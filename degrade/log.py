"""The log of a run: one `Epoch` a row, and its CSV form. Standard library only."""

import contextlib
import math
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields

VALIDATION = ("val_loss", "val_error")


@dataclass(frozen=True)
class Epoch:
    """What is known at the end of an epoch. Errors are fractions in [0, 1]; losses are mean cross-entropies in nats.

    Args:
        epoch: counted from 1.
        step: updates done.
        lr: the learning rate of the last update.
        train_loss, train_error: in eval mode, unaugmented, over the whole training set.
        train_error_running: average over the epoch's augmented batches, in training mode.
        test_loss, test_error: in eval mode, over the whole test set.
        val_loss, val_error: likewise over the validation split; None where there is none.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    train_error_running: float
    test_loss: float
    test_error: float
    val_loss: float | None = None
    val_error: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the training loss is NaN or infinite."""
        return not math.isfinite(self.train_loss)


COLUMNS = tuple(field.name for field in fields(Epoch))
WITHOUT_VALIDATION = tuple(name for name in COLUMNS if name not in VALIDATION)
INTEGERS = ("epoch", "step")
FRACTIONS = tuple(name for name in COLUMNS if "error" in name)
Columns = dict[str, "array[int] | array[float]"]  # the numbers of a log by the name of their column, all of one length


def to_csv(rows: list[Epoch], *, validation: bool) -> str:
    """The rows with a header; validation columns only where there is a validation split."""
    columns = COLUMNS if validation else WITHOUT_VALIDATION
    lines = [",".join(columns)]
    lines += [",".join(repr(getattr(row, column)) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def from_csv(text: str, *, gaps: bool = False) -> list[Epoch]:
    """The inverse of `to_csv`.

    Args:
        text: the CSV.
        gaps: epochs may be missing, and values be NaN, as in the log of an imported run.

    Raises:
        ValueError: it is not `to_csv`'s: another header, a row that does not fit it, a number spelt in another way, or
            epochs that are not 1, 2, 3, ...
    """
    return to_rows(to_columns(text, gaps=gaps))


def to_rows(columns: Columns) -> list[Epoch]:
    return [Epoch(*row) for row in zip(*columns.values(), strict=True)]


def to_columns(text: str, *, gaps: bool = False) -> Columns:
    """As `from_csv`, in a fraction of its memory: a folder of 10,000 logs fits."""
    if "\r" in text:
        raise ValueError("there are carriage returns in it; git's core.autocrlf adds them")
    lines = text.split("\n")
    header = tuple(lines[0].split(","))
    if header not in (COLUMNS, WITHOUT_VALIDATION):
        raise ValueError(f"the header is not degrade's: {lines[0][:100]!r}")
    if lines.pop():
        raise ValueError("the last row is cut off")
    rows = [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} values, the header {len(header)}")
    texts = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = {name: _numbers(name, column) for name, column in zip(header, texts, strict=True)}
    before: float = 0
    for number, (epoch, step) in enumerate(zip(columns["epoch"], columns["step"], strict=True), start=1):
        if epoch != number and not gaps:
            raise ValueError(f"row {number} is epoch {epoch}")
        if step <= before or epoch < number:
            raise ValueError(f"row {number}: its step, {step}, is not above the one before")
        before = step
    for name in FRACTIONS:
        for number, value in enumerate(columns.get(name, ()), start=1):
            if not 0 <= value <= 1 and not (gaps and math.isnan(value)):
                raise ValueError(f"row {number}: {name} must be from 0 to 1; got {value}")
    return columns


def _numbers(name: str, texts: Sequence[str]) -> "array[int] | array[float]":
    kind: type[float] = int if name in INTEGERS else float
    with contextlib.suppress(ValueError, OverflowError):
        values = array("q" if kind is int else "d", map(kind, texts))
        if all(map(operator.eq, map(repr, values), texts)):
            return values
    for number, text in enumerate(texts, start=1):  # which of them is it?
        try:
            value = kind(text)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        if repr(value) != text:
            raise ValueError(f"row {number}: {name} is {text[:100]!r}, which degrade writes as {value!r}")
    raise ValueError(f"{name} has a number of more than 64 bits")


def last_row(log: bytes) -> Columns | None:
    """The columns of the last row alone, in a twentieth of the time; None where a glance tells of something amiss.

    None too for a log with gaps, or with a number that is not finite: whoever wants to know reads all of it.
    """
    header, _, rows = log.partition(b"\n")
    row, shape = b"," * header.count(b",") + b"\n", rows.translate(None, b"0123456789.-e")
    count = len(shape) // len(row)
    if not count or shape != row * count:
        return None
    names = tuple(header.decode(errors="replace").split(","))
    texts = rows[rows.rfind(b"\n", 0, -1) + 1 : -1].decode().split(",")
    if names not in (COLUMNS, WITHOUT_VALIDATION):
        return None
    columns: Columns = {}
    for name, text in zip(names, texts, strict=True):
        kind: type[float] = int if name in INTEGERS else float
        try:
            value = kind(text)
            columns[name] = array("q" if kind is int else "d", (value,))
        except (ValueError, OverflowError):
            return None
        if repr(value) != text or (name in FRACTIONS and not 0 <= value <= 1):
            return None
    return columns if columns["epoch"][0] == count <= columns["step"][0] else None
