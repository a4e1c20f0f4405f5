import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from conftest import smoke, write_run
from rich.console import Console

from degrade import commit, store
from degrade.cli import app
from degrade.config import PROTOCOLS, RunConfig
from degrade.sweep import training_flops

ROOT = Path(__file__).parent.parent


def sweep_arguments(tmp_path, data_dir, *arguments):
    base = ["sweep", "--dataset", "shapes", "--protocol", "smoke", "--blocks", "plain", "--jobs", "1"]
    return [*base, "--out", tmp_path, "--data-dir", data_dir, *arguments]


@pytest.fixture
def results(tmp_path):
    """A study of two blocks, two depths, two seeds."""
    for block, deep in (("plain", 0.7), ("residual", 0.4)):
        for seed in (0, 1):
            write_run(tmp_path / "s", smoke(block, 8, seed), [(0.9, 0.9), (0.5 + seed / 100, 0.6)])
            write_run(tmp_path / "s", smoke(block, 14, seed), [(0.9, 0.9), (deep + seed / 100, 0.6)])
    return tmp_path


class TestSweep:
    def test_a_sweep_from_nothing_to_figures(self, cli, tmp_path, data_dir):
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8,14", "--seeds", "0,1"))
        assert result.exit_code == 0, result.stdout
        assert "4 runs, 4 to train" in result.stdout
        assert "About" in result.stdout
        assert "plain-14-s1  epoch 3/3  step 24/24  train" in result.stdout
        study = tmp_path / "shapes-smoke"
        assert {p.name for p in study.iterdir()} == {
            "study.json",
            *(smoke(depth=d, seed=s).run_id for d in (8, 14) for s in (0, 1)),
        }
        assert cli("plot", tmp_path).exit_code == 0
        for name in ("training-error", "curves", "test-error", "gap"):
            for kind in ("png", "svg", "pdf"):
                assert (study / "figures" / f"{name}.{kind}").stat().st_size > 1000
        assert "14 v 8" in cli("verdict", tmp_path).stdout

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, cli, tmp_path, data_dir):
        out = tmp_path / "out"
        cli(*sweep_arguments(out, data_dir, "--depths", "8"))
        before = sorted(out.rglob("*"))
        result = cli(*sweep_arguments(out, tmp_path / "data", "--depths", "8,14", "--dry-run"))
        assert result.exit_code == 0
        lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
        assert " done " in lines[smoke(depth=8).run_id]
        assert " new " in lines[smoke(depth=14).run_id]
        assert "About" in result.stdout
        assert sorted(out.rglob("*")) == before
        assert not (tmp_path / "data").exists()

    def test_overrides_reach_the_configuration_and_the_studys_name(self, cli, tmp_path, data_dir):
        flags = ("--lr", "0.03", "--decay", "conv", "--val-images", "50", "--milestones", "3,9", "--steps", "10")
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8", *flags))
        assert result.exit_code == 0, result.stdout
        name = "shapes-smoke-decayconv-lr0.03-milestones3-9-steps10-valimages50"
        (config,) = (tmp_path / name).glob("*/config.json")
        values = json.loads(config.read_text())
        assert (values["lr"], values["decay"], values["val_images"], values["milestones"]) == (0.03, "conv", 50, [3, 9])
        header = (config.parent / "log.csv").read_text().splitlines()[0]
        assert header.endswith("test_error,val_loss,val_error")

    def test_flags_win_over_the_file(self, cli, tmp_path):
        spec = tmp_path / "spec.toml"
        spec.write_text(
            'depths = [8]\nblocks = ["plain"]\ndataset = "shapes"\nprotocol = "smoke"\nlr = 0.5\nwidth = 2\n'
        )
        result = cli("sweep", spec, "--lr", "0.25", "--seeds", "5", "--out", tmp_path / "r", "--dry-run")
        assert result.exit_code == 0, result.stdout
        assert smoke(seed=5, lr=0.25, width=2).run_id in result.stdout

    @pytest.mark.parametrize("hours", [1, 100])
    def test_defaults_are_cifar10_and_the_paper(self, cli, tmp_path, monkeypatch, hours):
        from degrade import bench

        monkeypatch.setattr(bench, "estimate", lambda configs, _: {c.run_id: hours * 3600.0 for c in configs})
        result = cli("sweep", "--depths", "20,56", "--device", "cpu", "--out", tmp_path, "--dry-run", "--jobs", "1")
        assert result.exit_code == 0
        for block in ("plain", "residual"):
            for depth in (20, 56):
                assert RunConfig(block=block, depth=depth, seed=0).run_id in result.stdout
        assert "cifar10-paper: 4 runs, 4 to train" in result.stdout
        assert ("About 4.0 h on" if hours == 1 else "About 16.7 days on") in result.stdout
        assert ("Too long? --protocol short takes about 12.5 h" in result.stdout) is (hours == 100)

    def test_another_protocol_in_one_study_is_refused_with_the_difference(self, cli, tmp_path, data_dir):
        write_run(tmp_path / "mine", smoke(), [])
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8", "--study", "mine", "--lr", "0.5"))
        assert result.exit_code == 2
        assert "study mine was run with another protocol: lr 0.02 there, 0.5 here" in result.stderr
        assert "--study NAME" in result.stderr

    def test_a_run_under_way_elsewhere_is_waited_for_and_taken_over(self, cli, tmp_path, data_dir, monkeypatch):
        """Its process ends before the run does."""
        from degrade import sweep as engine

        run = write_run(tmp_path / "shapes-smoke", smoke(), [])
        waited_for, wait = threading.Event(), engine._Elsewhere.wait
        monkeypatch.setattr(engine._Elsewhere, "wait", lambda self: (waited_for.set(), wait(self))[1])

        def hold(held):
            with commit.hold(run.folder / store.LOCK):
                held.set()
                waited_for.wait(120)

        held = threading.Event()
        other = threading.Thread(target=hold, args=(held,))
        other.start()
        held.wait()
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8,14"))
        other.join()
        assert result.exit_code == 0, result
        assert "2 runs, 1 to train" in result.stdout
        assert f"waited for, process {os.getpid()}" in result.stdout
        assert f"plain-8-s0: held by process {os.getpid()}; waiting\n" in result.stdout
        assert {there.status for there in store.Study.open(tmp_path / "shapes-smoke").runs} == {"done"}

    def test_a_run_that_a_frozen_process_has_is_left_to_it(self, cli, tmp_path, data_dir, monkeypatch):
        from degrade import sweep as engine

        monkeypatch.setattr(engine, "SILENCE", 1.0)  # this process shows signs of life every 5 s only
        run = write_run(tmp_path / "shapes-smoke", smoke(), [])
        with commit.hold(run.folder / store.LOCK):
            result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8,14"))
        assert result.exit_code == 1
        left = f"plain-8-s0: left to process {os.getpid()}, which has shown no sign of life for 1 s\n"
        assert left in result.stdout
        assert result.stderr == "degrade: 1 of 2 runs not done (running); the same command goes on\n"

    def test_the_precision_of_the_device_is_no_override(self, cli, tmp_path, monkeypatch):
        """As on a GPU with TF32: the study keeps its name, and one begun on a CPU goes on in fp32."""
        from degrade import bench
        from degrade import sweep as engine

        monkeypatch.setattr(bench, "estimate", lambda configs, _: {c.run_id: 60.0 for c in configs})
        monkeypatch.setattr(engine, "has_precision", lambda *_: True)
        arguments = (
            "sweep",
            "--depths",
            "8",
            "--blocks",
            "plain",
            "--protocol",
            "smoke",
            "--out",
            tmp_path,
            "--dry-run",
        )
        tf32 = RunConfig(block="plain", depth=8, seed=0, precision="tf32", **PROTOCOLS["smoke"])
        for result in (cli(*arguments), cli(*arguments, "--precision", "tf32")):
            assert "cifar10-smoke: 1 run, 1 to train" in result.stdout
            assert tf32.run_id in result.stdout
        for other in ("fp32", "bf16"):  # which the default's study could not hold
            assert f"cifar10-smoke-precision{other}: 1 run" in cli(*arguments, "--precision", other).stdout
        begun = RunConfig(block="plain", depth=8, seed=0, **PROTOCOLS["smoke"])
        write_run(tmp_path / "cifar10-smoke", begun, [])
        assert begun.run_id in cli(*arguments).stdout
        result = cli(*arguments, "--precision", "tf32", "--study", "other")
        assert tf32.run_id in result.stdout

    def test_packed_runs_are_the_runs_alone(self, cli, tmp_path, data_dir):
        for out, pack in (("alone", "1"), ("packed", "3")):
            arguments = sweep_arguments(tmp_path / out, data_dir, "--depths", "8,14,20", "--threads", "1")
            result = cli(*arguments, "--pack", pack)
            assert result.exit_code == 0
        assert "3 runs at a time (3 to a process)" in result.stdout
        alone, packed = (
            {p.parent.name: (p.read_text(), max((p.parent / "checkpoints").iterdir()).name) for p in found}
            for found in ((tmp_path / out).rglob("log.csv") for out in ("alone", "packed"))
        )
        assert len(alone) == 3
        assert alone == packed

    def test_how_it_is_computed_is_stored_and_kept(self, cli, tmp_path, data_dir):
        arguments = sweep_arguments(tmp_path, data_dir, "--depths", "8")
        assert cli(*arguments, "--compile", "on").exit_code == 0
        folder = tmp_path / "shapes-smoke" / smoke().run_id
        assert store.read_json(folder / "environment.json")["compiled"] is True
        compiled = (folder / "log.csv").read_text()
        for path in [folder / "log.csv", *(folder / "checkpoints").iterdir()]:
            path.unlink()
        assert cli(*arguments, "--compile", "off").exit_code == 0  # it began compiled, and so it goes on
        assert (folder / "log.csv").read_text() == compiled

    def test_without_a_compiler_a_line_says_so_and_it_goes_on(self, cli, tmp_path, data_dir, monkeypatch):
        from degrade import sweep as engine

        monkeypatch.setattr(engine, "why_not", lambda _: "no C++ compiler")
        monkeypatch.setattr(engine, "COMPILED_FROM", 1)
        arguments = sweep_arguments(tmp_path, data_dir, "--depths", "8")
        result = cli(*arguments)
        assert result.exit_code == 0
        assert result.stderr == "degrade: not compiled, since that does not work here: no C++ compiler\n"
        folder = tmp_path / "shapes-smoke" / smoke().run_id
        assert store.read_json(folder / "environment.json")["compiled"] is False
        refused = cli(*arguments, "--compile", "on", "--seeds", "1")
        assert refused.exit_code == 2
        assert refused.stderr == "degrade: compile on needs a compiler that works: no C++ compiler\n"

    def test_a_failed_run_is_skipped_until_retried(self, cli, tmp_path, data_dir):
        run = write_run(tmp_path / "shapes-smoke", smoke(), [])
        (run.folder / store.ERROR).write_text("ValueError: why\n")
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8"))
        assert result.exit_code == 1
        assert "1 of 1 run not done (failed); --retry-failed tries the failed ones again" in result.stderr
        assert "failed" in result.stdout
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8", "--retry-failed"))
        assert result.exit_code == 0
        assert not (run.folder / store.ERROR).exists()

    def test_a_diverged_run_ends_with_exit_code_1(self, cli, tmp_path, data_dir):
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8,14", "--lr", "1e30"))
        assert result.exit_code == 1
        assert "plain-8-s0 diverged" in result.stdout
        assert "2 of 2 runs not done (diverged)" in result.stderr

    def test_a_full_disk_is_one_line(self, cli, tmp_path, data_dir, monkeypatch):
        def full(path, _):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(store, "write_file", full)
        result = cli(*sweep_arguments(tmp_path, data_dir, "--depths", "8"))
        assert result.exit_code == 1
        assert result.stderr.endswith("config.json: No space left on device\n")

    def test_missing_data_are_one_line(self, cli, tmp_path, monkeypatch):
        def offline(*_, **__):
            raise OSError("offline")

        monkeypatch.setattr("urllib.request.urlopen", offline)
        result = cli(
            "sweep", "--depths", "8", "--protocol", "smoke", "--out", tmp_path / "r", "--data-dir", tmp_path / "d"
        )
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert "CIFAR-10 is missing" in result.stderr
        assert not (tmp_path / "r").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--depths", "21"], "depth must be 6n+2 (8, 20, 32, 44, 56, 110, ...); got 21"),
            (
                ["--depths", "20,,56"],
                "--depths must be separated by commas, with nothing empty and no space; got '20,,56'",
            ),
            (["--depths", ""], "--depths must be separated by commas"),
            ([], "depths are missing: name them, such as --depths 20,56"),
            (["--depths", "twenty"], "--depths must be whole numbers separated by commas, such as 20,56; got 'twenty'"),
            (["--depths", "10" * 30], "--depths must be whole numbers"),
            (["--depths", "1000000004"], "depth must be at most 10,000; got 1000000004"),
            (["--depths", "20", "--blocks", "dense"], "block must be one of plain, residual, preact; got 'dense'"),
            (["--depths", "20", "--blocks", " "], "--blocks must be separated by commas"),
            (["--depths", "20", "--seeds", "-1"], "seed must be from 0 to 4294967295; got -1"),
            (["--depths", "20", "--dataset", "imagenet"], "mnist, shapes; got 'imagenet'"),
            (["--depths", "20", "--protocol", "fast"], "protocol must be one of paper, short, demo, smoke; got 'fast'"),
            (["--depths", "20", "--lr", "nan"], "lr must be a finite number of at least 0; got nan"),
            (["--depths", "20", "--jobs", "0"], "jobs must be from 1 to 1024; got 0"),
            (["--depths", "20", "--jobs", "-1"], "--jobs must be auto or a whole number of at least 1; got '-1'"),
            (["--depths", "20", "--pack", "0"], "pack must be from 1 to 1024; got 0"),
            (["--depths", "20", "--pack", "many"], "--pack must be auto or a whole number of at least 1; got 'many'"),
            (["--depths", "20", "--compile", "maybe"], "compile must be auto, on or off; got 'maybe'"),
            (["--depths", "20", "--precision", "fp8"], "precision must be one of fp32, tf32, bf16; got 'fp8'"),
            (["--depths", "20", "--threads", "all"], "--threads must be auto or a whole number"),
            (["--depths", "20", "--device", "cuda:7"], "device must be auto or one that is there"),
            (["--depths", "20", "--study", "../up"], "a study's name must be up to 100 of"),
            (["--depths", "20", "--train-images", "60000"], "train_images + val_images must be at most the 50000"),
            (["nowhere.toml"], "nowhere.toml is not a file"),
            (["new\nline.toml"], "new\\nline.toml is not a file"),
            (["--depths", "20", "--steps", "ten"], "must be a whole number; got 'ten'"),
            (["--depths", "20", "--lr", "fast"], "must be a number; got 'fast'"),
            (["--depths", "20", "--batch-size", "1000000000000"], "batch_size must be at most 65,536"),
            (["--depths", "20", "--steps", "1000000000000"], "steps must be at most 1,000,000,000"),
            (["--depths", "20", "--jobs", "999999999"], "jobs must be from 1 to 1024; got 999999999"),
            (["--depths", "20", "--precision", "tf32", "--device", "cpu"], "precision tf32 needs a GPU that has it"),
            (["--depth", "20"], "No such option: --depth. Did you mean --depths? Try: degrade sweep --help"),
            (["--depths", "20,", "56"], "--depths must be separated by commas, with nothing empty and no space; got"),
            (["--depths", "20", "--blocks", "Plan"], "got 'Plan'; did you mean plain?"),
            (["--depths", "20", "--protocol", "dmeo"], "got 'dmeo'; did you mean demo?"),
            (["--depths", "20", "--grid", "widht=4"], "got 'widht'; did you mean width?"),
        ],
    )
    def test_sweep(self, cli, tmp_path, arguments, message):
        result = cli("sweep", *arguments, "--out", tmp_path / "r")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("depths = 20", "depths must be a list of whole numbers; got 20"),
            ("depths = [20.5]", "depths must be a list of whole numbers; got [20.5]"),
            ("depths = []", "depths must be a list of whole numbers; got []"),
            ("depths = [20]\nblocks = [1]", "blocks must be a list of names; got [1]"),
            ("depths = [20]\nnesterov = true", "nesterov is not a setting; the settings are depths,"),
            ("depths = [20]\nprotocol = 3", "protocol must be a string; got 3"),
            ("depth = [20]", "did you mean depths?"),
            ("depths = [20]\nlr = 'fast'", "spec.toml: lr must be a number; got 'fast'"),
            ("depths = [20", "spec.toml: "),
        ],
    )
    def test_a_file_of_settings(self, cli, tmp_path, text, message):
        spec = tmp_path / "spec.toml"
        spec.write_text(text)
        result = cli("sweep", spec, "--out", tmp_path / "r")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1

    def test_an_output_folder_that_is_a_file(self, cli, tmp_path):
        (tmp_path / "file").write_text("precious")
        result = cli("sweep", "--depths", "8", "--out", tmp_path / "file")
        assert result.exit_code == 2
        assert f"{tmp_path / 'file'} is a file" in result.stderr
        assert (tmp_path / "file").read_text() == "precious"

    @pytest.mark.parametrize("name", ["show", "plot", "verdict"])
    def test_results_that_are_none(self, cli, tmp_path, name):
        (tmp_path / "file").touch()
        for folder, message in (
            (tmp_path / "none", "does not exist"),
            (tmp_path / "file", "is not a folder"),
            (tmp_path, "holds no study"),
        ):
            result = cli(name, folder)
            assert result.exit_code == 2
            assert message in result.stderr
            assert str(folder) in result.stderr
            assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("name", ["plot", "verdict"])
    def test_runs_without_an_epoch(self, cli, tmp_path, name):
        write_run(tmp_path / "s", smoke(), [])
        result = cli(name, tmp_path)
        assert result.exit_code == 2
        assert "holds no epoch yet" in result.stderr

    @pytest.mark.parametrize("name", ["show", "plot", "verdict"])
    def test_a_log_of_another_program(self, cli, results, name):
        path = results / "s" / smoke().run_id / store.LOG
        path.write_text("step,loss\n1,2\n")
        result = cli(name, results)
        assert result.exit_code == 1
        first, second = result.stderr.splitlines()
        assert first.startswith(f"degrade: left out: {path}: the header is not degrade's: 'step,loss'; ")
        assert second == "degrade: degrade check looks closer"
        assert {"show": "residual-8-s1", "plot": "curves", "verdict": "14 v 8"}[
            name
        ] in result.stdout  # the rest is there
        assert path.read_text() == "step,loss\n1,2\n"

    def test_a_command_misspelt(self, cli):
        result = cli("swep")
        assert result.exit_code == 2
        assert result.stderr == "degrade: No such command 'swep'. Did you mean 'sweep'? Try: degrade --help\n"

    def test_an_option_without_its_value(self, cli):
        result = cli("sweep", "--lr")
        assert result.exit_code == 2
        assert result.stderr == "degrade: Option '--lr' requires an argument. Try: degrade sweep --help\n"

    def test_a_number_that_is_none(self, cli, tmp_path):
        result = cli("identity", tmp_path, "--depth", "deep")
        assert result.exit_code == 2
        assert result.stderr == "degrade: --depth must be a whole number; got 'deep'. Try: degrade identity --help\n"
        result = cli("identity", tmp_path, "--depth", "14")  # its other numbers have their defaults
        assert result.stderr == f"degrade: {tmp_path} is not the folder of a run; degrade show tells which there are\n"

    def test_a_file_that_cannot_be_written_is_named_as_it_was_to_be(self, cli, results):
        (results / "file").touch()
        result = cli("report", results, "--out", results / "file")
        assert result.exit_code == 2
        assert result.stderr == f"degrade: {results / 'file' / 'report.html'}: Not a directory\n"

    def test_a_format_nobody_draws(self, cli, results):
        result = cli("plot", results, "--formats", "png,gif")
        assert result.exit_code == 2
        assert "--formats must be of png, svg, pdf; got 'gif'" in result.stderr


