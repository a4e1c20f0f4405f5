"""torch.compile, a block at a time, with no fallback that nobody sees."""

import logging
import threading
from functools import lru_cache
from types import UnionType

import torch
from torch import nn
from tqdm import tqdm

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA, it warns; that is no news here

tqdm.set_lock(threading.RLock())  # torch's progress bar would make a semaphore, and a killed process leave it behind

SHAPES = 256  # of blocks, times training or not: far more than any process needs; torch gives up at 8


def compile_modules(net: nn.Module, kind: type[nn.Module] | UnionType) -> None:
    """Have the modules of this class run compiled, in place. Those alike in shape share one compilation.

    The rest of the net runs as it is. Compiling happens in the first call, and takes time then.

    Raises, in a call:
        RuntimeError: the code cannot be compiled as a whole, or more often than `SHAPES` times.
    """
    import torch._dynamo  # neither is an attribute of torch until something compiles
    import torch._inductor

    torch._dynamo.config.recompile_limit = SHAPES
    torch._dynamo.config.accumulated_recompile_limit = SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if hasattr(torch._inductor.config, "deterministic"):  # kernels chosen by timing would differ between processes
        torch._inductor.config.deterministic = True
    for module in net.modules():
        if isinstance(module, kind):
            module.compile(fullgraph=True, dynamic=False)


@lru_cache
def why_not(device: str) -> str:
    """Why nothing can be compiled for this device here, in a line; empty where it can. Tried out, once a process."""
    if device == "mps":
        return "compiling for mps is untested"
    try:
        tried = torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(64, device=device))
        return "" if bool((tried == 1).all()) else "its result is wrong"
    except Exception as error:  # whatever is missing: a compiler, its headers, Triton, a folder to write to
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0][:200] if lines else type(error).__name__
