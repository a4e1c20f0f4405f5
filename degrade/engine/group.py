"""Several processes that train one run together, a part of each batch each: torchrun starts them."""

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # the others wait while the first one makes its plan; torchrun ends them if it dies


class Group(NamedTuple):
    """A process's place among those that train together; alone, it is the first of one."""

    rank: int = 0
    size: int = 1

    def rows(self, batch_size: int) -> slice:
        """The part of each batch that is this process's."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The net, whose gradients become the means over all processes as they are computed."""
        if self.size == 1:
            return net
        newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        without: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return DistributedDataParallel(net, **without)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over all processes."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each floating-point tensor by the mean over all processes, in one exchange."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            parts = torch.split(flat.div_(self.size), [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def tell(self, message: Any = None) -> Any:
        """What the first process says, in all of them."""
        if self.size == 1:
            return message
        messages = [message]
        dist.broadcast_object_list(messages, device=torch.device("cpu"))
        return messages[0]

    def leave(self) -> None:
        """Part, when there is no more to train."""
        if self.size > 1:
            dist.barrier()  # or the first would be gone before the others have heard all it says
            dist.destroy_process_group()


ALONE = Group()


def join(device: str) -> tuple[Group, str]:
    """Meet the other processes that torchrun has started; and the device of this one.

    Args:
        device: "cpu" or "cuda": the GPU is the one that has the process's number on its machine.

    Raises:
        ValueError: one device cannot be shared out.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"with torchrun, device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda":
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise ValueError(f"torchrun has started more processes than there are GPUs, {torch.cuda.device_count()}")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size()), device


def _die_with_parent(parent: int) -> None:
    """torchrun ends its processes in order, unless it is killed itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
