"""Where a run's steps are issued: at once, or as CUDA graphs on a stream of its own.

A captured function takes nothing and returns nothing: it reads and writes tensors that stay where they
are, so that whatever changes from call to call must itself be in such a tensor.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

AHEAD = 8  # replays that may wait for the device: enough to keep it busy, few enough to share it fairly
WARM_UP = 3  # calls before a capture: compile, choose kernels, allocate


class Fetched(NamedTuple):
    """Copies of tensors, on their way to the CPU. `ready` says at once whether they are there, `wait` waits."""

    tensors: list[Tensor]
    ready: Callable[[], bool] = lambda: True
    wait: Callable[[], object] = lambda: None


class Queue:
    """Runs every function when it is called."""

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """Whatever is computed in this context belongs to this queue."""
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], None]:
        """A function that does as `function` does, from now on. `changed` are the tensors it changes."""
        return function

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Copy the tensors to the CPU, as they are after all that was issued so far."""
        return Fetched([tensor.detach().to("cpu", copy=True) for tensor in tensors])


class WarmQueue(Queue):
    """Calls each function once as it is captured, so that compiling happens then. It leaves no other trace."""

    def capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], None]:
        with preserved(changed):
            function()
        return function


class GraphQueue(Queue):
    """Captures functions as CUDA graphs, in one memory pool, and replays them on one stream.

    Args:
        device: a CUDA device.
        cuda: torch.cuda, or what stands in for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.cuda = cuda
        self.device = device
        self.stream = cuda.Stream(device)
        self.stream.wait_stream(cuda.current_stream(device))  # what was made before is there
        self.pool = cuda.graph_pool_handle()
        self.ahead: deque[Any] = deque()

    def on(self) -> contextlib.AbstractContextManager[Any]:
        return self.cuda.stream(self.stream)  # type: ignore[no-any-return]

    def capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], None]:
        for _ in range(WARM_UP):
            with self.on(), preserved(changed):  # each from the same place: there may be no third batch
                function()
        graph = self.cuda.CUDAGraph()
        # Other runs' threads may go on writing their checkpoints meanwhile.
        with self.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()

        def replay() -> None:
            if len(self.ahead) == AHEAD:
                self.ahead.popleft().synchronize()
            with self.on():
                graph.replay()
                self.ahead.append(self._mark())

        return replay

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        with self.on():
            pinned = [torch.empty_like(t, device="cpu", pin_memory=self.device.type == "cuda") for t in tensors]
            for there, here in zip(tensors, pinned, strict=True):
                here.copy_(there.detach(), non_blocking=True)
            mark = self._mark()
        return Fetched(pinned, mark.query, mark.synchronize)

    def _mark(self) -> Any:
        event = self.cuda.Event(blocking=True)  # whoever waits for it sleeps
        event.record(self.stream)
        return event


def make_queue(device: torch.device, *, graphs: bool = True, warm: bool = False) -> Queue:
    """The fastest queue for the device: graphs on CUDA unless they are not wanted; at once elsewhere.

    `warm`: functions are called once beforehand, since their first call is unlike the others.
    """
    if device.type == "cuda" and graphs:
        return GraphQueue(device)
    return WarmQueue() if warm else Queue()


@contextlib.contextmanager
def preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards the tensors hold what they held before, in the same memory."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
