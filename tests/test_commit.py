import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from degrade import commit
from degrade.commit import (
    Held,
    Holder,
    checkpoints,
    create_file,
    hold,
    holder,
    leavings,
    make_folder,
    read_checkpoint,
    sign_of_life,
    write_checkpoint,
    write_file,
)
from degrade.errors import Failure


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "log.csv"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["log.csv"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, code):
    path = tmp_path / "log.csv"
    write_file(path, b"old")

    real = getattr(os, call)

    def fail(*arguments, **__):
        if call == "close":
            real(*arguments)
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


def test_of_several_who_create_a_file_one_succeeds(tmp_path, monkeypatch):
    path = tmp_path / "study.json"
    assert create_file(path, b"mine") is True
    assert create_file(path, b"theirs") is False
    monkeypatch.setattr(type(path), "exists", lambda self: self != path)  # at the moment when it looked
    assert create_file(path, b"theirs") is False
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["study.json"]


def test_where_there_are_no_hard_links_a_file_is_created_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    assert create_file(tmp_path / "study.json", b"mine") is True
    assert create_file(tmp_path / "study.json", b"theirs") is False
    assert (tmp_path / "study.json").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["study.json"]


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 90, 1000):
        write_checkpoint(tmp_path, step, b"state %d" % step)
    assert [read_checkpoint(path) for path in checkpoints(tmp_path)] == [b"state 1000", b"state 90"]


@pytest.mark.parametrize("bad", [b"newer stat", b"newer statf", b"", b"Newer state"])
def test_a_checkpoint_whose_bytes_are_not_its_own_is_not_read(tmp_path, bad):
    write_checkpoint(tmp_path, 5, b"good state")
    write_checkpoint(tmp_path, 90, b"newer state")
    newest, before = checkpoints(tmp_path)
    newest.write_bytes(bad)
    with pytest.raises(ValueError, match="its bytes are not those it was written with"):
        read_checkpoint(newest)
    assert read_checkpoint(before) == b"good state"


def test_a_checkpoint_on_a_bad_sector_is_not_read(tmp_path, monkeypatch):
    def unreadable(_):
        raise OSError(errno.EIO, "Input/output error")

    write_checkpoint(tmp_path, 5, b"state")
    monkeypatch.setattr(type(tmp_path), "read_bytes", unreadable)
    with pytest.raises(ValueError, match="Input/output error"):
        read_checkpoint(*checkpoints(tmp_path))


def test_a_checkpoint_of_a_stale_writer_costs_no_later_one(tmp_path):
    for step in (11, 12, 16, 17):
        write_checkpoint(tmp_path, step, b"state %d" % step)
    write_checkpoint(tmp_path, 13, b"state 13")
    assert [read_checkpoint(path) for path in checkpoints(tmp_path)] == [b"state 17", b"state 16", b"state 13"]


def test_at_one_step_the_checkpoint_with_more_epochs_is_the_newer(tmp_path):
    """Whatever their hashes: one was written before the epoch's row was, one after, and both may be there."""
    for step in range(20):
        for path in tmp_path.iterdir():
            path.unlink()
        write_checkpoint(tmp_path, step, b"before", epochs=1)
        (before,) = checkpoints(tmp_path)
        write_checkpoint(tmp_path, step, b"after %d" % step, epochs=2)
        write_file(before, b"before")  # not dropped yet, or come back with the power
        assert read_checkpoint(checkpoints(tmp_path)[0]) == b"after %d" % step