class TestBench:
    def test_as_json(self, cli):
        result = cli("bench", "--depths", "8,14", "--blocks", "plain", "--threads", "1", "--compile", "off", "--json")
        assert result.exit_code == 0
        first, second = json.loads(result.stdout)
        assert (first["depth"], second["depth"], first["block"]) == (8, 14, "plain")
        assert first["evaluation_images_per_second"] > 0
        assert first["train_images_per_second"] == pytest.approx(128_000 / first["milliseconds_per_step"])
        flops = second["fraction_of_matmul_peak"] * second["matmul_flops_per_second"]
        step = training_flops(RunConfig(block="plain", depth=14, seed=0)) / 64_000
        assert flops * second["milliseconds_per_step"] / 1000 == pytest.approx(step)
        assert first["paper_seconds"] > 20 * first["short_seconds"]
        assert not first["compiled"]

    def test_as_a_table(self, cli):
        result = cli("bench", "--depths", "8", "--jobs", "1", "--compile", "off", "--pack", "2")
        assert result.exit_code == 0
        for said in ("plain-8", "residual-8", "GFLOP/s", "2 packed: ", "paper: about", "short: about"):
            assert said in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--depths", "21"], "depth must be 6n+2"),
            (["--device", "cuda:7"], "device must be auto or one that is there"),
            (["--jobs", "-1"], "--jobs must be auto or a whole number"),
            (["--precision", "tf32", "--device", "cpu"], "precision tf32 needs a GPU that has it"),
        ],
    )
    def test_bad_input(self, cli, arguments, message):
        result = cli("bench", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


class TestShow:
    def test_json(self, cli, results):
        records = json.loads(cli("show", results, "--json").stdout)
        assert len(records) == 8
        assert records[0] == {
            "id": smoke().run_id,
            "study": "s",
            "block": "plain",
            "depth": 8,
            "seed": 0,
            "status": "done",
            "imported": False,
            "epoch": 2,
            "step": 24,
            "train_error": 0.5,
            "test_error": 0.6,
        }

    def test_csv(self, cli, results):
        write_run(results / "s", smoke(seed=9), [])
        rows = list(csv.DictReader(io.StringIO(cli("show", results, "--csv").stdout)))
        assert len(rows) == 9
        assert rows[0]["train_error"] == "0.5"
        assert rows[2]["status"] == "missing"
        assert rows[2]["train_error"] == ""

    def test_table(self, cli, results):
        (write_run(results / "s", smoke(seed=9), []).folder / store.ERROR).write_text("ValueError: [why]\n")
        output = cli("show", results).stdout
        assert "50.00 %" in output
        assert f"{smoke(seed=9).run_id}: ValueError: [why]" in output


class TestVerdict:
    def test_json(self, cli, results):
        records = json.loads(cli("verdict", results, "--json").stdout)
        assert [(r["block"], r["shallow"], r["deep"], r["seeds"], r["verdict"]) for r in records] == [
            ("plain", 8, 14, 2, "degrades"),
            ("residual", 8, 14, 2, "does not degrade"),
            ("plain-residual", 8, 14, 2, "degrades"),
        ]
        assert records[0]["difference"] == pytest.approx(0.2)
        assert records[0]["low"] < 0.2 < records[0]["high"]

    def test_text(self, cli, results):
        write_run(results / "s", smoke(seed=9), [])
        output = cli("verdict", results).stdout
        row = next(line for line in output.splitlines() if line.startswith("plain  "))
        assert row.split()[:6] == ["plain", "14", "v", "8", "2", "+20.00"]
        assert row.rstrip().endswith("degrades")
        assert "plain degrades more" in output
        assert "early in training: 24 steps" in output
        assert f"left out: {smoke(seed=9).run_id} (missing)" in output

    def test_nothing_to_compare(self, cli, tmp_path):
        write_run(tmp_path / "s", smoke(), [(0.5, 0.5)])
        assert "nothing to compare" in cli("verdict", tmp_path).stdout


def test_plot_writes_to_a_folder_of_choice(cli, results, tmp_path):
    result = cli("plot", results, "--out", tmp_path / "figures", "--formats", "png")
    assert result.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "figures" / "s").iterdir()) == [
        "curves.png",
        "gap.png",
        "test-error.png",
        "training-error.png",
    ]


