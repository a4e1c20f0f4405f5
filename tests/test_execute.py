import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from degrade.execute import Crowded, Error
from degrade.execute.local import execute


def squares(n, place):
    """Yields 0, 1, 4, ..., (n-1)**2."""
    for i in range(n):
        yield i * i


def troubled(n, place):
    yield n
    if n == 1:
        raise OSError(28, "No space left on device", "/there")
    if n == 2:
        raise KeyError("two")
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 4:
        os._exit(7)


def sleepy(n, place):
    yield os.getpid()
    time.sleep(n)


def places(jobs):
    return [f"place {i}" for i in range(jobs)]


@pytest.mark.parametrize("jobs", [1, 2, 3])
@pytest.mark.parametrize("pack", [1, 2, 9])
def test_equals_the_built_in_map(jobs, pack):
    items = [3, 0, 5, 1, 2, 4]
    got = {i: [] for i in range(len(items))}
    kinds = {i: [] for i in range(len(items))}
    for event in execute(squares, items, places(jobs), pack):
        kinds[event.item].append(event.kind)
        if event.kind == "value":
            got[event.item].append(event.value)
    assert list(got.values()) == [list(squares(n, "")) for n in items]
    assert all(kind == ["started", *["value"] * n, "done"] for kind, n in zip(kinds.values(), items, strict=True))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("pack", [1, 3])
def test_a_failed_item_comes_back_whole_and_the_others_go_on(jobs, pack):
    ends = {e.item: e for e in execute(troubled, [0, 1, 2, 5], places(jobs), pack) if e.kind in ("done", "failed")}
    assert [ends[i].kind for i in range(4)] == ["done", "failed", "failed", "done"]
    assert ends[1].value.type == "OSError"
    assert str(ends[1].value) == "/there: No space left on device"
    line = Path(__file__).read_text().splitlines().index('        raise KeyError("two")') + 1
    assert str(ends[2].value) == f"KeyError: 'two' (test_execute.py, line {line}, in troubled)"
    assert 'raise KeyError("two")' in ends[2].value.traceback


def test_a_process_that_dies_fails_its_item_and_is_replaced():
    ends = {e.item: e for e in execute(troubled, [3, 4, 0, 5, 3, 6], places(2)) if e.kind in ("done", "failed")}
    assert [ends[i].kind for i in range(6)] == ["failed", "failed", "done", "done", "failed", "done"]
    assert str(ends[0].value) == "its process was killed by SIGKILL; did memory run out?"
    assert str(ends[1].value) == "its process ended with exit code 7"


here: set[int] = set()


def placed(n, place):
    """Goes on as soon as three of them are here."""
    yield place, os.getpid()
    here.add(n)
    end = time.monotonic() + 20
    while len(here) < 3 and time.monotonic() < end:
        yield None
    yield n


def test_each_place_is_a_process_and_its_items_take_turns():
    events = list(execute(placed, range(6), places(2), 3))
    at = {e.item: e.value for e in events if e.kind == "value" and isinstance(e.value, tuple)}
    assert sorted(Counter(at.values()).values()) == [3, 3]
    assert {place for place, _ in at.values()} == {"place 0", "place 1"}
    for pair in set(at.values()):
        mine = [e for e in events if at[e.item] == pair]
        assert sorted(e.kind for e in mine) == ["done"] * 3 + ["started"] * 3 + ["value"] * 6
        last = [e.item for e in mine if e.kind == "value"][-3:]
        assert sorted(last) == sorted({e.item for e in mine})  # in turns: none was through before the others
    values = [e.value for e in execute(placed, range(3), places(1), 3) if e.kind == "value"]
    assert values[:3] == [("place 0", os.getpid())] * 3
    assert sorted(values[3:]) == [0, 1, 2]


ROOM = 2
inside: set[int] = set()


def crowding(n, place):
    """Has room for two at a time; item 9 has none at all."""
    inside.add(n)
    try:
        if len(inside) > ROOM or n == 9:
            raise Crowded(f"no room at {place}")
        yield n
        yield None
        yield -n
    finally:
        inside.discard(n)


@pytest.mark.parametrize("jobs", [1, 2])
def test_where_there_is_no_room_fewer_run_at_a_time_and_none_is_lost(jobs):
    events = list(execute(crowding, [1, 2, 3, 4, 5, 6, 7], places(jobs), 4))
    ends = [e.item for e in events if e.kind in ("done", "failed")]
    assert sorted(ends) == list(range(7))
    assert {e.kind for e in events} == {"started", "value", "waiting", "done"}
    for index, n in enumerate([1, 2, 3, 4, 5, 6, 7]):
        assert [e.value for e in events if e.item == index and e.kind == "value"] == [n, -n]
    waited = [e for e in events if e.kind == "waiting"]
    assert 1 <= len(waited) <= 2 * jobs  # it learns


def test_what_has_no_room_even_alone_has_failed():
    events = list(execute(crowding, [1, 9, 2], places(1), 2))
    ends = {e.item: e for e in events if e.kind in ("done", "failed")}
    assert [ends[i].kind for i in range(3)] == ["done", "failed", "done"]
    assert str(ends[1].value) == "no room at place 0"


def test_items_start_in_the_order_given():
    started = [e.item for e in execute(squares, [2] * 6, places(2)) if e.kind == "started"]
    assert sorted(started) == list(range(6))
    assert all(item <= place + 1 for place, item in enumerate(started))  # at most one other is under way
    assert [e.item for e in execute(squares, [2] * 6, places(1)) if e.kind == "started"] == list(range(6))


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def test_closing_the_iterator_ends_the_workers():
    events = execute(sleepy, [60, 60], ["", ""])
    pids = [e.value for _, e in zip(range(4), events, strict=False) if e.kind == "value"]
    assert len(pids) == 2
    start = time.monotonic()
    events.close()
    assert time.monotonic() - start < 5
    assert not any(map(alive, pids))


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_execute import sleepy, execute\n"
        "if __name__ == '__main__':\n"
        "    for event in execute(sleepy, [60, 60], ['', '']):\n"
        "        print(event.value, flush=True) if event.kind == 'value' else None\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_an_error_is_one_line():
    where = "train.py, line 7, in update"
    assert str(Error("ValueError", "first\nsecond", where, "")) == f"ValueError: first ({where})"
    assert str(Error("MemoryError", "", where, "")) == f"MemoryError ({where})"
    assert str(Error("Failure", "the disk is gone", where, "")) == "the disk is gone"


def test_ctrl_c_is_not_lost_while_workers_start(monkeypatch):
    """It is sent as one is being started, and comes out once it was."""
    popen = multiprocessing.get_context("spawn").Process._Popen

    def interrupted(process):
        os.kill(os.getpid(), signal.SIGINT)
        return popen(process)

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "_Popen", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        list(execute(squares, [1, 1], places(2)))


def blocked(n, place):
    yield signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_do_not_see_ctrl_c():
    assert [e.value for e in execute(blocked, [0, 0], places(2)) if e.kind == "value"] == [True, True]
