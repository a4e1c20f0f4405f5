"""The command line: parse, call, print. Torch, pandas and matplotlib are imported by the commands that need them."""

import signal
import threading

ordinary = signal.getsignal(signal.SIGINT)
catches = ordinary is signal.default_int_handler and threading.current_thread() is threading.main_thread()
if catches:  # Ctrl-C during these imports, before main can catch it, ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from degrade.cli import sweep, results, report, probe, weights, data, bench  # noqa: E402, F401, I001  each adds its commands
from degrade.cli.app import app, main  # noqa: E402

if catches:
    signal.signal(signal.SIGINT, ordinary)

__all__ = ["app", "main"]
