"""`degrade report`"""

from pathlib import Path
from typing import Annotated

from degrade import store
from degrade.cli.app import Plain, app, construction_of, say, tell
from degrade.cli.options import Results, option
from degrade.errors import Failure


@app.command(cls=Plain)
def report(
    results: Results = Path("results"),
    out: Annotated[Path | None, option("DIR", "A folder for the page.", show_default="the results")] = None,
) -> int:
    """Write one page about all studies: report.html, report.md.

    The page opens from disk and needs no network. report.md beside it has the same numbers.

    \b
    Example: degrade report results/
    Example: degrade report results/ --out public/
    """
    studies, damaged = store.find_studies(results)
    if not studies:
        raise Failure(f"nothing is left to read: {damaged[0]}")

    for study in studies:
        construction_of(study, damaged)

    from degrade.report import write_report

    for path in write_report(studies, damaged, out or results):
        say(str(path))
    return tell(damaged)
