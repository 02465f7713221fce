"""What decoding is about: a picture being decoded, the networks that decode it, the rows of a forward pass, its times.

This file needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from .schedule import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Seconds of every step by part: "transformer", "head", "sampling", "remask"; "step" is them and what lies between.
# What a backend does in one call has no parts.
Timings = dict[str, list[Any]]


class Network(Protocol):
    """What a backend offers the loop: the parts of a step, which ``step`` puts together."""

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked position."""

    def features(self, tokens: Tensor, contexts: Sequence[Any]) -> Tensor:
        """(R, N) int64 tokens, one context per row, to (R, N, C): the forward pass before the head."""

    def readout(self, features: Tensor) -> Tensor:
        """(M, C) features of single positions to (M, D) fp32, the normalized hidden state the head is affine in."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D) fp32 to (M, V) fp32 over the codes."""


@runtime_checkable
class WholeSteps(Protocol):
    """A backend whose whole step is one call; its tensors may be of any kind its canvases hold."""

    def decode_step(self, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None) -> tuple[Any, Any]:
        """Tokens and unknown of each canvas after one step; the canvases, of one size, are left as they are."""


@dataclass
class Canvas:
    """One picture being decoded; ``advance`` replaces tokens and unknown and counts the step.

    Attributes:
        tokens: (N,) int64 codes; at unknown positions the last draw, a preview that the network never sees.
        unknown: (N,) bool, True where masked.
        seed: the picture's seed, in [0, 2^63).
        steps: the numbers of every step, made for this count of unknown positions.
        contexts: one per branch, opaque to the loop. The same object means the same context.
        weights: one tuple per branch, one weight per step; they sum to 1 at every step.
        shape: what the network needs beyond the number of tokens to compute canvases together, say (h, w).
        step: steps done.
        masked: positions masked now, known from the schedule after a step; counted where it is not given, for which the
            host waits.
    """

    tokens: Tensor
    unknown: Tensor
    seed: int
    steps: Steps
    contexts: tuple[Any, ...]
    weights: tuple[tuple[float, ...], ...]
    shape: tuple[int, ...] = ()
    step: int = 0
    masked: int = -1

    def __post_init__(self) -> None:
        if self.masked < 0:
            self.masked = int(self.unknown.sum())
        assert self.tokens.shape == self.unknown.shape
        assert len(self.contexts) == len(self.weights) >= 1
        assert all(len(weights) == len(self.steps) for weights in self.weights)
        assert self.finished or self.steps.masked_after[self.step] <= self.masked, "schedule of another canvas"

    @classmethod
    def blank(
        cls,
        tokens: int,
        *,
        seed: int,
        steps: Steps,
        contexts: tuple[Any, ...],
        weights: tuple[tuple[float, ...], ...],
        device: torch.device | str = "cpu",
    ) -> Canvas:
        """A canvas of that many tokens, all of them masked."""
        import torch

        grid = torch.zeros(tokens, dtype=torch.int64, device=device)
        return cls(grid, torch.ones_like(grid, dtype=torch.bool), seed, steps, contexts, weights, masked=tokens)

    @property
    def finished(self) -> bool:
        return self.step == len(self.steps)


class Rows(NamedTuple):
    """The rows of one forward pass, and where each canvas finds its branches among them."""

    sources: list[int]
    contexts: list[Any]
    branches: list[list[tuple[int, float]]]


@contextmanager
def timed(timings: Timings | None, part: str, device: torch.device | str) -> Iterator[None]:
    """Add the seconds of the block to a part of the timings; nothing waits for a GPU until they are read as floats."""
    if timings is None:
        yield
        return
    start = _now(device)
    yield
    end = _now(device)
    timings.setdefault(part, []).append(end - start if isinstance(end, float) else _Span(start, end))


class _Span(NamedTuple):
    """What lies between two events on a GPU."""

    start: Any
    end: Any

    def __float__(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def _now(device: torch.device | str) -> Any:
    if str(device).startswith("cuda"):
        import torch

        with torch.cuda.device(device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event
    return time.perf_counter()
