"""A folder of images of one's own: train/<class>/* and test/<class>/*."""

import contextlib
import errno
import json
import os

import numpy as np
import pytest
import torch
from conftest import smoke
from PIL import Image

from degrade import data
from degrade.config import dataset_of
from degrade.data import OFFICIAL, folder, listing, pack
from degrade.errors import Failure

RNG = np.random.default_rng(0)


def pixels(height=32, width=32, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def put(root, path, image=None, **options):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels()) if image is None else image).save(file, **options)


@pytest.fixture
def images(tmp_path):
    """Two classes, of which each split has some."""
    root = tmp_path / "My Flowers!"
    for i in range(6):
        put(root, f"train/{'rose' if i % 2 else 'daisy'}/{i}.png")
    for i in range(4):
        put(root, f"test/{'rose' if i % 2 else 'daisy'}/{i}.png")
    return root


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def prepare(images, cache, **options):
    return folder.prepare(images, cache, **options)


def test_its_name_says_what_is_in_it(images, cache):
    prepared = prepare(images, cache)
    assert prepared.dataset.startswith("folder:my-flowers:6+4:2:32:")
    assert prepared.notes == ()
    assert dataset_of(prepared.dataset)[:4] == (6, 4, 2, 32)
    (train, labels), (test, test_labels) = folder.load(prepared.dataset, cache)
    assert (train.shape, test.shape) == ((6, 3, 32, 32), (4, 3, 32, 32))
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]  # by file name over all classes; daisy comes before rose
    assert test_labels.tolist() == [0, 1, 0, 1]
    with Image.open(images / "train" / "rose" / "3.png") as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), train[3].numpy())
    assert folder.cached(cache) == [prepared.dataset]


def test_the_same_images_have_the_same_name_wherever_they_lie(images, cache, tmp_path):
    first = prepare(images, cache)
    moved = tmp_path / "elsewhere" / images.name
    moved.parent.mkdir()
    images.rename(moved)
    assert prepare(moved, tmp_path / "other").dataset == first.dataset


def test_they_are_decoded_once(images, cache, monkeypatch):
    first = prepare(images, cache)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_image", lambda *_: pytest.fail("decoded"))
        assert prepare(images, cache) == first
    put(images, "train/rose/3.png")
    second = prepare(images, cache)
    assert second.dataset != first.dataset
    folder.load(first.dataset, cache)  # runs of before go on with what they had


@pytest.mark.parametrize("size", [8, 17, 64])
def test_the_size_asked_for(size, images, cache):
    put(images, "train/rose/wide.jpg", Image.fromarray(pixels(50, 90)))
    put(images, "train/daisy/high.jpg", Image.fromarray(pixels(90, 50)))
    prepared = prepare(images, cache, image_size=size)
    assert f":{size}:" in prepared.dataset
    assert folder.load(prepared.dataset, cache)[0][0].shape == (8, 3, size, size)


