"""The log of a run: one `Epoch` a row, and its CSV form. Standard library only."""

import math
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


def to_csv(rows: list[Epoch], *, validation: bool) -> str:
    """The rows with a header; validation columns only where there is a validation split."""
    columns = [c for c in COLUMNS if validation or c not in VALIDATION]
    lines = [",".join(columns)]
    lines += [",".join(repr(getattr(row, column)) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def from_csv(text: str, *, gaps: bool = False) -> list[Epoch]:
    """The inverse of `to_csv`.

    Args:
        text: the CSV.
        gaps: epochs may be missing, and values be NaN, as in the log of an imported run.

    Raises:
        ValueError: another program's header, a row that does not fit it, or epochs that are not 1, 2, 3, ...
    """
    lines = [line.split(",") for line in text.splitlines()]
    header = lines[0] if lines else []
    if tuple(header) not in (COLUMNS, tuple(c for c in COLUMNS if c not in VALIDATION)):
        raise ValueError(f"the header is not degrade's: {','.join(header)[:100]!r}")
    if not text.endswith("\n"):
        raise ValueError("the last row is cut off")
    rows: list[Epoch] = []
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise ValueError(f"row {number} has {len(line)} values, the header {len(header)}")
        try:
            row = Epoch(int(line[0]), int(line[1]), *map(float, line[2:]))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        if row.epoch != number and not gaps:
            raise ValueError(f"row {number} is epoch {row.epoch}")
        if row.step <= (rows[-1].step if rows else 0) or row.epoch < number:
            raise ValueError(f"row {number}: its step, {row.step}, is not above the one before")
        for name in ("train_error", "train_error_running", "test_error", "val_error"):
            value = getattr(row, name)
            if value is not None and not 0 <= value <= 1 and not (gaps and math.isnan(value)):
                raise ValueError(f"row {number}: {name} must be from 0 to 1; got {value}")
        rows.append(row)
    return rows
