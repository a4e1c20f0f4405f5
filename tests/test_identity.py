"""The construction argument, as code: the deeper net is no worse, by construction and by the bit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import smoke, write_run
from test_published import X, lively
from torch import nn
from torch.nn import functional as F

from degrade import commit, construction, store
from degrade.analysis.identity import BATCH_SIZE, compare, deepen, normalised, stage_statistics
from degrade.config import run_id
from degrade.data import load
from degrade.data.images import Images
from degrade.nets import cifar_net
from degrade.train import Training, load_splits, read_state, train

NETS = [("plain", "A"), ("residual", "A"), ("residual", "B"), ("residual", "C"), ("preact", "A"), ("preact", "C")]


def pair(block, shortcut="A", shallow=8, deep=20):
    """A lively shallow net, and a deeper one of the same kind that holds it."""
    small = lively(block, shallow, shortcut=shortcut)
    big = cifar_net(deep, block, width=4, shortcut=shortcut).eval()
    return small, big


@pytest.mark.parametrize(("block", "shortcut"), NETS)
@pytest.mark.parametrize(("shallow", "deep"), [(8, 14), (8, 32), (14, 20)])
def test_the_deeper_net_gives_the_same_logits_bit_for_bit(block, shortcut, shallow, deep):
    small, big = pair(block, shortcut, shallow, deep)
    assert not torch.equal(small(X), big(X))
    before = [t.clone() for t in small.state_dict().values()]
    deepen(small, big)
    assert torch.equal(small(X), big(X))
    assert all(torch.equal(a, b) for a, b in zip(before, small.state_dict().values(), strict=True))


@pytest.mark.parametrize("block", ["plain", "residual", "preact"])
def test_the_added_blocks_can_learn(block):
    """Every weight that is to bring the net away from the identity has a gradient that is neither 0 nor enormous."""
    small, big = pair(block)
    statistics = stage_statistics(small, [X, -X])
    deepen(small, big, statistics)
    F.cross_entropy(big.train()(X), torch.arange(8)).backward()
    kept = {id(p) for stage in big.stages for p in stage[0].parameters()}
    norms = {name: p.grad.norm().item() for name, p in big.named_parameters() if id(p) not in kept and p.ndim != 1}
    gamma = {name: p.grad.norm().item() for name, p in big.named_parameters() if id(p) not in kept and "bn2.w" in name}
    assert max(norms.values()) < 100 * big.linear.weight.grad.norm().item()
    moving = {"plain": norms, "residual": gamma, "preact": {n: v for n, v in norms.items() if "conv2" in n}}[block]
    assert min(moving.values()) > 0


def test_a_last_convolution_of_zeros_would_blow_gradients_up():
    """Why a residual block's scale is set to 0, not its convolution: no variance, and a division by sqrt(eps)."""
    small, big = pair("residual")
    deepen(small, big)
    added = big.stages[2][-1]
    norms = []
    for scale in (True, False):
        if not scale:
            nn.init.zeros_(added.conv2.weight)
            nn.init.ones_(added.bn2.weight)
        big.zero_grad()
        F.cross_entropy(big.train()(X), torch.arange(8)).backward()
        norms.append((added.bn2.weight if scale else added.conv2.weight).grad.norm().item())
    assert norms[1] > 30 * norms[0]


@pytest.mark.parametrize("block", ["residual", "preact"])
def test_in_training_mode_residual_nets_begin_exactly_where_the_shallow_net_is(block):
    small, big = pair(block)
    deepen(small, big, stage_statistics(small, [X]))
    start = compare(small, big, [(X, torch.arange(8))], training=True)
    assert (start.differing, start.max_difference) == (0, 0.0)


def test_in_training_mode_a_plain_net_begins_close_by_where_its_norms_are_calibrated():
    small, big = pair("plain", deep=14)
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % 10
    deepen(small, big)
    exact = compare(small, big, [(x, y)], training=True)
    deepen(small, big, stage_statistics(small, [x]))
    close = compare(small, big, [(x, y)], training=True)
    assert close.max_difference < 0.01 < 0.5 < exact.max_difference  # of these very batches, nearly exact
    assert compare(small, big, [(x, y)]).max_difference < 1e-3  # and in eval mode to rounding
    other = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert 0 < compare(small, big, [(other, y)], training=True).max_difference < exact.max_difference


