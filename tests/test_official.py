"""Published data sets beside CIFAR-10, small and in the real formats, on a server of this machine."""

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from conftest import serving
from scipy.io import savemat
from torchvision import datasets

from degrade import data
from degrade.data import OFFICIAL, official
from degrade.errors import Failure

RNG = np.random.default_rng(0)
COUNTS = {"train": 30, "t10k": 12}


def idx(array):
    axes = struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + axes + array.tobytes())


DIGITS = {
    f"{split}-{what}-idx{axes}-ubyte.gz": RNG.integers(0, most, (count, *size), dtype=np.uint8)
    for split, count in COUNTS.items()
    for what, axes, most, size in (("images", 3, 256, (28, 28)), ("labels", 1, 10, ()))
}
HOUSES = {
    f"{split}_32x32.mat": {
        "X": RNG.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
        "y": RNG.integers(1, 11, (count, 1), dtype=np.uint8),
    }
    for split, count in (("train", 30), ("test", 12))
}
HUNDRED = {
    split: {
        "data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8),
        "fine_labels": RNG.integers(0, 100, count).tolist(),
        "coarse_labels": [0] * count,
    }
    for split, count in (("train", 30), ("test", 12))
}


def mat(arrays):
    file = io.BytesIO()
    savemat(file, arrays, do_compression=True)
    return file.getvalue()


def archive(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for kind in ("MNIST", "FashionMNIST"):
        (folder / kind).mkdir()
        for name, array in DIGITS.items():
            (folder / kind / name).write_bytes(idx(255 - array if "images" in name and kind == "MNIST" else array))
    for name, arrays in HOUSES.items():
        (folder / name).write_bytes(mat(arrays))
    members = {name: pickle.dumps(values) for name, values in HUNDRED.items()} | {
        "meta": pickle.dumps({"fine_label_names": []})
    }
    (folder / "cifar-100-python.tar.gz").write_bytes(archive(members))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield folder, url, members


@pytest.fixture(autouse=True)
def genuine(served, monkeypatch):
    """The small files are the official ones; their official addresses cannot be reached."""
    folder, _, members = served
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        resources = [(name, md5((folder / kind.__name__ / name).read_bytes())) for name in DIGITS]
        monkeypatch.setattr(kind, "resources", resources)
        monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:1/"])
    split_list = {
        split: ["http://127.0.0.1:1/", f"{split}_32x32.mat", md5((folder / f"{split}_32x32.mat").read_bytes())]
        for split in ("train", "test")
    }
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    kind = datasets.CIFAR100
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:1/")
    monkeypatch.setattr(kind, "tgz_md5", md5((folder / "cifar-100-python.tar.gz").read_bytes()))
    monkeypatch.setattr(kind, "train_list", [["train", md5(members["train"])]])
    monkeypatch.setattr(kind, "test_list", [["test", md5(members["test"])]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(members["meta"])})


def mirror(served, name):
    _, url, _ = served
    return url + {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}.get(name, "")


NAMES = ["cifar100", "svhn", "fashion-mnist", "mnist"]


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_from_a_mirror_and_is_found_again(name, served, tmp_path):
    assert data.state(name, tmp_path) == "no"
    data.fetch(name, tmp_path, mirror(served, name))
    assert data.state(name, tmp_path) == "yes"
    data.fetch(name, tmp_path)  # which could reach no server
    (train, train_labels), (test, test_labels) = OFFICIAL[name].load(tmp_path)
    size = 28 if "mnist" in name else 32
    assert (train.shape, test.shape) == ((30, 3, size, size), (12, 3, size, size))
    assert (train_labels.shape, test_labels.shape) == ((30,), (12,))
    assert str(train.dtype) == "torch.uint8"
    assert str(train_labels.dtype) == "torch.int64"


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_reads_the_same(name, served, tmp_path):
    """From the very files: so its users' copies are found, and pixels and labels are those they know."""
    data.fetch(name, tmp_path, mirror(served, name))
    for is_train, (images, labels) in zip((True, False), OFFICIAL[name].load(tmp_path), strict=True):
        if name == "svhn":
            theirs = datasets.SVHN(str(tmp_path), split="train" if is_train else "test")
        else:
            kind = {"cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
            if "mnist" in name:  # it wants them unpacked
                for path in (tmp_path / kind / "raw").glob("*.gz"):
                    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            theirs = getattr(datasets, kind)(str(tmp_path), train=is_train)
        assert len(theirs) == len(images)
        for i in range(len(theirs)):
            image, label = theirs[i]
            assert np.array_equal(np.asarray(image.convert("RGB")).transpose(2, 0, 1), images[i].numpy())
            assert label == labels[i]


@pytest.mark.parametrize("name", NAMES)
def test_one_byte_flipped_is_refused_before_anything_is_read_and_mended(name, served, tmp_path, monkeypatch):
    data.fetch(name, tmp_path, mirror(served, name))
    source = OFFICIAL[name]
    for file in source.checksums():
        path = tmp_path / source.folder / file
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
        with monkeypatch.context() as patch:
            patch.setattr(official.Official, "decode", lambda *_: pytest.fail("decoded"))
            with pytest.raises(Failure, match=f"is damaged in .*{file}: missing or damaged"):
                source.load(tmp_path)
        assert data.state(name, tmp_path) == "damaged"
        data.fetch(name, tmp_path, mirror(served, name))
        assert path.read_bytes() == good


@pytest.mark.parametrize("name", NAMES)
def test_a_mirror_that_lies_changes_nothing(name, tmp_path, served):
    folder, *_ = served
    lies = tmp_path / "lies"
    lies.mkdir()
    for path in folder.rglob("*.*"):
        if path.is_file():
            (lies / path.name).write_bytes(b"evil" + path.read_bytes())
    with pytest.raises(Failure) as error:
        data.fetch(name, tmp_path / "data", lies.as_uri())
    assert "another file, by its checksum" in str(error.value)
    for part in ("is missing in", "--mirror", "--data-dir", "--dataset shapes"):
        assert part in str(error.value)
    assert [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.parametrize("name", NAMES)
def test_a_net_trains_on_it(name, served, tmp_path, monkeypatch):
    from degrade.config import Dataset, RunConfig
    from degrade.train import train

    data.fetch(name, tmp_path, mirror(served, name))
    known = data.dataset_of(name)
    small = Dataset(30, 12, known.num_classes, known.image_size, known.augment)
    monkeypatch.setitem(__import__("degrade.config").config.DATASETS, name, small)
    data.load.cache_clear()
    fields = {"width": 4, "steps": 2, "batch_size": 8, "milestones": (), "warmup_steps": 0}
    config = RunConfig(block="residual", depth=8, seed=0, dataset=name, **fields)
    (epoch,) = train(config, data_dir=tmp_path)
    assert 0 <= epoch.train_error <= 1