def test_leavings_of_a_killed_process_are_found(tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit

    write_file(tmp_path / "log.csv", b"whole")
    monkeypatch.setattr(os, "unlink", killed)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        write_file(tmp_path / "log.csv", b"half")
    (left,) = leavings(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", left.name}


def hold_for_ever(path):
    commit.HEARTBEAT = float(os.environ.get("HEARTBEAT", "5"))
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
        assert holder(path) == Holder(process.pid, socket.gethostname())
        with pytest.raises(Held, match=f"held by process {process.pid}"), hold(path):
            pass
        os.kill(process.pid, signal.SIGSTOP)  # a frozen holder keeps it
        assert holder(path).pid == process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert holder(path) is None  # the file is still there, and no one has to delete it
    with hold(path):
        assert path.read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_a_holder_elsewhere_is_named_with_its_host(tmp_path):
    assert str(Holder(7, "node3")) == "process 7 on node3"
    assert str(Holder(7, socket.gethostname())) == "process 7"
    assert str(Holder(0, "")) == "another process"


def test_whoever_holds_a_lock_shows_signs_of_life_until_it_is_frozen(tmp_path, monkeypatch):
    monkeypatch.setenv("HEARTBEAT", "0.05")
    path = tmp_path / "lock"
    process = holding(path)
    try:
        signs = {sign_of_life(path) for _ in range(20) if time.sleep(0.05) is None}
        assert len(signs) > 2
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert len({sign_of_life(path) for _ in range(20) if time.sleep(0.05) is None}) == 1
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.2)
        assert sign_of_life(path) not in signs
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_sign_of_life_that_fails_once_is_not_the_last(tmp_path, monkeypatch):
    utime, calls = os.utime, []

    def full_at_first(path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        utime(path)

    monkeypatch.setattr(commit, "HEARTBEAT", 0.02)
    monkeypatch.setattr(os, "utime", full_at_first)
    with hold(tmp_path / "lock"):
        end = time.monotonic() + 5
        while len(calls) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(calls) >= 3


def test_a_lock_is_for_all_who_may_write_in_the_folder(tmp_path):
    before = os.umask(0o002)
    try:
        with hold(tmp_path / "lock"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_folder_is_made_where_a_parent_may_not_be_read(tmp_path, monkeypatch):
    """Such as /home, on many clusters."""
    opened = os.open

    def unreadable(path, *arguments):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", unreadable)
    make_folder(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_lock_whose_file_was_deleted_is_lost(tmp_path, how):
    path = tmp_path / "lock"
    with hold(path) as lock:
        lock.check()
        path.unlink()
        if how == "replaced":
            path.touch()
        with pytest.raises(Failure, match="was taken away while it was held"):
            lock.check()
        with hold(path) as other:  # somebody else has it now
            other.check()


def test_a_lock_whose_file_names_another_process_is_lost(tmp_path):
    """A file server that has heard nothing of this machine for long may give the lock on this very file to others."""
    path = tmp_path / "lock"
    with hold(path) as lock:
        lock.check()
        path.write_text("7 node3\n")
        with pytest.raises(Failure, match="was taken away"):
            write_file(tmp_path / "log.csv", b"old", lock)


def test_a_lock_is_taken_away_from_its_owner_alone(tmp_path):
    path = tmp_path / "lock"
    commit.fence(path, "sweep-1")  # nobody has it
    with hold(path) as lock:
        commit.fence(path, "")
        lock.check()
    with hold(path, owner="sweep-1") as lock:
        assert holder(path) == Holder(os.getpid(), socket.gethostname(), "sweep-1")
        commit.fence(path, "sweep-2")
        lock.check()
        commit.fence(path, "")
        lock.check()
        commit.fence(path, "sweep-1")
        assert holder(path) is None
        with hold(path, owner="sweep-1") as other:
            for write in (write_file, create_file):
                write(tmp_path / write.__name__, b"without a lock")
            write_file(tmp_path / "log.csv", b"new", other)
            with pytest.raises(Failure, match="was taken away"):
                write_file(tmp_path / "log.csv", b"old", lock)
            with pytest.raises(Failure, match="was taken away"):
                write_checkpoint(tmp_path, 7, b"old", lock=lock)
    assert (tmp_path / "log.csv").read_bytes() == b"new"
    assert not checkpoints(tmp_path)
    assert not leavings(tmp_path)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "fstat", "replace"])
def test_a_writer_frozen_anywhere_publishes_nothing_once_its_lock_is_taken(tmp_path, monkeypatch, call):
    """Before each call of its commit another process takes the run over, and ends it."""
    path, lock_path = tmp_path / "log.csv", tmp_path / "lock"
    for nth in range(3):
        real, calls = getattr(os, call), iter(range(9))

        def frozen(*arguments, real=real, calls=calls, nth=nth, **options):
            if next(calls) == nth:
                monkeypatch.undo()
                commit.fence(lock_path, "sweep")
                with hold(lock_path, owner="sweep") as theirs:
                    for partial in leavings(tmp_path):
                        commit.remove(partial)
                    write_file(path, b"new", theirs)
            return real(*arguments, **options)

        with hold(lock_path, owner="sweep") as lock:
            monkeypatch.setattr(os, call, frozen)
            with contextlib.suppress(Failure, FileNotFoundError):
                write_file(path, b"old", lock)
            monkeypatch.undo()
        assert path.read_bytes() == (b"new" if next(calls) > nth else b"old")


def test_a_lock_taken_just_as_its_file_is_deleted_is_taken_again(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *a: (monkeypatch.undo(), path.unlink(), flock(*a)))
    with hold(path) as lock:
        lock.check()


@pytest.mark.parametrize(
    ("flock", "reason"),
    [
        (lambda *_: None, "two can hold one at once"),
        (lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")), "No locks available"),
    ],
)
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, flock, reason):
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Failure) as error, hold(tmp_path / "lock"):
        pass
    assert str(error.value) == (
        f"{tmp_path}: locks do not work on its file system ({reason}); name a folder on another"
    )


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), hold(tmp_path / "lock"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


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