NAMES = [command.name or command.callback.__name__ for command in app.registered_commands]
METAVARS = {"N", "X", "X,X,X", "NAME", "N,...", "NAME,...", "DIR", "FILE", "TEXT", "TIME", "EPOCH", "FIELD=X"}


class TestHelp:
    def test_commands_are_named_like_their_functions(self):
        for name, command in zip(NAMES, app.registered_commands, strict=True):
            assert command.callback.__name__ == {"import": "import_"}.get(name, name)  # import is a word of Python's

    @pytest.mark.parametrize("name", ["", *NAMES])
    def test_every_example_is_a_command_line_and_what_it_reads_is_there(self, cli, name):
        text = cli(*filter(None, [name]), "--help").stdout.replace("\\\n", "")
        examples = [line.split("Example: ")[1] for line in text.splitlines() if "Example: " in line]
        assert examples
        for words in map(shlex.split, examples):
            assert words[:2] == ["degrade", name or words[1]]
            arguments = words[2 : words.index(">") if ">" in words else None]
            command = typer.main.get_command(app).commands[words[1]]
            command.make_context(words[1], list(arguments))
            for argument in arguments:
                if argument.startswith(("results/", "experiments/")):
                    assert (ROOT / argument).exists(), argument

    @pytest.mark.parametrize("columns", ["80", "200"])
    @pytest.mark.parametrize("name", ["", *NAMES])
    def test_it_fits_80_columns_and_shows_no_types(self, cli, monkeypatch, name, columns):
        monkeypatch.setenv("COLUMNS", columns)
        text = cli(*filter(None, [name]), "--help").stdout
        assert all(len(line) <= 80 for line in text.splitlines()), text
        assert "<" not in text
        assert "\x1b" not in text

    def test_the_list_of_commands_is_not_cut_off(self, cli):
        text = cli("--help").stdout
        for name, command in zip(NAMES, app.registered_commands, strict=True):
            first = command.callback.__doc__.partition("\n")[0]
            assert f"  {name:10}{first}\n" in text

    @pytest.mark.parametrize("name", NAMES)
    def test_every_option_with_a_value_says_what_kind(self, name):
        for param in typer.main.get_command(app).commands[name].params:
            assert param.help
            if param.param_type_name == "option" and not param.is_flag:
                assert param.metavar in METAVARS | {"FIELD=X,..."}, param.name


