"""Promises 8, 15 and 17: sweeps that share a folder, are told to stop, or lose their parent."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
from conftest import micro, tally, times
from crash import digests, finish, processes, run_sweep, start

from degrade import cli, commit, store, sweep
from degrade.store import Run
from degrade.train import Training

pytestmark = pytest.mark.promise

GRID = [micro(block, seed) for block in ("plain", "residual") for seed in (0, 1, 2)]
COMMAND = ["sweep", "--blocks", "plain,residual", "--dataset", "shapes", "--protocol", "smoke", "--threads", "1"]


@pytest.fixture(scope="module")
def grid(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    finish(out, GRID, data_dir)
    return digests(out)


def any_held(out):
    return [folder for folder in out.glob("*/*/") if commit.holder(folder / store.LOCK)]


def trainers(out):
    """The processes that train a run of `share`, each of which keeps it until there is a GATE.

    Earlier, a lock may not name its holder yet, and `os.kill(0, …)` is for this process and all of its group.
    """
    return [commit.holder(folder / store.LOCK).pid for folder in out.glob("s/*/") if (out / folder.name).exists()]


def wait_for(condition, seconds):
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


# 8. Two sweeps on one folder train each run once; a frozen holder keeps its run, and the others say so.


GATE = "go"


def share(out, data_dir, pipe, silence):
    """A sweep over GRID with slow updates, each of which leaves a byte in a file of its run's.

    None goes beyond the fourth of six before the file GATE is there, so that whoever holds a run keeps it till then.
    """
    commit.HEARTBEAT, sweep.SILENCE = 0.05, silence
    update = Training.update

    def slow(self):
        update(self)
        with open(out / self.config.run_id, "ab") as file:
            file.write(b".")
        time.sleep(0.03)
        while self.step == 4 and not (out / GATE).exists():
            time.sleep(0.01)

    Training.update = slow
    for run, event in run_sweep(out, GRID, data_dir, finished=True):
        if event.kind in ("done", "failed", "held"):
            pipe.send((run.folder.name, event.kind, str(event.value)))


def gather(pipe):
    """All that a sweep has told until it ended."""
    told = []
    try:
        while True:
            told.append(pipe.recv())
    except EOFError:
        return told


@pytest.mark.parametrize("trouble", ["none", "killed", "frozen"])
def test_eight_sweeps_on_one_folder(grid, data_dir, tmp_path, trouble):
    for round_ in range(-(-times(20) // (2 if trouble == "none" else 4))):
        out = tmp_path / str(round_)
        out.mkdir()
        sweeps = []
        for _ in range(8):
            ours, theirs = processes.Pipe(duplex=False)
            sweeps.append((start(share, out, data_dir, theirs, 5 if trouble == "frozen" else 60), ours))
            theirs.close()
        victim = None
        if trouble != "none":
            assert wait_for(lambda out=out: trainers(out), 20)
            time.sleep(random.Random(round_).uniform(0, 0.3))
            victim = random.Random(round_).choice(trainers(out))
            os.kill(victim, signal.SIGKILL if trouble == "killed" else signal.SIGSTOP)
        (out / GATE).touch()
        told = {process.pid: gather(pipe) for process, pipe in sweeps if process.pid != victim}
        kept = [folder.name for folder in any_held(out)]
        if trouble == "frozen":
            assert all(commit.holder(out / "s" / name / store.LOCK).pid == victim for name in kept)
            for lines in told.values():  # each of the others names it, and has seen all else finished
                left = f"left to process {victim}, which has shown no sign of life for 5 s"
                assert [(n, text) for n, kind, text in lines if kind == "held" and "left" in text] == [
                    (n, left) for n in kept
                ]
            os.kill(victim, signal.SIGCONT)
            told[victim] = gather(next(pipe for process, pipe in sweeps if process.pid == victim))
        for process, _ in sweeps:
            process.join()
        assert not any_held(out)
        for pid, lines in told.items():
            done = {name for name, kind, _ in lines if kind == "done"} | (set(kept) if pid != victim else set())
            assert done == set(grid), lines  # whoever trained it
            assert not [line for line in lines if line[1] == "failed"]
        updates = {config.run_id: (out / config.run_id).stat().st_size for config in GRID}
        if trouble != "killed":
            assert set(updates.values()) == {6}, "a run was trained twice"
        assert digests(out) == grid
        tally(
            8, f"rounds of eight sweeps on one folder, a holder of whose runs was {trouble}".replace(" none", " fine")
        )


def test_both_sweeps_end_with_the_full_table(data_dir, tmp_path):
    command = [sys.executable, "-m", "degrade", *COMMAND, "--depths", "8,14", "--jobs", "1", "--data-dir", data_dir]
    both = [
        subprocess.Popen([*command, "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        table = output.rpartition("train error")[2].splitlines()[1:]
        assert Counter(line.split()[1] for line in table[:4]) == {"done": 4}, output


# 15. SIGTERM and Ctrl-C end it within 5 seconds, 143 and 130, resumable.


def command_line(arguments, errors):
    """`degrade`, in a process that was forked from one with torch in it."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["degrade", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def catches_sigterm(pid):
    """Whether the process has set a handler; Linux tells."""
    mask = next((line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line[:6] == "SigCgt"), "0")
    return bool(int(mask.split()[-1], 16) & 1 << (signal.SIGTERM - 1))


