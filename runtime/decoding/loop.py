"""The one decoding loop, for every backend and every family.

A canvas is one picture being decoded. One step of it, with x its tokens, w_b the weights of its branches and M its
masked positions:

    h_b = readout(features(x, context_b)[M])      one row of the forward pass per branch with a weight at this step
    l   = logits(sum_b w_b h_b)                   the head is affine and the weights sum to 1: one head for all branches
    x[M] = draw(l),  then the least confident of M are masked again, ``Steps.masked_after`` of them

Every forward is one step for each of its canvases. They may differ in step, schedule, length, branches and style, so an
engine lets a new picture join at the next step. What is computed on tensors is in ``step``; a backend whose whole step
is one call (an ONNX graph) brings its own. This file needs no torch.

Exact savings: branches without weight aren't run; all pictures of a request share each branch's first forward, where
every token is MASK; only masked positions are read out, scored and drawn; a last step draws no confidence.

Laws: a canvas's tokens don't depend on the canvases beside it, given a network whose rows don't; its randomness depends
on its seed alone; exactly ``masked_after`` positions are masked after a step, ties by lowest index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from stylemuse.decoding.schedule import Steps

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


def decode(
    network: Network | WholeSteps,
    canvases: Sequence[Canvas],
    on_step: Callable[[Sequence[Canvas]], None] | None = None,
    timings: Timings | None = None,
) -> list[Tensor]:
    """Run every canvas to its last step; returns their tokens, (N,) int64 each.

    ``on_step`` is called after each step with the canvases that took part in it.
    """
    while running := [canvas for canvas in canvases if not canvas.finished]:
        advance(network, running, timings)
        if on_step is not None:
            on_step(running)
    for spans in (timings or {}).values():
        spans[:] = map(float, spans)
    return [canvas.tokens for canvas in canvases]


def advance(network: Network | WholeSteps, canvases: Sequence[Canvas], timings: Timings | None = None) -> None:
    """One decoding step for each canvas.

    ``timings`` collects seconds; on a GPU by the device's own clock, as numbers once it has come so far (see `timed`).
    """
    for group in alike(canvases):
        with timed(timings, "step", getattr(group[0].tokens, "device", "cpu")):
            _advance(network, group, timings)


def alike(canvases: Sequence[Canvas]) -> list[list[Canvas]]:
    """The canvases that one forward pass can compute together: of one number of tokens and one shape."""
    groups: dict[tuple[int, ...], list[Canvas]] = {}
    for canvas in canvases:
        assert not canvas.finished
        groups.setdefault((len(canvas.tokens), *canvas.shape), []).append(canvas)
    return list(groups.values())


def _advance(network: Network | WholeSteps, canvases: Sequence[Canvas], timings: Timings | None) -> None:
    rows = _rows(canvases)
    if isinstance(network, WholeSteps):
        tokens, unknown = network.decode_step(canvases, rows, timings)
    else:
        from stylemuse.decoding.step import step

        tokens, unknown = step(network, canvases, rows, timings)
    for canvas, drawn, mask in zip(canvases, tokens, unknown, strict=True):
        canvas.tokens, canvas.unknown, canvas.masked = drawn, mask, canvas.steps.masked_after[canvas.step]
        canvas.step += 1


class Rows(NamedTuple):
    """The rows of one forward pass, and where each canvas finds its branches among them."""

    sources: list[int]
    contexts: list[Any]
    branches: list[list[tuple[int, float]]]


def _rows(canvases: Sequence[Canvas]) -> Rows:
    """A row per branch with a weight; canvases that are still all MASK share the rows of equal contexts."""
    rows = Rows([], [], [])
    shared: dict[int, int] = {}
    for source, canvas in enumerate(canvases):
        blank = canvas.masked == len(canvas.tokens) and canvas.step == 0
        branches = []
        for context, weights in zip(canvas.contexts, canvas.weights, strict=True):
            weight = weights[canvas.step]
            if weight == 0.0:
                continue
            row = shared.get(id(context)) if blank else None
            if row is None:
                row = len(rows.sources)
                rows.sources.append(source)
                rows.contexts.append(context)
                if blank:
                    shared[id(context)] = row
            branches.append((row, weight))
        rows.branches.append(branches)
    return rows


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
