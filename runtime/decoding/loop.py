"""The one decoding loop, for every backend and every family.

A canvas is one picture being decoded. One step of it, with x its tokens, w_b the weights of its branches and M its
masked positions:

    h_b = readout(features(x, context_b)[M])      one row of the forward pass per branch with a weight at this step
    l   = logits(sum_b w_b h_b)                   the head is affine and the weights sum to 1: one head for all branches
    x[M] = draw(l),  then the least confident of M are masked again, ``Steps.masked_after`` of them

Every forward is one step for each of its canvases. They may differ in step, schedule, length, branches and style, so an
engine lets a new picture join at the next step.

Exact savings: branches without weight aren't run; all pictures of a request share each branch's first forward, where
every token is MASK; only masked positions are read out, scored and drawn; a last step draws no confidence.

Laws: a canvas's tokens don't depend on the canvases beside it, given a network whose rows don't; its randomness depends
on its seed alone; exactly ``masked_after`` positions are masked after a step, ties by lowest index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stylemuse.decoding.schedule import Steps
from stylemuse.kernels import sampling

# Seconds of every step by part: "transformer", "head", "sampling", "remask"; "step" is them and what lies between.
Timings = dict[str, list[float]]


class Network(Protocol):
    """What a backend offers the loop."""

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked position."""

    def features(self, tokens: Tensor, contexts: Sequence[Any]) -> Tensor:
        """(R, N) int64 tokens, one context per row, to (R, N, C): the forward pass before the head."""

    def readout(self, features: Tensor) -> Tensor:
        """(M, C) features of single positions to (M, D) fp32, the normalized hidden state the head is affine in."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D) fp32 to (M, V) fp32 over the codes."""


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
        masked: positions masked now, counted once and then known from the schedule.
    """

    tokens: Tensor
    unknown: Tensor
    seed: int
    steps: Steps
    contexts: tuple[Any, ...]
    weights: tuple[tuple[float, ...], ...]
    shape: tuple[int, ...] = ()
    step: int = 0
    masked: int = field(init=False)

    def __post_init__(self) -> None:
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
        grid = torch.zeros(tokens, dtype=torch.int64, device=device)
        return cls(grid, torch.ones_like(grid, dtype=torch.bool), seed, steps, contexts, weights)

    @property
    def finished(self) -> bool:
        return self.step == len(self.steps)


def decode(
    network: Network,
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
    return [canvas.tokens for canvas in canvases]


@torch.no_grad()
def advance(network: Network, canvases: Sequence[Canvas], timings: Timings | None = None) -> None:
    """One decoding step for each canvas. ``timings`` collects seconds, at the price of waiting for the device."""
    alike: dict[tuple[int, ...], list[Canvas]] = {}
    for canvas in canvases:
        assert not canvas.finished
        alike.setdefault((len(canvas.tokens), *canvas.shape), []).append(canvas)
    for group in alike.values():
        with _timed(timings, "step", group[0].tokens.device):
            _advance(network, group, timings)


def _advance(network: Network, canvases: Sequence[Canvas], timings: Timings | None) -> None:
    size, device = len(canvases[0].tokens), canvases[0].tokens.device
    unknown = torch.stack([canvas.unknown for canvas in canvases])
    tokens = torch.stack([canvas.tokens for canvas in canvases]).masked_fill(unknown, network.mask_id)
    # Masked positions of all canvases in one list, canvas after canvas. Their number is known: nothing waits for it.
    counts = [canvas.masked for canvas in canvases]
    places = torch.nonzero_static(unknown.flatten(), size=sum(counts))[:, 0]

    plan = _plan(canvases)
    with _timed(timings, "transformer", device):
        features = network.features(tokens[plan.sources], plan.contexts)
    with _timed(timings, "head", device):
        logits = network.logits(_combine(network, features, plan, torch.split(places % size, counts)))
    noise = _Noise.of(canvases, places // size, places % size)
    with _timed(timings, "sampling", device):
        tokens, scores = _draw(noise, canvases, tokens, logits, places)
    with _timed(timings, "remask", device):
        _remask(noise, canvases, tokens, scores, places)


class _Plan(NamedTuple):
    """The rows of one forward pass, and where each canvas finds its branches among them."""

    sources: list[int]
    contexts: list[Any]
    branches: list[list[tuple[int, float]]]


def _plan(canvases: Sequence[Canvas]) -> _Plan:
    """A row per branch with a weight; canvases that are still all MASK share the rows of equal contexts."""
    plan = _Plan([], [], [])
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
                row = len(plan.sources)
                plan.sources.append(source)
                plan.contexts.append(context)
                if blank:
                    shared[id(context)] = row
            branches.append((row, weight))
        plan.branches.append(branches)
    return plan


def _combine(network: Network, features: Tensor, plan: _Plan, positions: Sequence[Tensor]) -> Tensor:
    """The guided hidden states (M, D) fp32 of all masked positions: sum over branches of weight * readout."""
    owners = zip(plan.branches, positions, strict=True)
    picked = [features[row, places] for branches, places in owners for row, _ in branches]
    hidden = iter(torch.split(network.readout(torch.cat(picked)), [len(part) for part in picked]))
    # Multiplied and added one by one: a matmul may sum in another order for another batch, and rows must not notice.
    return torch.cat([_weighted_sum((weight, next(hidden)) for _, weight in branches) for branches in plan.branches])


def _weighted_sum(parts: Iterator[tuple[float, Tensor]]) -> Tensor:
    weight, hidden = next(parts)
    total = weight * hidden
    for weight, hidden in parts:
        total = total + weight * hidden
    return total


class _Noise(NamedTuple):
    """What the noise of every masked position hangs on, (M,) each; ``owner`` is the canvas it belongs to."""

    owner: Tensor
    positions: Tensor
    seeds: Tensor
    steps: Tensor

    @classmethod
    def of(cls, canvases: Sequence[Canvas], owner: Tensor, positions: Tensor) -> _Noise:
        made = cls(owner, positions, positions, positions)
        seeds = made.per_place((canvas.seed for canvas in canvases), torch.int64)
        return made._replace(seeds=seeds, steps=made.per_place((canvas.step for canvas in canvases), torch.int64))

    def per_place(self, values: Iterable[float], dtype: torch.dtype) -> Tensor:
        """A value per canvas -> a value per masked position."""
        return torch.tensor(list(values), dtype=dtype, device=self.owner.device)[self.owner]


def _draw(
    noise: _Noise, canvases: Sequence[Canvas], tokens: Tensor, logits: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) with the masked positions (``places``, in the flattened tokens) drawn, and their scores."""
    temperature = noise.per_place((canvas.steps.token_temperature[canvas.step] for canvas in canvases), torch.float32)
    raw_logit = noise.per_place((canvas.steps.score == "logit" for canvas in canvases), torch.bool)
    drawn, scores = sampling.draw(logits, noise.seeds, noise.steps, noise.positions, temperature, raw_logit)
    return tokens.flatten().scatter(0, places, drawn).view_as(tokens), scores