LINE = "degrade: stopped; the same command goes on from the last checkpoints\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when the command has begun")
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_told_to_stop_at_any_time(data_dir, tmp_path, cold):
    """Cold, it begins with importing torch, and has workers; warm, it trains in its own process."""
    rng = random.Random(15 + cold)
    for i in range(times(16) if cold else times(34)):
        number, code = rng.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
        out, errors, token = tmp_path / str(i), tmp_path / f"{i}.txt", uuid.uuid4().hex
        arguments = [*COMMAND, "--depths", "8,14", "--steps", "100000", "--data-dir", str(data_dir), "--out", str(out)]
        if cold:
            with errors.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "degrade", *arguments],
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    env=os.environ | {"TOKEN": token},
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                )
        else:
            process = start(command_line, [*arguments, "--jobs", "1"], str(errors))
        assert wait_for(lambda pid=process.pid: catches_sigterm(pid), 60)
        time.sleep(rng.uniform(0, 12 if cold else 2))
        assert not any_ended(process), errors.read_text()
        began = time.monotonic()
        os.kill(process.pid, number)
        process.wait(20) if cold else process.join(20)
        took = time.monotonic() - began
        assert any_ended(process) == (code,)
        assert took < 5
        assert errors.read_text() == LINE
        assert wait_for(lambda out=out: not any_held(out), 5)
        for run in store.Study.open(out / "shapes-smoke-steps100000").runs if out.exists() else []:
            assert run.status in ("interrupted", "missing")
        if cold:
            assert wait_for(lambda token=token: not having(token), 5)
        tally(15, f"signals at seeded times after a {'cold' if cold else 'warm'} start: 5 s, one line, 143 or 130")


def any_ended(process):
    """Its exit code, in a tuple, once it has ended."""
    code = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
    return () if code is None else (code,)


