"""Images that are too many for memory: read from the disk, batch by batch, as a function of (seed, step)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from degrade import bench, data
from degrade.config import RunConfig, dataset_of
from degrade.data import imagenet, pack, stream
from degrade.data.plan import SamplePlan
from degrade.data.stream import crop, middle_view, random_view
from degrade.errors import Failure
from degrade.log import to_csv
from degrade.train import Training

SIZE = 32
FIELDS = {
    "width": 4,
    "steps": 9,
    "batch_size": 8,
    "milestones": (6,),
    "warmup_steps": 0,
}


def picture(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEG files of several shapes, one of them grey and one a PNG."""
    root = tmp_path_factory.mktemp("images") / "mini"
    seed = 0
    for split, count in (("train", 10), ("val", 5)):
        for name in ("n01", "n02", "n03"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                image = picture(seed, 40 + 3 * (seed % 7), 50 + 5 * (seed % 4))
                image = image.convert("L") if i == 3 else image
                image.save(root / split / name / f"{name}_{i}.{'png' if i == 4 else 'JPEG'}")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dataset(folder, cache):
    return imagenet.prepare(folder, cache, image_size=SIZE).dataset


def config_of(dataset, depth=18, block="residual", **fields):
    return RunConfig(block=block, depth=depth, seed=0, dataset=dataset, **(FIELDS | fields))


def training(dataset, cache, **fields):
    config = config_of(dataset, **fields)
    data.load.cache_clear()
    splits = data.load(dataset, input_mean=config.input_mean, data_dir=cache)
    return Training(config, splits)


def test_its_name_says_what_is_in_it(dataset, folder, cache):
    assert dataset.startswith("imagenet:mini:30+15:3:32:")
    assert dataset_of(dataset)[:4] == (30, 15, 3, 32)
    train, test = imagenet.load(dataset, cache)
    assert (len(train), len(test)) == (30, 15)
    assert train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10  # as torchvision's ImageNet orders them
    config = config_of(dataset)
    assert (config.family, config.augment, config.input_mean) == ("imagenet", "scale-color", (0.485, 0.456, 0.406))


def test_the_paper_s_protocol_on_imagenet(dataset):
    from degrade.config import matches_protocol, protocol_fields

    config = RunConfig(block="plain", depth=34, seed=0, dataset=dataset, **protocol_fields("paper", {}, dataset))
    assert (config.width, config.batch_size, config.steps, config.lr) == (64, 256, 600_000, 0.1)
    assert config.weight_decay == 1e-4
    assert matches_protocol(config.shared(), "paper")


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"depth": 20}, "depth must be one of 18, 34, 50, 101, 152 on ImageNet; got 20"),
        ({"block": "preact"}, "block on ImageNet must be one of plain, residual"),
        ({"augment": "crop-flip"}, "augment must be one of scale-color, none"),
        ({"bn_batch_size": 3}, "bn_batch_size must divide the batch_size 8; got 3"),
    ],
)
def test_what_there_is_not(fields, rule, dataset):
    with pytest.raises(ValueError, match=rule):
        config_of(dataset, **fields)


class TestViews:
    def test_they_are_a_function_of_seed_and_step(self):
        first, again = random_view(1, 5, 8), random_view(1, 5, 8)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not np.array_equal(first.side, random_view(1, 6, 8).side)
        assert not np.array_equal(first.side, random_view(2, 5, 8).side)

    def test_scale_crop_flip_and_colour_have_the_paper_s_range(self):
        view = random_view(0, 0, 20_000)
        assert 256 <= 224 * view.side.min() < 257
        assert 479 < 224 * view.side.max() <= 480
        for place in (view.y, view.x):
            assert 0 <= place.min() < 0.01
            assert 0.99 < place.max() < 1
        assert abs(view.flip.mean() - 0.5) < 0.02
        # The colours' covariance is that of the components, a tenth of their standard deviations each.
        vectors = stream.EIGENVECTORS
        wanted = vectors @ np.diag((0.1 * stream.EIGENVALUES) ** 2) @ vectors.T
        assert np.allclose(np.cov(view.color.T), wanted, atol=0.05 * wanted.max())
        assert np.abs(view.color.mean(0)).max() < 1e-3

    def test_the_components_are_orthonormal(self):
        vectors = stream.EIGENVECTORS
        assert np.allclose(vectors @ vectors.T, np.eye(3), atol=1e-3)

    @pytest.mark.parametrize(("height", "width", "most", "mean"), [(512, 512, 1, 0.1), (375, 500, 6, 1)])
    def test_a_test_image_is_what_torchvision_s_v2_makes_of_it(self, height, width, most, mean):
        image = picture(3, height, width)
        theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
        side, y, x, flip, color = (choice[0] for choice in middle_view(1))
        ours = crop(image, 224, side, y, x, flip)
        assert not color.any()
        difference = np.abs(ours.astype(int) - np.asarray(theirs).transpose(2, 0, 1))
        assert difference.max() <= most  # it rounds the longer side and the place of the crop to whole pixels
        assert difference.mean() < mean

    def test_a_crop_in_a_corner_mirrored(self):
        image = picture(4, 480, 640)
        theirs = v2.functional.resized_crop(image, 0, 0, 240, 240, [224, 224])
        ours = crop(image, 224, 480 / 240, 0.0, 0.0, True)
        assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1)[:, :, ::-1])


