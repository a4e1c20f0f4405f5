"""A stand-in for torch.cuda that captures on the CPU what a CUDA graph would: kernels and where they read and write.

Replaying runs the recorded operations again on the very tensors of the capture. So whatever a real graph
bakes in is baked in here too: numbers, the first step's special cases, tensors that were rebound since. An
operation that needs a tensor's value on the host fails the capture, as it does on a GPU.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
UNDECLARED = ("running_mean", "running_var")  # native_batch_norm's schema does not say that it writes them


class CUDAGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = []  # what the capture wrote over

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__.split(".")[0] in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or argument.name in UNDECLARED:
                written = tree_flatten(named.get(argument.name))[0]
                self.before += [(tensor, tensor.detach().clone()) for tensor in written]
        results = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, results))
        return results

    def __exit__(self, *exception):
        super().__exit__(*exception)
        with torch.no_grad():  # a real capture computes nothing
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                again, there = tree_flatten(function(*args, **kwargs))[0], tree_flatten(results)[0]
                for new, old in zip(again, there, strict=True):
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)  # into the memory that the capture gave it


class Event:
    def __init__(self, blocking=False):
        self.recorded = self.waited = False

    def record(self, stream):
        self.recorded = True

    def synchronize(self):
        assert self.recorded
        self.waited = True

    def query(self):
        """Not at once: whoever asks has to come again."""
        assert self.recorded
        before, self.waited = self.waited, True
        return before


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def current_stream(device=None):
    return Stream()


def stream(which):
    return contextlib.nullcontext()


def graph_pool_handle():
    return (0, 1)


def graph(captured, *, pool, stream, capture_error_mode):
    assert pool == graph_pool_handle()
    return captured
