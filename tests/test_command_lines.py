"""Promise 14: any command line ends in 0 or 2 with one helpful line; in 1 only where results are damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import smoke, tally, times, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from degrade import bench, data, machines, plots, store
from degrade import sweep as engine

pytestmark = pytest.mark.promise

DAMAGES = {  # by folder of results: the file that is damaged, and what is in it instead
    "junk study": (store.STUDY, b"\xff{"),
    "study\nof another program": (store.STUDY, b'{"name": "optuna"}'),
    "lost study": (store.STUDY, None),
    "lost config": (store.CONFIG, None),
    "nested config": (store.CONFIG, b"[" * 100_000),
    "edited config": (store.CONFIG, json.dumps(smoke(seed=1).as_dict()).encode()),
    "junk log": (store.LOG, b"\xff\x00"),
    "\x1b[31mcut log": (store.LOG, b"epoch,step"),
    "log of another program": (store.LOG, b"step,loss\n1,2\n"),
    "[bold]log that is a folder": (store.LOG, ...),
    "junk timing": (store.TIMING, b"\xff"),
    "junk environment": (store.ENVIRONMENT, b"[]"),
    "junk checkpoint": (f"{store.CHECKPOINTS}/000000006-ab.pt", b"junk"),
}
SOUND = ["sound", "ü", "\udcff"]
PLACES = [*SOUND, "empty", "file", "none", "begun", ".", *DAMAGES]

HOSTILE = [
    *(
        "",
        " ",
        ",",
        ",,",
        "-",
        "--",
        "---",
        "-1",
        "-h",
        "--help",
        "--version",
        "=",
        "@file",
        "%s",
        "{0}",
        "$HOME",
        "\\",
    ),
    *(
        "\n",
        "a\nb",
        "\t",
        "\x1b[31m",
        "\x7f",
        "ü",
        "日本",
        "🙂",
        "\u202e",
        "\udcff",
        "[bold]",
        "[/]",
        "'",
        '"',
        "٨",
        "８",
    ),
    *("nan", "inf", "-inf", "-0", "0", "1e400", "1e9", "10**9", "0x8", "1_000", "9" * 18, "9" * 40, "9" * 5000),
    *("None", "true", "auto", "../x", ".", "~", "a/../b", "x" * 300, "x/" * 3000, "/dev/null", "/dev/null/x"),
]
VALUES = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_characters="\0/"), max_size=6)

GRID = {
    "--depths": ["8", "8,14", "8, 14", "20,,56", "21", "8,8", "20,32,44,56,110", "1000000004", "-8", "8,", "8;14"],
    "--blocks": ["plain", "residual", "plain,residual", "preact", "dense", "plain,,"],
}
MACHINE = {
    "--device": ["auto", "cpu", "cuda", "cuda:1", "mps", "gpu", "cpu:1"],
    "--jobs": ["auto", "1", "2", "1024", "1025"],
    "--threads": ["auto", "1", "1024"],
    "--pack": ["auto", "1", "3"],
    "--compile": ["auto", "on", "off", "maybe"],
    "--precision": ["fp32", "tf32", "bf16", "fp8"],
}
NUMBERS = (
    *("steps", "batch-size", "lr", "warmup-depth", "warmup-lr", "warmup-steps", "momentum", "weight-decay", "width"),
    *("train-images", "val-images", "test-images", "split-seed"),
)
FIELDS = {
    "--seeds": ["0", "0,1,2", "-1", "4294967296"],
    "--dataset": ["cifar10", "shapes", "svhn", "folder:sound", "folder:", "folder:a:1+1:2:32:0123456789ab", "imagenet"],
    "--augment": ["crop", "none", "flip"],
    "--image-size": ["32", "7", "x"],
    "--protocol": ["paper", "short", "demo", "smoke", "fast"],
    "--milestones": ["3", "12,18", "18,12", "-1", "none"],
    "--decay": ["all", "conv", "none"],
    "--shortcut": ["A", "B", "C", "a"],
    "--init": ["he", "zero-gamma", "identity:plain-8-s0-01234567:0123456789ab", "zeros"],
    "--input-mean": ["0.5,0.5,0.5", "0.5", "nan,0,0", "1,2,x"],
    "--padding": ["mean", "black", "white"],
    "--snapshots": ["0", "3,24", "25", "-1", "99999999999"],
    "--grid": ["lr=0.1,0.2", "lr=0.1,0.1", "lr=", "width=1,2,x", "depth=8,14", "init=he,zero-gamma", "steps=1,2"],
} | {f"--{name}": ["0", "1", "8", "100", "1.5", "0.1", "1e-3", "1000000000000"] for name in NUMBERS}
STORED = {
    "--out": PLACES,
    "--study": ["mine", "study", "a b", "x" * 100, "x" * 101, ".hidden"],
    "--data-dir": PLACES,
    "--retry-failed": [],
    "--skip-broken": [],
}
OPTIONS = {  # of each command, with some of their values
    "sweep": GRID | FIELDS | MACHINE | STORED,
    "show": {"--json": [], "--csv": []},
    "plot": {"--out": PLACES, "--formats": ["png", "svg,pdf", "gif", "png,,", "png,png"]},
    "verdict": {"--json": []},
    "check": {"--repair": []},
    "data list": {"--data-dir": PLACES},
    "data check": {"--data-dir": PLACES, "--image-size": ["32", "7"]},
    "bench": GRID | MACHINE | {"--json": []},
    "report": {"--out": PLACES},
    "export": {"--to": [*PLACES, "net.pt", "net.safetensors", "none/net.pt"]},
    "identity": {"--depth": ["8", "14", "21", "x"], "--steps": ["0", "5", "-1"], "--lr": ["0.1", "nan", "-1"]},
    "import": {
        "--block": ["plain", "dense"],
        "--depth": ["8", "9"],
        "--source": ["a friend"],
        "--set": ["width=4", "depth=8", "x=1", "width"],
        "--mean": ["0.5,0.5,0.5", "125,125,125"],
        "--log": PLACES,
        "--study": ["mine", "study", "a b"],
    },
}
RIGHT = ["--depths=8", "--protocol=smoke", "--dataset=shapes", "--device=cpu"]
REFUSED = [  # whatever comes before: at once, by the study that is there, and by the machine
    *(["--depths", depths] for depths in ("21", "20,,56", "1000000004", "")),
    [*RIGHT, "--study", "study", "--out", "sound", "--lr", "0.5"],
    [*RIGHT, "--out", "none", "--jobs", "0"],
]


def chance(draw, percent):
    return draw(st.integers(0, 99)) < percent


@st.composite
def command_lines(draw):
    """A command and its options in any order: some twice, some without a value, some with an absurd one.

    None of them trains: a sweep is dry, or ends in what is refused.
    """
    if chance(draw, 5):
        return draw(st.lists(VALUES | st.sampled_from(["show", "bench", "--depths", "--json", "sound"]), max_size=5))
    command = draw(st.sampled_from([*OPTIONS, "sweep", "sweep"]))
    parts = []
    if command == "sweep" and chance(draw, 70):
        parts += [[word] for word in RIGHT]
        if chance(draw, 50):
            parts += [["--study", "study"], ["--out", draw(st.sampled_from(PLACES))]]
    for flag in draw(st.lists(st.sampled_from(sorted(OPTIONS[command])), max_size=4)):
        plausible = OPTIONS[command][flag]
        value = draw(st.sampled_from(plausible) if plausible and chance(draw, 70) else VALUES)
        if chance(draw, 10):
            parts.append([f"{flag}={value}"])
        else:
            parts.append([flag, value] if bool(plausible) != chance(draw, 3) else [flag])
    if command == "sweep" and chance(draw, 30):
        parts.append(["spec.toml"])
    elif command not in ("sweep", "bench") and chance(draw, 80):
        parts.append([draw(st.sampled_from(PLACES))])
    elif chance(draw, 10):
        parts.append([draw(VALUES)])
    words = [word for part in draw(st.permutations(parts)) for word in part]
    if command != "sweep":
        return [*command.split(), *words]
    return [command, *words, *draw(st.sampled_from(REFUSED))] if chance(draw, 30) else [command, "--dry-run", *words]


KEYS = (
    *("depths", "blocks", "seeds", "dataset", "protocol", "study", "lr", "steps", "milestones", "width", "precision"),
    *("grid", "train-images", "train_images", "nesterov", "out", '"a\\nb"', '""', '"\\u001b[31m"'),
)
SETTINGS = (
    *("[8]", "[8, 14]", '["plain"]', "[]", "[true]", "[8.0]", "[[8]]", "nan", "-1", "0.1", "true", "1979-05-27"),
    *('"shapes"', '"smoke"', '"../x"', '"a\\u0000b"', '"a\\nb"', f'"{"x" * 300}"', "{a = 1}", "9" * 30, "9" * 5000),
    *("{lr = [0.1, 0.2]}", "{width = [8, 8]}", "{depth = [8]}"),
)
BROKEN = (
    *(b"", b"\0", b"\xff\xfe", b"depths = [8", b"depths = [8]\r\n", b"\xef\xbb\xbfdepths = [8]", b"a.b.c = 1"),
    b"depths = " + b"[" * 5000,
)
TOML = st.sampled_from(BROKEN) | st.dictionaries(st.sampled_from(KEYS), st.sampled_from(SETTINGS), max_size=4).map(
    lambda values: "\n".join(f"{key} = {value}" for key, value in values.items()).encode()
)


def damaged(place):
    name, _ = DAMAGES[place]
    return Path(place, "study", name if name == store.STUDY else Path(smoke().run_id, name))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Folders of results: sound ones, none at all, and damaged ones."""
    world = tmp_path_factory.mktemp("original")
    errors = [(0.9, 0.9), (0.8, 0.8), (0.7, 0.7)]
    for place in (*SOUND, *DAMAGES):
        for config in (smoke(), smoke(depth=14), smoke("residual")):
            run = write_run(world / place / "study", config, errors)
            (run.folder / store.ENVIRONMENT).write_text('{"threads": 1}\n')
    for place, (_, content) in DAMAGES.items():
        path = world / damaged(place)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if content is ...:
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
    write_run(world / "begun" / "study", smoke(), [])
    (world / "empty").mkdir()
    (world / "file").touch()
    return world


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """The working folder, with nothing in reach that takes long, or that trains."""
    world = tmp_path / "world"
    shutil.copytree(original, world)
    monkeypatch.chdir(world)

    def never(*_, **__):
        raise AssertionError("it was to be refused")

    monkeypatch.setattr(engine, "sweep", never)
    monkeypatch.setattr(data, "fetch", never)
    monkeypatch.setattr(machines, "fetch", never)
    monkeypatch.setattr(engine, "training_flops", lambda _: 1e12)
    monkeypatch.setattr(engine, "why_not", lambda _: "there is none here")
    monkeypatch.setattr(bench, "training_flops", lambda _: 1e12)
    monkeypatch.setattr(bench, "estimate", lambda configs, _: {config.run_id: 3600.0 for config in configs})
    monkeypatch.setattr(bench, "measure", lambda *_, **__: bench.Speed(0.1, 0.001, 1.0))
    monkeypatch.setattr(bench, "measure_packed", lambda *_, **__: 0.3)
    monkeypatch.setattr(bench, "matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(plots, "figures", lambda _: {"curves": Figure((1, 1))})
    return world


def listing(folder):
    stats = {entry.path: entry.stat(follow_symlinks=False) for entry in walk(folder)}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in stats.items()}


