"""Published weights: whatever they are called and however they are stored, the net computes the same."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import smoke, write_run
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import degrade
from degrade import store
from degrade.config import RunConfig
from degrade.data import load
from degrade.evaluate import evaluate
from degrade.nets import PadShortcut, cifar_net
from degrade.published import fit, layers, read_log, state_dict
from degrade.weights import load_weights, read_tensors, recorded

ONES = (1.0, 1.0, 1.0)


def config(block="plain", depth=14, **fields):
    return smoke(block, depth, **fields)


def lively(block="plain", depth=14, width=4, **options):
    """A net in eval mode whose BNs all differ from the identity."""
    torch.manual_seed(1)
    net = cifar_net(depth, block, width=width, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                nn.init.uniform_(tensor, low, high)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same_function(net, other, x=X):
    with torch.no_grad():
        assert net(x).std() > 0.1  # a dead net equals any other
        torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-4)


class TestNames:
    """`fit` takes layers by order and shape."""

    @pytest.mark.parametrize("block", ["plain", "residual", "preact"])
    def test_its_own(self, block):
        net = lively(block)
        there = fit(config(block), net.state_dict(), std=ONES, zero_channels="appended")
        assert torch.equal(there(X), net(X))

    @pytest.mark.parametrize("shortcut", ["B", "C"])
    def test_projections(self, shortcut):
        net = lively("residual", shortcut=shortcut)
        there = fit(config("residual", shortcut=shortcut), net.state_dict(), std=ONES, zero_channels="appended")
        assert torch.equal(there(X), net(X))

    def test_prefixes_and_other_names(self):
        net = lively()
        named = {f"module.features.{name}": value for name, value in net.state_dict().items()}
        assert torch.equal(fit(config(), named, std=ONES, zero_channels="appended")(X), net(X))

    def test_names_that_say_nothing(self):
        net = lively()
        values = [value for name, value in net.state_dict().items() if "num_batches" not in name]
        numbered = {f"param_{i}": value for i, value in enumerate(values)}
        assert torch.equal(fit(config(), numbered, std=ONES, zero_channels="appended")(X), net(X))

    def test_convolutions_stored_before_the_norms_of_their_block(self):
        """As by a class that makes conv1 and conv2 first, then bn1 and bn2."""
        net = lively()
        there = sorted(net.state_dict().items(), key=lambda item: (item[0].rpartition(".")[0][:10], "bn" in item[0]))
        order = {"bn": 1, "conv": 0}
        block = lambda name: ".".join(name.split(".")[:3]) if name.startswith("stages") else name[:1]  # noqa: E731
        groups: dict[str, list] = {}
        for name, value in net.state_dict().items():
            groups.setdefault(block(name), []).append((name, value))
        there = {
            name: value
            for group in groups.values()
            for name, value in sorted(group, key=lambda item: order["bn" if ".bn" in item[0] else "conv"])
        }
        assert list(there) != list(net.state_dict())
        assert torch.equal(fit(config(), there, std=ONES, zero_channels="appended")(X), net(X))

    def test_half_and_double_precision(self):
        net = lively()
        for dtype in (torch.float16, torch.float64):
            cast = {n: v.to(dtype) if v.is_floating_point() else v for n, v in net.state_dict().items()}
            there = fit(config(), cast, std=ONES, zero_channels="appended")
            assert all(p.dtype == torch.float32 for p in there.parameters())
            torch.testing.assert_close(there(X), net(X), rtol=0.05, atol=0.05)

    @pytest.mark.parametrize(
        "wrapped",
        [
            lambda s: s,
            lambda s: {"state_dict": s, "epoch": 164, "best_prec1": 0.9},
            lambda s: {"model": {"net": s}, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}}},
        ],
    )
    def test_wrapped(self, wrapped):
        there = lively().state_dict()
        assert state_dict(wrapped(there)).keys() == there.keys()

    def test_two_nets_in_one_file(self):
        there = lively().state_dict()
        both = {"model": there, "ema": {"state_dict": there}}
        with pytest.raises(ValueError, match=r"several nets: model, ema.state_dict; name one with --key"):
            state_dict(both)
        assert state_dict(both, "ema.state_dict").keys() == there.keys()
        with pytest.raises(ValueError, match="no state dict called teacher"):
            state_dict(both, "teacher")


class TestSameFunction:
    def test_biases_of_convolutions_go_into_the_running_means(self):
        net = lively("residual")
        biased = lively("residual")
        for module in list(biased.modules()):
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.randn(module.out_channels) / 2)
        assert not torch.allclose(biased(X), net(X))
        there = fit(config("residual"), biased.state_dict(), std=ONES, zero_channels="appended")
        assert all(m.bias is None for m in there.modules() if isinstance(m, nn.Conv2d))
        same_function(biased, there)

    def test_a_bias_that_no_norm_follows(self):
        net = lively("preact")
        net.blocks[0].conv2.bias = nn.Parameter(torch.ones(4))
        with pytest.raises(ValueError, match="a convolution has a bias, and no BN follows"):
            fit(config("preact"), net.state_dict(), std=ONES, zero_channels="appended")

    @pytest.mark.parametrize("block", ["residual", "preact"])
    def test_zero_channels_on_both_sides(self, block, monkeypatch):
        net = lively(block, depth=20)

        def both_sides(self, x):  # as in akamaster/pytorch_resnet_cifar10
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))

        with monkeypatch.context() as context:
            context.setattr(PadShortcut, "forward", both_sides)
            theirs = net(X)
        assert not torch.allclose(theirs, net(X), atol=1e-3)
        there = fit(config(block, 20), net.state_dict(), std=ONES, zero_channels="both-sides")
        torch.testing.assert_close(there(X), theirs, rtol=1e-4, atol=1e-4)

    def test_what_the_input_was_divided_by(self):
        net, std = lively(), (0.2, 0.25, 0.3)
        there = fit(config(), net.state_dict(), std=std, zero_channels="appended")
        same_function(nn.Sequential(Divided(std), net), there)


class Divided(nn.Module):
    def __init__(self, std):
        super().__init__()
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    def forward(self, x):
        return x / self.std


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda s: dict(list(s.items())[:-8]), r"convolutions: 12 there, 13 in plain-14 with shortcut A; are --block"),
        (lambda s: s | {"conv.weight": torch.zeros(4, 1, 3, 3)}, "convolution 1: its weight is 4x1x3x3 there, 4x3x3x3"),
        (lambda s: s | {"linear.weight": torch.zeros(100, 16)}, "linear layer 1: its weight is 100x16 there, 10x16 in"),
        (lambda s: s | {"bn.weight": torch.full((4,), math.nan)}, "BN 1: its weight holds values that are not finite"),
        (lambda s: {n: v for n, v in s.items() if "running" not in n}, "is not a convolution, a BN with its running"),
        (lambda s: {n: v for n, v in s.items() if n != "linear.bias"}, "its bias is missing there, 10 in this net"),
    ],
)
def test_weights_of_another_net(damage, rule):
    with pytest.raises(ValueError, match=rule):
        fit(config(), damage(lively().state_dict()), std=ONES, zero_channels="appended")


def test_a_count_of_vectors_that_is_no_norm():
    values = [v for n, v in lively().state_dict().items() if "num_batches" not in n]
    del values[2]
    with pytest.raises(ValueError, match="vectors follow w0; a BN has four"):
        layers({f"w{i}": value for i, value in enumerate(values)})


class Evil:
    def __reduce__(self):
        return (os.mkdir, (str(Evil.target),))


class TestFiles:
    def test_nothing_in_a_file_is_executed(self, tmp_path):
        Evil.target = tmp_path / "pwned"
        path = tmp_path / "evil.pt"
        torch.save({"state_dict": lively().state_dict(), "extra": Evil()}, path)
        with pytest.raises(ValueError, match="it holds code, which is not run: save its state dict instead"):
            read_tensors(path.read_bytes())
        with pytest.raises(ValueError, match="it is not a file of weights"):
            read_tensors(pickle.dumps(Evil()))
        assert not Evil.target.exists()

    @pytest.mark.parametrize(
        "data", [b"", b"weights", b"PK\x03\x04" + bytes(100), bytes(8) + b"{}", b"\x08" + bytes(7) + b"{" * 9]
    )
    def test_no_file_of_weights(self, data):
        with pytest.raises(ValueError, match="it is not a file of weights"):
            read_tensors(data)


class TestLog:
    CSV = "epoch,loss,train_err,val_acc\n" + "".join(
        f"{i},{2 - i / 10},{0.9 - i / 10},{0.1 + i / 10}\n" for i in range(3)
    )

    def read(self, text=CSV, percent=False, **columns):
        columns = columns or {"train_loss": "loss", "train_error": "train_err", "test_error": "1-val_acc"}
        return read_log(text, columns, config(), percent=percent)

    def test_columns_are_mapped_and_what_is_not_known_is_nan(self):
        rows = self.read()
        assert [row.epoch for row in rows] == [1, 2, 3]
        assert [row.step for row in rows] == [config().epoch_end(e) for e in (1, 2, 3)]
        assert [row.train_loss for row in rows] == [2.0, 1.9, 1.8]
        assert [row.test_error for row in rows] == pytest.approx([0.9, 0.8, 0.7])
        assert all(math.isnan(row.test_loss) and math.isnan(row.train_error_running) for row in rows)

    def test_percent(self):
        text = "train_error,acc\n" + "90,20\n" * 3
        rows = self.read(text, percent=True, test_error="1-acc")
        assert (rows[0].train_error, rows[0].test_error) == pytest.approx(
            (0.9, 0.8)
        )  # of its own name: not to be named

    @pytest.mark.parametrize(
        ("text", "columns", "rule"),
        [
            (CSV, {"test_error": "val_err"}, "--columns: the log has no column val_err; it has epoch, loss"),
            (CSV, {"accuracy": "val_acc"}, "--columns: accuracy is not one of train_loss"),
            (CSV.replace("0.9", "x"), {"train_error": "train_err"}, "row 1 of the log: train_err is 'x'"),
            ("train_error\n" + "90\n" * 3, {}, r"train_error is 90, not from 0 to 1; --percent\?"),
            ("train_error\n" + "0.9\n" * 4, {}, "the log has 4 epochs, 24 steps are 3; --set steps=N says how many"),
            ("", {}, "the log has 0 epochs"),
        ],
    )
    def test_bad_logs(self, text, columns, rule):
        with pytest.raises(ValueError, match=rule):
            read_log(text, columns, config(), percent=False)


@pytest.fixture
def trained(cli, data_dir, tmp_path, monkeypatch):
    """A run trained by a sweep, and its folder of results."""
    monkeypatch.setenv("DEGRADE_DATA", str(data_dir))
    monkeypatch.chdir(tmp_path)
    options = ["--depths", "8", "--blocks", "residual", "--dataset", "shapes", "--protocol", "smoke", "--jobs", "1"]
    assert cli("sweep", *options).exit_code == 0
    (folder,) = Path("results/shapes-smoke").glob("residual-8-*")
    return store.Run.open("shapes-smoke", folder)


IMPORT = [
    "--block",
    "residual",
    "--depth",
    "8",
    "--dataset",
    "shapes",
    "--protocol",
    "smoke",
    "--source",
    "a friend, MIT",
]


class TestCommands:
    def test_export_and_import_are_inverse(self, trained, cli, data_dir):
        last = trained.epochs[-1]
        assert cli("export", trained.folder, "--to", "net.pt").exit_code == 0
        assert cli("export", trained.folder, "--to", "net.safetensors").exit_code == 0
        about = json.loads(Path("net.pt.json").read_text())
        assert about["config"] == trained.config.as_dict()
        assert (about["train_error"], about["test_error"]) == (last.train_error, last.test_error)
        splits = load("shapes", train_images=256, test_images=128, data_dir=data_dir)
        torch.testing.assert_close(torch.tensor(about["mean"]), splits.mean)

        tensors = torch.load("net.pt", weights_only=True)
        net = cifar_net(8, "residual", width=4)
        net.load_state_dict(tensors, strict=False)
        assert evaluate(net, splits.test.images, splits.test.labels, splits.mean)[1] == last.test_error
        assert all(torch.equal(tensors[name], value) for name, value in load_file("net.safetensors").items())

        for file in ("net.pt", "net.safetensors"):
            told = cli("import", file, *IMPORT, "--study", file.replace(".", "-"), "--claimed-test-error", "12.34")
            assert told.exit_code == 0, told
            run = degrade.store.find_studies(Path("results") / file.replace(".", "-"))[0][0].runs[0]
            assert (run.epochs[-1].train_error, run.epochs[-1].test_error) == (last.train_error, last.test_error)
            assert "12.34 %" in told.stdout
            assert f"{100 * last.test_error:.2f} %" in told.stdout
            assert run.imported["claimed"] == {"train_error": None, "test_error": 0.1234}
            assert run.imported["source"] == "a friend, MIT"
        again = cli("import", "net.pt", *IMPORT, "--study", "net-pt")
        assert again.exit_code == 1
        assert "is there already, and stays as it is" in again.stderr
        assert cli("export", trained.folder, "--to", "net.pt").stderr.count("net.pt is there already") == 1

    def test_an_imported_run_is_marked_everywhere_and_never_mixed(self, trained, cli):
        cli("export", trained.folder, "--to", "net.pt")
        Path("log.csv").write_text("err\n" + "0.5\n" * trained.config.epochs)
        log = ["--log", "log.csv", "--columns", "test_error=err"]
        told = cli("import", "net.pt", *IMPORT, *log, "--departure", "by hand", "--seed", "7")
        assert told.exit_code == 0, told
        frame = degrade.load("results/imported-shapes-smoke")
        assert frame["imported"].all()
        assert not degrade.load("results/shapes-smoke")["imported"].any()
        assert list(frame["test_error"])[:-1] == [0.5] * (trained.config.epochs - 1)
        assert frame["train_error"].iloc[:-1].isna().all()
        assert frame["train_error"].iloc[-1] == trained.epochs[-1].train_error  # of the weights, as measured here
        rows = json.loads(cli("show", "results", "--json").stdout)
        assert {row["study"]: row["imported"] for row in rows} == {"imported-shapes-smoke": True, "shapes-smoke": False}
        assert "imported" in cli("show", "results/imported-shapes-smoke").stdout
        for command in ("check", "plot", "verdict", "report"):
            assert cli(command, "results/imported-shapes-smoke").exit_code == 0, command
        sweep = ["sweep", "--depths", "8", "--dataset", "shapes", "--protocol", "smoke", "--study"]
        refused = cli(*sweep, "imported-shapes-smoke")
        assert refused.exit_code == 2
        assert "holds imported runs" in refused.stderr
        refused = cli("import", "net.pt", *IMPORT, "--study", "shapes-smoke", "--seed", "7")
        assert refused.exit_code == 2
        assert "holds runs that were trained here" in refused.stderr

    def test_weights_that_were_changed_are_not_used(self, trained, cli):
        cli("export", trained.folder, "--to", "net.pt")
        cli("import", "net.pt", *IMPORT)
        (run,) = store.find_studies(Path("results/imported-shapes-smoke"))[0][0].runs
        ((_, path),) = recorded(run)
        path.write_bytes(Path("net.pt").read_bytes().replace(b"conv1", b"conv9"))
        with pytest.raises(degrade.errors.Failure, match="not those that were imported; import them again"):
            load_weights(run, torch.zeros(3, 32, 32))
        assert cli("check", "results/imported-shapes-smoke").exit_code == 1
        path.unlink()
        assert cli("check", "results/imported-shapes-smoke").exit_code == 0  # weights stay out of git
        with pytest.raises(degrade.errors.Failure, match="has no weights"):
            load_weights(run, torch.zeros(3, 32, 32))

    @pytest.mark.parametrize(
        ("options", "code", "rule"),
        [
            (["net.pt", "--depth", "14"], 2, "convolutions: 7 there, 13 in residual-14"),
            (["net.pt", "--width", "4"], 2, "No such option"),
            (["net.pt", "--set", "width=8"], 2, "convolution 1: its weight is 4x3x3x3 there, 8x3x3x3 in this net"),
            (["net.pt", "--set", "depth=8"], 2, "--set depth: there is --depth for that"),
            (["net.pt", "--set", "width"], 2, "--set must be FIELD=VALUE, such as steps=78125; got 'width'"),
            (["net.pt", "--set", "color=red"], 2, "unknown field color"),
            (["net.pt", "--mean", "0.5"], 2, "--mean must be three numbers"),
            (["net.pt", "--std", "0,1,1"], 2, "--std must be above 0"),
            (
                ["net.pt", "--zero-channels", "left"],
                2,
                "--zero-channels must be one of appended, both-sides; got 'left'",
            ),
            (["net.pt", "--log", "none.csv"], 1, "none.csv: No such file"),
            (["none.pt"], 1, "none.pt: No such file"),
            (["."], 1, "Is a directory"),
            (["junk.pt"], 2, "it is not a file of weights"),
        ],
    )
    def test_bad_input_is_one_line_and_nothing_is_written(self, trained, cli, options, code, rule):
        cli("export", trained.folder, "--to", "net.pt")
        Path("junk.pt").write_bytes(b"junk")
        told = cli("import", *IMPORT, *options, "--study", "new")
        assert (told.exit_code, told.stderr.count("\n")) == (code, 1), told
        assert rule in told.stderr
        assert not Path("results/new").exists()

    def test_runs_without_weights_cannot_be_exported(self, cli, tmp_path):
        run = write_run(tmp_path / "study", smoke(), [(0.5, 0.5)])
        told = cli("export", run.folder, "--to", tmp_path / "net.pt")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert "has no weights (done)" in told.stderr
        told = cli("export", tmp_path)
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)


PEERS = Path(os.environ.get("DEGRADE_PEERS", "not-at-hand")) / "a-martyn"


@pytest.mark.skipif(not PEERS.is_dir(), reason="DEGRADE_PEERS, the folder with published weights, is not set")
@pytest.mark.parametrize(
    ("block", "file", "test_error"), [("plain", "plainnet20", 0.0969), ("residual", "resnet20", 0.0804)]
)
def test_published_weights_have_their_published_error_to_the_digit(cifar10_dir, block, file, test_error):
    mean, std = (0.4918687901200927, 0.49185976472299225, 0.4918583862227116), (0.24697121702736, 0.24696766978537033)
    published = RunConfig(block=block, depth=20, seed=0, input_mean=mean)
    tensors = state_dict(read_tensors((PEERS / f"{file}.pt").read_bytes()))
    net = fit(published, tensors, std=(*std, 0.2469719877121087), zero_channels="appended")
    splits = load("cifar10", data_dir=cifar10_dir, input_mean=mean)
    torch.set_num_threads(2)
    assert evaluate(net, splits.test.images, splits.test.labels, splits.mean)[1] == test_error
