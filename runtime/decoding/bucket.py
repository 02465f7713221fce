"""The loop on fixed buffers: one decoding step of a bucket of rows is one launch, and nothing waits for the device.

A bucket has rows of the network and as many places for pictures. Every number of a step (schedule, weights, seeds,
masked positions, and what `StaticNetwork.seat` keeps of a row's prompt and adapter) is read from tensors at addresses
that never change. So a step of the first ``n`` rows is always the same launches with the same arguments: on a GPU they
are captured as a CUDA graph the first time, and replayed from then on; anywhere else they are called. Pictures enter
and leave between steps, with other styles and schedules; the graphs stay. The equations are those of `loop`,
`kernels.decoding_step` computes them. Only what a graph is made of has a graph of its own: how many rows (`size`), how
many branches the draw adds up (`BRANCHES`), which layers have an adapter in any row (`StaticNetwork.variant`).

A canvas takes a row for each of its branches, whatever their weights, and all positions are read out. A row without a
picture is computed and seen by nobody, fewer than a fifth of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from stylemuse.decoding.captured import Graph, capture
from stylemuse.kernels.canvases import Canvases, Schedules
from stylemuse.kernels.decoding_step import decoding_step
from stylemuse.kernels.dispatch import Kernels

from .canvas import Canvas

BRANCHES = (1, 2, 3, 5)
"""Branches the draw is compiled for, beside the most a bucket takes: guidance with none, one and two more, objects."""


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

    @property
    def variant(self) -> Hashable:
        """What of `hidden` depends on who is seated; of a few values. The launches of a value are always the same."""

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head."""

    def seat(self, row: int, context: Any) -> None:
        """Write what a row's context holds into that row's buffers, in place."""

    def vacate(self, row: int) -> None:
        """The row's context is not needed any more."""

    def hidden(self, inputs: Tensor) -> Tensor:
        """(r, N) int64 tokens of the first rows to (r, N, D), the normalized hidden states the head is affine in."""


def size(rows: int) -> int:
    """The rows a step computes for so many: at most 8, or four sizes to an octave, so that few graphs are captured."""
    unit = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // unit) * unit


@dataclass(frozen=True)
class _Seat:
    """Where a canvas is; ``tokens`` are what it was left with, others there mean that it was decoded elsewhere."""

    canvas: Canvas
    rows: tuple[int, ...]
    tokens: Tensor

    @property
    def place(self) -> int:
        """Of the picture: its first row's number."""
        return self.rows[0]


