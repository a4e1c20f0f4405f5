"""Jobs on an engine that is no more than processes here: what Ray and SLURM have in common."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import times

from degrade.errors import Failure
from degrade.execute import Crowded, Event, remote
from degrade.execute.remote import Job, execute_elsewhere

FORK = multiprocessing.get_context("fork")


class Processes:
    """An engine; `frozen_reply` is what it says of a job whose process is stopped."""

    def __init__(self, at_once=None):
        self.at_once = at_once
        self.started, self.machines_lost, self.most, self.waiting = [], 0, 0, False

    def submit(self, jobs):
        processes = [FORK.Process(target=job, daemon=True) for job in jobs]
        for process in processes:
            process.start()
        self.started += processes
        self.most = max(self.most, sum(process.is_alive() for process in self.started))
        return processes

    def state(self, process):
        if process.exitcode is None:
            return None
        return f"its process ended with {process.exitcode}" if process.exitcode else ""

    def is_waiting(self, process):
        return self.waiting

    def losses(self):
        return self.machines_lost

    def cancel(self, processes):
        for process in processes:
            process.kill()


class Unreachable(Processes):
    """A frozen process cannot be killed, as on a machine that does not answer."""

    def cancel(self, processes):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "BEAT", 0.1)
    monkeypatch.setattr(remote, "FLUSH", 0.02)
    monkeypatch.setattr(remote, "POLL", 0.02)
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.setattr(remote, "UNHEARD", 0.05)


def squares(n, place):
    for i in range(n):
        yield i * i


def singles(items):
    return [[i] for i in range(len(items))]


def values_of(events):
    got = defaultdict(list)
    for event in events:
        if event.kind == "value":
            got[event.item].append(event.value)
    return got


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("share", [1, 2, 9])
@pytest.mark.parametrize("pack", [1, 2])
def test_equals_the_built_in_map(tmp_path, at_once, share, pack):
    items = [3, 0, 5, 1, 2, 4]
    shares = [list(range(len(items)))[i : i + share] for i in range(0, len(items), share)]
    engine = Processes(at_once)
    events = list(execute_elsewhere(engine, squares, items, shares, tmp_path, pack=pack))
    assert [values_of(events)[i] for i in range(len(items))] == [list(squares(n, "")) for n in items]
    for i, n in enumerate(items):
        assert [event.kind for event in events if event.item == i] == ["started", *["value"] * n, "done"]
    assert len(engine.started) == len(shares)
    if at_once:
        assert engine.most <= at_once


def placed(n, place):
    yield [place, os.getpid()]


def test_a_job_decides_where_it_runs_how_many_take_turns(tmp_path):
    def two(place, items):
        assert (place, list(items)) == ("cuda:0", [7, 8, 9])
        return 2

    events = list(execute_elsewhere(Processes(), placed, [7, 8, 9], [[0, 1, 2]], tmp_path, place="cuda:0", pack=two))
    assert [(event.item, event.kind) for event in events][:4] == [
        (0, "started"),
        (1, "started"),
        (0, "value"),
        (1, "value"),
    ]
    assert len({tuple(value) for values in values_of(events).values() for value in values}) == 1


def troubled(n, place):
    yield n
    if n == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "/there")
    if n == 2:
        raise KeyError("two")
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 4:
        raise Crowded("no room")


def test_a_failed_item_comes_back_whole_and_the_others_go_on(tmp_path):
    items = [0, 1, 2, 5]
    ends = {e.item: e for e in execute_elsewhere(Processes(), troubled, items, singles(items), tmp_path)}
    assert [ends[i].kind for i in range(4)] == ["done", "failed", "failed", "done"]
    assert str(ends[1].value) == "/there: No space left on device"
    assert str(ends[2].value).startswith("KeyError: 'two' (test_remote.py, line ")
    assert 'raise KeyError("two")' in ends[2].value.traceback


def test_an_item_that_kills_its_process_each_time_fails_in_the_end_and_the_others_do_not(tmp_path):
    freed = []
    events = list(execute_elsewhere(Processes(), troubled, [0, 3, 5], [[0, 1, 2]], tmp_path, pack=1, lost=freed.append))
    kinds = Counter((event.item, event.kind) for event in events)
    assert kinds[0, "done"] == kinds[2, "done"] == kinds[1, "failed"] == 1
    assert kinds[1, "lost"] == remote.TRIES - 1
    failed = next(event for event in events if event.kind == "failed")
    assert str(failed.value).startswith("its process ended with -9 (process ")
    assert str(failed.value).endswith(f"; it was tried {remote.TRIES} times")
    assert freed.count(3) == remote.TRIES
    assert 0 not in freed  # it had ended


class Mute(Processes):
    """Jobs end at once, without a word, `mute` of them."""

    mute = 1000

    def submit(self, jobs):
        if len(self.started) >= self.mute:
            return super().submit(jobs)
        processes = [FORK.Process(target=os._exit, args=(3,), daemon=True) for _ in jobs]
        for process in processes:
            process.start()
        self.started += processes
        return processes


def test_jobs_that_end_without_a_word_are_not_started_for_ever(tmp_path, monkeypatch):
    """Nor at once again: a broken machine is idle, and would be given all that waits for the others."""
    monkeypatch.setattr(remote, "UNHEARD", 0.2)
    start = time.monotonic()
    events = list(execute_elsewhere(Mute(), squares, [1, 1], [[0, 1]], tmp_path))
    assert Counter(event.kind for event in events) == {"lost": 2 * (remote.TRIES - 1), "failed": 2}
    assert str(events[-1].value) == f"its process ended with 3; it was tried {remote.TRIES} times"
    assert time.monotonic() - start > 0.2 * sum(range(remote.TRIES - 1))


def test_those_that_end_with_their_machine_lose_no_try(tmp_path):
    class Removed(Mute):
        mute = 2 * remote.TRIES

        def losses(self):
            return min(self.mute, len(self.started))

    events = list(execute_elsewhere(Removed(), squares, [1], [[0]], tmp_path))
    assert Counter(event.kind for event in events) == {"lost": 2 * remote.TRIES, "started": 1, "value": 1, "done": 1}
    assert events[0].value == "its machine was lost before it began"


def once_troubled(item, place):
    """Killed, or frozen for good, the first time; `item` is a folder and how."""
    folder, how = item
    first = not os.path.exists(f"{folder}/{how}")
    with open(f"{folder}/{how}", "a") as file:
        file.write(f"{os.getpid()}\n")
    yield "begun"
    if first:
        time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.2)
        yield "from the stale process"
    for _ in range(3):
        time.sleep(0.05)
        yield "goes on"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("engine", [Processes, Unreachable])
def test_what_dies_or_freezes_is_started_again(tmp_path, how, engine):
    """Whoever was frozen is thawed in the end; what it has to say is not heard."""
    freed, engine, start = [], engine(), time.monotonic()
    events = []
    for event in execute_elsewhere(
        engine, once_troubled, [(str(tmp_path), how)], [[0]], tmp_path, lost=freed.append, silence=1.0
    ):
        events.append(event)
        if event.kind == "lost" and how == "SIGSTOP" and engine.started[0].is_alive():
            os.kill(engine.started[0].pid, signal.SIGCONT)
    assert [event.kind for event in events if event.kind != "value"] == ["started", "lost", "started", "done"]
    assert values_of(events)[0] == ["begun", "begun", *["goes on"] * 3]
    assert len(freed) == 1
    assert time.monotonic() - start < 20
    (lost,) = [event.value for event in events if event.kind == "lost"]
    assert ("has shown no sign of life for 1 s" in lost) == (how == "SIGSTOP")
    assert f"process {(tmp_path / how).read_text().split()[0]} on " in lost
    for process in engine.started:
        process.join(10)
        assert not process.is_alive()


def slow(seconds, place):
    yield "begun"
    time.sleep(seconds)
    yield "ended"


def test_a_job_that_is_busy_shows_signs_of_life(tmp_path):
    events = list(execute_elsewhere(Processes(), slow, [1.5], [[0]], tmp_path, silence=0.8))
    assert [event.kind for event in events] == ["started", "value", "value", "done"]


def stopped(tmp_path, silence, meanwhile):
    """What is heard of a job whose process is stopped once it has begun, as one that has left its machine is silent."""
    engine, kinds = Processes(), []
    for event in execute_elsewhere(engine, slow, [1.0], [[0]], tmp_path, silence=silence):
        if kinds == ["started"]:
            os.kill(engine.started[0].pid, signal.SIGSTOP)
            meanwhile(engine)
        kinds.append(event.kind)
    return kinds


def goes_on_after(seconds, engine):
    threading.Timer(seconds, os.kill, (engine.started[0].pid, signal.SIGCONT)).start()


def test_a_job_that_waits_in_the_queue_is_not_lost(tmp_path):
    """It is stopped, as one that was put into the queue again has ended; then it goes on."""
    since = time.monotonic()

    def wait(engine):
        engine.waiting = True
        goes_on_after(2.0, engine)

    assert stopped(tmp_path, 0.3, wait) == ["started", "value", "value", "done"]
    assert time.monotonic() - since > 2.0


def test_a_job_that_has_left_the_queue_may_take_its_time_to_begin_again(tmp_path):
    def wait(engine):
        engine.waiting = True
        threading.Timer(0.5, setattr, (engine, "waiting", False)).start()
        goes_on_after(2.0, engine)

    assert stopped(tmp_path, 0.3, wait) == ["started", "value", "value", "done"]


def test_what_keeps_the_driver_from_looking_is_no_silence_of_the_jobs(tmp_path):
    """A file server that hangs, say, stops both; the driver may go on first."""

    def hang(engine):
        goes_on_after(2.3, engine)
        time.sleep(2.0)

    assert stopped(tmp_path, 1.0, hang) == ["started", "value", "value", "done"]


class Silent(Processes):
    """The first job is lost with its machine before it can say a word."""

    def submit(self, jobs):
        if self.started:
            return super().submit(jobs)
        self.started.append(FORK.Process(target=time.sleep, args=(60,), daemon=True))
        self.started[0].start()
        return self.started[:1]


def test_what_was_under_way_to_a_machine_that_was_lost_is_started_again(tmp_path):
    engine = Silent()
    signal.signal(signal.SIGALRM, lambda *_: setattr(engine, "machines_lost", 1))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    events = list(execute_elsewhere(engine, squares, [2], [[0]], tmp_path, silence=60.0))
    assert events[0] == Event(0, "lost", "its machine was lost before it began")
    assert [event.kind for event in events[1:]] == ["started", "value", "value", "done"]
    engine.started[0].join(10)
    assert not engine.started[0].is_alive()


def test_jobs_that_never_begin_are_submitted_however_often_machines_are_lost(tmp_path):
    class Shrinking(Processes):
        def submit(self, jobs):
            if self.machines_lost == 3 * remote.TRIES:
                return super().submit(jobs)
            processes = [FORK.Process(target=time.sleep, args=(60,), daemon=True) for _ in jobs]
            for process in processes:
                process.start()
            return processes

        def losses(self):
            self.machines_lost = min(self.machines_lost + 1, 3 * remote.TRIES)
            return self.machines_lost

    events = list(execute_elsewhere(Shrinking(), squares, [2, 1], [[0], [1]], tmp_path))
    assert Counter(event.kind for event in events)["lost"] > 2 * remote.TRIES
    assert Counter((event.item, event.kind) for event in events if event.kind == "done") == {
        (0, "done"): 1,
        (1, "done"): 1,
    }


def test_an_item_whose_jobs_last_may_lose_any_number_of_them(tmp_path, monkeypatch):
    """As a run on machines that are taken away every few hours, which gets further each time."""
    monkeypatch.setattr(remote, "LASTING", 0.2)
    monkeypatch.setattr(remote, "TRIES", 2)

    def lasting(path, place):
        with open(path, "a") as file:
            file.write("tried\n")
        yield "begun"
        time.sleep(0.3)
        if Path(path).read_text().count("tried") < 5:
            os.kill(os.getpid(), signal.SIGKILL)

    kinds = Counter(e.kind for e in execute_elsewhere(Processes(), lasting, [str(tmp_path / "a")], [[0]], tmp_path))
    assert kinds == {"started": 5, "value": 5, "lost": 4, "done": 1}


class Queue(Processes):
    """Where jobs wait for a while, and then vanish before they have said anything."""

    def submit(self, jobs):
        self.started += jobs
        return [time.monotonic() for _ in jobs]

    def state(self, submitted):
        return "left the queue without a result" if time.monotonic() - submitted > 0.3 else None

    def is_waiting(self, submitted):
        return self.state(submitted) is None

    def cancel(self, handles):
        pass


def test_time_in_a_queue_is_no_time_that_a_job_has_lasted(tmp_path, monkeypatch):
    for name, value in (("LASTING", 0.2), ("TRIES", 3), ("UNHEARD", 0.1)):
        monkeypatch.setattr(remote, name, value)
    engine = Queue()
    events = list(execute_elsewhere(engine, squares, [2], [[0]], tmp_path))
    assert [event.kind for event in events] == ["lost", "lost", "failed"]
    assert "it was tried 3 times" in str(events[-1].value)
    assert len(engine.started) == 3


def noted(item, place):
    folder, n = item
    with open(f"{folder}/begun-{n}", "a") as file:
        file.write(f"{os.getpid()}\n")
    yield "begun"
    time.sleep(0.5)


def test_a_job_that_was_given_up_begins_nothing_more(tmp_path):
    """It comes back with items left that nobody has begun: these are somebody else's by now."""
    engine = Unreachable()
    items = [(str(tmp_path), n) for n in range(3)]
    for event in execute_elsewhere(engine, noted, items, [[0, 1, 2]], tmp_path, silence=1.0):
        if event.kind == "value" and len(engine.started) == 1:
            os.kill(engine.started[0].pid, signal.SIGSTOP)
        if event.kind == "lost":
            os.kill(engine.started[0].pid, signal.SIGCONT)
    engine.started[0].join(10)
    assert engine.started[0].exitcode == 1
    begun = {n: (tmp_path / f"begun-{n}").read_text().split() for n in range(3)}
    assert begun[0][0] == str(engine.started[0].pid)
    assert [pids.count(str(engine.started[0].pid)) for pids in begun.values()] == [1, 0, 0]


