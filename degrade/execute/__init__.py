"""Executors run a generator function over items and pass on what it yields. They know nothing scientific."""

from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """Something that happened to one item.

    Args:
        item: its place in the list of items.
        kind: "started"; "value", something its generator yielded; "done"; "failed"; or "waiting", where there was
            no room for it beside the others, and it will be started again.
        value: what was yielded, the `Error` of a failed item, or how many fit beside each other.
    """

    item: int
    kind: Literal["started", "value", "done", "failed", "waiting"]
    value: Any = None


class Crowded(Exception):
    """Raised by a function whose item has no room beside the others of its place: it will be tried again later."""


class Error(NamedTuple):
    """An exception, as it comes back from wherever it was raised."""

    type: str
    message: str
    traceback: str

    def __str__(self) -> str:
        """One line: the type is said where the message alone does not tell, and multi-line messages are cut."""
        line = self.message.strip().partition("\n")[0]
        expected = ("Failure", "Held", "Crowded", "OSError", "")
        return line if self.type in expected and line else f"{self.type}: {line}".rstrip(": ")