class Bucket:
    """Rows and places for pictures that are decoded together, of one size.

    Args:
        network: its rows are this bucket's alone.
        rows: of the network.
        branches, steps: the most of one picture.
        positions: of a picture, all of them alike.
        graph: False calls the launches one by one on a GPU too.
        pool: memory that graphs share which never run at the same time; nothing in it outlives a step.
    """

    def __init__(
        self,
        network: StaticNetwork,
        *,
        rows: int,
        branches: int,
        steps: int,
        positions: int,
        device: torch.device,
        graph: bool = True,
        pool: Any = None,
    ) -> None:
        self.network, self.rows, self.branches, self.steps = network, rows, branches, steps
        self._seats: dict[int, _Seat] = {}
        self._device, self._pool = device, pool
        self._captured = graph and device.type == "cuda" and network.capturable
        self._graphs: dict[Hashable, Graph] = {}

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._canvases = Canvases(
            seeds=zeros(rows, dtype=torch.int64),
            rows=zeros(rows, branches) - 1,
            steps=zeros(rows),
            counts=zeros(rows),
            places=zeros(rows, positions),
            tokens=zeros(rows, positions, dtype=torch.int64),
            inputs=zeros(rows, positions, dtype=torch.int64),
        )
        self._schedules = Schedules(
            masked_after=zeros(rows, steps),
            token_temperature=zeros(rows, steps, dtype=torch.float32),
            choice_temperature=zeros(rows, steps, dtype=torch.float32),
            weights=zeros(rows, steps, branches, dtype=torch.float32),
            raw_logit=zeros(rows, dtype=torch.bool),
        )

    def fits(self, canvases: Sequence[Canvas]) -> bool:
        """Whether there are rows for all of them at once, and none is beyond what the bucket was made for."""
        return sum(len(canvas.contexts) for canvas in canvases) <= self.rows and all(
            len(canvas.contexts) <= self.branches
            and len(canvas.steps) <= self.steps
            and len(canvas.tokens) == self._canvases.tokens.shape[1]
            for canvas in canvases
        )

    @torch.no_grad()
    def step(self, canvases: Sequence[Canvas]) -> list[tuple[Tensor, Tensor]]:
        """One step of canvases that `fits`: tokens and unknown, (N,) each, of every one; they are left as they are.

        Newcomers enter, and whoever is seated and not among them leaves. On a GPU it returns before the step is done.
        """
        assert self.fits(canvases)
        rows = min(self.rows, size(sum(len(canvas.contexts) for canvas in canvases)))
        self._seat(canvases, rows)
        try:
            self._run(rows)
        except BaseException:
            # How far the device came is not known; the canvases still stand where they stood.
            self._leave(list(self._seats))
            raise
        tokens, unknown = self._canvases.tokens[:rows].clone(), self._canvases.inputs[:rows] == self.network.mask_id
        made = []
        for canvas in canvases:
            seat = self._seats[id(canvas)]
            made.append((tokens[seat.place], unknown[seat.place]))
            self._seats[id(canvas)] = replace(seat, tokens=made[-1][0])
        self._leave([id(canvas) for canvas in canvases if canvas.step + 1 == len(canvas.steps)])
        return made

    def _seat(self, canvases: Sequence[Canvas], rows: int) -> None:
        """Exactly these canvases, all of them in the first rows: those that sit beyond are seated anew."""
        wanted = {id(canvas) for canvas in canvases}
        self._leave(
            [
                key
                for key, seat in self._seats.items()
                if key not in wanted or max(seat.rows) >= rows or seat.canvas.tokens is not seat.tokens
            ]
        )
        taken = {row for seat in self._seats.values() for row in seat.rows}
        free = iter([row for row in range(rows) if row not in taken])
        for canvas in canvases:
            if id(canvas) not in self._seats:
                self._enter(canvas, tuple(next(free) for _ in canvas.contexts))

    def _enter(self, canvas: Canvas, rows: tuple[int, ...]) -> None:
        assert not canvas.finished
        place, state, numbers = rows[0], self._canvases, self._schedules
        seen = canvas.tokens.masked_fill(canvas.unknown, self.network.mask_id)
        for row, context in zip(rows, canvas.contexts, strict=True):
            self.network.seat(row, context)
            state.inputs[row] = seen
        _fill(state.rows[place], [*rows, *[-1] * (self.branches - len(rows))])
        # Their number is known: nothing waits for it.
        masked = torch.nonzero_static(canvas.unknown, size=canvas.masked)[:, 0]
        state.places[place, : canvas.masked] = masked.int()
        state.tokens[place] = canvas.tokens
        state.seeds[place], state.steps[place], state.counts[place] = canvas.seed, canvas.step, canvas.masked
        steps = canvas.steps
        _fill(numbers.masked_after[place], steps.masked_after)
        _fill(numbers.token_temperature[place], steps.token_temperature)
        _fill(numbers.choice_temperature[place], steps.choice_temperature)
        numbers.raw_logit[place] = steps.score == "logit"
        absent = ((0.0,) * len(steps),) * (self.branches - len(rows))
        _fill(numbers.weights[place], list(zip(*canvas.weights, *absent, strict=True)))
        self._seats[id(canvas)] = _Seat(canvas, rows, canvas.tokens)

    def _leave(self, keys: Sequence[int]) -> None:
        for key in keys:
            seat = self._seats.pop(key)
            self._canvases.counts[seat.place] = 0
            for row in seat.rows:
                self.network.vacate(row)

    def _run(self, rows: int) -> None:
        """A step of the first rows: its launches are called the first time they come up, then captured."""
        most = max(len(seat.rows) for seat in self._seats.values())
        branches = next((each for each in BRANCHES if most <= each <= self.branches), self.branches)
        key = rows, branches, self.network.variant
        if (graph := self._graphs.get(key)) is not None:
            graph.replay()
            return
        self._launch(rows, branches)
        if self._captured:
            self._graphs[key] = self._capture(rows, branches)

    def _launch(self, rows: int, branches: int) -> None:
        state = {name: getattr(self._canvases, name)[:rows] for name in Canvases.__dataclass_fields__}
        numbers = {name: getattr(self._schedules, name)[:rows] for name in Schedules.__dataclass_fields__}
        canvases = Canvases(**state | {"rows": state["rows"][:, :branches]})
        schedules = Schedules(**numbers | {"weights": numbers["weights"][..., :branches]})
        hidden, (weight, bias) = self.network.hidden(canvases.inputs), self.network.head()
        mask_id, kernels = self.network.mask_id, self.network.kernels
        decoding_step(hidden, weight, bias, canvases, schedules, mask_id, kernels=kernels)

    def _capture(self, rows: int, branches: int) -> Graph:
        return capture(lambda: self._launch(rows, branches), self._device, self._pool)


def _fill(target: Tensor, values: Sequence[Any]) -> None:
    """Values to the front of a tensor; from pinned memory to a GPU, which waits for nothing."""
    front = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target[: len(values)].copy_(front, non_blocking=True)