def test_stage_statistics_are_those_of_what_an_added_block_is_given():
    net = lively("plain", 8)
    before = [t.clone() for t in net.state_dict().values()]
    maps = []
    net.train()
    x = net.stem(X)
    for stage in net.stages:
        x = stage(x)
        maps.append(F.relu(x))
    net.load_state_dict(dict(zip(net.state_dict(), before, strict=True)))
    net.eval()
    for statistics, there in zip(stage_statistics(net, [X]), maps, strict=True):
        torch.testing.assert_close(statistics.mean, there.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(statistics.variance, there.var(dim=(0, 2, 3)))
    assert not net.training
    for name, was, now in zip(net.state_dict(), before, net.state_dict().values(), strict=True):
        assert torch.equal(was, now) or "num_batches" in name, name


def test_compare_counts_what_differs():
    small, big = pair("plain", shallow=8, deep=14)
    deepen(small, big)
    images = Images(
        torch.randint(256, (BATCH_SIZE + 5, 3, 32, 32), dtype=torch.uint8), torch.zeros(BATCH_SIZE + 5).long()
    )
    mean = torch.zeros(3, 32, 32)
    same = compare(small, big, normalised(images, mean))
    assert (same.images, same.differing, same.max_difference) == (BATCH_SIZE + 5, 0, 0.0)
    assert same.shallow_error == same.deep_error == (small(images.images / 255).argmax(1) != 0).double().mean().item()
    with torch.no_grad():
        big.linear.bias[3] += 0.5
    other = compare(small, big, normalised(images, mean))
    assert (other.differing, other.max_difference) == (BATCH_SIZE + 5, pytest.approx(0.5))
    assert other.deep_loss != other.shallow_loss == same.shallow_loss


def test_a_shallower_net_cannot_hold_a_deeper_one():
    with pytest.raises(ValueError, match="a net of 1 blocks a stage cannot hold one of 2"):
        deepen(lively("plain", 14), cifar_net(8, "plain", width=4))


@pytest.fixture(scope="module")
def study(tmp_path_factory, data_dir):
    """A sweep's results: depth 8 and 14 of each block, trained for three epochs."""
    from degrade import sweep

    folder = tmp_path_factory.mktemp("identity") / "study"
    configs = [smoke(block, depth) for block in ("plain", "residual", "preact") for depth in (8, 14)]
    there = store.Study(folder, folder.name, "smoke", configs[0].shared())
    for _ in sweep.sweep(there, there.find(configs), sweep.Machine("cpu", 1, 1), data_dir):
        pass
    return folder


@pytest.fixture
def results(study, tmp_path, data_dir, monkeypatch):
    """A copy of it, to write into."""
    monkeypatch.setenv("DEGRADE_DATA", str(data_dir))
    shutil.copytree(study, tmp_path / "study")
    return tmp_path


def shallow(results, block):
    (folder,) = (results / "study").glob(f"{block}-8-s0-*")
    return folder


class TestCommand:
    @pytest.mark.parametrize("block", ["plain", "residual", "preact"])
    def test_proved_trained_on_and_compared(self, results, cli, block):
        told = cli("identity", shallow(results, block), "--depth", "14", "--steps", "10", "--threads", "1")
        assert told.exit_code == 0, told
        folder = results / f"study-identity-{block}-8-14-s0"
        record = json.loads((folder / store.IDENTITY).read_text())
        run = store.Run.open("study", shallow(results, block))
        assert record["train"]["images"] == 256
        assert record["test"]["images"] == 128
        for split in ("train", "test"):
            assert (record[split]["differing"], record[split]["max_difference"]) == (0, 0.0)
            error = getattr(run.epochs[-1], f"{split}_error")
            assert record[split]["deep_error"] == record[split]["shallow_error"] == error
        assert (record["start"]["training_mode"]["differing"] == 0) == (block != "plain")
        control, deeper = store.Study.open(folder).runs
        assert (deeper.config.depth, deeper.config.lr, deeper.config.milestones) == (14, 0.0002, ())
        assert deeper.config.init.startswith(f"identity:{run.folder.name}:")
        assert (control.status, deeper.status) == ("done", "done")
        assert replace(control.config, depth=14) == deeper.config
        scratch = next(
            r for r in store.Study.open(results / "study").runs if r.config.depth == 14 and r.config.block == block
        )
        runs = (scratch, deeper, control)
        for error in (record["train"]["deep_error"], *(run.epochs[-1].train_error for run in runs)):
            assert f"{100 * error:.2f} %" in told.stdout
        assert "every logit bit for bit on 256 training images" in told.stdout
        assert record["finding"] in told.stdout
        assert (folder / "figures" / "identity.png").stat().st_size > 1000
        log = (deeper.folder / store.LOG).read_bytes()
        again = cli("identity", shallow(results, block), "--depth", "14", "--steps", "10")
        assert (again.exit_code, (deeper.folder / store.LOG).read_bytes()) == (0, log)
        for command in ("check", "plot", "verdict", "report"):
            assert cli(command, results).exit_code == 0

    def test_training_begins_from_the_construction(self, results, cli, monkeypatch):
        kept = []
        write = commit.write_checkpoint
        monkeypatch.setattr(commit, "write_checkpoint", lambda *a, **k: kept.append(a) or write(*a, **k))
        assert cli("identity", shallow(results, "residual"), "--depth", "14", "--steps", "1").exit_code == 0
        first, second = (read_state(data) for _, step, data in kept[:2] if step == 0)
        assert (first.config.depth, second.config.depth) == (8, 14)
        state = second
        assert not any(m.any() for m in state.momentum)
        deep, small = cifar_net(14, "residual", width=4), cifar_net(8, "residual", width=4)
        deep.load_state_dict(state.net, strict=False)
        (path, *_) = commit.checkpoints(shallow(results, "residual") / store.CHECKPOINTS)
        small.load_state_dict(read_state(path.read_bytes()).net, strict=False)
        assert torch.equal(deep.eval()(X), small.eval()(X))
        assert all(torch.equal(small.state_dict()[name], value) for name, value in first.net.items())  # the control

    @pytest.mark.parametrize(
        ("error", "control", "words"),
        [
            (0.104, 0.102, "training did not leave the solution by more than half a point"),
            (0.2, 0.1, "training left the solution, and the deeper net is further from it"),
            (0.2, 0.198, "training left the solution, at this learning rate that of the shallow net too"),
            (0.2, None, "training left the solution"),
        ],
    )
    def test_what_is_said_of_training_on(self, error, control, words):
        assert construction._left(error, 0.1, control) == words

    def test_without_steps_it_proves_only(self, results, cli):
        told = cli("identity", shallow(results, "plain"), "--depth", "20")
        assert told.exit_code == 0
        assert {p.name for p in (results / "study-identity-plain-8-20-s0").iterdir()} == {store.IDENTITY, store.STUDY}
        assert "from scratch" not in told.stdout  # there is no plain-20 in that study
        for command in ("show", "check", "report"):
            assert cli(command, results).exit_code == 0
        told = cli("identity", shallow(results, "plain"), "--depth", "20", "--steps", "2", "--lr", "0.01")
        assert told.exit_code == 0, told

    def test_a_study_holds_one_construction(self, results, cli):
        command = ["identity", shallow(results, "plain"), "--study", "x"]
        assert cli(*command, "--depth", "14").exit_code == 0
        before = (results / "x" / store.IDENTITY).read_bytes()
        for more in (["--depth", "20"], ["--depth", "20", "--steps", "2"]):
            told = cli(*command, *more)
            assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
            assert "is of plain-14 from plain-8-s0-" in told.stderr
        assert (results / "x" / store.IDENTITY).read_bytes() == before

    @pytest.mark.parametrize("options", [[], ["--steps", "4"]])
    def test_a_study_that_was_trained_from_scratch_holds_none(self, results, cli, options):
        told = cli("identity", shallow(results, "plain"), "--depth", "14", "--study", "study", *options)
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
        assert "init he there, identity:" in told.stderr
        assert not (results / "study" / "identity.json").exists()

    def test_a_run_that_another_process_has_is_a_line(self, results, cli):
        run = construction_run(results, cli)
        with commit.hold(run / store.LOCK):
            told = cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert f"held by process {os.getpid()}" in told.stderr

    def test_a_damaged_record_is_named(self, results, cli):
        construction_run(results, cli)
        path = results / "study-identity-plain-8-14-s0" / store.IDENTITY
        for content in ("[]", "{}", '{"source": [1]}', '{"source": {}, "deep": 14}', "junk"):
            path.write_text(content)
            told = cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4")
            assert (told.exit_code, told.stderr.count("\n")) == (1, 1), content
            assert f"{path} is not" in told.stderr
            assert "delete it, and the same command writes it again" in told.stderr
        assert f"{path}\n" in cli("check", results).stdout
        told = cli("report", results)
        assert (told.exit_code, str(path) in told.stderr) == (1, True)
        assert "identity.json is not JSON" in (results / "report.md").read_text()

    def test_weights_before_the_last_step_are_not_taken_for_the_last(self, results, cli):
        folder = shallow(results, "plain") / store.CHECKPOINTS
        newest, *_ = commit.checkpoints(folder)
        state = read_state(newest.read_bytes())
        training = Training(state.config, load_splits(state.config, None, "cpu"))
        newest.write_bytes(b"junk")
        commit.write_checkpoint(folder, 0, training.state())  # an older one, and sound
        newest.write_bytes(b"junk")
        for command in (
            ["identity", folder.parent, "--depth", "14"],
            ["export", folder.parent, "--to", results / "n.pt"],
        ):
            told = cli(*command)
            assert (told.exit_code, told.stderr.count("\n")) == (1, 1), told
            assert newest.name in told.stderr
        assert not (results / "n.pt").exists()

    def test_a_proof_that_fails_is_a_failure(self, results, cli, monkeypatch):
        deepen = construction.identity.deepen

        def wrong(shallow, deep, statistics=None):
            deepen(shallow, deep, statistics)
            with torch.no_grad():
                deep.linear.bias[0] += 100

        monkeypatch.setattr(construction.identity, "deepen", wrong)
        told = cli("identity", shallow(results, "plain"), "--depth", "14")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert "the construction does not hold on this machine" in told.stderr
        assert len(list(results.iterdir())) == 1

    def test_runs_that_were_published_without_their_checkpoints_are_done(self, results, cli):
        """Under the run ids of an older version of degrade, too."""
        run = construction_run(results, cli)
        for folder in (run, *run.parent.glob("plain-8-*")):
            shutil.rmtree(folder / store.CHECKPOINTS)
        config = json.loads((run / store.CONFIG).read_text())
        del config["augment"]
        (run / store.CONFIG).write_bytes(store.to_json(config))
        run = run.rename(run.with_name(run_id(config)))
        before = {path: path.read_bytes() for path in run.parent.glob("*/*")}
        told = cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4")
        assert told.exit_code == 0, told
        assert "After 4 steps of training on" in told.stdout
        after = {path: path.read_bytes() for path in run.parent.glob("*/*") if path.suffix in (".json", ".csv")}
        assert after == {path: data for path, data in before.items() if path.suffix in (".json", ".csv")}
        assert not [*run.parent.glob("*/checkpoints")]

    def test_initial_weights_that_are_lost_are_not_replaced_by_others(self, results, cli):
        config = construction_run(results, cli)
        for path in (config / store.CHECKPOINTS).iterdir():
            path.unlink()
        (config / store.LOG).unlink()
        told = cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4")
        assert told.exit_code == 0  # the construction is made again
        for path in (config / store.CHECKPOINTS).iterdir():
            path.unlink()
        (config / store.LOG).unlink()
        study = store.Study.open(config.parent)
        from degrade import sweep

        lost = [run for run in study.runs if run.config.depth == 14]
        events = list(sweep.sweep(study, lost, sweep.Machine("cpu", 1, 1), Path("none")))
        assert "has lost its initial weights" in str(events[-1][1].value)
        with pytest.raises(ValueError, match="degrade identity makes such a run"):
            train(lost[0].config)

    def test_another_learning_rate_needs_a_study_of_its_own(self, results, cli):
        construction_run(results, cli)
        told = cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4", "--lr", "0.1")
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
        assert "lr 0.0002 there, 0.1 here" in told.stderr
        told = cli(
            "identity", shallow(results, "plain"), "--depth", "14", "--steps", "4", "--lr", "0.1", "--study", "x"
        )
        assert told.exit_code == 0

    @pytest.mark.parametrize(
        ("depth", "rule"),
        [("8", "depth must be above the run's, 8, to hold its net; got 8"), ("21", "depth must be 6n+2")],
    )
    def test_a_depth_that_cannot_hold_the_net(self, results, cli, depth, rule):
        told = cli("identity", shallow(results, "plain"), "--depth", depth)
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
        assert rule in told.stderr
        assert len(list(results.iterdir())) == 1

    def test_bad_runs(self, results, cli):
        for path in (shallow(results, "plain") / store.CHECKPOINTS).iterdir():
            path.unlink()
        told = cli("identity", shallow(results, "plain"), "--depth", "14")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert "has no weights (done): no checkpoint and no weights.pt" in told.stderr
        half = write_run(results / "half", smoke(steps=100), [])
        told = cli("identity", half.folder, "--depth", "14")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert "is missing; the identity construction needs a net that was trained to its end" in told.stderr
        (other,) = (results / "study").glob("residual-8-s0-*")
        (mine,) = (results / "study").glob("preact-8-s0-*")
        checkpoint = commit.checkpoints(other / store.CHECKPOINTS)[0]
        for path in (mine / store.CHECKPOINTS).iterdir():
            path.unlink()
        shutil.copy(checkpoint, mine / store.CHECKPOINTS)
        told = cli("identity", mine, "--depth", "14")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert f"it is of {other.name}, not of {mine.name}" in told.stderr
        told = cli("identity", results, "--depth", "14")
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)


def construction_run(results, cli):
    """The folder of a run of four steps from the construction."""
    assert cli("identity", shallow(results, "plain"), "--depth", "14", "--steps", "4").exit_code == 0
    (folder,) = (results / "study-identity-plain-8-14-s0").glob("plain-14-*")
    return folder


def test_no_image_changes_its_logits_on_genuine_cifar10(cifar10_dir):
    """Plain-20 into plain-56 at the paper's width; the nets are untrained, and the arithmetic is the same."""
    splits = load("cifar10", data_dir=cifar10_dir, train_images=500)
    small, big = lively("plain", 20, width=16), cifar_net(56, "plain").eval()
    deepen(small, big)
    same = compare(small, big, normalised(splits.train, splits.mean))
    assert (same.images, same.differing) == (500, 0)