def walk(folder):
    for entry in os.scandir(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)


def shown(path):
    """As a message shows it."""
    return str(path).replace("\n", "\\n").replace("\x1b", "\\x1b")


def held_to_the_promise(code, stdout, stderr):
    lines = stderr.removesuffix("\n").split("\n") if stderr else []
    assert "Traceback" not in stdout + stderr
    assert all(line.startswith("degrade: ") and len(line) > 20 for line in lines), stderr
    if code == 0:
        assert not lines
    elif code == 2:
        assert len(lines) == 1, stderr
        assert not stdout
        assert "can't encode" not in stderr
    else:
        assert code == 1
        paths, told = [damaged(place) for place in DAMAGES], stdout + stderr
        assert any(shown(path) in told or f"{shown(path.parent)} has a log.csv but no" in told for path in paths), told


@settings(max_examples=times(2000), deadline=None, suppress_health_check=list(HealthCheck))
@given(words=command_lines(), spec=TOML)
def test_any_command_line_ends_in_0_or_2_with_one_line_and_nothing_written(cli, original, world, words, spec):
    (world / "spec.toml").write_bytes(spec)
    before = listing(world.parent)
    result = cli(*words)
    tally(14, "argument lists")
    held_to_the_promise(*result)
    if listing(world.parent) != before:
        assert {"--repair", "plot", "report"} & set(words), words
        assert result.exit_code != 2, words
        shutil.rmtree(world)
        shutil.copytree(original, world)
        os.chdir(world)