class TestBatches:
    def test_training_batches_are_what_the_plan_says(self, dataset, cache, folder):
        train, _ = imagenet.load(dataset, cache)
        plan = SamplePlan(len(train), 8, 3, "scale-color")
        batches = list(train.training_batches(plan, 0, 7, slice(None)))
        assert len(batches) == 7
        for step, (images, labels, colors) in enumerate(batches):
            index, view = plan.index(step), random_view(3, step, 8)
            assert labels.tolist() == train.labels[index].tolist()
            assert torch.equal(colors, torch.from_numpy(view.color).float())
            for row in range(8):
                whole = train.reader.read(int(index[row]))
                wanted = crop(whole, SIZE, *(float(choice[row]) for choice in view[:3]), bool(view.flip[row]))
                assert np.array_equal(images[row].numpy(), wanted)

    def test_they_can_begin_anywhere_and_be_shared_out(self, dataset, cache):
        train, _ = imagenet.load(dataset, cache)
        plan = SamplePlan(len(train), 8, 3, "scale-color")
        whole = list(train.training_batches(plan, 0, 6, slice(None)))
        late = list(train.training_batches(plan, 4, 6, slice(None)))
        half = list(train.training_batches(plan, 0, 6, slice(4, 8)))
        for there, here in zip(whole[4:], late, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
        for there, here in zip(whole, half, strict=True):
            assert all(torch.equal(a[4:], b) for a, b in zip(there, here, strict=True))

    def test_the_middles_of_all_in_order(self, dataset, cache):
        _, test = imagenet.load(dataset, cache)
        parts = torch.cat(list(test.middles(4)))
        assert len(parts) == 16
        assert torch.equal(parts[14], parts[15])
        assert torch.equal(test.take(torch.arange(15)).images, parts[:15])
        chosen = torch.tensor([7, 2])
        assert torch.equal(test.part(chosen).take(torch.arange(2)).images, parts[chosen])
        assert test.part(chosen).labels.tolist() == test.labels[chosen].tolist()

    def test_nothing_is_left_running_where_it_is_broken_off(self, dataset, cache):
        import threading

        train, _ = imagenet.load(dataset, cache)
        batches = train.training_batches(SamplePlan(30, 8, 0, "none"), 0, 1000, slice(None))
        next(batches)
        assert any(thread.name.startswith("reader") for thread in threading.enumerate())
        batches.close()
        assert not any(thread.name.startswith("reader") for thread in threading.enumerate())


class TestTraining:
    def test_a_run_from_the_disk_stops_anywhere_and_goes_on_to_the_same_bytes(self, dataset, cache):
        whole = training(dataset, cache)
        epochs = [epoch for epoch in whole if epoch]
        assert [epoch.step for epoch in epochs] == [4, 8, 9]
        for stop in (2, 4, 7):  # in the middle of an epoch too
            first = training(dataset, cache)
            while first.step < stop:
                first.update()
                if first.step == first.config.epoch_end(len(first.epochs) + 1):
                    list(first.end_epoch())
            second = training(dataset, cache)
            second.update()  # whatever was read before
            second.restore(first.state())
            rows = [epoch for epoch in second if epoch]
            assert to_csv(second.epochs, validation=False) == to_csv(whole.epochs, validation=False)
            assert second.state() == whole.state()
            assert rows[-1] == epochs[-1]

    def test_a_store_of_whole_images_gives_the_log_of_the_files(self, dataset, cache, folder, tmp_path):
        pack.pack(folder, tmp_path / "store", short_side=0)
        packed = imagenet.prepare(tmp_path / "store", cache, image_size=SIZE).dataset
        assert packed.startswith("imagenet:mini:30+15:3:32:")
        assert packed != dataset
        logs = []
        for name in (dataset, packed):
            run = training(name, cache)
            logs.append(to_csv([epoch for epoch in run if epoch], validation=False))
        assert logs[0] == logs[1]

    def test_the_training_error_is_that_of_as_many_images_as_there_are_for_the_test(self, dataset, cache):
        run = training(dataset, cache)
        assert len(run.evaluations["train"].split) == 15
        assert run.evaluations["train"].split.labels.bincount().tolist() == [5, 5, 5]

    def test_a_validation_split_and_fewer_images(self, dataset, cache):
        data.load.cache_clear()
        splits = data.load(dataset, train_images=12, val_images=9, test_images=6, data_dir=cache)
        assert [len(part) for part in (splits.train, splits.val, splits.test)] == [12, 9, 6]
        assert not set(splits.train.which) & set(splits.val.which)

    def test_a_broken_file_ends_the_run_and_is_named(self, folder, tmp_path):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        broken = copy / "train" / "n02" / "n02_0.JPEG"
        broken.write_bytes(broken.read_bytes()[:200])
        dataset = imagenet.prepare(copy, tmp_path, image_size=SIZE).dataset
        with pytest.raises(Failure, match=r"n02_0\.JPEG cannot be decoded .*--skip-broken"):
            list(training(dataset, tmp_path))
        with pytest.raises(Failure, match=r"n02_0\.JPEG"):
            imagenet.check_folder(copy)
        with pytest.raises(Failure, match=r"1 files of train: .*n02_0\.JPEG"):
            pack.pack(copy, tmp_path / "store")
        about, notes = pack.pack(copy, tmp_path / "store", skip_broken=True)
        assert about.counts == (29, 15)
        assert "n02_0.JPEG" in notes[0]


def test_an_epoch_s_evaluation_is_as_long_as_is_measured():
    config = RunConfig(block="plain", depth=18, seed=0, dataset="imagenet:x:1000+50:2:64:0123456789ab", steps=10)
    assert bench._run_seconds(config, bench.Speed(step=0, image=1, start_up=0)) == config.epochs * (50 + 50)


class TestStore:
    @pytest.fixture
    def store(self, folder, tmp_path):
        pack.pack(folder, tmp_path / "store", short_side=36)
        return tmp_path / "store"

    def test_the_shorter_side_is_as_asked_for(self, store):
        with np.load(store / "train.npz") as table:
            assert table["shapes"].min(axis=1).tolist() == [36] * 30
            assert (store / "train.bin").stat().st_size == 3 * table["shapes"].prod(axis=1).sum()

    def test_every_damage_is_noticed(self, store, tmp_path):
        dataset = imagenet.prepare(store, tmp_path, image_size=SIZE).dataset
        imagenet.check(dataset, tmp_path)
        for path in sorted(store.glob("t*.*")):
            good = path.read_bytes()
            path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
            with pytest.raises(Failure, match=r"is damaged.*pack the images again"):
                imagenet.check(dataset, tmp_path)
            path.write_bytes(good[:-1])
            with pytest.raises(Failure, match=r"is damaged.*pack the images again"):
                imagenet.check(dataset, tmp_path)
            path.write_bytes(good)
        index = json.loads((store / "index.json").read_text())
        (store / "index.json").write_text(json.dumps(index | {"short_side": 37}))
        with pytest.raises(Failure, match="are others by now"):
            imagenet.load(dataset, tmp_path)
        for text in ("", "[]", "{}", json.dumps(index | {"format": "x"}), json.dumps(index | {"counts": 3})):
            (store / "index.json").write_text(text)
            with pytest.raises(Failure, match="is damaged"):
                imagenet.load(dataset, tmp_path)

    def test_it_is_never_written_over(self, store, folder):
        with pytest.raises(ValueError, match="is there already"):
            pack.pack(folder, store)

    def test_one_that_was_broken_off_is_begun_anew(self, store, folder):
        (store / "index.json").unlink()
        (store / "train.bin").write_bytes(b"half")
        pack.pack(folder, store)
        imagenet.check_folder(store)


def test_images_that_have_changed_are_others(folder, tmp_path):
    import shutil

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    dataset = imagenet.prepare(copy, tmp_path, image_size=SIZE).dataset
    assert dataset == imagenet.prepare(folder, tmp_path / "other", image_size=SIZE).dataset  # wherever they lie
    (copy / "train" / "n01" / "n01_0.JPEG").write_bytes(b"another")
    with pytest.raises(Failure, match="are others by now"):
        imagenet.load(dataset, tmp_path)
    shutil.rmtree(copy)
    with pytest.raises(Failure, match=r"are not in .* any more"):
        imagenet.load(dataset, tmp_path)
    with pytest.raises(Failure, match=r"are not known in .*degrade data fetch imagenet:PATH"):
        imagenet.load(dataset, tmp_path / "nowhere")
    assert data.state(dataset, tmp_path) == "no"


class TestParts:
    """A batch in equal parts, each with BN statistics of its own."""

    def noise(self, **fields):
        from conftest import smoke

        from degrade.bench import on_noise

        torch.manual_seed(0)
        return on_noise(smoke("residual", batch_size=32, **fields), "cpu")

    def test_the_whole_batch_is_one_part(self):
        runs = [self.noise(), self.noise(bn_batch_size=32)]
        for run in runs:
            run.update()
        pairs = zip(runs[0].net.state_dict().values(), runs[1].net.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_gradients_and_statistics_are_the_means_of_those_of_the_parts(self):
        from copy import deepcopy

        from torch.nn import functional as F

        from degrade.train import training_batch

        run = self.noise(bn_batch_size=8)
        before = deepcopy(run.net).train()
        x, y = training_batch(run.splits, run.plan.batch(0))
        run.update()
        moved, gradients = [], []
        for part_x, part_y in zip(x.split(8), y.split(8), strict=True):
            net = deepcopy(before)
            F.cross_entropy(net(part_x), part_y).backward()
            gradients.append([p.grad for p in net.parameters()])
            moved.append(list(net.buffers()))
        for buffer, values in zip(run.net.buffers(), zip(*moved, strict=True), strict=True):
            torch.testing.assert_close(buffer, torch.stack(values).mean(0))
        for parameter, values in zip(run.net.parameters(), zip(*gradients, strict=True), strict=True):
            torch.testing.assert_close(parameter.grad, torch.stack(values).mean(0), rtol=1e-4, atol=1e-6)

    def test_it_is_not_the_whole_batch_s_update(self):
        runs = [self.noise(), self.noise(bn_batch_size=8)]
        for run in runs:
            run.update()
        assert not torch.equal(runs[0].net.conv.weight, runs[1].net.conv.weight)


class TestTenCrops:
    def test_they_are_the_middle_and_the_corners_and_all_mirrored(self, dataset, cache):
        from degrade.analysis.crops import ten_views

        _, test = imagenet.load(dataset, cache)
        ((pixels, _, _),) = test.batches([(np.full(10, 3), ten_views(1))])
        image = test.reader.read(3)
        side = min(image.size) / stream.TEST
        width, height = image.size
        corner = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(width - side, 0, width, side))
        assert torch.equal(pixels[0], test.take(torch.tensor([3])).images[0])
        assert np.array_equal(pixels[2].numpy(), np.asarray(corner).transpose(2, 0, 1))
        assert torch.equal(pixels[5:], pixels[:5].flip(3))
        assert height >= side

    def test_each_image_is_decoded_once_for_its_ten_crops(self, dataset, cache, monkeypatch):
        from degrade.analysis.crops import ten_crop

        _, test = imagenet.load(dataset, cache)
        read, numbers = stream.Files.read, []
        monkeypatch.setattr(stream.Files, "read", lambda self, n: (numbers.append(n), read(self, n))[1])
        run = training(dataset, cache)
        list(ten_crop(run.net.eval(), test, run.splits.mean))
        assert sorted(numbers) == list(range(15))

    def test_predictions_are_averaged(self, dataset, cache):
        from degrade.analysis.crops import ten_crop
        from degrade.evaluate import evaluate

        run = training(dataset, cache)
        run.net.eval()
        _, test = imagenet.load(dataset, cache)
        one, ten = ten_crop(run.net, test, run.splits.mean)
        middles = test.take(torch.arange(15))
        loss, error = evaluate(run.net, middles.images, middles.labels, run.splits.mean)
        assert (one["crops"], one["error"], one["images"]) == (1, error, 15)
        assert one["loss"] == pytest.approx(loss, rel=1e-5)
        assert ten["crops"] == 10
        assert ten["loss"] != one["loss"]


def test_the_whole_way_on_the_command_line(cli, folder, tmp_path):
    """sweep, plot, verdict, identity, probe, check and report, as on CIFAR-10."""
    words = ("--protocol", "smoke", "--steps", "4", "--batch-size", "8", "--width", "4", "--device", "cpu")
    where = ("--out", tmp_path / "out", "--data-dir", tmp_path / "data")
    result = cli("sweep", "--dataset", f"imagenet:{folder}", "--image-size", "32", "--depths", "18,34", *words, *where)
    assert result.exit_code == 0, result.stderr
    (study,) = (tmp_path / "out").iterdir()
    assert study.name.startswith("mini-smoke")
    assert "34 v 18" in cli("verdict", tmp_path / "out").stdout
    assert cli("plot", tmp_path / "out").exit_code == 0
    run = next(study.glob("residual-18-*"))
    result = cli("identity", run, "--depth", "34", "--data-dir", tmp_path / "data")
    assert result.exit_code == 0, result.stderr
    result = cli("probe", study, "--probes", "ten-crop,responses", "--data-dir", tmp_path / "data")
    assert result.exit_code == 0, result.stderr
    assert (study / "figures" / "ten-crop.png").stat().st_size > 1000
    assert (study / "probes" / "ten-crop.csv").read_text().count("\n") == 9
    assert cli("check", tmp_path / "out").exit_code == 0
    assert cli("report", tmp_path / "out").exit_code == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "crops of 32 pixels" in page
    assert "Published on" not in page
