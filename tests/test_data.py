import errno
import functools
import hashlib
import http.server
import io
import pickle
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import serving

from degrade import data
from degrade.data import shapes
from degrade.data.official import CIFAR10
from degrade.data.plan import PAD, Batch, SamplePlan, augment, normalise
from degrade.errors import Failure


@pytest.fixture(autouse=True)
def fresh_cache():
    data.load.cache_clear()


class TestShapes:
    def test_the_bytes_are_the_same_everywhere(self, data_dir):
        images = np.load(shapes._cache(data_dir))
        assert hashlib.sha256(images.tobytes()).hexdigest() == shapes.SHA256

    def test_content(self, data_dir):
        splits = data.load("shapes", data_dir=data_dir)
        assert splits.train.images.shape == (10_000, 3, 32, 32)
        assert splits.test.images.shape == (2_000, 3, 32, 32)
        assert splits.train.images.dtype == torch.uint8
        assert torch.equal(splits.train.labels.bincount(), torch.full((10,), 1000))
        assert torch.equal(splits.test.labels.bincount(), torch.full((10,), 200))
        assert len(splits.val) == 0
        assert splits.num_classes == len(set(shapes.CLASSES)) == 10

    def test_no_test_image_is_a_training_image(self, data_dir):
        splits = data.load("shapes", data_dir=data_dir)
        train = {image.numpy().tobytes() for image in splits.train.images}
        assert len(train) == 10_000
        assert not any(image.numpy().tobytes() in train for image in splits.test.images)

    def test_a_damaged_cache_is_drawn_anew(self, tmp_path, monkeypatch):
        small = np.zeros((12, 3, 2, 2), np.uint8)
        monkeypatch.setattr(shapes, "_draw_all", lambda: small)
        monkeypatch.setattr(shapes, "SHA256", hashlib.sha256(small.tobytes()).hexdigest())
        shapes.fetch(tmp_path)
        good = shapes._cache(tmp_path).read_bytes()
        for bad in (good[:-1] + b"\1", good[: len(good) // 2], b"", pickle.dumps(small)):
            shapes._cache(tmp_path).write_bytes(bad)
            assert shapes._images(tmp_path) is None
            shapes.fetch(tmp_path)
            assert shapes._cache(tmp_path).read_bytes() == good

    def test_a_cache_that_cannot_be_written_is_done_without(self, tmp_path, monkeypatch):
        small = np.zeros((12_000, 3, 1, 1), np.uint8)
        monkeypatch.setattr(shapes, "_draw_all", lambda: small)

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shapes, "write_file", full)
        shapes.fetch(tmp_path / "new")
        (train, _), (test, _) = shapes.load(tmp_path / "new")
        assert (len(train), len(test)) == (10_000, 2_000)


class TestSplits:
    def test_validation_and_training_images_are_disjoint_and_balanced(self, data_dir):
        splits = data.load("shapes", data_dir=data_dir, train_images=2_000, val_images=1_000, test_images=500)
        keys = [{image.numpy().tobytes() for image in part.images} for part in (splits.train, splits.val)]
        assert not keys[0] & keys[1]
        assert splits.train.labels.bincount().tolist() == [200] * 10
        assert splits.val.labels.bincount().tolist() == [100] * 10
        assert splits.test.labels.bincount().tolist() == [50] * 10

    def test_the_mean_is_of_the_training_images_alone(self, data_dir):
        splits = data.load("shapes", data_dir=data_dir, train_images=300, val_images=5_000)
        mean = splits.train.images.double().mean(0) / 255
        torch.testing.assert_close(splits.mean, mean.float(), rtol=0, atol=1e-7)
        assert splits.mean.shape == (3, 32, 32)

    def test_the_split_is_a_function_of_its_seed(self, data_dir):
        first, again, other = (
            data.load("shapes", data_dir=data_dir, val_images=100, split_seed=seed).val.images for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_all_images_keep_their_order(self, data_dir):
        splits = data.load("shapes", data_dir=data_dir)
        assert torch.equal(splits.train.labels, torch.arange(10_000) % 10)

    @pytest.mark.parametrize("count", [0, 1, 37, 60])
    def test_stratified_keeps_unequal_shares(self, count):
        labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
        chosen = data.stratified(labels, count, seed=5)
        assert len(set(chosen.tolist())) == count
        assert torch.equal(chosen, chosen.sort().values)
        for label, share in enumerate((1 / 6, 1 / 3, 1 / 2)):
            assert abs((labels[chosen] == label).sum().item() - share * count) <= 1

    def test_stratified_refuses_more_than_there_are(self):
        with pytest.raises(ValueError, match="5 images were asked for, 3 are there"):
            data.stratified(torch.zeros(3, dtype=torch.int64), 5, seed=0)


class TestSamplePlan:
    def test_every_image_once_in_each_pass(self):
        plan = SamplePlan(images=50, batch_size=8, seed=3)
        stream = torch.cat([plan.batch(step).index for step in range(25)])  # 200 images: four passes
        for start in range(0, 200, 50):
            assert sorted(stream[start : start + 50].tolist()) == list(range(50))
        assert stream[:50].tolist() != stream[50:100].tolist()

    def test_a_step_is_the_same_wherever_one_starts(self):
        def same(a, b):
            return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))

        forward = SamplePlan(images=50, batch_size=8, seed=3)
        steps = [forward.batch(step) for step in range(40)]
        for step in (39, 0, 17, 18):
            assert same(SamplePlan(images=50, batch_size=8, seed=3).batch(step), steps[step])
            assert same(forward.batch(step), steps[step])
        assert not same(SamplePlan(images=50, batch_size=8, seed=4).batch(0), steps[0])

    def test_golden_choices(self):
        """The order, crops and flips of a published run must never change."""
        batch = SamplePlan(images=50_000, batch_size=4, seed=0).batch(12_345)
        got = [batch.index.tolist(), batch.dy.tolist(), batch.dx.tolist(), batch.flip.tolist()]
        assert got == [[25431, 46972, 30568, 7075], [4, 1, 1, 2], [2, 8, 6, 4], [True, True, False, False]]

    def test_a_batch_larger_than_the_training_set(self):
        index = SamplePlan(images=5, batch_size=12, seed=0).batch(0).index
        assert index.bincount().min() >= 2

    def test_crops_and_flips_are_even_and_independent_of_each_other(self):
        plan = SamplePlan(images=100, batch_size=500, seed=0)
        batches = [plan.batch(step) for step in range(60)]
        dy, dx, flip = (torch.cat([getattr(b, name) for b in batches]) for name in ("dy", "dx", "flip"))
        for offsets in (dy, dx):
            assert offsets.min() == 0
            assert offsets.max() == 2 * PAD
            assert (offsets.bincount() / len(offsets) - 1 / 9).abs().max() < 0.01
        assert abs(flip.double().mean() - 0.5) < 0.01
        pairs = torch.stack([dy, dx, flip.long()]).double()
        assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.02
        assert len(set(zip(dy[:500].tolist(), dx[:500].tolist(), strict=True))) > 60  # not one offset a batch