SCRIPT = """
import json, os, sys
from degrade.cli import main
for words in json.load(sys.stdin):
    sys.argv = ["degrade", *(os.fsdecode(word.encode(errors="surrogateescape")) for word in words)]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os.write(1, b"\\0%d\\0" % (end.code or 0))
        os.write(2, b"\\0")
"""


def test_a_poor_terminal_is_no_reason_to_crash(world):
    """Twenty columns and nothing but ASCII, in a process of its own."""
    readers = (["show"], ["show", "--json"], ["show", "--csv"], ["verdict"], ["check"])
    lines = [[], ["--help"], *([command, "--help"] for command in OPTIONS), *(["show", value] for value in HOSTILE)]
    lines += [[*reader, root] for reader in readers for root in PLACES]
    lines += [["sweep", "--dry-run", *RIGHT, "--study", "study", "--out", root] for root in ("ü", *DAMAGES)]
    poor = {"COLUMNS": "20", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    poor["PYTHONPATH"] = str(Path(store.__file__).parents[1])
    before = listing(world)
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, input=json.dumps(lines).encode(), capture_output=True, env=os.environ | poor)
    stdout, stderr = result.stdout.decode("ascii").split("\0"), result.stderr.decode("ascii").split("\0")
    assert result.returncode == 0, stderr[-1]
    for words, out, code, err in zip(lines, stdout[::2], stdout[1::2], stderr[:-1], strict=False):
        held_to_the_promise(int(code), out, err)
        assert code == "0" or words[-1:] not in ([place] for place in SOUND), words
        tally(14, "argument lists")
    assert len(stderr) - 1 == len(lines)
    assert listing(world) == before
