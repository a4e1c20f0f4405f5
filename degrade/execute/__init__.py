"""Executors run a generator function over items and pass on what it yields. They know nothing scientific."""

from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """Something that happened to one item.

    Args:
        item: its place in the list of items.
        kind: "started"; "value", something its generator yielded; "done"; "failed"; "waiting", where there was
            no room for it beside the others, and it will be started again; "lost", where whatever ran it is out of
            reach, and it will be started again; or "held", which no executor says, but a sweep that has found
            another process at work on the item.
        value: what was yielded, the `Error` of a failed item, how many fit beside each other, how it was lost, or who
            holds it.
    """

    item: int
    kind: Literal["started", "value", "done", "failed", "waiting", "lost", "held"]
    value: Any = None


class Crowded(Exception):
    """Raised by a function whose item has no room beside the others of its place: it will be tried again later."""


class Error(NamedTuple):
    """An exception, as it comes back from wherever it was raised."""

    type: str
    message: str
    where: str
    traceback: str

    def __str__(self) -> str:
        """One line: type and place are said where the message alone does not tell; multi-line messages are cut."""
        line = self.message.strip().partition("\n")[0]
        if self.type in ("Failure", "Held", "Crowded", "OSError", "") and line:
            return line
        return f"{self.type}: {line}".rstrip(": ") + f" ({self.where})"


def check_counts(*, compiled: str, **counts: int | None) -> None:
    """
    Raises:
        ValueError: a count below 1 or above 1024, or no such way to compile.
    """
    for name, value in counts.items():
        if value is not None and not 1 <= value <= 1024:
            raise ValueError(f"{name} must be from 1 to 1024; got {value}")
    if compiled not in ("auto", "on", "off"):
        raise ValueError(f"compile must be auto, on or off; got {compiled!r}")
