import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEPS = [  # instruction, rest; lines that end in a backslash go on
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", "", RECIPE).splitlines()
    if line.strip() and not line.startswith("#")
]
INSTALLS = [n for n, (step, text) in enumerate(STEPS) if step == "RUN" and "pip install" in text]


def the(wanted):
    (text,) = (text for step, text in STEPS if step == wanted)
    return text


def copies(steps=STEPS):
    return [source for step, text in steps if step == "COPY" for source in text.split()[:-1]]


def ignored(path):
    """As docker reads .dockerignore: a pattern fits a path or a folder above it, and the last one that fits holds."""
    is_ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if line and not line.startswith("#") and re.fullmatch(f"{pattern}(/.*)?", path):
            is_ignored = not line.startswith("!")
    return is_ignored


def dependencies():
    """What the recipe's own line of Python takes out of pyproject.toml."""
    python, flag, code, *_ = shlex.split(STEPS[INSTALLS[0]][1])
    assert (python, flag) == ("python", "-c")
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return lines.splitlines()


def test_what_is_copied_makes_the_package(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for name in copies(STEPS[: INSTALLS[-1]]):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {path for path in (ROOT / "degrade").rglob("[!.]*.*") if "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {str(path.relative_to(ROOT)) for path in files} == {name for name in names if name.startswith("degrade/")}
    assert any(name.endswith("/LICENSE") for name in names)
    assert metadata.strip().endswith((source / PROJECT["readme"]).read_text().strip())


def test_nothing_that_is_copied_is_ignored():
    for name in copies():
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
        for path in (ROOT / name).rglob("*"):
            inside = str(path.relative_to(ROOT))
            assert ignored(inside) == ("__pycache__" in path.parts), inside


@pytest.mark.parametrize("path", [".git/HEAD", ".venv/bin/python", "results/report.md", "data/cifar10.npy"])
def test_what_is_large_or_private_stays_out(path):
    assert ignored(path)


def test_dependencies_come_first_and_all_are_those_that_were_tested():
    for n in INSTALLS:
        assert "-c constraints.txt" in STEPS[n][1]
    assert copies(STEPS[: INSTALLS[0]]) == ["pyproject.toml", "constraints.txt"], "torch is installed anew"
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = {re.match(r"[\w-]+", line)[0] for line in dependencies()}
    assert names <= {name.lower() for name in pinned}


def test_the_dependencies_are_those_of_the_extra_that_is_installed():
    extra = re.search(r"'\.\[(\w+)\]'", STEPS[INSTALLS[-1]][1])[1]
    assert dependencies() == PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]


def test_degrade_gets_the_signals_and_is_not_root():
    assert json.loads(the("ENTRYPOINT"))[0] in PROJECT["scripts"]  # a list: no shell is between
    assert int(the("USER").split(":")[0]) > 0  # a number: there is no account, and orchestrators can see it is not root


def test_the_command_at_the_head_mounts_what_is_written():
    head = RECIPE.partition("FROM")[0]
    *_, work = (text for step, text in STEPS if step == "WORKDIR")
    data = re.search(r"DEGRADE_DATA=(\S+)", RECIPE)[1]
    assert dict(re.findall(r'-v "\$PWD/(\w+):([^"]+)"', head)) == {"results": f"{work}/results", "data": data}
    experiment = Path(re.search(r"degrade sweep (\S+)", head)[1])
    assert (ROOT / experiment).is_file()
    assert experiment.parts[0] in copies()
