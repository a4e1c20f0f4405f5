import dataclasses
import io
import math
import zipfile

import pytest
import torch
from conftest import smoke
from torch import nn

from degrade.data import load
from degrade.data.images import Images
from degrade.data.plan import SamplePlan
from degrade.evaluate import BATCH_SIZES, evaluate
from degrade.nets import cifar_net
from degrade.train import Training, load_splits, parameter_groups, train, training_batch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def splits(data_dir):
    return load_splits(smoke(), data_dir, "cpu")


def epochs_of(training):
    return [epoch for epoch in training if epoch]


class TestEvaluate:
    def test_error_and_loss_are_those_of_the_whole_set(self):
        torch.manual_seed(0)
        count = 2 * BATCH_SIZES["cpu"] + 17  # a ragged last batch
        images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8)
        labels = torch.randint(10, (count,))
        mean = torch.rand(3, 8, 8)
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10))
        logits = net.eval()(images / 255 - mean).double()
        loss, error = evaluate(net, images, labels, mean)
        assert error == (logits.argmax(1) != labels).double().mean().item()
        assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)

    @pytest.mark.parametrize("mode", [True, False])
    def test_the_net_stays_as_it_was(self, splits, mode):
        net = cifar_net(8, "plain", width=4).train(mode)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        evaluate(net, splits.test.images, splits.test.labels, splits.mean)
        assert net.training is mode
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class TestOneStep:
    def test_sgd_is_the_papers(self, splits):
        """Two updates by hand: v = 0.9 v + g + 1e-4 w; w -= lr v. No Nesterov, no dampening."""
        config = smoke(lr=0.05, steps=8, milestones=(1,), weight_decay=0.01)
        training = Training(config, splits)
        hand = Training(config, splits)
        velocity = [torch.zeros_like(p) for p in hand.net.parameters()]
        for step, lr in enumerate((0.05, 0.005)):
            x, y = training_batch(splits, hand.plan.batch(step))
            hand.net.zero_grad()
            nn.functional.cross_entropy(hand.net(x), y).backward()
            with torch.no_grad():
                for p, v in zip(hand.net.parameters(), velocity, strict=True):
                    v.mul_(0.9).add_(p.grad + 0.01 * p)
                    p.sub_(lr * v)
            training.update()
        for p, q in zip(training.net.parameters(), hand.net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)

    def test_the_batch_is_normalised_cropped_and_labelled(self, splits):
        batch = Training(smoke(), splits).plan.batch(0)
        x, y = training_batch(splits, batch)
        assert x.shape == (32, 3, 32, 32)
        assert torch.equal(y, splits.train.labels[batch.index])
        middle = splits.train.images[batch.index[0]].float() / 255 - splits.mean
        row, column = 4 + 12 - int(batch.dy[0]), 4 + 12 - int(batch.dx[0])  # where pixel (12, 12) went
        column = 31 - column if batch.flip[0] else column
        torch.testing.assert_close(x[0, :, row, column], middle[:, 12, 12])

    def test_decay_all_or_convolutions_only(self):
        net = cifar_net(8, "plain", width=4)
        (everything,) = parameter_groups(net, 1e-4, "all")
        assert len(everything["params"]) == len(list(net.parameters()))
        weights, others = parameter_groups(net, 1e-4, "conv")
        assert weights["weight_decay"] == 1e-4
        assert others["weight_decay"] == 0.0
        assert all(p.ndim in (2, 4) for p in weights["params"])
        assert len(weights["params"]) == 8
        assert len(weights["params"]) + len(others["params"]) == len(everything["params"])