def test_an_engine_that_takes_no_job_for_a_while_costs_the_others_nothing(tmp_path):
    class Busy(Processes):
        refusals = 0

        def submit(self, jobs):
            if self.started and self.refusals < 3:
                self.refusals += 1
                raise Failure("sbatch: timed out")
            return super().submit(jobs)

    engine = Busy()
    item = (str(tmp_path), "SIGKILL")
    events = list(execute_elsewhere(engine, once_or_slow, [item, 2.0], [[0], [1]], tmp_path))
    assert Counter(event.kind for event in events if event.item == 1) == {"started": 1, "value": 2, "done": 1}
    assert Counter(event.kind for event in events if event.item == 0)["done"] == 1
    assert engine.refusals == 3

    class Closed(Processes):
        def submit(self, jobs):
            raise Failure("sbatch: no")

    with pytest.raises(Failure, match="sbatch: no"):
        list(execute_elsewhere(Closed(), squares, [1], [[0]], tmp_path))


def once_or_slow(item, place):
    yield from (once_troubled if isinstance(item, tuple) else slow)(item, place)


def test_closing_ends_all_jobs(tmp_path):
    engine = Processes()
    events = execute_elsewhere(engine, slow, [60, 60], singles("ab"), tmp_path)
    next(events)
    events.close()
    for process in engine.started:
        process.join(10)
        assert process.exitcode == -signal.SIGKILL