def test_augment_is_pad_crop_flip_image_by_image():
    plan = SamplePlan(images=20, batch_size=20, seed=1)
    batch = plan.batch(0)
    images = torch.randn(20, 3, 32, 32)
    got = augment(images, batch)
    for i in range(20):
        padded = torch.zeros(3, 40, 40)
        padded[:, 4:36, 4:36] = images[i]
        y, x = int(batch.dy[i]), int(batch.dx[i])
        crop = padded[:, y : y + 32, x : x + 32]
        assert torch.equal(got[i], crop.flip(2) if batch.flip[i] else crop)
    assert batch.flip.any()
    assert not batch.flip.all()
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_middle_crop_changes_nothing():
    images = torch.randn(3, 3, 32, 32)
    middle = torch.full((3,), PAD)
    still = Batch(torch.arange(3), middle, middle, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(augment(images, still), images)


def test_normalise_subtracts_the_mean_and_divides_by_no_deviation():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    mean = torch.rand(3, 4, 4)
    torch.testing.assert_close(normalise(images, mean), images / 255 - mean)


class TestCifar10:
    def test_genuine_images(self, cifar10_dir):
        splits = data.load("cifar10", data_dir=cifar10_dir)
        assert splits.train.images.shape == (50_000, 3, 32, 32)
        assert splits.test.images.shape == (10_000, 3, 32, 32)
        assert splits.train.labels.bincount().tolist() == [5_000] * 10
        assert splits.train.labels[:6].tolist() == [6, 9, 9, 4, 1, 1]  # frog, truck, truck, deer, automobile, ...
        channel_means = splits.mean.mean((1, 2))
        torch.testing.assert_close(channel_means, torch.tensor([0.49140, 0.48216, 0.44653]), rtol=0, atol=1e-5)

    def test_a_flipped_byte_is_refused_before_anything_is_unpickled(self, cifar10_dir, tmp_path, monkeypatch):
        folder = tmp_path / CIFAR10.folder
        folder.mkdir()
        for path in (cifar10_dir / CIFAR10.folder).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        bad = bytearray((folder / "data_batch_3").read_bytes())
        bad[1_000_000] ^= 1
        (folder / "data_batch_3").write_bytes(bad)

        def unpickled(*_, **__):
            raise AssertionError("unpickled")

        monkeypatch.setattr(pickle, "load", unpickled)
        with pytest.raises(Failure, match=f"CIFAR-10 is damaged in {tmp_path}"):
            data.load("cifar10", data_dir=tmp_path)

    @pytest.fixture
    def server(self, tmp_path, monkeypatch):
        """A tiny CIFAR-10 in the real format, served on this machine."""
        folder = tmp_path / "made" / CIFAR10.folder
        folder.mkdir(parents=True)
        official = torchvision.datasets.CIFAR10
        for lists in ("train_list", "test_list"):
            entries = []
            for name, _ in getattr(official, lists):
                pixels = np.random.default_rng(len(name)).integers(0, 256, (20, 3072), dtype=np.uint8)
                (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
                entries.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
            monkeypatch.setattr(official, lists, entries)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane"]}))
        meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
        monkeypatch.setattr(official, "meta", official.meta | {"md5": meta})
        archive = tmp_path / "made" / official.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, CIFAR10.folder)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
        with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
            monkeypatch.setattr(official, "url", f"{url}{archive.name}")
            monkeypatch.setattr(official, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
            yield archive

    def test_it_is_downloaded_once_with_a_progress_bar(self, server, tmp_path, capfd):
        data.fetch("cifar10", tmp_path / "data")
        assert "100%" in capfd.readouterr().err
        server.unlink()  # a second download would fail
        data.fetch("cifar10", tmp_path / "data")
        (train, _), (test, _) = CIFAR10.load(tmp_path / "data")
        assert (len(train), len(test)) == (100, 20)

    def test_an_archive_with_another_checksum_is_not_opened(self, server, tmp_path):
        with tarfile.open(server, "w:gz") as tar:
            info = tarfile.TarInfo("../escaped")
            tar.addfile(info, io.BytesIO())
        with pytest.raises(Failure, match="CIFAR-10 is missing"):
            data.fetch("cifar10", tmp_path / "data")
        assert not (tmp_path / "escaped").exists()
        assert not (tmp_path / "data" / CIFAR10.folder).exists()

    def test_missing_and_offline_says_what_to_do(self, tmp_path, monkeypatch):
        def offline(*_, **__):
            raise URLError("no network")

        monkeypatch.setattr("degrade.data.download.urlopen", offline)
        with pytest.raises(Failure) as error:
            data.fetch("cifar10", tmp_path)
        message = str(error.value)
        assert "\n" not in message
        assert "urlopen" not in message
        for part in ("missing", str(tmp_path), "no network", "--data-dir", "DEGRADE_DATA", "--dataset shapes"):
            assert part in message

    def test_missing_is_said_on_load_too(self, tmp_path):
        with pytest.raises(Failure, match="CIFAR-10 is missing"):
            data.load("cifar10", data_dir=tmp_path)


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DEGRADE_DATA", str(tmp_path))
    assert data.default_data_dir() == tmp_path
    monkeypatch.delenv("DEGRADE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.default_data_dir() == tmp_path / "cache" / "degrade"
