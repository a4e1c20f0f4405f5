import json
import subprocess
import sys

import pytest
from conftest import smoke, write_run

import degrade
from degrade import commit, store
from degrade.errors import Failure
from degrade.store import Run, Study, find_studies


class TestStatus:
    def status(self, run):
        return Run.open(run.study, run.folder).status

    def test_missing_interrupted_done(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        assert run.status == "missing"
        commit.make_folder(run.folder / store.CHECKPOINTS)
        commit.write_checkpoint(run.folder / store.CHECKPOINTS, 3, b"state")
        assert self.status(run) == "interrupted"
        assert write_run(tmp_path / "study", smoke(), [(0.9, 0.9), (0.8, 0.8)]).status == "done"

    def test_failed(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        (run.folder / store.ERROR).write_text("Traceback\n  ...\nValueError: why\n")
        assert self.status(run) == "failed"
        assert run.error == "ValueError: why"

    def test_diverged(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [(0.9, 0.9), (0.9, 0.9)], loss=float("nan"))
        assert run.status == "diverged"

    def test_running_only_while_the_lock_is_held(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        with commit.hold(run.folder / store.LOCK):
            assert self.status(run) == "running"
        assert self.status(run) == "missing"  # a killed run leaves the file, not the lock
        done = write_run(tmp_path / "study", smoke(seed=1), [(0.5, 0.5)])
        with commit.hold(done.folder / store.LOCK):  # by a sweep that looks whether there is something to do
            assert self.status(done) == "done"


class TestAtAGlance:
    def test_a_run_is_as_it_is_at_second_sight(self, tmp_path):
        for seed, rows in enumerate(([], [(0.5, 0.5)], [(0.75, 0.5), (0.5, 0.25), (0.25, 0.125)])):
            write_run(tmp_path / "study", smoke(seed=seed), rows)
        write_run(tmp_path / "study", smoke(seed=3), [(0.5, 0.5)], loss=float("nan"))
        (studies, damaged), (at_a_glance, _) = find_studies(tmp_path), find_studies(tmp_path, glance=True)
        assert damaged == []
        assert [run.record() for run in at_a_glance[0].runs] == [run.record() for run in studies[0].runs]
        assert [len(run.epochs) for run in studies[0].runs] == [0, 1, 3, 1]
        assert [len(run.epochs) for run in at_a_glance[0].runs] == [0, 1, 1, 1]

    def test_damage_that_is_seen_is_said_in_the_same_words(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [(0.75, 0.5), (0.5, 0.25)])
        (run.folder / store.LOG).write_bytes((run.folder / store.LOG).read_bytes()[:-1])
        (_, damaged), (_, at_a_glance) = find_studies(tmp_path), find_studies(tmp_path, glance=True)
        assert "the last row is cut off" in damaged[0]
        assert at_a_glance == damaged


class TestDamage:
    def test_an_edited_configuration_is_refused(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        path = run.folder / store.CONFIG
        path.write_text(path.read_text().replace('"lr": 0.02', '"lr": 0.2'))
        with pytest.raises(Failure, match=r"config.json was edited, or its folder renamed: it belongs to plain-8-s0-"):
            Run.open("study", run.folder)

    @pytest.mark.parametrize(
        "text", ["{", "[]", "[" * 100_000, "{}", '{"block": "plain", "depth": 8, "seed": 0, "x": 1}']
    )
    def test_an_unreadable_configuration_names_its_file(self, tmp_path, text):
        run = write_run(tmp_path / "study", smoke(), [])
        (run.folder / store.CONFIG).write_text(text)
        with pytest.raises(Failure, match=store.CONFIG):
            Run.open("study", run.folder)

    def test_a_run_of_another_study_is_left_out(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        other = write_run(tmp_path / "other", smoke(lr=0.5), [])
        other.folder.rename(run.folder.parent / other.folder.name)
        study = Study.open(tmp_path / "study")
        assert [there.config for there in study.runs] == [smoke()]
        (line,) = study.damaged
        assert "lr 0.02 there, 0.5 here" in line

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_a_damaged_log_is_left_out_and_said(self, tmp_path, checkpoint):
        run = write_run(tmp_path / "study", smoke(), [(0.5, 0.5)])
        write_run(tmp_path / "study", smoke(seed=1), [(0.25, 0.5)])
        (run.folder / store.LOG).write_text("loss,step\n1,2\n")
        if checkpoint:
            commit.make_folder(run.folder / store.CHECKPOINTS)
            commit.write_checkpoint(run.folder / store.CHECKPOINTS, 3, b"state")
        says = "a sweep writes it anew from its checkpoint" if checkpoint else "restore it, or delete it"
        with pytest.warns(UserWarning, match=rf"log.csv: the header is not degrade's: 'loss,step'; {says}"):
            assert degrade.load(tmp_path)["train_error"].tolist() == [0.25]
        status = "interrupted" if checkpoint else "failed"
        assert [there.status for there in Study.open(tmp_path / "study").runs] == [status, "done"]

    def test_an_unreadable_log_is_left_out_and_said(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [])
        (run.folder / store.LOG).mkdir()
        with pytest.warns(UserWarning, match=r"log.csv: Is a directory"):
            assert degrade.load(tmp_path).empty

    def test_a_run_without_its_configuration_is_not_passed_over(self, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [(0.5, 0.5)])
        (run.folder / store.CONFIG).unlink()
        with pytest.warns(UserWarning, match=r"has a log\.csv but no config\.json"):
            degrade.load(tmp_path)

    def test_a_study_file_of_something_else(self, tmp_path):
        (tmp_path / "study.json").write_text('{"name": "optuna"}')
        studies, (line,) = find_studies(tmp_path)
        assert studies == []
        assert line.endswith("study.json is not of a study of degrade's")


def test_results_of_an_older_version_stay_readable(tmp_path):
    """A field added later has its default for older runs, and their ids stay what they were."""
    values = smoke().as_dict()
    del values["precision"], values["split_seed"]
    folder = tmp_path / "study" / store.run_id(values)
    folder.mkdir(parents=True)
    (folder / store.CONFIG).write_text(json.dumps(values))
    shared = {name: value for name, value in values.items() if name not in ("block", "depth", "seed")}
    (tmp_path / "study" / store.STUDY).write_text(json.dumps({"protocol": "smoke", "shared": shared}))
    study = Study.open(tmp_path / "study")
    (run,) = study.runs
    assert run.config == smoke()
    assert [there.folder for there in study.find([smoke()])] == [folder]  # the same run, not another
    study.create([smoke(), smoke(seed=1)])
    assert {there.folder.name for there in Study.open(tmp_path / "study").runs} == {folder.name, smoke(seed=1).run_id}


def test_a_study_refuses_another_protocol_with_the_difference(tmp_path):
    write_run(tmp_path / "study", smoke(), [])
    study = Study.open(tmp_path / "study")
    study.check([smoke("residual", depth=20, seed=3)])
    with pytest.raises(ValueError) as error:
        study.check([smoke(lr=0.5, width=8)])
    assert "lr 0.02 there, 0.5 here; width 4 there, 8 here" in str(error.value)
    assert "--study NAME" in str(error.value)


def test_a_study_made_meanwhile_with_another_protocol_is_not_joined(tmp_path):
    """Two sweeps start at once: both saw no study.json, and one was faster."""
    slower = Study(tmp_path / "study", "study", "smoke", smoke(lr=0.5).shared())
    write_run(tmp_path / "study", smoke(), [])
    with pytest.raises(ValueError, match=r"lr 0\.02 there, 0\.5 here"):
        slower.create([smoke(lr=0.5)])
    assert [run.config for run in Study.open(tmp_path / "study").runs] == [smoke()]


def test_studies_of_one_name_are_told_apart_by_where_they_are(tmp_path):
    write_run(tmp_path / "a" / "s", smoke(), [(0.5, 0.5)])
    write_run(tmp_path / "b" / "s", smoke(depth=14, lr=0.5), [(0.9, 0.9)])
    assert [study.name for study in find_studies(tmp_path)[0]] == ["a/s", "b/s"]
    assert find_studies(tmp_path / "a" / "s")[0][0].name == "s"
    assert set(degrade.load(tmp_path)["study"]) == {"a/s", "b/s"}


def test_load_gives_a_row_an_epoch(tmp_path):
    write_run(tmp_path / "a", smoke(), [(0.9, 0.8), (0.7, 0.6)])
    write_run(tmp_path / "a", smoke("residual"), [(0.5, 0.4)])
    write_run(tmp_path / "deep" / "b", smoke(lr=0.1), [(0.3, 0.2)])
    epochs = degrade.load(tmp_path)
    assert list(epochs.groupby("study").size().items()) == [("a", 3), ("deep/b", 1)]
    first = epochs[epochs["id"] == smoke().run_id]
    assert first["train_error"].tolist() == [0.9, 0.7]
    assert first["test_error"].tolist() == [0.8, 0.6]
    assert first["epoch"].tolist() == [1, 2]
    assert first["step"].tolist() == [12, 24]
    assert set(first["status"]) == {"done"}
    assert first["lr"].tolist() == [0.02, 0.0002]  # the epoch's own
    for column in ("protocol", "dataset", "block", "depth", "seed", "width", "steps"):
        assert column in epochs


@pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p, lambda p: (p / "f", (p / "f").touch())[0]])
def test_no_studies(tmp_path, make):
    with pytest.raises(ValueError, match=r"does not exist|holds no study|is not a folder"):
        degrade.load(make(tmp_path))


def test_records_are_what_show_prints(tmp_path):
    run = write_run(tmp_path / "a", smoke(), [(0.9, 0.8), (0.7, 0.6)])
    assert run.record() == {
        "id": smoke().run_id,
        "study": "a",
        "block": "plain",
        "depth": 8,
        "seed": 0,
        "status": "done",
        "imported": False,
        "epoch": 2,
        "step": 24,
        "train_error": 0.7,
        "test_error": 0.6,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="one process reads them elsewhere")
@pytest.mark.parametrize("dies", ["no process dies", "each process dies at its third log"])
def test_many_logs_are_read_in_several_processes_as_in_one(tmp_path, dies):
    for seed in range(9):
        write_run(tmp_path / "s", smoke(seed=seed), [(0.9, 0.9), (0.1 * seed, 0.5)])
    damaged = tmp_path / "s" / smoke(seed=4).run_id / store.LOG
    damaged.write_text(damaged.read_text()[:-5])
    one, lines = find_studies(tmp_path)
    assert str(damaged) in lines[0]
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from degrade import store\n"
        "store.MANY, read, mine, theirs = 9, store.to_columns, os.getpid(), []\n"
        "def to_columns(*values, **named):\n"
        "    theirs.append(1)\n"
        f"    if {dies != 'no process dies'} and os.getpid() != mine and len(theirs) > 2: os._exit(1)\n"
        f"    Path({str(tmp_path)!r}, f'read-{{os.getpid()}}').touch()\n"
        "    return read(*values, **named)\n"
        "store.to_columns = to_columns\n"
        f"studies, damaged = store.find_studies(Path({str(tmp_path)!r}))\n"
        "print([(run.folder.name, run.status, run.epochs) for run in studies[0].runs], damaged, mine)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, _, mine = result.stdout.rstrip().rpartition(" ")
    assert found == f"{[(run.folder.name, run.status, run.epochs) for run in one[0].runs]} {lines}"
    here = f"read-{mine}" in [path.name for path in tmp_path.glob("read-*")]
    assert here == (dies != "no process dies")
    assert len(list(tmp_path.glob("read-*"))) > here