class TestCompletion:
    """What the script of bash hands over at Tab, and what it gets."""

    @pytest.mark.parametrize(
        ("typed", "offered"),
        [
            ("sw", "sweep"),
            ("sweep --proto", "--protocol"),
            ("sweep --protocol ", "paper short demo smoke"),
            ("sweep --protocol s", "short smoke"),
            ("sweep --dataset ", "cifar10 cifar100 svhn fashion-mnist mnist shapes folder: imagenet:"),
            ("sweep --blocks plain,", "plain,residual plain,preact"),
            ("sweep --blocks plain,r", "plain,residual"),
            ("sweep --depths 20,5", "20,56"),
            ("sweep --device c", "cpu cuda"),
            ("sweep --compile o", "on off"),
            ("sweep --shortcut ", "A B C"),
            ("probe results/ --probes lesion,l", "lesion,landscape"),
            ("plot --formats png,", "png,svg png,pdf"),
            ("identity results/x --depth 5", "56"),
            ("import net.pt --weights-of ", "last best"),
            ("bench --precision t", "tf32"),
            ("sweep exp", ""),  # a path: left to the shell
            ("show res", ""),
            ("sweep --out ", ""),
        ],
    )
    def test_of_words(self, cli, monkeypatch, typed, offered):
        words = ["degrade", *typed.split(" ")]
        monkeypatch.setenv("_DEGRADE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        result = cli()
        assert (result.exit_code, result.stdout.split(), result.stderr) == (0, offered.split(), "")

    def test_in_bash(self, tmp_path):
        """Its own script, in a real one; and torch is not imported at each Tab."""
        program = tmp_path / "degrade"
        program.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -X importtime -m degrade \"$@\" 2>'{tmp_path}/imported'\n"
        )
        program.chmod(0o755)
        script = (
            'eval "$(_DEGRADE_COMPLETE=source_bash degrade)"; complete -p degrade\n'
            "COMP_WORDS=(degrade sweep --protocol s) COMP_CWORD=3\n"
            '_degrade_completion degrade; echo "${COMPREPLY[@]}"'
        )
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=os.environ | path)
        assert result.stdout.splitlines() == ["complete -o default -F _degrade_completion degrade", "short smoke"]
        imported = (tmp_path / "imported").read_text()
        assert "degrade.cli" in imported
        assert not re.search(r"\| +(torch|pandas|matplotlib|numpy)$", imported, re.MULTILINE)

    def test_the_words_offered_are_those_that_are_taken(self):
        from degrade import plots, probe
        from degrade.cli import options
        from degrade.cli.probe import PROBES

        assert PROBES == probe.PROBES
        assert options.FORMATS == plots.FORMATS


