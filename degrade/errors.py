"""The one exception for what can be expected to go wrong."""


class Failure(RuntimeError):
    """Something outside the program's control failed; the message says it in one line. Exit code 1."""
