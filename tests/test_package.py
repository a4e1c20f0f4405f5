import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_built_wheel_works_outside_the_checkout(data_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "degrade", source / "degrade", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "site")
    assert modules == {str(path.relative_to(ROOT)) for path in (ROOT / "degrade").rglob("*.py")}

    sweep = ["sweep", "--depths", "8", "--blocks", "plain,residual", "--dataset", "shapes", "--protocol", "smoke"]
    script = (
        "import degrade, sys\n"
        f"assert degrade.__file__.startswith({str(tmp_path)!r}), degrade.__file__\n"
        "from degrade.cli import main\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    (tmp_path / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "DEGRADE_DATA": str(data_dir)}
    for arguments in (sweep, ["plot", "results"], ["verdict", "results"]):
        subprocess.run([sys.executable, "run.py", *arguments], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "results" / "shapes-smoke" / "figures" / "curves.png").exists()
    assert not any((tmp_path / "site").rglob("results"))