class TestRun:
    def test_the_rows_are_what_they_say(self, splits):
        training = Training(smoke(), splits)
        wrong = []
        for epoch in training:
            if len(wrong) < 8:
                wrong.append(training.wrong.item() if epoch is None else None)
            if epoch and epoch.epoch == 1:
                assert epoch.step == 8  # 256 images / 32
                assert epoch.lr == 0.02
                train_set, test_set = splits.train, splits.test
                assert (epoch.train_loss, epoch.train_error) == evaluate(
                    training.net, train_set.images, train_set.labels, splits.mean
                )
                assert (epoch.test_loss, epoch.test_error) == evaluate(
                    training.net, test_set.images, test_set.labels, splits.mean
                )
                assert epoch.val_error is None
                assert wrong[6] <= epoch.train_error_running * 256 <= wrong[6] + 32
        assert [(row.epoch, row.step, row.lr) for row in training.epochs] == [
            (1, 8, 0.02),
            (2, 16, 0.002),
            (3, 24, pytest.approx(0.0002)),
        ]

    def test_the_running_error_counts_this_epochs_batches_alone(self, splits):
        config = smoke(batch_size=96, steps=8)  # epochs end after 3, 6 and 8 steps
        training = Training(config, splits)
        assert [config.epoch_end(e) for e in (1, 2, 3)] == [3, 6, 8]
        counted = []
        update = training.update

        def counting():
            before = training.wrong.item()
            update()
            counted.append(training.wrong.item() - before)

        training.update = counting
        rows = epochs_of(training)
        assert [row.train_error_running for row in rows] == [
            sum(counted[:3]) / 288,
            sum(counted[3:6]) / 288,
            sum(counted[6:]) / 192,
        ]

    def test_validation_adds_its_columns(self, data_dir):
        config = smoke(val_images=100)
        splits = load_splits(config, data_dir, "cpu")
        assert len(splits.val) == 100
        row = next(train(config, data_dir=data_dir))
        assert 0 <= row.val_error <= 1
        assert row.val_loss > 0

    def test_learning_happens(self, data_dir):
        rows = list(train(smoke("residual", steps=120, lr=0.05, warmup_steps=0, milestones=(90,)), data_dir=data_dir))
        assert rows[-1].train_error < 0.7 < rows[0].train_error

    def test_the_same_run_twice_is_the_same_bytes(self, splits):
        states = []
        for _ in range(2):
            training = Training(smoke("residual"), splits)
            epochs_of(training)
            states.append(training.state())
        assert states[0] == states[1]

    def test_another_seed_is_another_run(self, splits):
        rows = [epochs_of(Training(smoke(seed=seed), splits))[-1] for seed in (0, 1)]
        assert rows[0].train_loss != rows[1].train_loss

    @pytest.mark.parametrize("block", ["plain", "residual"])
    def test_stopped_after_any_step_it_goes_on_to_the_same_bytes(self, splits, block):
        config = smoke(block, val_images=0, decay="conv" if block == "plain" else "all")
        whole = Training(config, splits)
        states = [whole.state()]
        for _ in whole:
            states.append(whole.state())  # noqa: PERF401
        assert len(states) == 1 + 24 + 3 * (2 + 1 + 1)  # updates, and 2 + 1 batches and a row each epoch
        for moment in (0, 5, 8, 9, 11, 12, 20, 33, 35, 36):
            resumed = Training(config, splits)
            resumed.restore(states[moment])
            assert resumed.state() == states[moment]
            epochs_of(resumed)
            assert resumed.state() == states[-1], moment
            assert resumed.epochs == whole.epochs

    def test_a_state_of_another_run_is_refused(self, splits):
        state = Training(smoke(), splits).state()
        with pytest.raises(ValueError, match=r"it is of plain-8-s0-.*, not of plain-8-s1-"):
            Training(smoke(seed=1), splits).restore(state)

    def test_a_state_that_unpacks_to_more_than_it_is_is_refused(self, splits):
        training = Training(smoke(), splits)
        bomb = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(training.state())) as sound, zipfile.ZipFile(bomb, "w") as packed:
            for record in sound.infolist():
                packed.writestr(record.filename, sound.read(record), zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match="it unpacks to more than it is"):
            training.restore(bomb.getvalue())

    def test_a_finished_run_has_nothing_left_to_do(self, splits):
        training = Training(smoke(), splits)
        epochs_of(training)
        again = Training(smoke(), splits)
        again.restore(training.state())
        assert list(again) == []

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_diverged_run_stops_at_the_end_of_its_epoch(self, splits, value):
        training = Training(smoke(), splits)
        for _ in range(3):
            next(iter(training))
        with torch.no_grad():
            training.net.linear.weight.fill_(value)
        rows = epochs_of(training)
        assert len(rows) == 1
        assert rows[0].diverged
        assert rows[0].step == 8
        assert training.finished

    def test_plain_and_residual_see_the_same_images(self, splits):
        plain, residual = (Training(smoke(block), splits) for block in ("plain", "residual"))
        assert torch.equal(plain.plan.batch(5).index, residual.plan.batch(5).index)
        assert torch.equal(plain.net.conv.weight, residual.net.conv.weight)

    def test_depth_110_takes_the_warm_up_lr_to_the_optimizer(self, splits):
        config = smoke(depth=110, width=1, warmup_steps=1, lr=0.1, batch_size=2, steps=3, milestones=())
        training = Training(config, tiny(splits))
        seen = []
        for _ in range(3):
            training.update()
            seen.append(training.optimizer.param_groups[0]["lr"].item())
        assert seen == pytest.approx([0.01, 0.1, 0.1])


def tiny(splits):
    few = Images(splits.train.images[:8], splits.train.labels[:8])
    return dataclasses.replace(splits, train=few, test=few)


def test_the_paper_protocol_runs_on_genuine_cifar10(cifar10_dir):
    """One update and the evaluation of a few images of the paper's own protocol, all 50,000 images in place."""
    config = dataclasses.replace(smoke(), dataset="cifar10", train_images=None, test_images=200, steps=1, milestones=())
    load.cache_clear()
    splits = load_splits(config, cifar10_dir, "cpu")
    assert len(splits.train) == 50_000
    training = Training(dataclasses.replace(config, batch_size=128, width=16), splits)
    training.update()
    loss, error = evaluate(training.net, splits.test.images, splits.test.labels, splits.mean)
    assert 0 < error <= 1
    assert math.isfinite(loss)


def test_crops_are_padded_with_the_mean_or_with_black(data_dir):
    """As zeros after the mean was subtracted, or before."""
    splits = load_splits(smoke(), data_dir, "cpu")
    batch = SamplePlan(len(splits.train), 64, 0).batch(0)
    (grey, labels), (black, same) = (training_batch(splits, batch, padding) for padding in ("mean", "black"))
    assert torch.equal(labels, same)
    padded = (grey == 0).all(1, keepdim=True).expand_as(grey)
    assert 0.01 < padded.double().mean() < 0.5
    assert (black + splits.mean)[padded].abs().max() < 1e-6
    assert (black + splits.mean).min() > -1e-6
    # Each image carries its own mean along when it is shifted; padded with black, the mean stays where it is.
    unshifted = (batch.dy == 4) & (batch.dx == 4) & ~batch.flip
    assert torch.allclose(grey[unshifted], black[unshifted], atol=1e-6)
