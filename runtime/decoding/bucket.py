"""The loop on fixed buffers: one decoding step of a bucket of rows is one launch, and nothing waits for the device.

A bucket has places for pictures and rows of the network. Every number of a step (schedule, weights, seeds, masked
positions, and what `StaticNetwork.seat` keeps of a row's prompt and adapter) is read from tensors at addresses that
never change. So a step is always the same launches with the same arguments: on a GPU they are captured once as a CUDA
graph and replayed, anywhere else called. Pictures enter and leave between steps, with other styles and schedules; the
graph stays. The equations are those of `loop`, `kernels.decoding_step` computes them.

An empty place has no masked positions: a step leaves it as it is, and costs it the rows it might have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stylemuse.kernels.canvases import Canvases, Schedules
from stylemuse.kernels.decoding_step import decoding_step
from stylemuse.kernels.dispatch import Kernels

from .loop import Canvas


class StaticNetwork(Protocol):
    """What a backend offers a bucket."""

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked position."""

    @property
    def kernels(self) -> Kernels:
        """Which operations run in Triton."""

    @property
    def capturable(self) -> bool:
        """Whether `hidden` is launches only, and reads what `seat` writes when it runs."""

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head."""

    def seat(self, row: int, context: Any) -> None:
        """Write what a row's context holds into that row's buffers, in place."""

    def hidden(self, inputs: Tensor) -> Tensor:
        """(R, N) int64 tokens of all rows to (R, N, D), the normalized hidden states the head is affine in."""


class Bucket:
    """Places for pictures that are decoded together, of one size.

    Args:
        network: its rows are this bucket's alone.
        rows: of the network.
        pictures: places; each takes as many rows as it has branches.
        branches, steps: the most of one picture.
        positions: of a picture, all of them alike.
        graph: False calls the launches one by one on a GPU too.
    """

    def __init__(
        self,
        network: StaticNetwork,
        *,
        rows: int,
        pictures: int,
        branches: int,
        steps: int,
        positions: int,
        device: torch.device,
        graph: bool = True,
    ) -> None:
        self.network = network
        self._seated: dict[int, Canvas] = {}
        self._free_rows, self._free_places = list(range(rows)), list(range(pictures))

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._canvases = Canvases(
            seeds=zeros(pictures, dtype=torch.int64),
            rows=zeros(pictures, branches) - 1,
            steps=zeros(pictures),
            counts=zeros(pictures),
            places=zeros(pictures, positions),
            tokens=zeros(pictures, positions, dtype=torch.int64),
            inputs=zeros(rows, positions, dtype=torch.int64),
        )
        self._schedules = Schedules(
            masked_after=zeros(pictures, steps),
            token_temperature=zeros(pictures, steps, dtype=torch.float32),
            choice_temperature=zeros(pictures, steps, dtype=torch.float32),
            weights=zeros(pictures, steps, branches, dtype=torch.float32),
            raw_logit=zeros(pictures, dtype=torch.bool),
        )
        captured = graph and device.type == "cuda" and network.capturable
        self._graph = self._capture() if captured else None

    def fits(self, canvas: Canvas) -> bool:
        """Whether there is a place and enough rows, and the canvas is not beyond what the bucket was made for."""
        _, steps, branches = self._schedules.weights.shape
        return (
            bool(self._free_places)
            and len(canvas.weights) <= min(branches, len(self._free_rows))
            and len(canvas.steps) <= steps
            and len(canvas.tokens) == self._canvases.tokens.shape[1]
        )

    def enter(self, canvas: Canvas) -> int:
        """Seat a picture that `fits`; returns its place."""
        assert self.fits(canvas)
        assert not canvas.finished
        place, state, numbers = self._free_places.pop(0), self._canvases, self._schedules
        rows = [self._free_rows.pop(0) for _ in canvas.contexts]
        for row, context in zip(rows, canvas.contexts, strict=True):
            self.network.seat(row, context)
            state.inputs[row] = canvas.tokens.masked_fill(canvas.unknown, self.network.mask_id)
        _fill(state.rows[place], rows, -1)
        masked = canvas.unknown.nonzero()[:, 0]
        state.places[place, : len(masked)] = masked.int()
        state.tokens[place] = canvas.tokens
        state.seeds[place], state.steps[place], state.counts[place] = canvas.seed, canvas.step, canvas.masked
        steps = canvas.steps
        _fill(numbers.masked_after[place], steps.masked_after, 0)
        _fill(numbers.token_temperature[place], steps.token_temperature, 0.0)
        _fill(numbers.choice_temperature[place], steps.choice_temperature, 0.0)
        numbers.raw_logit[place] = steps.score == "logit"
        numbers.weights[place] = 0.0
        weights = torch.tensor(canvas.weights, dtype=torch.float32).T
        numbers.weights[place, : len(steps), : len(rows)] = weights.to(numbers.weights.device)
        self._seated[place] = canvas
        return place

    def step(self) -> None:
        """One decoding step for every seated picture; on a GPU it returns before the step is done."""
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        for canvas in self._seated.values():
            if not canvas.finished:
                canvas.masked = canvas.steps.masked_after[canvas.step]
                canvas.step += 1

    def read(self, place: int) -> Canvas:
        """The picture of a place with its tokens and masked positions as they stand; waits for the device."""
        canvas, state = self._seated[place], self._canvases
        canvas.tokens = state.tokens[place].to(canvas.tokens.device, copy=True)
        masked = state.places[place, : canvas.masked].long().to(canvas.tokens.device)
        canvas.unknown = torch.zeros_like(canvas.unknown).index_fill(0, masked, True)
        return canvas

    def leave(self, place: int) -> Canvas:
        """Read a picture, finished or not, and free its place and rows."""
        canvas = self.read(place)
        self._free_rows += [row for row in self._canvases.rows[place].tolist() if row >= 0]
        self._canvases.counts[place], self._canvases.rows[place] = 0, -1
        self._free_places.append(place)
        del self._seated[place]
        return canvas

    def decode(self, canvases: Iterable[Canvas]) -> list[Tensor]:
        """Run canvases that fit together to their last step; returns their tokens, (N,) int64 each."""
        places = [self.enter(canvas) for canvas in canvases]
        for _ in range(max((len(self._seated[place].steps) - self._seated[place].step for place in places), default=0)):
            self.step()
        return [self.leave(place).tokens for place in places]

    @torch.no_grad()
    def _launch(self) -> None:
        hidden = self.network.hidden(self._canvases.inputs)
        weight, bias = self.network.head()
        decoding_step(
            hidden, weight, bias, self._canvases, self._schedules, self.network.mask_id, kernels=self.network.kernels
        )

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The launches as a graph; all places are empty, so that neither warming up nor capturing changes anything."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._launch()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch()
        return graph


def _fill(target: Tensor, values: Sequence[float], rest: float) -> None:
    """Values to the front of a vector, ``rest`` behind them."""
    padded = [*values, *[rest] * (len(target) - len(values))]
    target.copy_(torch.tensor(padded, dtype=target.dtype))
