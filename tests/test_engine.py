"""What keeps a fast engine honest: each faster path against the simple one."""

import copy
import json
import subprocess
import sys

import fake_cuda
import pytest
import torch
from conftest import smoke

from degrade.engine import compiled as compiling
from degrade.engine.compiled import compile_modules, why_not
from degrade.engine.process import keep_memory, prepare_process
from degrade.engine.queue import AHEAD, GraphQueue, Queue, WarmQueue, make_queue
from degrade.nets import TwoLayers, cifar_net
from degrade.train import Training, load_splits

needs_compiler = pytest.mark.skipif(bool(why_not("cpu")), reason=f"nothing can be compiled here: {why_not('cpu')}")
GPUS = torch.cuda.device_count()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device here")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    prepare_process(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def splits(data_dir):
    return load_splits(smoke(), data_dir, "cpu")


def finish(training, updates=None):
    """Train to the end, or as many updates."""
    while updates is not None and training.step < updates:
        training.update()
    if updates is None:
        for _ in training:
            pass
    return training


@pytest.fixture
def graphs(monkeypatch):
    """Every training in the test uses graphs, of the stand-in for CUDA."""
    monkeypatch.setattr("degrade.train.make_queue", lambda device, **_: GraphQueue(device, fake_cuda))
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, *, pin_memory=False, **options: real(t, **options))


class TestGraphs:
    """On the CPU, behind the stand-in; `TestGpu` does the same on a GPU."""

    def test_a_graph_is_the_eager_step_bit_for_bit(self, splits, monkeypatch):
        """To the end: learning rates change, the tables are filled anew, three epochs are evaluated."""
        for fields in ({}, {"batch_size": 96, "steps": 8}, {"decay": "conv", "shortcut": "B"}, {"momentum": 0.0}):
            config = smoke("residual", **fields)
            eager = finish(Training(config, splits))
            with monkeypatch.context() as patch:
                patch.setattr("degrade.train.make_queue", lambda device, **_: GraphQueue(device, fake_cuda))
                graphed = finish(Training(config, splits))
            assert graphed.epochs == eager.epochs
            assert graphed.state() == eager.state()

    def test_it_resumes_through_the_graph(self, splits, graphs):
        config = smoke("residual")
        whole = finish(Training(config, splits))
        first = finish(Training(config, splits), updates=5)
        second = Training(config, splits)
        second.restore(first.state())
        assert finish(second).state() == whole.state()

    def test_evaluating_leaves_the_net_alone(self, splits, graphs):
        training = finish(Training(smoke(), splits), updates=3)
        before = training.state()
        for _ in training.evaluate():
            pass
        assert training.state() == before

    def test_packed_is_alone(self, splits, graphs):
        configs = [smoke(block, depth) for block in ("plain", "residual") for depth in (8, 14)]
        alone = [finish(Training(config, splits)).state() for config in configs]
        packed = [Training(config, splits) for config in configs]
        turns = [iter(training) for training in packed]
        while turns:
            turns = [turn for turn in turns if next(turn, turn) is not turn]
        assert [training.state() for training in packed] == alone

    def test_the_stand_in_bakes_in_what_a_graph_bakes_in(self):
        x, rate = torch.zeros(3), {"lr": 1.0}
        replay = GraphQueue(torch.device("cpu"), fake_cuda).capture(lambda: x.add_(rate["lr"]), [x])
        assert x.tolist() == [0, 0, 0]
        rate["lr"] = 100.0
        replay()
        assert x.tolist() == [1, 1, 1]
        with pytest.raises(RuntimeError, match="not permitted"):
            GraphQueue(torch.device("cpu"), fake_cuda).capture(lambda: x.sum().item(), [x])

    def test_only_so_many_replays_wait_for_the_device(self):
        queue = GraphQueue(torch.device("cpu"), fake_cuda)
        x = torch.zeros(1)
        replay = queue.capture(lambda: x.add_(1), [x])
        marks = []
        for _ in range(3 * AHEAD):
            replay()
            marks.append(queue.ahead[-1])
        assert [mark.waited for mark in marks] == [True] * (2 * AHEAD) + [False] * AHEAD

    def test_capturing_leaves_no_trace(self):
        x = torch.arange(3.0)
        WarmQueue().capture(lambda: x.mul_(2), [x])
        assert x.tolist() == [0, 1, 2]

    def test_which_queue(self):
        assert type(make_queue(torch.device("cpu"))) is Queue
        assert type(make_queue(torch.device("mps"))) is Queue
        assert type(make_queue(torch.device("cpu"), warm=True)) is WarmQueue
        assert type(make_queue(torch.device("cuda"), graphs=False)) is Queue