def test_a_job_called_again_says_once_more_what_is_done_which_is_not_heard_twice(tmp_path):
    """As SLURM does with a job whose time was up, whose last line may be cut off."""

    class Again(Processes):
        def submit(self, jobs):
            (job,) = jobs
            job()
            with job.events.open("ab") as file:
                file.write(b'[0, "val')
            return super().submit(jobs)

    events = list(execute_elsewhere(Again(), squares, [2, 1], [[0, 1]], tmp_path))
    assert [event.item for event in events if event.kind == "done"] == [0, 1]
    assert values_of(events) == {0: [0, 1], 1: [0]}


def test_lines_that_a_full_disk_has_cut_are_completed(tmp_path, monkeypatch):
    real, calls = os.write, Counter()

    def full(descriptor, data):
        calls["write"] += 1
        if calls["write"] % 3 == 1:
            return real(descriptor, data[:5])
        if calls["write"] % 3 == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    path = tmp_path / "events"
    path.touch()
    with remote._writing(path) as write:
        monkeypatch.setattr(os, "write", full)
        for i in range(40):
            write(i, "value", "x" * i)
            time.sleep(0.01)
        time.sleep(0.2)
        monkeypatch.undo()
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert lines == [[i, "value", "x" * i] for i in range(40)]
    assert calls["write"] > 10


@pytest.mark.parametrize("name", ["events", "gone/events"])
def test_a_job_without_its_file_does_nothing(tmp_path, name):
    """It was given up before it began, or does not see the folder."""
    with pytest.raises(FileNotFoundError):
        Job(noted, [(0, (str(tmp_path), 0))], "cpu", 1, tmp_path / name)()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise
def test_killed_again_and_again_every_item_ends(tmp_path, monkeypatch):
    """Jobs are killed at seeded times; each starts anew with what it leaves."""
    import random

    monkeypatch.setattr(remote, "TRIES", 100)
    chance = random.Random(9)
    engine, ended, killed = Processes(2), Counter(), 0
    items = [0.05 * (i % 4) for i in range(4 * times(20))]
    for event in execute_elsewhere(engine, slow, items, singles(items), tmp_path):
        ended[event.item] += event.kind == "done"
        assert event.kind != "failed", event
        if event.kind == "value" and chance.random() < 0.15:
            alive = [process for process in engine.started if process.is_alive()]
            if alive:
                chance.choice(alive).kill()
                killed += 1
    assert ended == Counter(dict.fromkeys(range(len(items)), 1))
    assert killed