class TestWidth:
    @pytest.mark.parametrize("name", ["show", "verdict", "check"])
    def test_a_file_is_the_same_whatever_the_terminal(self, cli, results, monkeypatch, name):
        texts = []
        for columns in ("20", "80", "200"):
            monkeypatch.setenv("COLUMNS", columns)
            texts.append(cli(name, results).stdout)
        assert texts[0] == texts[1] == texts[2]
        assert "…" not in texts[0]
        assert "\x1b" not in texts[0]
        assert all(line == line.rstrip() for line in texts[0].splitlines())
        if name == "show":
            assert smoke("residual", 14, 1).run_id in texts[0]

    def test_a_sentence_wraps_between_words_on_a_terminal_and_a_path_nowhere(self, capsys, monkeypatch):
        commands = sys.modules["degrade.cli.app"]
        monkeypatch.setattr(commands, "console", Console(width=30, force_terminal=True))
        commands.say("training has left the solution, and so on")
        commands.say(f"results/{'x' * 40} is there")
        first, second, third = capsys.readouterr().out.splitlines()
        assert (first.rstrip(), second) == ("training has left the", "solution, and so on")
        assert third == f"results/{'x' * 40} is there"


def test_a_name_between_colons_means_itself(cli, tmp_path):
    """rich takes it for an emoji otherwise."""
    config = smoke(dataset="folder:dog:40+20:2:32:0123456789ab", train_images=20, test_images=10)
    write_run(tmp_path / "s", config, [(0.5, 0.5)])
    assert "s: folder:dog:40+20:2:32:0123456789ab, protocol smoke" in cli("show", tmp_path).stdout