def batch_norms(function):
    """How many of torch's own batch norms are called; compiled code has its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name == "aten::native_batch_norm" for event in profile.events())


@needs_compiler
class TestCompiled:
    @pytest.mark.parametrize("block", ["plain", "residual"])
    @pytest.mark.parametrize("shortcut", ["A", "B"])
    def test_compiled_is_eager_within_rounding(self, block, shortcut):
        """The stated tolerance: logits to 1e-4; gradients as near to those of float64 as the eager net's, or to 1 %.

        Roundings flip ReLUs near 0, so that gradients of two exact implementations differ by more than rounding.
        """
        torch.manual_seed(0)
        eager = cifar_net(14, block, width=16, shortcut=shortcut).to(memory_format=torch.channels_last)
        fast, double = copy.deepcopy(eager), copy.deepcopy(eager).double()
        compile_modules(fast, TwoLayers)
        x, y = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (64,))
        logits, gradients = {}, {}
        for name, net in (("eager", eager), ("fast", fast), ("double", double)):
            logits[name] = net(x.to(net.linear.weight.dtype)).double()
            torch.nn.functional.cross_entropy(logits[name], y).backward()
            gradients[name] = torch.cat([p.grad.double().flatten() for p in net.parameters()])
        torch.testing.assert_close(logits["fast"], logits["eager"], rtol=1e-4, atol=1e-4)
        away = {name: (gradients[name] - gradients["double"]).norm() for name in ("eager", "fast")}
        assert away["fast"] <= max(2 * away["eager"], 0.01 * gradients["double"].norm())
        for a, b in zip(eager.buffers(), fast.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_it_resumes_and_repeats_to_the_same_bytes(self, splits):
        config = smoke("residual", depth=14)
        whole = finish(Training(config, splits, compiled=True))
        first = finish(Training(config, splits, compiled=True), updates=7)
        second = Training(config, splits, compiled=True)
        second.restore(first.state())
        assert finish(second).state() == whole.state()
        assert second.epochs == whole.epochs

    def test_nothing_falls_back_silently(self, splits):
        """More shapes than torch would compile by default: of all batch norms only the stem's runs as it is written."""
        trainings = [
            Training(smoke(block, depth, **more), splits, compiled=compiled)
            for compiled in (True, False)
            for block in ("plain", "residual")
            for depth, more in ((8, {}), (20, {"shortcut": "B"}), (14, {"width": 8}))
        ]
        with torch.compiler.set_stance("fail_on_recompile"):
            for training in trainings:
                finish(training, updates=1)
                norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in training.net.modules())
                written = 1 if type(training.queue) is WarmQueue else norms
                assert batch_norms(training.update) == written
                batches = sum(evaluation.batches for evaluation in training.evaluations.values())
                assert batch_norms(lambda training=training: list(training.evaluate())) == written * batches

    def test_too_many_shapes_are_an_error_not_a_fallback(self, monkeypatch):
        torch._dynamo.reset()
        monkeypatch.setattr(compiling, "SHAPES", 2)
        net = cifar_net(8, "plain", width=4)
        compile_modules(net, TwoLayers)
        with pytest.raises(Exception, match="recompile_limit"):
            net(torch.zeros(2, 3, 32, 32))
        torch._dynamo.reset()

    def test_blocks_alike_share_one_compilation(self):
        import torch._dynamo.utils as dynamo

        torch._dynamo.reset()
        dynamo.counters.clear()
        net = cifar_net(56, "plain", width=4)
        compile_modules(net, TwoLayers)
        with torch.no_grad():
            net(torch.zeros(2, 3, 32, 32))
        assert dynamo.counters["stats"]["unique_graphs"] == 5  # 3 stages, and 2 blocks that change the shape


def test_no_compiler_is_said_in_a_line(tmp_path):
    script = "from degrade.engine.compiled import why_not; print(why_not('cpu'))"
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.strip()


