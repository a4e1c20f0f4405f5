"""`degrade report`"""

from pathlib import Path
from typing import Annotated

import typer

from degrade import store
from degrade.cli.app import Results, app, say, tell
from degrade.errors import Failure


@app.command()
def report(
    results: Results = Path("results"),
    out: Annotated[Path | None, typer.Option(help="A folder for the page.", show_default="the results")] = None,
) -> int:
    """Write one page about all studies: report.html, which needs nothing else, and report.md.

    Example: degrade report results/
    """
    studies, damaged = store.find_studies(results)
    if not studies:
        raise Failure(f"nothing is left to read: {damaged[0]}")

    from degrade.report import write_report

    for path in write_report(studies, damaged, out or results):
        say(str(path))
    return tell(damaged)
