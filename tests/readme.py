"""The part of README.md that is written from results/: `python tests/readme.py` (make figures) renews it."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- verdict: written by make figures -->\n).*?(<!-- /verdict -->)", re.DOTALL)


def verdict_table() -> str:
    """What `degrade verdict` prints of the reference results, as Markdown."""
    import degrade
    from degrade.analysis.verdict import verdicts
    from degrade.terminal import interval_text

    lines = ["| data | nets | depths | seeds | rise | 95 % interval | verdict |", "|---|---|---|---|---|---|---|"]
    epochs = degrade.load(ROOT / "results")
    for v in verdicts(epochs[~epochs["imported"]]):  # what was trained elsewhere is told apart
        block = v.block.replace("-", " minus ")
        data = v.study.partition("-")[0]
        lines.append(
            f"| {data} | {block} | {v.deep} v {v.shallow} | {v.seeds} | {100 * v.difference:+.2f} "
            f"| {interval_text(v)} | {v.words} |"
        )
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    return BLOCK.sub(lambda match: match[1] + "\n" + verdict_table() + "\n" + match[2], text)


if __name__ == "__main__":
    os.chdir(ROOT)
    README.write_text(renewed(README.read_text()))
