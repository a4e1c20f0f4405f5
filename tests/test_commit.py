import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from degrade.commit import (
    Held,
    clear_leavings,
    hold,
    holder,
    make_folder,
    read_checkpoint,
    write_checkpoint,
    write_file,
)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "log.csv"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["log.csv"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, code):
    path = tmp_path / "log.csv"
    write_file(path, b"old")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["log.csv"]


def test_data_are_synced_before_they_are_named_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_file(tmp_path / "x", b"data")
    assert calls == ["file", "replace", "folder"]


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (5, 90, 1000):
        write_checkpoint(folder, step, b"state %d" % step)
    assert len(list(folder.iterdir())) == 2
    assert read_checkpoint(folder) == (b"state 1000", [])


def test_a_bad_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    write_checkpoint(tmp_path, 5, b"good state")
    write_checkpoint(tmp_path, 90, b"newer state")
    newest = max(tmp_path.iterdir())
    for bad in (b"newer stat", b"newer statf", b"", b"Newer state"):
        newest.write_bytes(bad)
        assert read_checkpoint(tmp_path) == (b"good state", [newest.name])
    min(tmp_path.iterdir()).write_bytes(b"")
    data, bad = read_checkpoint(tmp_path)
    assert data is None
    assert len(bad) == 2
    assert read_checkpoint(tmp_path / "nothing") == (None, [])


def test_a_checkpoint_written_after_damage_is_the_newest_and_stays(tmp_path):
    for step in (12, 16):
        write_checkpoint(tmp_path, step, b"state %d" % step)
    max(tmp_path.iterdir()).write_bytes(b"damaged")
    assert read_checkpoint(tmp_path)[0] == b"state 12"
    write_checkpoint(tmp_path, 13, b"state 13")
    assert read_checkpoint(tmp_path) == (b"state 13", [])
    assert len(list(tmp_path.iterdir())) == 2  # 12 is still there to fall back on
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    write_checkpoint(tmp_path, 5, b"state 5")  # started anew
    assert read_checkpoint(tmp_path) == (b"state 5", [])


def test_leavings_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".000000001-abc.x.partial").write_bytes(b"half")
    (tmp_path / "log.csv").write_bytes(b"whole")
    clear_leavings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def hold_for_ever(path):
    with hold(path):
        print("held", flush=True)
        time.sleep(60)


def holding(path):
    code = (
        f"import pathlib, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_commit; "
        f"test_commit.hold_for_ever(pathlib.Path({str(path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    assert holder(path) is None
    process = holding(path)
    try:
        assert holder(path) == process.pid
        with pytest.raises(Held, match=f"held by process {process.pid}"), hold(path):
            pass
        os.kill(process.pid, signal.SIGSTOP)  # a frozen holder keeps it
        assert holder(path) == process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert holder(path) is None  # the file is still there, and no one has to delete it
    with hold(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_looking_at_a_lock_does_not_keep_others_from_it(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    context = multiprocessing.get_context("spawn")
    looking = context.Event()
    looker = context.Process(target=look, args=(path, looking))
    looker.start()
    assert looking.wait(20)
    try:
        for _ in range(300):
            with hold(path):
                pass
    finally:
        looker.kill()
        looker.join()


def look(path, looking):
    looking.set()
    while True:
        holder(path)
        time.sleep(0.0002)


def test_folders_are_made_durably(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
