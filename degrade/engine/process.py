"""What is set once for the whole process: threads, rounding, memory."""

import ctypes
import os

import torch
from torch import Tensor

# Many runs on one GPU need a hardware queue each. CUDA reads it once, when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def prepare_process(threads: int, device: str = "cpu") -> None:
    """Pin what changes the bits, process-wide. Call it before anything is computed: threads take it from there on.

    A GPU that is named by number becomes the current one, or torch would take memory on the first as well.
    """
    keep_memory()
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def keep_memory() -> None:
    """Have malloc keep what is freed, where it is glibc's, so that no step faults its activations in anew.

    By default it maps every large block and returns it to the kernel at once: thousands of page faults
    a step (benchmarks/RESULTS.md). Blocks above 32 MiB, the most that glibc allows here, are mapped still.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)  # other arenas return their memory whatever the threshold


def set_precision(precision: str) -> None:
    """How GPUs that have TF32 convolve fp32 numbers, and deterministically so. bf16 is `autocast`'s."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16: convolutions and the linear layer take bf16 copies of fp32 weights. Otherwise it does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def send(values: Tensor, there: Tensor) -> None:
    """Copy a tensor on the CPU to where a graph finds it; the CPU does not wait for that."""
    there.copy_(values.pin_memory() if there.device.type == "cuda" else values, non_blocking=True)


def cores() -> int:
    """CPU cores that this process may use, shared with those that torchrun has started beside it."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(every // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
