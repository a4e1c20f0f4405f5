"""Every promise has a test that can fail: each of these changes to the code turns one red. `make mutations`.

A copy of the tree is changed in one place, and the tests named are run there. Exit code 1 if any stays green.
Words on the command line choose the mutations whose description has one of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT = 200  # seconds; a test that hangs is red


class Mutation(NamedTuple):
    """`old` stands in `file` exactly once."""

    promise: str
    what: str
    file: str
    old: str
    new: str
    tests: str


CRASH, SWEEP, BYTES = "tests/test_crash.py", "tests/test_sweep.py", "tests/test_same_bytes.py"
DAMAGE, REMOTE, RAY = "tests/test_damage.py", "tests/test_remote.py", "tests/test_ray.py"
CHECK, LINES, DATA = "tests/test_check.py", "tests/test_command_lines.py", "tests/test_hostile_data.py"
PROCESSES, COMMIT, EXECUTE = "tests/test_processes.py", "tests/test_commit.py", "tests/test_execute.py"

MUTATIONS = [
    Mutation(
        "1",
        "the log is written before the checkpoint",
        "degrade/sweep.py",
        "    commit.write_checkpoint(folder / store.CHECKPOINTS, step, state(), epochs=len(epochs), lock=lock)\n"
        "    _write_log(lock, config, epochs)\n",
        "    _write_log(lock, config, epochs)\n"
        "    commit.write_checkpoint(folder / store.CHECKPOINTS, step, state(), epochs=len(epochs), lock=lock)\n",
        f"{CRASH}::test_killed_at_any_sync_point",
    ),
    Mutation(
        "1",
        "files are written in place",
        "degrade/commit.py",
        '    partial = path.with_name(f".{path.name[:20]}.{secrets.token_hex(4)}.partial")\n    try:\n',
        "    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)\n    os.write(descriptor, data)\n"
        "    os.fsync(descriptor)\n    os.close(descriptor)\n    return\n    partial = path\n    try:\n",
        f"{COMMIT}::test_a_failing_disk_leaves_the_old_file_and_no_other",
    ),
    Mutation(
        "1",
        "a run goes on without its running count",
        "degrade/train.py",
        "            self.wrong.fill_(there.wrong)\n",
        "",
        f"{CRASH}::test_killed_at_any_sync_point",
    ),
    Mutation(
        "2",
        "nothing is committed before the end",
        "degrade/sweep.py",
        "            if now - committed >= interval and",
        "            if False and",
        f"{CRASH}::test_ten_kills_in_a_row_cost_an_epoch_each_at_most",
    ),
    Mutation(
        "3",
        "old checkpoints are dropped before the new one is there",
        "degrade/commit.py",
        "    path = keep_checkpoint(folder, step, data, epochs=epochs, lock=lock)\n    older =",
        "    for other in checkpoints(folder):\n        remove(other)\n"
        "    path = keep_checkpoint(folder, step, data, epochs=epochs, lock=lock)\n    older =",
        f"{CRASH}::test_any_call_may_fail",
    ),
    Mutation(
        "3",
        "errors of the thread that writes are not looked at",
        "degrade/sweep.py",
        "            pending.result()\n",
        "",
        f"{CRASH}::test_any_call_may_fail",
    ),
    Mutation(
        "4",
        "a full disk makes a run a failed one",
        "degrade/sweep.py",
        "        except (OSError, Failure):\n            raise\n        except torch",
        "        except Failure:\n            raise\n        except torch",
        f"{SWEEP}::test_a_really_full_disk_and_then_room",
    ),
    Mutation(
        "5",
        "no file is synced",
        "degrade/commit.py",
        "            os.fsync(descriptor)\n        finally:\n            os.close(descriptor)\n        if lock",
        "        finally:\n            os.close(descriptor)\n        if lock",
        f"{CRASH}::test_power_is_cut_after_any_operation",
    ),
    Mutation(
        "5",
        "no folder is synced after a file was renamed",
        "degrade/commit.py",
        "                os.unlink(partial)\n    _sync_folder(path.parent)\n",
        "                os.unlink(partial)\n",
        f"{CRASH}::test_power_is_cut_after_any_operation",
    ),
    Mutation(
        "5",
        "no folder is synced after another was made in it",
        "degrade/commit.py",
        "but not read\n        _sync_folder(path.parent)\n",
        "but not read\n        pass\n",
        f"{CRASH}::test_power_is_cut_after_any_operation",
    ),
    Mutation(
        "5",
        "checkpoints of one step are ordered by their hashes",
        "degrade/commit.py",
        'f"{step:09d}-{epochs:06d}-{',
        'f"{step:09d}-{0:06d}-{',
        f"{COMMIT}::test_at_one_step_the_checkpoint_with_more_epochs_is_the_newer",
    ),
    Mutation(
        "6",
        "checkpoints are loaded without a look at their hashes",
        "degrade/commit.py",
        '    if path.stem.rpartition("-")[2] != hashlib.sha256(data).hexdigest():\n',
        "    if False:\n",
        f"{DAMAGE}::TestDamagedCheckpoints",
    ),
    Mutation(
        "6",
        "there is no falling back on the checkpoint before",
        "degrade/sweep.py",
        "            damaged.append(path)\n            continue\n",
        "            damaged.append(path)\n            break\n",
        f"{DAMAGE}::TestDamagedCheckpoints",
    ),
    Mutation(
        "6",
        "a checkpoint of another run is gone on from",
        "degrade/train.py",
        "        if there.config != self.config:\n",
        "        if False:\n",
        f"{DAMAGE}::TestDamagedCheckpoints",
    ),
    Mutation(
        "7",
        "the log is not written anew from the checkpoint",
        "degrade/sweep.py",
        "        _write_log(lock, training.config, training.epochs)\n",
        "",
        f"{DAMAGE}::TestDamagedLog",
    ),
    Mutation(
        "7",
        "the log's epochs need not be 1, 2, 3",
        "degrade/log.py",
        "        if epoch != number and not gaps:\n",
        "        if False:\n",
        "tests/test_log.py",
    ),
    Mutation(
        "7",
        "the last row is taken for that of a whole log, whatever its number",
        "degrade/log.py",
        '    return columns if columns["epoch"][0] == count <= columns["step"][0] else None\n',
        "    return columns\n",
        "tests/test_log.py",
    ),
    Mutation(
        "7",
        "a log without validation is read where there should be some",
        "degrade/store.py",
        "            if (VALIDATION[0] in columns) != (self.config.val_images > 0):\n",
        "            if False:\n",
        f"{DAMAGE}::TestDamagedLog",
    ),
    Mutation(
        "7",
        "a log that is not as degrade wrote it is read",
        "degrade/log.py",
        "        if all(map(operator.eq, map(repr, values), texts)):\n",
        "        if True:\n",
        f"{DAMAGE}::TestDamagedLog",
    ),
    Mutation(
        "8",
        "no lock is taken",
        "degrade/commit.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))\n            return\n",
        "            return\n",
        f"{COMMIT}::test_a_lock_names_its_holder_and_dies_with_it",
    ),
    Mutation(
        "8",
        "nobody waits for the runs of others",
        "degrade/sweep.py",
        "        todo = held.wait()\n",
        "        todo = []\n",
        f"{PROCESSES}::test_both_sweeps_end_with_the_full_table {PROCESSES}::test_eight_sweeps_on_one_folder",
    ),
    Mutation(
        "8",
        "a frozen process is waited for, for ever",
        "degrade/sweep.py",
        "        if now - self.signs[run.folder][1] < SILENCE:\n",
        "        if True:\n",
        "tests/test_cli.py::TestSweep::test_a_run_that_a_frozen_process_has_is_left_to_it",
    ),
    Mutation(
        "8",
        "a run that has failed is trained by each sweep again",
        "degrade/sweep.py",
        "    if (folder / store.ERROR).exists() and not task.retry:\n",
        "    if False:\n",
        f"{SWEEP}::TestTroubledRuns::test_a_run_that_has_failed_meanwhile_is_not_trained_again",
    ),
    Mutation(
        "8",
        "whoever holds a lock shows no sign of life",
        "degrade/commit.py",
        "                os.utime(lock.path)\n",
        "                pass\n",
        f"{COMMIT}::test_whoever_holds_a_lock_shows_signs_of_life_until_it_is_frozen",
    ),
    Mutation(
        "8",
        "a lock whose file was deleted is still trusted",
        "degrade/commit.py",
        "        if not self.in_place:\n",
        "        if False:\n",
        f"{COMMIT}::test_a_lock_whose_file_was_deleted_is_lost",
    ),
    Mutation(
        "9",
        "the lock is looked at before there is anything to publish",
        "degrade/commit.py",
        "        if lock:\n            lock.check()\n        how(partial, path)\n",
        "        how(partial, path)\n",
        f"{COMMIT}::test_a_writer_frozen_anywhere_publishes_nothing_once_its_lock_is_taken",
    ),
    Mutation(
        "9",
        "a stale writer drops the checkpoints that are later than its own",
        "degrade/commit.py",
        "    for other in older[KEPT:]:\n",
        "    for other in set(checkpoints(folder)) - set(older[:KEPT]):\n",
        f"{COMMIT}::test_a_checkpoint_of_a_stale_writer_costs_no_later_one",
    ),
    Mutation(
        "9",
        "a lock is taken away from anybody",
        "degrade/commit.py",
        "        if owner and _named(descriptor).owner == owner:\n",
        "        if True:\n",
        f"{COMMIT}::test_a_lock_is_taken_away_from_its_owner_alone",
    ),
    Mutation(
        "9",
        "a job that shows no sign of life is not given up",
        "degrade/execute/remote.py",
        "        elif state is None and now - self.heard > silence:\n",
        "        elif state is None and now - self.heard > 40 * silence:\n",
        f"{REMOTE}::test_what_dies_or_freezes_is_started_again",
    ),
    Mutation(
        "9",
        "what keeps the driver from looking is taken for silence",
        "degrade/execute/remote.py",
        "        self.heard += max(now - self.looked - silence / 4, 0)",
        "        self.heard += 0",
        f"{REMOTE}::test_what_keeps_the_driver_from_looking_is_no_silence_of_the_jobs",
    ),
    Mutation(
        "9",
        "a job put into the queue again has begun at once",
        "degrade/execute/remote.py",
        "            self.queued = self.offset\n",
        "            pass\n",
        f"{REMOTE}::test_a_job_that_has_left_the_queue_may_take_its_time_to_begin_again",
    ),
    Mutation(
        "9",
        "what a broken machine is given it is given at once again",
        "degrade/execute/remote.py",
        "(PAUSE if attempt.where else UNHEARD) *",
        "PAUSE *",
        f"{REMOTE}::test_jobs_that_end_without_a_word_are_not_started_for_ever",
    ),
    Mutation(
        "9",
        "a job that is busy shows no sign of life",
        "degrade/execute/remote.py",
        '                    flush(b"\\n")\n',
        '                    flush(b"")\n',
        f"{REMOTE}::test_a_job_that_is_busy_shows_signs_of_life",
    ),
    Mutation(
        "9",
        "what a lost job has begun is not taken away from it",
        "degrade/commit.py",
        "        if owner and _named(descriptor).owner == owner:\n            remove(path)\n",
        "        pass\n",
        f"{COMMIT}::test_a_lock_is_taken_away_from_its_owner_alone {SWEEP}::TestTroubledRuns",
    ),
    Mutation(
        "9",
        "whether a node shares the folder is not looked at",
        "degrade/machines.py",
        "        if not (folder / name).exists():\n",
        "        if False:\n",
        f"{RAY}::test_a_folder_that_a_node_does_not_share_is_refused",
    ),
    Mutation(
        "9",
        "a cluster without a token is joined from anywhere",
        "degrade/execute/ray.py",
        "    if not needs_token(where):\n",
        "    if True:\n",
        f"{RAY}::test_a_cluster_that_anyone_can_use_is_refused",
    ),
    Mutation(
        "9",
        "a job that was given up begins what it has left",
        "degrade/execute/remote.py",
        "            if data and not _is_there(path):\n",
        "            if False:\n",
        f"{REMOTE}::test_a_job_that_was_given_up_begins_nothing_more",
    ),
    Mutation(
        "10",
        "a run goes on with as many threads as there happen to be",
        "degrade/provenance.py",
        'now |= {"threads": self.before["threads"], "compiled"',
        'now |= {"threads": threads, "compiled"',
        f"{BYTES}::TestEnvironment::test_unchanged_there_is_nothing_to_say",
    ),
    Mutation(
        "10",
        "momentum is forgotten",
        "degrade/train.py",
        "            for here, value in zip(mine, theirs, strict=True):\n",
        "            for here, value in zip(net.values(), theirs):\n",
        f"{BYTES}::test_resumed_at_every_epoch_the_same_bytes",
    ),
    Mutation(
        "10",
        "another environment is not told",
        "degrade/provenance.py",
        "        if changed:\n",
        "        changed = {}\n        if changed:\n",
        f"{BYTES}::TestEnvironment",
    ),
    Mutation(
        "11",
        "an infinite loss does not count as diverged",
        "degrade/log.py",
        "        return not math.isfinite(self.train_loss)\n",
        "        return math.isnan(self.train_loss)\n",
        "tests/test_log.py tests/test_train.py",
    ),
    Mutation(
        "11",
        "a diverged run goes on",
        "degrade/train.py",
        "self.epochs[-1].step >= self.config.steps or self.epochs[-1].diverged)",
        "self.epochs[-1].step >= self.config.steps)",
        "tests/test_train.py::TestRun::test_a_diverged_run_stops_at_the_end_of_its_epoch",
    ),
    Mutation(
        "11",
        "a diverged run is like any other",
        "degrade/store.py",
        '            return "diverged"\n',
        '            return "done"\n',
        f"{BYTES}::test_a_diverged_run_is_a_visible_row_and_the_others_finish",
    ),
    Mutation(
        "12",
        "the checksums of an archive's members are not compared",
        "degrade/data/official.py",
        "                        if _md5(data) == checksums[name]:\n",
        "                        if data:\n",
        DATA,
    ),
    Mutation(
        "12",
        "tarfile extracts the archive",
        "degrade/data/official.py",
        "        files = self.unpack(archive, names)\n",
        "        tarfile.open(archive).extractall(data_dir)\n        files = self.unpack(archive, names)\n",
        DATA,
    ),
    Mutation(
        "12",
        "data are unpickled whatever their checksum",
        "degrade/data/official.py",
        "                if _md5(data) == md5:\n",
        "                if data:\n",
        DATA,
    ),
    Mutation(
        "12",
        "an archive is opened whatever its checksum",
        "degrade/data/download.py",
        "        if _md5(part) == md5:\n",
        "        if part:\n",
        DATA,
    ),
    Mutation(
        "13",
        "checkpoints are unpickled whole",
        "degrade/train.py",
        "weights_only=True",
        "weights_only=False",
        f"{DAMAGE}::TestMaliciousCheckpoints",
    ),
    Mutation(
        "13",
        "tensors of other shapes are copied",
        "degrade/train.py",
        "        if [(t.shape, t.dtype) for t in mine] != [(t.shape, t.dtype) for t in theirs]:\n",
        "        if False:\n",
        f"{DAMAGE}::TestHostileCheckpoints",
    ),
    Mutation(
        "14",
        "what is wrong with a command line ends in a traceback",
        "degrade/cli/app.py",
        "    except ValueError as error:\n        leave(str(error), 2)\n    except Failure",
        "    except Failure",
        LINES,
    ),
    Mutation(
        "14",
        "a dry run writes",
        "degrade/cli/sweep.py",
        "    if not dry_run:\n        _print_results(plans, out)\n",
        "    for plan in plans:\n        plan.study.create(plan.configs)\n",
        LINES,
    ),
    Mutation(
        "check",
        "the hashes of checkpoints are not verified",
        "degrade/check.py",
        "read_state(commit.read_checkpoint(path))",
        "read_state(path.read_bytes())",
        CHECK,
    ),
    Mutation(
        "check",
        "logs are not compared with their checkpoints",
        "degrade/check.py",
        "if repr(row) != repr(its):",
        "if False:",
        CHECK,
    ),
    Mutation(
        "check",
        "runs under way are repaired",
        "degrade/check.py",
        "with commit.hold(lock):",
        "with contextlib.nullcontext():",
        CHECK,
    ),
    Mutation(
        "check",
        "without --repair it repairs",
        "degrade/check.py",
        "if not (repair and any(finding.mend for finding in findings)):",
        "if not any(finding.mend for finding in findings):",
        CHECK,
    ),
    Mutation(
        "weights",
        "a run from an identity construction that has lost its initial weights starts from others",
        "degrade/sweep.py",
        "    if run.config.init not in INITS:\n",
        "    if False:\n",
        "tests/test_identity.py::TestCommand::test_initial_weights_that_are_lost_are_not_replaced_by_others",
    ),
    Mutation(
        "weights",
        "imported weights are not held against what was imported",
        "degrade/weights.py",
        "sha256 != store.weights_sha256(run.folder)",
        "False",
        "tests/test_published.py::TestCommands::test_weights_that_were_changed_are_not_used",
    ),
    Mutation(
        "weights",
        "the weights of a finished run may be older ones",
        "degrade/weights.py",
        "if path is None and run.outcome and trained.step != run.epochs[-1].step:",
        "if False:",
        "tests/test_identity.py::TestCommand::test_weights_before_the_last_step_are_not_taken_for_the_last",
    ),
    Mutation(
        "weights",
        "a probe's rows may be of other weights",
        "degrade/probe.py",
        'len(nets) < len(asked["weights"])',
        "False",
        "tests/test_probe.py::test_weights_that_change_after_the_plan_was_made_are_not_measured_for_the_others",
    ),
    Mutation(
        "15",
        "signals are not caught",
        "degrade/cli/sweep.py",
        '@stopping("stopped; the same command goes on from the last checkpoints")\n',
        "",
        f"{PROCESSES}::test_told_to_stop_at_any_time",
    ),
    Mutation(
        "15",
        "a stop that is swallowed is lost",
        "degrade/stopping.py",
        "                _leave(message, number[0])\n",
        "                pass\n",
        f"{PROCESSES}::test_a_stop_that_is_swallowed_or_converted_or_late_is_a_stop",
    ),
    Mutation(
        "15",
        "a stop is raised in the import of a library in C",
        "degrade/stopping.py",
        "            postponed.set()\n            return\n",
        "            pass\n",
        f"{PROCESSES}::test_a_stop_while_a_library_in_c_is_imported_waits_for_that",
    ),
    Mutation(
        "16",
        "a sweep joins any study",
        "degrade/store.py",
        "            if common(config) != self._common:\n                raise ValueError(",
        "            if False:\n                raise ValueError(",
        f"{DAMAGE}::TestProtocol",
    ),
    Mutation(
        "16",
        "the run id is not held against config.json",
        "degrade/store.py",
        "        if (identity := run_id(values)) != folder.name:\n",
        "        if (identity := run_id(values)) == 'x':\n",
        f"{DAMAGE}::TestEditedRuns",
    ),
    Mutation(
        "16",
        "older studies are not filled in",
        "degrade/store.py",
        '{"block": "plain", "depth": depth, "seed": 0} | values["shared"]).shared()',
        '{"block": "plain", "depth": depth, "seed": 0} | values["shared"]).shared() and values["shared"]',
        f"{DAMAGE}::TestOlderResults",
    ),
    Mutation(
        "16",
        "what is left out is not said",
        "degrade/cli/app.py",
        '        note(f"left out: {line}")\n',
        "        pass\n",
        f"{DAMAGE}::TestReaders",
    ),
    Mutation(
        "17",
        "workers do not watch their parent",
        "degrade/execute/local.py",
        "    threading.Thread(target=_die_with_parent, daemon=True).start()\n",
        "",
        f"{EXECUTE}::test_no_orphans_when_the_parent_is_killed",
    ),
    Mutation(
        "status",
        "a run is running as long as its lock's file is there",
        "degrade/store.py",
        "        if self.holder:\n",
        "        if (self.folder / LOCK).exists():\n",
        f"{PROCESSES}::test_status_is_never_running_once_the_process_has_gone",
    ),
    Mutation(
        "errors",
        "the traceback of a failed run is not kept",
        "degrade/sweep.py",
        "            commit.write_file(task.folder / store.ERROR, traceback.format_exc().encode(), lock)\n",
        "            pass\n",
        f"{SWEEP}::TestTroubledRuns::test_a_failed_run_is_a_visible_row_and_the_rest_go_on",
    ),
]


def survives(mutation: Mutation) -> tuple[bool, str]:
    """Whether its tests stay green, and the last line they print."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".venv", ".git", "checkpoints", "*-results", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / mutation.file
        path.write_text(changed(path.read_text(), mutation))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy), "MUTATED": str(copy)}
        process = subprocess.Popen(
            command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return False, f"hangs, for {LIMIT} s"
    assert process.returncode in (0, 1), output  # 1: tests failed; others: they did not run
    failed = [line.partition(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")]
    return not failed, failed[0] if failed else output.splitlines()[-1]


def changed(text: str, mutation: Mutation) -> str:
    assert text.count(mutation.old) == 1, f"{mutation.file} does not hold this once: {mutation.old}"
    return text.replace(mutation.old, mutation.new)


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.promise} {m.what}" for word in words)]
    green = 0
    for mutation in chosen:
        start = time.monotonic()
        survived, line = survives(mutation)
        green += survived
        verdict = "GREEN" if survived else "red"
        print(
            f"{mutation.promise:>6}  {verdict:5}  {mutation.what}  ({time.monotonic() - start:.0f} s: {line})",
            flush=True,
        )
    print(f"{len(chosen) - green} of {len(chosen)} mutations turn a test red")
    return int(green > 0)


if __name__ == "__main__":
    sys.exit(main())
