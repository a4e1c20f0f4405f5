"""`degrade check`: every file deleted, truncated, junk, edited, foreign; what is said, what is mended, what is left."""

import errno
import os
import random
import re
import shutil
from itertools import pairwise

import pytest
from conftest import micro

from degrade import commit, store
from degrade.check import check
from degrade.config import RunConfig, run_id
from degrade.provenance import Clock, Provenance
from degrade.store import Run, Study, to_json
from degrade.sweep import Task, _commit, train_run
from degrade.train import Training, load_splits, read_state

RUNS = {"done": micro(), "begun": micro("residual")}


def begin(study, config, data_dir, epochs=2):
    """A run that was interrupted after that many of its three epochs, each of which was committed."""
    run = Run(study.name, study.folder / config.run_id, config)
    study.create([config])
    commit.make_folder(run.folder / store.CHECKPOINTS)
    Provenance(run.folder / store.ENVIRONMENT, "cpu", 1, False)
    training = Training(config, load_splits(config, data_dir, "cpu"))
    clock = Clock(run.folder / store.TIMING)
    clock.start_up(0, 0)
    with commit.hold(run.folder / store.LOCK) as lock:
        for epoch in filter(None, training):
            clock.end_epoch(epoch)
            _commit(lock, config, training.step, training.epochs, training.snapshot(), clock.csv())
            if epoch.epoch == epochs:
                break
    return run


def finish(run, data_dir):
    for _ in train_run(Task(run.study, run.folder, run.config, data_dir, 1, commit_seconds=1e9), "cpu"):
        pass


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """A run that is done, with checkpoints of steps 4 and 6, and one that was interrupted, with those of 2 and 4."""
    folder = tmp_path_factory.mktemp("made") / "study"
    study = Study(folder, "study", "demo", micro().shared())
    finish(begin(study, RUNS["done"], data_dir), data_dir)
    begin(study, RUNS["begun"], data_dir)
    return folder


