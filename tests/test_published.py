"""Published weights: whatever they are called and however they are stored, the net computes the same."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import smoke, write_run
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import degrade
from degrade import commit, store
from degrade.config import RunConfig, run_id
from degrade.data import load
from degrade.errors import Failure
from degrade.evaluate import evaluate
from degrade.nets import PadShortcut, cifar_net
from degrade.published import epoch_of, fit, layers, read_log, state_dict
from degrade.weights import export_weights, load_weights, read_tensors, recorded

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
            lambda s: {"model": {"net": s}, "best": [s], "epoch": {"net": torch.zeros(2, 2)}},
        ],
    )
    def test_wrapped(self, wrapped):
        there = lively().state_dict()
        assert state_dict(wrapped(there)).keys() == there.keys()

    @pytest.mark.parametrize(
        "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, amsgrad=True)]
    )
    def test_beside_the_state_of_an_optimizer(self, make, tmp_path):
        net = lively()
        optimizer = make(net.parameters())
        net(X).sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state_dict()["state"].values() for t in state.values() if t is not None]
        assert {2, 4} <= {t.ndim for t in moments}
        torch.save({"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
        there = state_dict(read_tensors((tmp_path / "checkpoint.pt").read_bytes()))
        assert there.keys() == net.state_dict().keys()
        assert torch.equal(fit(config(), there, std=ONES, zero_channels="appended")(X), net(X))

    def test_mappings_that_hold_themselves_or_are_very_deep(self):
        there: dict = {f"copy{i}": {} for i in range(100)}
        for name in list(there):
            there[name] = there
        with pytest.raises(ValueError, match="it holds no state dict: no mapping of names to a net's tensors"):
            state_dict(there)
        there["net"] = lively().state_dict()
        assert state_dict(there).keys() == there["net"].keys()
        deep: dict = {}
        for _ in range(100_000):
            deep = {"down": deep}
        with pytest.raises(ValueError, match="it holds no state dict"):
            state_dict(deep)

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

    def test_zero_channels_on_both_sides_of_a_width_that_cannot_be_split(self):
        net = lively("residual", width=3)
        with pytest.raises(ValueError, match="both-sides: width must be even, for as many on each side; got 3"):
            fit(config("residual", width=3), net.state_dict(), std=ONES, zero_channels="both-sides")
        assert fit(config("residual", width=3), net.state_dict(), std=ONES, zero_channels="appended")

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
        (
            lambda s: s | {"bn.weight": torch.ones(4).double() * 1e300},
            "BN 1: its weight holds .* not finite in float32",
        ),
        (lambda s: s | {"bn.running_var": -torch.ones(4)}, "BN 1: its running_var must be at least 0; it holds -1"),
        (lambda s: s | {"conv.bias": torch.full((4,), math.inf)}, "convolution 1: its bias holds values that are not"),
        (lambda s: s | {"conv.bias": torch.ones(5)}, "convolution 1: its bias is 5 there, 4 in this net"),
        (
            lambda s: s | {"bn.bias": torch.ones(4).to_sparse()},
            "bn.bias must be dense, .*; it is sparse_coo, on cpu",
        ),
        (lambda s: s | {"bn.bias": torch.ones(4, device="meta")}, "bn.bias must be dense, .*, on meta"),
        (lambda s: s | {"bn.bias": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "it is quantised"),
        (lambda s: s | {"bn.bias": torch.ones(4, dtype=torch.complex64)}, "float64; it is of complex64"),
        (lambda s: s | {"bn.bias": torch.ones(4, dtype=torch.int64)}, "bn.bias must be of float16, .*; it is of int64"),
        (lambda s: {n: v for n, v in s.items() if "running" not in n}, "is not a convolution, a BN with its running"),
        (lambda s: {n: v for n, v in s.items() if n != "linear.bias"}, "its bias is missing there, 10 in this net"),
    ],
)
def test_weights_of_another_net(damage, rule):
    with pytest.raises(ValueError, match=rule):
        fit(config(), damage(lively().state_dict()), std=ONES, zero_channels="appended")


def test_weights_that_overflow_once_they_are_divided():
    with pytest.raises(ValueError, match="is not finite in float32, once biases and --std"):
        fit(config(), lively().state_dict(), std=(1e-40, 1, 1), zero_channels="appended")


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

    def test_empty_cells_and_nan_are_nan(self):
        rows = self.read("test_error,train_error,loss\n0.9,,\nnan, ,\n0.8,0.7,1\n", train_loss="loss")
        assert [row.test_error for row in rows] == pytest.approx([0.9, math.nan, 0.8], nan_ok=True)
        assert [row.train_error for row in rows] == pytest.approx([math.nan, math.nan, 0.7], nan_ok=True)
        assert [row.train_loss for row in rows] == pytest.approx([math.nan, math.nan, 1], nan_ok=True)

    def test_the_epoch_the_weights_are_of(self):
        rows = self.read("test_error\nnan\n0.7\n0.8\n", test_error="test_error")
        assert [epoch_of(rows, of).epoch for of in ("last", "best", "1")] == [3, 2, 1]
        for of in ("4", "0", "-1", "first"):
            with pytest.raises(ValueError, match=f"must be last, best, or an epoch from 1 to 3; got '{of}'"):
                epoch_of(rows, of)
        unknown = self.read("train_error,test_error\n" + "0.5,nan\n" * 3, train_error="train_error")
        with pytest.raises(ValueError, match="--weights-of best needs the log's test_error; it has none that is a"):
            epoch_of(unknown, "best")

    @pytest.mark.parametrize(
        ("text", "columns", "rule"),
        [
            (
                CSV,
                {},
                r"none of train_loss, .*; --columns says which of \['epoch', 'loss', 'train_err', 'val_acc'\] is",
            ),
            (
                "err\n" + "nan\n" * 3,
                {"test_error": "err"},
                "--columns: err must hold test_error; it is empty or NaN in",
            ),
            ("train_error\n" + "9" * 200_000, {}, "the log is not CSV: field larger than field limit"),
            ("9" * 200_000, {}, "the log is not CSV: field larger than field limit"),
            ("train_error\n\0\n", {}, r"row 1 of the log: train_error is '\\x00'$"),
            ("train_error\n" + "x" * 1000, {}, "row 1 of the log: train_error is 'x{59}$"),
            ("train_error,test_error\n0.5\n", {}, "row 1 of the log: test_error is None"),
            (CSV, {"test_error": "val_err"}, "--columns: the log has no column val_err; it has epoch, loss"),
            (CSV, {"accuracy": "val_acc"}, "--columns: accuracy is not one of train_loss"),
            (CSV.replace("0.9", "x"), {"train_error": "train_err"}, "row 1 of the log: train_err is 'x'"),
            ("train_error\n" + "90\n" * 3, {}, r"train_error is 90, not from 0 to 1; --percent\?"),
            ("train_error\n" + "0.9\n" * 4, {}, "the log has 4 epochs, 24 steps are 3; --set steps=N says how many"),
            ("", {}, r"the log has none of train_loss, .*; --columns says which of \[\] is which"),
            ("train_error\n", {}, "the log has 0 epochs"),
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
            assert run.imported["weights_of"] == "last"
        again = cli("import", "net.pt", *IMPORT, "--study", "net-pt")
        assert again.exit_code == 1
        assert "is there already, and stays as it is" in again.stderr
        assert cli("export", trained.folder, "--to", "net.pt").stderr.count("net.pt is there already") == 1

    def test_a_run_published_with_half_its_weights_can_be_probed_and_built_upon(self, trained, cli, data_dir):
        """weights.pt in the run's folder stands in for its checkpoints, which win as long as they are there."""
        weights = trained.folder / "weights.pt"
        assert cli("export", trained.folder, "--half", "--to", weights).exit_code == 0
        assert {tensor.dtype for tensor in torch.load(weights, weights_only=True).values()} == {torch.float16}
        mean = load("shapes", train_images=256, test_images=128, data_dir=data_dir).mean
        exact = load_weights(trained, mean)
        shutil.rmtree(trained.folder / "checkpoints")
        assert json.loads(Path(f"{weights}.json").read_text())["dtype"] == "float16"
        rounded = load_weights(trained, mean)
        assert rounded.step == exact.step
        assert rounded.sha256 != exact.sha256
        pairs = zip(exact.net.state_dict().values(), rounded.net.state_dict().values(), strict=True)
        for before, after in pairs:
            assert after.dtype == torch.float32
            torch.testing.assert_close(after, before, rtol=2**-11, atol=1e-7)
        assert cli("check").stdout.count("nothing wrong") == 1
        assert cli("probe", "--probes", "lesion,bn", "--images", "32").exit_code == 0
        assert cli("identity", trained.folder, "--depth", "14").exit_code == 0
        assert cli("import", weights, *IMPORT, "--study", "again").exit_code == 0

        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        told = cli("check", "results/shapes-smoke")
        assert told.exit_code == 1
        assert "weights.pt\n  is not what was exported; export it again" in told.stdout
        told = cli("identity", trained.folder, "--depth", "20")
        assert told.exit_code == 1
        assert "its bytes are not those that were exported; export them again" in told.stderr

    def test_weights_that_half_precision_cannot_hold_are_not_written(self, trained, cli, data_dir):
        mean = load("shapes", train_images=256, test_images=128, data_dir=data_dir).mean
        net = load_weights(trained, mean)
        net.net.state_dict()["linear.weight"][0] = 1e6
        with pytest.raises(Failure, match="half precision cannot hold"):
            export_weights(net, trained, Path("net.pt"), half=True)
        assert not Path("net.pt").exists()

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

    @pytest.mark.parametrize(
        ("options", "weights_of", "claimed", "departures"),
        [
            ([], "last", 0.3, []),
            (["--weights-of", "last"], "last", 0.3, []),
            (["--weights-of", "3"], 3, 0.3, []),
            (["--weights-of", "1"], 1, 0.4, ["the weights are of epoch 1 of 3, not of the last"]),
            (
                ["--weights-of", "best"],
                "best",
                0.2,
                ["the weights are of epoch 2 of 3, the best on test, not of the last"],
            ),
        ],
    )
    def test_the_epoch_of_the_weights_is_recorded(
        self, tmp_path, cli, data_dir, options, weights_of, claimed, departures
    ):
        torch.save(lively("residual", 8).state_dict(), tmp_path / "net.pt")
        (tmp_path / "log.csv").write_text("\ufefftest_error\n0.4\n0.2\n0.3\n", encoding="utf-8")
        where = ["--out", tmp_path / "results", "--data-dir", data_dir, "--departure", "by hand"]
        told = cli("import", tmp_path / "net.pt", *IMPORT, *where, "--log", tmp_path / "log.csv", *options)
        assert told.exit_code == 0, told
        (run,) = store.find_studies(tmp_path / "results")[0][0].runs
        assert run.imported["weights_of"] == weights_of
        assert run.imported["departures"] == ["by hand", *departures]
        assert run.imported["claimed"]["test_error"] == claimed
        assert [row.test_error for row in run.epochs[:-1]] == [0.4, 0.2]

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
            (["net.pt", "--mean", "125.3,123,113.9"], 2, "--mean must be of pixels / 255, from 0 to 1; got 125.3,"),
            (["net.pt", "--std", "0,1,1"], 2, "--std must be of pixels / 255, above 0 and at most 1; got 0,1,1"),
            (["net.pt", "--std", "63,62.1,66.7"], 2, "--std must be of pixels / 255, above 0 and at most 1; got 63"),
            (["net.pt", "--claimed-test-error", "nan"], 2, "--claimed-test-error must be in percent, from 0 to 100; "),
            (["net.pt", "--claimed-train-error", "101"], 2, "--claimed-train-error must be in percent, from 0 to 100"),
            (["net.pt", "--set", "init=identity:plain-8-s0-01234567:0123456789ab"], 2, "only degrade identity makes"),
            (["net.pt", "--set", "width=" + "[" * 100_000], 2, "width must be a whole number; got '[[["),
            (["net.pt", "--columns", "test_error=err"], 2, "--columns, --percent and --weights-of are of a published"),
            (
                ["net.pt", "--percent"],
                2,
                "--columns, --percent and --weights-of are of a published log; --log is missing",
            ),
            (["net.pt", "--weights-of", "best"], 2, "are of a published log; --log is missing"),
            (["net.pt", "--log", "."], 1, "Is a directory"),
            (["net.pt", "--log", "net.pt"], 2, "net.pt is not text"),
            (
                ["net.pt", "--log", "ok.csv", "--columns", "err"],
                2,
                "--columns must be MEASURE=COLUMN, such as test_error=",
            ),
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
    def test_bad_input_is_one_line_and_nothing_is_written(
        self, tmp_path, monkeypatch, data_dir, cli, options, code, rule
    ):
        monkeypatch.setenv("DEGRADE_DATA", str(data_dir))
        monkeypatch.chdir(tmp_path)
        torch.save(lively("residual", 8).state_dict(), "net.pt")
        Path("ok.csv").write_text("test_error\n0.4\n0.2\n0.3\n")
        Path("junk.pt").write_bytes(b"junk")
        told = cli("import", *IMPORT, *options, "--study", "new")
        assert (told.exit_code, told.stderr.count("\n")) == (code, 1), told
        assert rule in told.stderr
        assert not Path("results/new").exists()

    def test_weights_of_another_step_never_stand_in_for_the_last_ones(self, trained):
        early = load_weights(trained, torch.zeros(3, 32, 32))._replace(step=8)
        with pytest.raises(Failure, match="stands in for the weights of the last step, 24; these are of 8"):
            export_weights(early, trained, trained.folder / "weights.pt")
        assert not [*trained.folder.glob("weights.pt*")]

    def test_a_run_that_was_published_without_its_weights_is_given_them_back(self, trained, cli):
        """Under the run id of an older version of degrade, too, whose configuration had fewer fields."""
        assert cli("export", trained.folder, "--to", "net.pt").exit_code == 0
        assert cli("import", "net.pt", *IMPORT, "--study", "new").exit_code == 0
        (folder,) = Path("results/new").glob("residual-8-*")
        config, weights = json.loads((folder / "config.json").read_text()), (folder / "weights.pt").read_bytes()
        del config["augment"]
        old = folder.rename(folder.with_name(run_id(config)))
        (old / "config.json").write_bytes(store.to_json(config))
        (old / "weights.pt").unlink()
        told = cli("export", old, "--to", "again.pt")
        assert "import it again, which puts them back" in told.stderr
        told = cli("import", "net.pt", *IMPORT, "--study", "new")
        assert told.exit_code == 0, told
        assert (old / "weights.pt").read_bytes() == weights
        assert [*Path("results/new").glob("residual-8-*")] == [old]
        (old / "weights.pt").unlink()
        tensors = torch.load("net.pt", weights_only=True)
        torch.save(tensors | {"linear.bias": tensors["linear.bias"] + 1}, "other.pt")
        for file, code in (("other.pt", 1), ("net.pt", 0), ("net.pt", 1)):
            told = cli("import", file, *IMPORT, "--study", "new")
            assert told.exit_code == code, told
            assert ("is there already, and stays as it is" in told.stderr) == bool(code)

    def test_a_validation_split_is_measured_too(self, trained, cli):
        assert cli("export", trained.folder, "--to", "net.pt").exit_code == 0
        Path("log.csv").write_text("test_error\n0.9\n0.8\n0.7\n")
        options = ["--set", "val_images=64", "--log", "log.csv"]
        assert cli("import", "net.pt", *IMPORT, "--study", "held", *options).exit_code == 0
        (study,), damaged = degrade.store.find_studies(Path("results/held"))
        assert damaged == []
        *before, last = study.runs[0].epochs
        assert 0 <= last.val_error <= 1
        assert all(math.isnan(row.val_error) for row in before)
        assert cli("check", "results/held").exit_code == 0

    def test_a_run_that_another_process_has_is_a_line(self, trained, cli):
        assert cli("export", trained.folder, "--to", "net.pt").exit_code == 0
        assert cli("import", "net.pt", *IMPORT, "--study", "new").exit_code == 0
        (folder,) = Path("results/new").glob("residual-8-*")
        (folder / "log.csv").unlink()
        with commit.hold(folder / "lock"):
            told = cli("import", "net.pt", *IMPORT, "--study", "new")
        assert (told.exit_code, told.stderr.count("\n")) == (1, 1)
        assert f"{folder}: held by process {os.getpid()}" in told.stderr

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