def test_the_middle_is_taken(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    put(tmp_path, "wide.png", Image.fromarray(wide))
    assert (folder.read_image(tmp_path / "wide.png", 32) == 200).all()


def test_grey_transparent_palette_and_16_bit_images(tmp_path):
    grey = pixels(channels=1)[:, :, 0]
    put(tmp_path, "grey.png", Image.fromarray(grey))
    assert np.array_equal(folder.read_image(tmp_path / "grey.png", 32), np.stack([grey] * 3))
    put(tmp_path, "deep.png", Image.fromarray(grey.astype(np.uint16) * 256 + 99))
    assert np.array_equal(folder.read_image(tmp_path / "deep.png", 32), np.stack([grey] * 3))
    put(tmp_path, "clear.png", Image.new("RGBA", (32, 32), (10, 20, 30, 0)))
    assert (folder.read_image(tmp_path / "clear.png", 32) == 255).all()  # what cannot be seen is not there
    put(tmp_path, "opaque.png", Image.new("RGBA", (32, 32), (10, 20, 30, 255)))
    assert folder.read_image(tmp_path / "opaque.png", 32)[:, 0, 0].tolist() == [10, 20, 30]
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    put(tmp_path, "palette.gif", palette)
    assert folder.read_image(tmp_path / "palette.gif", 32)[:, 0, 0].tolist() == [10, 20, 30]
    put(tmp_path, "hole.png", palette, transparency=1)
    assert (folder.read_image(tmp_path / "hole.png", 32) == 255).all()
    put(tmp_path, "print.jpg", Image.new("CMYK", (32, 32), (0, 0, 0, 0)))
    assert (folder.read_image(tmp_path / "print.jpg", 32) == 255).all()


def test_the_camera_s_rotation_is_applied(tmp_path):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 250
    turned = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    put(tmp_path, "turned.png", turned, exif=exif)
    assert np.array_equal(folder.read_image(tmp_path / "turned.png", 32), upright.transpose(2, 0, 1))


class TestBroken:
    @pytest.fixture
    def broken(self, images):
        good = (images / "train" / "rose" / "3.png").read_bytes()
        (images / "train" / "rose" / "cut.png").write_bytes(good[: len(good) // 2])
        (images / "train" / "daisy" / "text.jpg").write_text("no image")
        (images / "test" / "rose" / "empty.png").write_bytes(b"")
        return images

    def test_they_are_named(self, broken, cache):
        with pytest.raises(Failure) as error:
            prepare(broken, cache)
        message = str(error.value)
        for part in ("3 files", "train/rose/cut.png", "train/daisy/text.jpg", "test/rose/empty.png", "--skip-broken"):
            assert part in message
        assert "\n" not in message
        assert not cache.exists()

    def test_or_left_out_and_said(self, broken, cache):
        prepared = prepare(broken, cache, skip_broken=True)
        assert prepared.dataset.startswith("folder:my-flowers:6+4:2:32:")
        assert "train/rose/cut.png" in prepared.notes[0]
        assert prepare(broken, cache, skip_broken=True) == prepared  # and said again, from the cache
        for name in ("train/rose/cut.png", "train/daisy/text.jpg", "test/rose/empty.png"):
            (broken / name).unlink()
        assert prepare(broken, cache).dataset == prepared.dataset

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "the disk is ill"), MemoryError()])
    def test_what_is_no_fault_of_the_image_leaves_none_out(self, images, cache, tmp_path, monkeypatch, error):
        """Or the cache would hold fewer images for good, under another name."""
        calls, rgb = [], listing.rgb

        def ill(path):
            calls.append(path)
            if len(calls) == 3:
                raise error
            return rgb(path)

        for room, decode in ((folder, prepare), (pack, pack.pack)):
            calls.clear()
            monkeypatch.setattr(room, "rgb", ill)
            with pytest.raises(type(error)):
                decode(images, tmp_path / room.__name__, skip_broken=True)
        sound = prepare(images, tmp_path / folder.__name__, skip_broken=True)
        assert sound.dataset.startswith("folder:my-flowers:6+4:")

    def test_a_narrow_image_takes_no_more_memory_than_its_middle(self, tmp_path):
        put(tmp_path, "narrow.png", Image.new("RGB", (1, 60_000), (1, 2, 3)))
        assert folder.read_image(tmp_path / "narrow.png", 512).shape == (3, 512, 512)

    def test_all_of_them(self, images, cache):
        for path in images.rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(Failure, match="no image can be decoded"):
            prepare(images, cache, skip_broken=True)

    def test_a_bomb_is_broken(self, broken, cache, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(Failure, match=r"train/daisy/0\.png \(Image size.*exceeds limit"):
            prepare(broken, cache)


class TestLayout:
    @pytest.mark.parametrize(
        ("gone", "lacking"), [("train", "no folder train;"), ("test", "no folder test;"), ("", "is not a folder")]
    )
    def test_what_is_lacking_is_named(self, gone, lacking, images, cache):
        (images / gone).rename(images.parent / "gone")
        with pytest.raises(ValueError, match=lacking) as error:
            prepare(images, cache)
        assert "train/<class>/" in str(error.value)

    def test_val_will_do_and_test_comes_first(self, images, cache):
        first = prepare(images, cache)
        (images / "test").rename(images / "val")
        assert prepare(images, cache).dataset == first.dataset
        put(images, "test/rose/only.png")
        prepared = prepare(images, cache)
        assert ":6+1:" in prepared.dataset
        assert prepared.notes == ("tested on test; val is not used", "classes without test images: daisy")

    def test_classes_that_one_split_lacks(self, images, cache):
        put(images, "train/tulip/9.png")
        put(images, "test/weed/9.png")
        (images / "train" / "fern").mkdir()
        prepared = prepare(images, cache)
        assert prepared.dataset.startswith("folder:my-flowers:7+4:3:32:")
        assert prepared.notes == (
            "classes without training images: fern",
            "left out, since no net can learn them: 1 test image of weed",
            "classes without test images: tulip",
            "from 1 to 3 training images a class",
        )

    def test_other_files_are_counted_and_hidden_ones_passed_over(self, images, cache):
        (images / "train" / "rose" / "list.txt").write_text("x")
        (images / "train" / "readme").write_text("x")
        (images / "train" / "rose" / ".DS_Store").write_bytes(b"x")
        (images / "train" / "rose" / "._3.png").write_bytes(b"x")
        (images / ".git").mkdir()
        prepared = prepare(images, cache)
        assert prepared.notes == ("passed over, as they are no images by their names: 1 .txt, 1 without a suffix",)

    def test_folders_within_a_class_belong_to_it(self, images, cache):
        put(images, "train/rose/more/7.png")
        assert ":7+4:" in prepare(images, cache).dataset

    def test_links_that_go_round_and_links_to_nowhere(self, images, cache):
        first = prepare(images, cache)
        (images / "train" / "rose" / "again").symlink_to(".")
        (images / "train" / "rose" / "up").symlink_to("..", target_is_directory=True)
        (images / "train" / "rose" / "gone.png").symlink_to("nowhere.png")
        prepared = prepare(images, cache)
        assert "1 links to nowhere" in prepared.notes[-1]
        assert prepared.dataset == first.dataset

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_split_without_images(self, split, images, cache):
        for path in (images / split).rglob("*.png"):
            path.unlink()
        with pytest.raises(ValueError, match=split):
            prepare(images, cache)

    @pytest.mark.parametrize("size", [0, 7, 513])
    def test_a_size_out_of_bounds(self, size, images, cache):
        with pytest.raises(ValueError, match="image_size must be from 8 to 512 pixels"):
            prepare(images, cache, image_size=size)

    def test_more_than_memory_holds(self, images, cache, monkeypatch):
        monkeypatch.setattr(folder, "LIMIT", 10_000)
        with pytest.raises(Failure, match=r"choose a smaller --image-size"):
            prepare(images, cache)


class TestCache:
    def test_every_damage_is_noticed(self, images, cache):
        prepared = prepare(images, cache)
        path = folder.cache(prepared.dataset, cache)
        good = path.read_bytes()
        rng = np.random.default_rng(1)
        noticed = 0
        for place in rng.integers(0, len(good), 40):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            try:
                (train, _), _ = folder.load(prepared.dataset, cache)
            except Failure:
                noticed += 1
            else:
                assert np.array_equal(train[0].numpy(), folder.read_image(images / "train/daisy/0.png", 32))
        assert noticed > 30  # the rest are in the archive's own headers, which change no pixel
        for place in range(len(good) - 500, len(good)):  # the archive's directory, whose damage takes many forms
            path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
            with contextlib.suppress(Failure):  # or they are read as they were
                (train, _), _ = folder.load(prepared.dataset, cache)
                assert np.array_equal(train[0].numpy(), folder.read_image(images / "train/daisy/0.png", 32))
        for short in (0, 10, len(good) - 1):
            path.write_bytes(good[:short])
            with pytest.raises(Failure, match=r"are damaged .*degrade data fetch folder:PATH --image-size 32"):
                folder.load(prepared.dataset, cache)

    def test_another_cache_under_its_name_is_refused(self, images, cache):
        first = prepare(images, cache).dataset
        put(images, "train/rose/3.png")
        second = prepare(images, cache).dataset
        folder.cache(second, cache).replace(folder.cache(first, cache))
        with pytest.raises(Failure, match="their checksum is another"):
            folder.load(first, cache)

    def test_missing(self, images, cache):
        prepared = prepare(images, cache)
        folder.cache(prepared.dataset, cache).unlink()
        with pytest.raises(Failure, match="are not in"):
            data.fetch(prepared.dataset, cache)
        assert data.state(prepared.dataset, cache) == "no"
        assert prepare(images, cache) == prepared
        assert data.state(prepared.dataset, cache) == "yes"

    @pytest.mark.parametrize("record", ["", "[]", "{}", '{"dataset": 1, "notes": []}', '{"dataset": "x", "notes": 1}'])
    def test_a_damaged_record_is_made_anew(self, record, images, cache):
        prepared = prepare(images, cache)
        (path,) = cache.glob("*.json")
        path.write_text(record)
        assert prepare(images, cache) == prepared
        assert json.loads(path.read_text())["dataset"] == prepared.dataset

    def test_nothing_is_written_where_nothing_may_be(self, images, cache):
        assert prepare(images, cache, write=False).dataset.startswith("folder:")
        assert not cache.exists()


@pytest.fixture(scope="module")
def genuine_as_a_folder(cifar10_dir, tmp_path_factory):
    """Genuine CIFAR-10 as PNG files whose names keep its order: 2,000 and 500 images of it, or, in a soak, all."""
    root = tmp_path_factory.mktemp("cifar") / "cifar10"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    most = {"train": 50_000, "test": 10_000} if os.environ.get("DEGRADE_SOAK") == "1" else {"train": 2_000, "test": 500}
    for split, (images, labels) in zip(most, OFFICIAL["cifar10"].load(cifar10_dir), strict=True):
        for name in names:
            (root / split / name).mkdir(parents=True)
        for i in range(most[split]):
            picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
            picture.save(root / split / names[labels[i]] / f"{i:05d}.png", compress_level=1)
    return root, most


def test_genuine_cifar10_as_a_folder_gives_its_tensors_and_its_log(genuine_as_a_folder, cifar10_dir, tmp_path):
    from degrade.log import to_csv
    from degrade.train import Training

    root, most = genuine_as_a_folder
    name = folder.prepare(root, tmp_path).dataset
    ours = data.load(name, data_dir=tmp_path)
    (train, labels), (test, test_labels) = OFFICIAL["cifar10"].load(cifar10_dir)
    assert torch.equal(ours.train.images, train[: most["train"]])
    assert torch.equal(ours.train.labels, labels[: most["train"]])
    assert torch.equal(ours.test.images, test[: most["test"]])
    assert torch.equal(ours.test.labels, test_labels[: most["test"]])
    first = data.Splits(
        data.Images(train[: most["train"]], labels[: most["train"]]),
        data.Images(train[:0], labels[:0]),
        data.Images(test[: most["test"]], test_labels[: most["test"]]),
        data.pixel_mean(train[: most["train"]]),
        10,
    )
    fields = {"train_images": None, "test_images": None, "steps": 130}
    logs = []
    for dataset, splits in ((name, ours), ("cifar10", first)):
        training = Training(smoke("residual", dataset=dataset, **fields), splits)
        if dataset == "cifar10":  # of which only the first images are there
            object.__setattr__(training.config, "train_images", most["train"])
        logs.append(to_csv([epoch for epoch in training if epoch], validation=False))
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + training.config.epochs


def test_what_is_an_image_to_torchvision_is_one_here():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert listing.IMAGES == IMG_EXTENSIONS