class TestMemory:
    @pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
    def test_no_page_faults_in_the_steady_step(self, data_dir):
        """Without `keep_memory` a step of ResNet-20 maps and returns its activations."""
        script = (
            "import sys, resource, torch; from pathlib import Path\n"
            "from degrade.config import RunConfig\n"
            "from degrade.engine.process import keep_memory\n"
            "from degrade.train import Training, load_splits\n"
            "sys.argv[1] == 'kept' and keep_memory()\n"
            "torch.set_num_threads(1)\n"
            "config = RunConfig(block='residual', depth=20, seed=0, dataset='shapes')\n"
            "training = Training(config, load_splits(config, Path(sys.argv[2]), 'cpu'))\n"
            "faults = [0]\n"
            "for _ in range(14):\n"
            "    training.update()\n"
            "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
            "print([after - before for before, after in zip(faults, faults[1:])][6:])\n"
        )
        faults = {
            how: json.loads(
                subprocess.run(
                    [sys.executable, "-c", script, how, str(data_dir)], check=True, capture_output=True, text=True
                ).stdout
            )
            for how in ("kept", "as it is")
        }
        assert max(faults["as it is"]) > 1000  # in some of the steps, as glibc happens to have laid it out
        assert min(faults["kept"]) < 50  # in others the kernel may have taken pages back that lay idle

    def test_another_c_library_is_left_alone(self, monkeypatch):
        monkeypatch.setattr("ctypes.CDLL", lambda _: object())
        keep_memory()


def test_a_gpu_named_by_number_is_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("cpu", "cuda:1", "cuda:0"):
        prepare_process(1, device)
    assert taken == ["cuda:1", "cuda:0"]


class TestPrecision:
    def test_bf16_trains_with_weights_in_fp32(self, splits):
        training = finish(Training(smoke("residual", precision="bf16"), splits))
        assert training.epochs[-1].train_error < 0.9
        assert {value.dtype for value in training.net.state_dict().values()} == {torch.float32}
        same = finish(Training(smoke("residual", precision="bf16"), splits))
        assert same.state() == training.state()
        assert finish(Training(smoke("residual"), splits)).epochs != training.epochs

    def test_convolutions_are_in_bf16(self, splits):
        training = Training(smoke(precision="bf16"), splits)
        seen = []
        for module in training.net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        training.update()
        assert set(seen) == {torch.bfloat16}


class TestGpu:
    """On a real GPU."""

    pytestmark = gpu

    @pytest.fixture
    def splits(self, data_dir):
        return load_splits(smoke(), data_dir, "cuda")

    @pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_fifty_graphed_steps_are_the_eager_ones(self, splits, precision, compiled):
        config = smoke("residual", 20, precision=precision, steps=50, width=16, milestones=(20, 40))
        graphed = finish(Training(config, splits, "cuda", compiled=compiled))
        eager = finish(Training(config, splits, "cuda", compiled=compiled, graphs=False))
        assert graphed.epochs == eager.epochs
        assert graphed.state() == eager.state()

    @pytest.mark.parametrize("compiled", [False, True])
    def test_packed_is_alone(self, splits, compiled):
        configs = [smoke(block, depth, width=16) for block in ("plain", "residual") for depth in (8, 20)]
        alone = [finish(Training(config, splits, "cuda", compiled=compiled)).state() for config in configs]
        packed = [Training(config, splits, "cuda", compiled=compiled) for config in configs]
        turns = [iter(training) for training in packed]
        while turns:
            turns = [turn for turn in turns if next(turn, turn) is not turn]
        assert [training.state() for training in packed] == alone

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_hundred_steps_are_fifty_and_fifty(self, splits, compiled):
        config = smoke("residual", 20, steps=100, width=16)
        whole = finish(Training(config, splits, "cuda", compiled=compiled))
        first = finish(Training(config, splits, "cuda", compiled=compiled), updates=50)
        second = Training(config, splits, "cuda", compiled=compiled)
        second.restore(first.state())
        assert finish(second).state() == whole.state()

    def test_the_gpu_does_as_the_cpu_does(self, splits, data_dir):
        config = smoke("residual", 14)
        here = finish(Training(config, load_splits(config, data_dir, "cpu")), updates=10)
        there = finish(Training(config, splits, "cuda"), updates=10)
        for (name, a), b in zip(here.net.state_dict().items(), there.net.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-4, msg=name)

    def test_no_update_waits_for_the_device(self, splits):
        training = Training(smoke("residual", 20, steps=1000), splits, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            finish(training, updates=AHEAD - 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_sweep_packed_on_the_gpu(self, cli, data_dir, tmp_path):
        for pack, out in (("1", tmp_path / "alone"), ("4", tmp_path / "packed")):
            arguments = ("--depths", "8,14", "--dataset", "shapes", "--protocol", "smoke", "--data-dir", data_dir)
            assert cli("sweep", *arguments, "--device", "cuda:0", "--pack", pack, "--out", out).exit_code == 0
        logs = [sorted(p.read_text() for p in (tmp_path / which).rglob("log.csv")) for which in ("alone", "packed")]
        assert len(logs[0]) == 4
        assert logs[0] == logs[1]