@pytest.fixture
def study(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results" / "study")


def files(folder):
    """Every file's bytes, but those of locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != store.LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def snapshot(folder):
    """Whatever changes when something is written."""
    stats = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return files(folder), {path: (s.st_mtime_ns, s.st_ino, s.st_size) for path, s in stats.items()}


def find(study, name):
    """`study.json`, `done log.csv`, `begun newest`, ..."""
    run, _, file = name.rpartition(" ")
    folder = study / RUNS[run].run_id if run else study
    if file in ("newest", "older"):
        return commit.checkpoints(folder / store.CHECKPOINTS)[file == "older"]
    return folder / file


def deleted(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def junk(path):
    path.write_bytes(b"\xff\x00junk")


def edited(path):
    """One value is another, in bytes of the same form."""
    if path.suffix == ".pt":  # a bit of a weight, which the hash alone tells
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        read_state(bytes(data))
        path.write_bytes(data)
        return
    pattern, value = {
        store.STUDY: (rb'"lr": 0.02', b'"lr": 0.05'),
        store.CONFIG: (rb'"seed": 0', b'"seed": 1'),
        store.LOG: (rb"2\.\d+", b"1.5"),
        store.ENVIRONMENT: (rb'"threads": 1', b'"threads": "1"'),
        store.TIMING: (rb"\n2,", b"\n2.0,"),
    }[path.name]
    data, count = re.subn(pattern, value, path.read_bytes(), count=1)
    assert count
    path.write_bytes(data)


def foreign(path):
    """Another study's, another run's, another program's."""
    data = {
        store.STUDY: to_json({"protocol": "smoke", "shared": micro(lr=0.5).shared()}),
        store.CONFIG: to_json(micro(seed=9).as_dict()),
        store.LOG: b"step,loss\n1,2\n",
        store.ENVIRONMENT: b'["optuna"]',
        store.TIMING: b"epoch,seconds\n1,2\n",
    }.get(path.name)
    path.write_bytes(data or newest_of_the_other(path).read_bytes())


def newest_of_the_other(path):
    """Checkpoint, of the other run than this checkpoint's."""
    (other,) = {run.run_id for run in RUNS.values()} - {path.parents[1].name}
    return commit.checkpoints(path.parents[2] / other / store.CHECKPOINTS)[0]


HOWS = (deleted, truncated, junk, edited, foreign)
JSON, BYTES = "is not JSON: ", "its bytes are not those it was written with"
LATER, HEADER = f"{BYTES}; a later one is sound", "the header is not degrade's"
EDITED = "was edited, or its folder renamed: it belongs to "
SAID = {
    store.STUDY: ("is missing", JSON, JSON, "is not of its runs: lr 0.05 there, 0.02", "is not of its runs: lr 0.5"),
    store.CONFIG: ("is missing", JSON, JSON, EDITED, EDITED + "plain-8-s9-"),
    store.LOG: ("is missing", "the last row is cut off", HEADER, "row 1 is not that of its checkpoint", HEADER),
    store.ENVIRONMENT: ("is missing", JSON, JSON, "does not say how many threads there were", "is not a JSON object"),
    store.TIMING: ("", "row", HEADER, "row 3 is not degrade's", HEADER),  # a kill may come before it is there
    "newest": ("", BYTES, BYTES, BYTES, BYTES),
    "older": ("", LATER, LATER, LATER, LATER),
}
MENDED = (store.STUDY, store.CONFIG, store.LOG)  # what can be derived from other files
PLACES = [store.STUDY, *(f"done {name}" for name in SAID if name != store.STUDY)]
PLACES += [f"begun {name}" for name in (store.CONFIG, store.LOG, "newest")]
CASES = [(name, how, says) for name in PLACES for how, says in zip(HOWS, SAID[name.split()[-1]], strict=True)]


def said(result):
    """By file."""
    lines = result.stdout.splitlines()
    return {path: line.strip() for path, line in pairwise(lines) if line.startswith("  ")}


@pytest.mark.parametrize(("name", "how", "says"), CASES, ids=[f"{how.__name__}: {name}" for name, how, _ in CASES])
def test_a_damaged_file_is_named_and_mended_if_it_can_be_derived(cli, study, made, name, how, says):
    path, kind = find(study, name), name.split()[-1]
    how(path)
    if kind == "newest" and not says:  # the log is ahead of the checkpoint that is left
        path, says = path.parents[1] / store.LOG, "has "
    damaged = snapshot(study)

    result = cli("check", study.parent)
    assert result.exit_code == (1 if says else 0), result
    if says:
        assert said(result)[str(path)].startswith(says)
        assert ("; can be restored from " in result.stdout) is (kind in MENDED)
        assert result.stderr.startswith("degrade: ")
        assert result.stderr.count("\n") == 1
    assert snapshot(study) == damaged

    result = cli("check", study.parent, "--repair")
    assert result.exit_code == (1 if says and kind not in MENDED else 0), result
    if kind in MENDED:
        assert "; restored from " in result.stdout
        assert files(study) == files(made)
    else:
        assert snapshot(study) == damaged

    assert cli("check", study.parent).exit_code == result.exit_code


def test_what_a_user_sees(cli, study, monkeypatch):
    edited(find(study, "done log.csv"))
    junk(find(study, "begun timing.csv"))
    monkeypatch.chdir(study.parent)
    done, begun = (run.run_id for run in RUNS.values())
    result = cli("check", "study")
    assert result.stdout == (
        "study: 2 runs (1 done, 1 interrupted)\n"
        f"study/{done}/log.csv\n"
        "  row 1 is not that of its checkpoint; can be restored from its checkpoint\n"
        f"study/{begun}/timing.csv\n"
        "  the header is not degrade's\n"
    )
    assert result.stderr == (
        "degrade: 2 problems; --repair mends 1; otherwise restore the file, or delete it and sweep again\n"
    )
    result = cli("check", "study", "--repair")
    assert "  row 1 is not that of its checkpoint; restored from its checkpoint\n" in result.stdout
    assert result.stderr == "degrade: 1 problem; restore the file, or delete it and sweep again\n"


def unchanged(*_):
    pass


def diverged(study, data_dir):
    run = begin(Study(study.parent / "lost", "lost", "demo", micro(lr=1e30).shared()), micro(lr=1e30), data_dir)
    assert Run.open("", run.folder).status == "diverged"


def failed(study, _):
    (study / RUNS["begun"].run_id / store.ERROR).write_text("ValueError: why\n")


def from_git(study, _=None):
    for run in RUNS.values():
        shutil.rmtree(study / run.run_id / store.CHECKPOINTS)
        (study / run.run_id / store.LOCK).unlink()


def not_begun(study, _):
    Study.open(study).create([micro(seed=5)])
    (study / "plain-8-s6-00000000").mkdir()  # by a sweep that was killed at once


def amid_the_first_epoch(study, data_dir):
    """Where it was interrupted: it has a checkpoint, and no row yet."""
    run = begin(Study.open(study), micro(seed=7), data_dir, 1)
    for path in (run.folder / store.LOG, *commit.checkpoints(run.folder / store.CHECKPOINTS)):
        path.unlink()
    training = Training(run.config, load_splits(run.config, data_dir, "cpu"))
    training.update()
    commit.write_checkpoint(run.folder / store.CHECKPOINTS, training.step, training.state())


def drawn(study, _):
    (study / "figures").mkdir()
    (study / "figures" / ".curves.png.ab.partial").touch()  # being written


def older_version(study, data_dir):
    """Its configurations lack fields that were added later."""
    values = micro().as_dict()
    values.pop("precision")
    folder = study.parent / "old" / run_id(values)
    shutil.copytree(study / micro().run_id, folder)
    (folder / store.CONFIG).write_bytes(to_json(values))
    shared = {name: value for name, value in values.items() if name not in ("block", "depth", "seed")}
    (study.parent / "old" / store.STUDY).write_bytes(to_json({"protocol": "demo", "shared": shared}))


SOUND = (unchanged, diverged, failed, from_git, not_begun, amid_the_first_epoch, drawn, older_version)


@pytest.mark.parametrize("what", SOUND, ids=lambda what: what.__name__)
@pytest.mark.parametrize("repair", [[], ["--repair"]])
def test_of_sound_results_nothing_is_written(cli, study, data_dir, what, repair):
    what(study, data_dir)
    before = snapshot(study.parent)
    for root in (study, study.parent):
        result = cli("check", root, *repair)
        assert result.exit_code == 0, result
        assert result.stderr == ""
        assert f"{study}: " in result.stdout
        assert result.stdout.count("nothing wrong") == len([*root.rglob(store.STUDY)])
    assert snapshot(study.parent) == before


@pytest.mark.parametrize("how", HOWS)
def test_a_configuration_from_git_is_restored_from_the_study(cli, study, made, how):
    """Its run id proves that it is the one."""
    from_git(study)
    undisturbed = files(study)
    how(find(study, "done config.json"))
    assert "; restored from study.json\n" in cli("check", study, "--repair").stdout
    assert files(study) == undisturbed


@pytest.mark.parametrize("how", ["the folder is renamed", "the study is edited", "both runs are lost"])
def test_a_configuration_that_no_run_id_proves_is_not_guessed(cli, study, how):
    from_git(study)
    path = find(study, "done config.json")
    path.unlink()
    if how == "the folder is renamed":
        path = path.parent.rename(study / "plain-8-s0-00000000") / path.name
    elif how == "the study is edited":
        shutil.rmtree(study / RUNS["begun"].run_id)
        edited(study / store.STUDY)
    else:
        find(study, "begun config.json").unlink()
        (study / store.STUDY).unlink()
    before = snapshot(study)
    result = cli("check", study, "--repair")
    assert result.exit_code == 1
    assert said(result)[str(path)] == "is missing"
    assert snapshot(study) == before


@pytest.mark.parametrize("how", HOWS)
def test_a_log_from_git_is_not_guessed(cli, study, how):
    """What has no checkpoint can be held against its configuration only."""
    from_git(study)
    path = find(study, "done log.csv")
    if how is edited:
        path.write_text(path.read_text().replace(",4,0.002,", ",4,0.02,"))
    else:
        how(path)
    before = snapshot(study)
    result = cli("check", study, "--repair")
    assert result.exit_code == 1
    says = "row 2 does not fit config.json" if how is edited else SAID[store.LOG][HOWS.index(how)]
    assert said(result)[str(path)].startswith(says)
    assert snapshot(study) == before


def test_a_log_from_git_that_was_written_by_another_program_is_told(cli, study):
    from_git(study)
    path = find(study, "done log.csv")
    path.write_text(path.read_text().replace("\n", "\r\n"))
    assert said(cli("check", study))[str(path)] == "there are carriage returns in it; git's core.autocrlf adds them"


@pytest.mark.parametrize("name", [store.CONFIG, store.LOG])
def test_the_results_of_an_older_version_are_mended_in_its_own_words(cli, study, data_dir, name):
    older_version(study, data_dir)
    before = files(study.parent)
    (path,) = (study.parent / "old").glob(f"*/{name}")
    path.unlink()
    assert cli("check", study.parent, "--repair").exit_code == 0
    assert files(study.parent) == before


def test_a_study_of_which_only_checkpoints_are_left_is_whole_after_one_repair(cli, study, made):
    for name in (store.STUDY, "done config.json", "done log.csv", "begun config.json", "begun log.csv"):
        find(study, name).unlink()
    assert cli("check", study.parent).exit_code == 1
    assert cli("check", study.parent, "--repair").exit_code == 0
    assert files(study) == files(made)


def test_a_lost_study_and_a_lost_configuration_from_git_are_restored_from_the_other_runs(cli, study):
    from_git(study)
    undisturbed = files(study)
    for name in (store.STUDY, "done config.json"):
        find(study, name).unlink()
    assert cli("check", study, "--repair").exit_code == 0
    assert files(study) == undisturbed


def test_what_a_kill_leaves_is_tidied_up(cli, study, made):
    """Between a checkpoint and its log; and amid every file."""
    log = find(study, "begun log.csv")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    for name in ("begun .log.csv.ab.partial", "begun .000000004-ab.cd.partial", ".study.json.ab.partial"):
        path = find(study, name)
        (path.parent / store.CHECKPOINTS / path.name if ".0" in name else path).write_text("half")
    os.utime(study / ".study.json.ab.partial", (0, 0))
    result = cli("check", study)
    assert said(result)[str(log)] == (
        "lacks the last 1 of its checkpoint's 2 rows; can be restored from its checkpoint"
    )
    assert result.stdout.count("left half-written by a process that was killed; can be removed") == 3
    assert cli("check", study, "--repair").exit_code == 0
    assert files(study) == files(made)


def test_rows_that_no_checkpoint_has_are_not_thrown_away(cli, study):
    """The newest checkpoint is lost, and the log is damaged in a row that an older one knows."""
    find(study, "begun newest").unlink()
    log = find(study, "begun log.csv")
    edited(log)
    before = snapshot(study)
    result = cli("check", study, "--repair")
    assert result.exit_code == 1
    assert said(result)[str(log)] == ("row 1 is not that of its checkpoint; delete it, and a sweep goes on from step 2")
    assert snapshot(study) == before


def test_rows_after_the_end_of_a_run_are_removed(cli, study, made):
    log = find(study, "done log.csv")
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    assert said(cli("check", study))[str(log)].startswith("row 4 is epoch 3; can be restored")
    assert cli("check", study, "--repair").exit_code == 0
    assert files(study) == files(made)


@pytest.mark.parametrize("alone", [False, True])
def test_a_checkpoint_of_another_run_is_named_and_stays(cli, study, alone):
    mine = find(study, "done newest")
    there = newest_of_the_other(mine)
    path = mine.parent / there.name
    shutil.copy(there, path)
    if alone:
        mine.unlink()
    before = files(study)
    result = cli("check", study, "--repair")
    assert result.exit_code == 1
    says = f"is of {RUNS['begun'].run_id}"
    assert said(result)[str(path)].startswith(says)
    assert files(study) == before


def test_a_run_of_another_study_is_named_with_the_difference(cli, study, data_dir):
    other = begin(Study(study.parent / "other", "other", "demo", micro(lr=0.5).shared()), micro(lr=0.5), data_dir)
    moved = shutil.move(other.folder, study / other.config.run_id)
    before = files(study)
    result = cli("check", study, "--repair")
    assert said(result)[str(moved / store.CONFIG)] == "is of another study: lr 0.02 there, 0.5 here"
    assert files(study) == before


def test_a_run_of_the_other_family_of_nets_is_named_and_hides_no_other(cli, study):
    config = RunConfig(block="plain", depth=18, seed=0, dataset="imagenet:x:100+10:2:64:0123456789ab")
    other = Study(study.parent / "other", "other", "paper", config.shared())
    other.create([config])
    moved = shutil.copytree(find(study, "done config.json").parent, other.folder / RUNS["done"].run_id)
    result = cli("check", study.parent)
    assert result.exit_code == 1
    assert said(result)[str(moved / store.CONFIG)].startswith("is of another study: ")
    assert f"{study}: 2 runs" in result.stdout


def test_a_run_under_way_is_left_alone_and_counted(cli, study):
    for name in ("done log.csv", "done config.json", "begun log.csv"):
        edited(find(study, name))
    before = files(study)
    with commit.hold(find(study, "done lock")):
        assert "2 runs (1 interrupted, 1 running)" in cli("check", study).stdout
        assert cli("check", study, "--repair").exit_code == 0
        assert "2 runs (1 interrupted, 1 running), nothing wrong" in cli("check", study).stdout
    assert {name for name, data in files(study).items() if data != before[name]} == {
        f"{RUNS['begun'].run_id}/{store.LOG}"
    }
    assert cli("check", study).exit_code == 1


@pytest.mark.parametrize("repair", [False, True])
def test_a_run_that_is_begun_while_it_is_looked_at_is_left_alone(study, monkeypatch, repair):
    """Its files change meanwhile, so that what was seen of them means nothing."""
    log, holder = find(study, "done log.csv"), commit.holder
    edited(log)

    def free_at_first(_):
        monkeypatch.setattr(commit, "holder", holder)

    shutil.rmtree(study / RUNS["begun"].run_id)
    before = files(study)
    with commit.hold(log.parent / store.LOCK):
        monkeypatch.setattr(commit, "holder", free_at_first)
        (checked,) = check(study, repair=repair)
    assert checked.statuses["running"] == 1
    assert not checked.findings
    assert files(study) == before


def test_its_lock_is_held_while_a_run_is_mended(cli, study, monkeypatch):
    edited(find(study, "done log.csv"))
    write, held = commit.write_file, []

    def look(path, data):
        held.append(commit.holder(path.parent / store.LOCK))
        write(path, data)

    monkeypatch.setattr(commit, "write_file", look)
    assert cli("check", study, "--repair").exit_code == 0
    assert [holder.pid for holder in held] == [os.getpid()]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", [store.STUDY, "done config.json", "done log.csv"])
def test_a_full_disk_ends_in_one_line_and_the_old_files_stay(cli, study, monkeypatch, call, name):
    path = find(study, name)
    edited(path)
    before = files(study)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    result = cli("check", study, "--repair")
    assert result.exit_code == 1
    assert result.stderr == f"degrade: {path}: No space left on device\n"
    assert files(study) == before
    monkeypatch.undo()
    assert cli("check", study, "--repair").exit_code == 0


@pytest.mark.parametrize("seed", range(15))
def test_whatever_is_damaged_one_repair_does_all_that_can_be_done_and_nothing_else(cli, study, made, seed):
    """Each file is afterwards as it was, or as it was undisturbed, or a log as far as a checkpoint goes."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        from_git(study)
    whole = files(made)
    for name, how, _ in rng.sample(CASES, 4):
        try:
            how(find(study, name))
        except (FileNotFoundError, IndexError, AssertionError):  # that is damaged already
            continue
    damaged = files(study)
    cli("check", study.parent)
    assert files(study) == damaged
    code = cli("check", study.parent, "--repair").exit_code
    for name, data in (there := files(study)).items():
        assert data in (damaged.get(name), whole[name]) or (name.endswith(store.LOG) and whole[name].startswith(data))
    assert there.keys() >= damaged.keys()
    after = snapshot(study.parent)
    result = cli("check", study.parent)
    assert result.exit_code == code
    assert "can be" not in result.stdout
    assert cli("check", study.parent, "--repair").exit_code == code
    assert snapshot(study.parent) == after
