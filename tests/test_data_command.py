"""`degrade data`, and sweeps on one's own images, as typed."""

import json

import numpy as np
import pytest
from PIL import Image

from degrade.config import DATASETS


@pytest.fixture
def flowers(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "flowers"
    for split, count in (("train", 40), ("test", 20)):
        for i in range(count):
            path = root / split / ("daisy" if i % 2 else "rose") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return root


SMALL = ("--protocol", "smoke", "--depths", "8", "--blocks", "plain", "--jobs", "1", "--steps", "4", "--device", "cpu")


def test_the_list_has_every_data_set_and_what_is_here(cli, flowers, tmp_path):
    where = ("--data-dir", tmp_path / "data")
    result = cli("data", "list", *where)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80  # a terminal's, so that no row is broken
    numbers, words, rest = result.stdout.partition("In ")[2].split("\n\n")
    lines = {line.split()[0]: line for line in numbers.splitlines()[2:]}
    assert set(lines) == set(DATASETS)
    assert all(lines[name].endswith(" no") for name in set(DATASETS) - {"shapes"})
    assert "170.5 MB" in lines["cifar10"]
    assert "svhn           for non-commercial use only\n               http://ufldl.stanford.edu" in words
    assert rest == ""
    assert not (tmp_path / "data").exists()
    assert cli("data", "fetch", f"folder:{flowers}", *where).exit_code == 0
    assert cli("data", "fetch", f"imagenet:{flowers}", "--image-size", "64", *where).exit_code == 0
    lines = cli("data", "list", *where).stdout.splitlines()
    assert any(line.startswith("folder:flowers:40+20:2:32:") and line.endswith("  yes") for line in lines)
    assert any(line.startswith("imagenet:flowers:40+20:2:64:") and line.endswith("  yes") for line in lines)


def test_without_a_command_it_says_what_there_are(cli):
    result = cli("data")
    assert result.exit_code == 0
    assert all(f"\n  {word} " in result.stdout for word in ("list", "fetch", "check", "pack"))
    assert result.stdout == cli("data", "--help").stdout
    assert result.stderr == ""


def test_check_looks_at_what_is_here_or_at_what_is_named(cli, flowers, tmp_path):
    where = ("--data-dir", tmp_path / "data")
    assert cli("data", "check", *where).stdout == "shapes: sound\n"
    result = cli("data", "check", "cifar10", *where)
    assert (result.exit_code, "CIFAR-10 is missing" in result.stderr) == (1, True)
    result = cli("data", "check", f"folder:{flowers}", f"imagenet:{flowers}", *where)
    assert result.exit_code == 0
    assert result.stdout.count("flowers: sound") == 2
    assert not (tmp_path / "data").exists()
    (flowers / "train" / "rose" / "00.png").write_bytes(b"")
    for kind in ("folder", "imagenet"):
        result = cli("data", "check", f"{kind}:{flowers}", *where)
        assert (result.exit_code, "rose/00.png" in result.stderr) == (1, True)


def test_a_damaged_cache_is_found_and_decoded_again(cli, flowers, tmp_path):
    where = ("--data-dir", tmp_path / "data")
    assert cli("data", "fetch", f"folder:{flowers}", *where).exit_code == 0
    (cache,) = (tmp_path / "data").glob("folder-flowers-*.npz")
    sound = cache.read_bytes()
    cache.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
    for names in ([], [f"folder:{flowers}"]):
        told = cli("data", "check", *names, *where)
        assert (told.exit_code, "are damaged in" in told.stderr) == (1, True), told
    assert cli("data", "fetch", f"folder:{flowers}", *where).exit_code == 0
    assert cli("data", "check", f"folder:{flowers}", *where).exit_code == 0
    assert cache.read_bytes() == sound


def test_a_sweep_on_one_s_own_images_names_no_path(cli, flowers, tmp_path):
    out, where = tmp_path / "out", ("--data-dir", tmp_path / "data")
    result = cli("sweep", "--dataset", f"folder:{flowers}", *SMALL, *where, "--out", out, "--image-size", "16")
    assert result.exit_code == 0, result.stderr
    (study,) = out.iterdir()
    assert study.name == "flowers-smoke-steps4"  # all images, since there are fewer than the protocol takes
    (run,) = study.glob("plain-8-*")
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"].startswith("folder:flowers:40+20:2:16:")
    assert config["train_images"] is None
    assert not any(str(tmp_path) in path.read_text() for path in study.rglob("*.json"))
    # Its full name will do in place of the path, and the images are not needed any more.
    flowers.rename(tmp_path / "gone")
    result = cli("sweep", "--dataset", config["dataset"], *SMALL, *where, "--out", out)
    assert (result.exit_code, "1 run, 0 to train" in result.stdout) == (0, True)
    assert cli("plot", out).exit_code == 0


def test_a_dry_run_decodes_and_writes_nothing(cli, flowers, tmp_path):
    where = ("--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    result = cli("sweep", "--dataset", f"folder:{flowers}", *SMALL, *where, "--dry-run")
    assert result.exit_code == 0
    assert "Data set folder:flowers:40+20:2:32:" in result.stdout
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "out").exists()


def test_a_file_of_settings_may_name_the_folder_and_the_size(cli, flowers, tmp_path):
    spec = tmp_path / "own.toml"
    spec.write_text(f'depths = [8]\ndataset = "folder:{flowers}"\nimage-size = 16\nprotocol = "smoke"\n')
    result = cli("sweep", spec, "--dry-run", "--data-dir", tmp_path / "data")
    assert "Data set folder:flowers:40+20:2:16:" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("sweep", "--dataset", "folder:"), 2, "folder: must name a folder of images, such as folder:flowers"),
        (("sweep", "--dataset", "folder:nowhere"), 2, "nowhere is not a folder; images must lie in train/<class>/"),
        (("sweep", "--dataset", "cifar10", "--image-size", "16"), 2, "the images of cifar10 are 32x32"),
        (("sweep", "--dataset", "folder:flowers", "--image-size", "4"), 2, "image_size must be from 8 to 512"),
        (("sweep", "--dataset", "imagenet:flowers", "--image-size", "4"), 2, "image_size must be from 32 to 512"),
        (("sweep", "--dataset", "imagenet:flowers"), 2, "depth must be one of 18, 34, 50, 101, 152 on ImageNet; got 8"),
        (("sweep", "--dataset", "imagnet"), 2, "dataset must be one of cifar10"),
        (("data", "fetch", "cifar11"), 2, "did you mean cifar10?"),
        (("data", "fetch", "imagenet:flowers", "--skip-broken"), 2, "--skip-broken is for folder:PATH"),
        (("data", "fetch", "shapes", "--mirror", "file:///x"), 2, "--mirror is for what is downloaded; shapes is not"),
        (("data", "fetch"), 2, "Missing argument 'NAME"),
        (("data", "pack", "nowhere", "store"), 2, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(cli, flowers, tmp_path, monkeypatch, words, code, line):
    monkeypatch.chdir(tmp_path)
    more = (*SMALL, "--out", tmp_path / "out") if words[0] == "sweep" else ()
    where = ("--data-dir", tmp_path / "data") if words[1] != "pack" else ()
    result = cli(*words, *more, *where)
    assert result.exit_code == code
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store").exists()


def test_pack_and_train(cli, flowers, tmp_path):
    result = cli("data", "pack", flowers, tmp_path / "store", "--short-side", "32")
    assert result.exit_code == 0, result.stderr
    assert "40 training and 20 test images" in result.stdout
    assert f"--dataset imagenet:{tmp_path / 'store'}" in result.stdout.replace("\n", " ")
    result = cli("data", "check", f"imagenet:{tmp_path / 'store'}", "--data-dir", tmp_path)
    assert result.stdout.endswith("flowers: sound\n")


def test_a_store_that_another_process_has_packed_meanwhile_stays_as_it_is(cli, flowers, tmp_path, monkeypatch):
    from degrade.data import pack

    listed, store = pack.list_images, tmp_path / "store"

    def slow(path):
        monkeypatch.setattr(pack, "list_images", listed)
        pack.pack(flowers, store)
        before.update({path: path.read_bytes() for path in store.iterdir()})
        return listed(path)

    before = {}
    monkeypatch.setattr(pack, "list_images", slow)
    result = cli("data", "pack", flowers, store, "--short-side", "32")
    assert (result.exit_code, "is there already, and stays as it is" in result.stderr) == (2, True)
    assert before == {path: path.read_bytes() for path in store.iterdir() if path in before}


def test_a_store_is_called_the_same_in_every_folder(cli, flowers, tmp_path, monkeypatch):
    from degrade.data import pack

    pack.pack(flowers, tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    flowers.rename(tmp_path / "elsewhere")
    flowers.symlink_to(tmp_path / "store")
    assert pack.read_index(tmp_path / "store").name == "flowers"


def test_two_that_pack_into_one_store(cli, flowers, tmp_path):
    from degrade.commit import hold, make_folder

    make_folder(tmp_path / "store")
    with hold(tmp_path / "store" / ".lock"):
        result = cli("data", "pack", flowers, tmp_path / "store")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "held by process" in result.stderr


def test_a_remembered_folder_that_has_gone_does_not_hide_the_others(cli, flowers, tmp_path):
    where = ("--data-dir", tmp_path / "data")
    cli("data", "fetch", f"imagenet:{flowers}", *where)
    flowers.rename(tmp_path / "gone")
    result = cli("data", "list", *where)
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("imagenet:"))
    assert line.endswith("  no")
