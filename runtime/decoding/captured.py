"""A function of tensors as one launch: on a GPU a CUDA graph for each set of shapes, captured when it first comes up.

A graph's tensors lie at fixed addresses: what is given is copied in, and what comes out is copied out, so results stay
when the graph runs again. A function that is captured reads nothing of the device on the host, and what it reads beside
its arguments (weights, a bank of adapters) stays at its address. Where nothing is captured it is simply called.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

KEPT = 8
"""Sets of shapes whose graphs are kept, those used last; each has memory of its own."""

_CAPTURING = threading.Lock()
"""To begin a capture waits for the whole device, which fails while another thread captures."""

Function = Callable[..., tuple[Tensor, ...]]


class Graph(Protocol):
    """Launches that run again at a call."""

    def replay(self) -> None:
        """All of them, on the current stream."""


def capture(run: Callable[[], object], device: torch.device, pool: Any = None) -> Graph:
    """The launches of run() as a CUDA graph; capturing runs nothing, so they have run before, as they are.

    Other threads may use the device meanwhile. ``pool``: memory shared with other graphs, else the graph's own.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        _CAPTURING,
        torch.cuda.device(device),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        run()
    return graph


class Pool:
    """Memory that graphs share which never run at the same time.

    torch can't use it any more once all graphs in it are gone while anything else, say cuBLAS's workspace, still lies
    in it ("use_count > 0 INTERNAL ASSERT FAILED"). So it has a graph of its own, of one launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._kept = capture(lambda: torch.zeros(1, device=device), device, self.handle)


@dataclass
class _Held:
    """A graph with the tensors it reads and writes."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    graph: Graph | None = None


class Captured:
    """The function; safe to call from several threads, which take turns.

    Args:
        function: of tensors alone, to a tuple of tensors.
        capture: how its launches are captured; None calls it each time.
    """

    def __init__(self, function: Function, capture: Callable[[Callable[[], object]], Graph] | None) -> None:
        self._function, self._capture = function, capture
        self._held: OrderedDict[Any, _Held] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._capture is None:
            return self._function(*inputs)
        key = tuple((value.shape, value.dtype) for value in inputs)
        with self._lock:
            held = self._held.pop(key, None)
            if held is None:
                made = self._function(*inputs)  # which loads kernels, and tells what is wrong
                held = self._hold(inputs, self._capture)
            else:
                assert held.graph is not None
                for place, value in zip(held.inputs, inputs, strict=True):
                    place.copy_(value)
                held.graph.replay()
                made = tuple(value.clone() for value in held.outputs)
            self._held[key] = held
            return made

    def _hold(self, inputs: tuple[Tensor, ...], capture: Callable[[Callable[[], object]], Graph]) -> _Held:
        while len(self._held) >= KEPT:
            self._held.popitem(last=False)
        held = _Held(tuple(value.clone() for value in inputs))

        def run() -> None:
            held.outputs = self._function(*held.inputs)

        held.graph = capture(run)
        return held