def test_ctrl_c_while_modules_are_imported_is_no_traceback():
    script = (
        "import importlib.abc, os, signal, sys\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'degrade.cli.sweep': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "import degrade.cli\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["sweep", "--help"],
        ["show", "S"],
        ["plot", "S"],
        ["verdict", "S"],
        ["sweep", "--depths", "21"],
        ["sweep", "--depths", "20", "--grid", "lr=fast"],
    ],
)
def test_torch_is_not_imported_to_read_results_or_print_help(results, arguments):
    script = (
        "import sys, degrade\n"
        "degrade.load\n"
        "from degrade.cli import main\n"
        f"sys.argv = ['degrade', *{[a.replace('S', str(results)) if a == 'S' else a for a in arguments]!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--executor", "ray"]])
def test_nobody_waits_for_torch_or_a_cluster_where_nothing_is_left_to_train(cli, tmp_path, data_dir, flags):
    asked = sweep_arguments(tmp_path, data_dir, "--depths", "8", "--grid", "lr=0.1,0.2")
    trained = cli(*asked)
    assert trained.exit_code == 0, trained.stdout
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['ray'] = None\n"
        "from degrade.cli import main\n"
        f"sys.argv = ['degrade', *{[str(word) for word in [*asked, *flags]]!r}]\n"
        "main()\n"
    )
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.count("1 run, 0 to train") == 2
    results = trained.stdout[trained.stdout.rindex("Study ") :]
    assert again.stdout.endswith(results) == (flags != ["--dry-run"])


