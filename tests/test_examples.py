"""The notebooks run, and what is stored in them is what comes out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_SIZE = 600_000  # bytes: GitHub shows them with their figures


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell has printed and the tables it shows; of a figure only its size, since its bytes differ elsewhere."""
    shown = []
    for output in cell.outputs:
        kinds = output.get("data", {output.get("name"): output.get("text")})
        shown += [(kind, value) for kind, value in sorted(kinds.items()) if not kind.startswith("image/")]
    return shown


def listing():
    """Every file that executing could touch, and when it was written."""
    return {path: path.stat().st_mtime_ns for name in ("examples", "results") for path in (ROOT / name).rglob("*")}


@pytest.fixture(scope="module")
def executed(data_dir, tmp_path_factory):
    """The folder with all of them executed anew, as `make notebook` does it, but beside the repository."""
    out, home = tmp_path_factory.mktemp("executed"), tmp_path_factory.mktemp("jupyter")
    own = {"DEGRADE_DATA": str(data_dir), "IPYTHONDIR": str(home), "JUPYTER_RUNTIME_DIR": str(home)}
    before = listing()
    command = [sys.executable, "examples/execute.py", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert listing() == before
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_what_comes_out_the_same_everywhere_is_as_stored(self, path, executed):
        stored, now = code(read(path)), code(read(executed / path.name))
        tagged = [i for i, cell in enumerate(stored) if "reproducible" in cell.metadata.get("tags", [])]
        assert tagged
        for i in tagged:
            assert texts(stored[i]) == texts(now[i]), f"{stored[i].id}: run make notebook"

    def test_every_cell_shows_now_what_kind_of_thing_it_showed(self, path, executed):
        """A figure above all: without a display it is drawn all the same."""
        kinds = [
            [(cell.id, [sorted(output.get("data", {})) for output in cell.outputs]) for cell in code(read(there))]
            for there in (path, executed / path.name)
        ]
        assert kinds[0] == kinds[1], "run make notebook"
        assert sum("image/png" in data for _, cell in kinds[1] for data in cell) >= 3

    def test_it_is_stored_executed_from_top_to_bottom(self, path):
        notebook = read(path)
        nbformat.validate(notebook)
        assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
        outputs = [output for cell in code(notebook) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]

    def test_it_is_small_and_names_no_machine(self, path):
        text = path.read_text()
        assert len(text) < MAX_SIZE
        assert not re.search(r"/(home|root|Users|tmp|work)/", text)
        notebook = read(path)
        assert notebook.metadata == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)  # no times of execution

    def test_the_files_and_studies_it_names_are_there(self, path):
        text = "\n".join(cell.source for cell in read(path).cells)
        for name in re.findall(r"\bexperiments/[\w.-]+|\bresults/[\w./-]*\w", text):
            assert (ROOT / name).exists(), name