def _remask(noise: _Noise, canvases: Sequence[Canvas], tokens: Tensor, scores: Tensor, places: Tensor) -> None:
    """Mask the least confident of the drawn positions again, as many as the schedule says, and end the step."""
    masked = [canvas.steps.masked_after[canvas.step] for canvas in canvases]
    unknown = torch.zeros_like(tokens, dtype=torch.bool)
    if any(masked):
        choice = noise.per_place((canvas.steps.choice_temperature[canvas.step] for canvas in canvases), torch.float32)
        confidence = sampling.confidence(scores, noise.seeds, noise.steps, noise.positions, choice)
        known = torch.full(tokens.shape, torch.inf, device=tokens.device)
        confidences = known.flatten().scatter(0, places, confidence)
        unknown = sampling.remask(confidences.view_as(tokens), torch.tensor(masked, device=tokens.device))
    for canvas, row, mask, count in zip(canvases, tokens, unknown, masked, strict=True):
        canvas.tokens, canvas.unknown, canvas.masked = row, mask, count
        canvas.step += 1


@contextmanager
def _timed(timings: Timings | None, part: str, device: torch.device) -> Iterator[None]:
    if timings is None:
        yield
        return
    start = _now(device)
    yield
    timings.setdefault(part, []).append(_now(device) - start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