def test_bad_options_are_refused_where_nothing_is_left_to_train_too(cli, tmp_path, data_dir):
    asked = sweep_arguments(tmp_path, data_dir, "--depths", "8")
    assert cli(*asked).exit_code == 0
    for options, message in (
        (["--jobs", "0"], "jobs must be from 1 to 1024; got 0"),
        (["--compile", "yes"], "compile must be auto, on or off; got 'yes'"),
        (["--executor", "rya"], "executor must be local, ray or slurm; got 'rya'"),
        (["--gpus", "1"], "--gpus is for --executor slurm"),
        (["--executor", "slurm", "--time", "1"], "--time must be at least 5 minutes"),
        (["--executor", "slurm", "--gpus", "2"], "--gpus must be 0 or 1"),
    ):
        result = cli(*asked, *options)
        assert (result.exit_code, result.stdout) == (2, ""), options
        assert result.stderr.startswith(f"degrade: {message}")


def test_torchvision_is_imported_by_what_needs_it_alone():
    """It takes a second."""
    script = "import sys, degrade.sweep, degrade.cli; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_source_folder_runs_without_installed_metadata():
    script = (
        "import importlib.metadata as m, runpy, sys\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = m.version = m.metadata = none\n"
        "sys.argv = ['degrade', '--version']; runpy.run_module('degrade', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("degrade 0."), result.stderr