IMPORTING = """
import enum, os, signal, time
import torch
from degrade.stopping import stopping

plain, armed = enum.EnumType.__setattr__, [True]

def setattr_and_stop(*arguments):
    if armed:
        os.kill(os.getpid(), armed.pop() and signal.SIGTERM)
    plain(*arguments)

with stopping("stopped"):
    enum.EnumType.__setattr__ = setattr_and_stop
    import triton._C.libtriton  # whose C++ ends the process at an exception
    time.sleep(30)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton, which torch brings on Linux")
def test_a_stop_while_a_library_in_c_is_imported_waits_for_that():
    began = time.monotonic()
    process = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (143, "degrade: stopped\n")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", ["swallowed", "converted", "in C"])
def test_a_stop_that_is_swallowed_or_converted_or_late_is_a_stop(tmp_path, how):
    """As libraries may do: an exception in a callback is lost, another made of it, or no bytecode is run for long."""
    body = {
        "swallowed": "while True:\n        try: time.sleep(60)\n        except BaseException: pass",
        "converted": "try: time.sleep(60)\n    except BaseException: raise RuntimeError('something else')",
        "in C": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # minutes, and not one bytecode
    }[how]
    script = (
        "import time\nfrom degrade.stopping import stopping\n"
        f"with stopping('stopped'):\n    print('ready', flush=True)\n    {body}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert (process.returncode, errors) == (143, "degrade: stopped\n")


def test_a_stop_ends_even_where_nobody_reads_what_it_prints():
    """Both outputs go into one pipe that is full."""
    script = (
        "import os, sys, time\nfrom degrade.stopping import stopping\n"
        "with stopping('stopped; the same command goes on from the last checkpoints'):\n"
        "    os.write(3, b'!')\n    while True: print('x' * 70)\n"
    )
    ready, told = os.pipe()
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({told}, 3)\n{script}"],
        stdout=writer,
        stderr=writer,
        pass_fds=[told],
    )
    os.close(writer)
    try:
        assert os.read(ready, 1) == b"!"
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    finally:
        process.kill()
        for descriptor in (ready, told, reader):
            os.close(descriptor)


def test_signals_that_were_ignored_still_are(tmp_path):
    """As by nohup, or of a shell's background jobs."""
    script = (
        "import os, signal\nfrom degrade.stopping import stopping\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with stopping('stopped'):\n    os.kill(os.getpid(), signal.SIGINT)\n    print('went on')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "went on\n", "")


# 17. No orphans: when the parent dies, its workers stop within 5 s and free their locks.


def having(token):
    """The processes that have inherited this from the one it was given to, and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                token.encode() in (path / "environ").read_bytes()
                and (path / "stat").read_text().split(") ")[1][0] != "Z"
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whose children there are")
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_no_orphans_when_the_parent_is_killed_at_any_time(data_dir, tmp_path, compiled):
    rng = random.Random(17)
    workers = 0
    for i in range(times(16) if compiled == "off" else times(4)):
        token = uuid.uuid4().hex
        out = tmp_path / str(i)
        arguments = [
            *COMMAND,
            "--depths",
            "8",
            "--steps",
            "100000",
            "--data-dir",
            data_dir,
            "--out",
            out,
            "--jobs",
            "2",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "degrade", *arguments, "--compile", compiled],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"TOKEN": token, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache{i}")},
        )
        # Half of the times while the workers begin, since that is when they might not know their parent yet.
        if i % 2:
            assert wait_for(lambda token=token: len(having(token)) > 2, 60)
            time.sleep(rng.uniform(0, 2))
        else:
            assert wait_for(lambda out=out: len(any_held(out)) == 2, 60)
            time.sleep(rng.uniform(0, 6))
        workers += len(having(token)) > 2
        process.kill()
        process.wait()
        assert wait_for(lambda token=token: not having(token), 5), having(token)
        assert not any_held(out)
        tally(17, f"parents killed at seeded times, compile {compiled}: nothing left of them in 5 s")
    assert workers


def test_status_is_never_running_once_the_process_has_gone(data_dir, tmp_path):
    process = start(finish, tmp_path, [micro(steps=100_000, milestones=())], data_dir)
    assert wait_for(lambda: any_held(tmp_path), 20)
    (folder,) = any_held(tmp_path)
    assert Run.open("s", folder).status == "running"
    assert wait_for(lambda: any((folder / store.CHECKPOINTS).glob("*.pt")), 20)
    process.kill()
    process.join()
    assert Run.open("s", folder).status == "interrupted"
