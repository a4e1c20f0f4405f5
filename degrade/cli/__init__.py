"""The command line: parse, call, print. Torch, pandas and matplotlib are imported by the commands that need them."""

from degrade.cli import sweep, results, bench, weights, probe, report  # noqa: F401, I001  each adds its commands
from degrade.cli.app import app, main

__all__ = ["app", "main"]
