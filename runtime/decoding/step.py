"""One decoding step on tensors: the network's parts, the weighted sum, the draw and the re-masking (see ``loop``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stylemuse.kernels import sampling

from .canvas import Canvas, Network, Rows, Timings, timed


@torch.no_grad()
def step(network: Network, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None) -> tuple[Tensor, Tensor]:
    """Tokens and unknown, (B, N) each, of the canvases after one step; ``rows`` are those of the forward pass."""
    size, device = len(canvases[0].tokens), canvases[0].tokens.device
    unknown = torch.stack([canvas.unknown for canvas in canvases])
    tokens = torch.stack([canvas.tokens for canvas in canvases]).masked_fill(unknown, network.mask_id)
    # Masked positions of all canvases in one list, canvas after canvas. Their number is known: nothing waits for it.
    counts = [canvas.masked for canvas in canvases]
    places = torch.nonzero_static(unknown.flatten(), size=sum(counts))[:, 0]

    with timed(timings, "transformer", device):
        features = network.features(tokens[rows.sources], rows.contexts)
    with timed(timings, "head", device):
        logits = network.logits(_combine(network, features, rows, torch.split(places % size, counts)))
    noise = _Noise.of(canvases, places // size, places % size)
    with timed(timings, "sampling", device):
        tokens, scores = _draw(noise, canvases, tokens, logits, places)
    with timed(timings, "remask", device):
        return tokens, _remask(noise, canvases, tokens, scores, places)


def _combine(network: Network, features: Tensor, rows: Rows, positions: Sequence[Tensor]) -> Tensor:
    """The guided hidden states (M, D) fp32 of all masked positions: sum over branches of weight * readout."""
    owners = zip(rows.branches, positions, strict=True)
    picked = [features[row, places] for branches, places in owners for row, _ in branches]
    hidden = iter(torch.split(network.readout(torch.cat(picked)), [len(part) for part in picked]))
    # Multiplied and added one by one: a matmul may sum in another order for another batch, and rows must not notice.
    return torch.cat([_weighted_sum((weight, next(hidden)) for _, weight in branches) for branches in rows.branches])


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


def _remask(noise: _Noise, canvases: Sequence[Canvas], tokens: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """Which positions (B, N) are masked again: the least confident of the drawn ones, as many as the schedule says."""
    masked = [canvas.steps.masked_after[canvas.step] for canvas in canvases]
    if not any(masked):
        return torch.zeros_like(tokens, dtype=torch.bool)
    choice = noise.per_place((canvas.steps.choice_temperature[canvas.step] for canvas in canvases), torch.float32)
    confidence = sampling.confidence(scores, noise.seeds, noise.steps, noise.positions, choice)
    known = torch.full(tokens.shape, torch.inf, device=tokens.device)
    confidences = known.flatten().scatter(0, places, confidence)
    return sampling.remask(confidences.view_as(tokens), torch.tensor(masked, device=tokens.device))
