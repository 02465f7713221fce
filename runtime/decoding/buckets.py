"""Canvases of any sizes decoded in buckets: what the loop is given in place of a network that is made of launches.

There is a bucket for each size of picture, made when it comes up and made anew, twice as large, when more rows are
wanted; those of the sizes used last are kept. A canvas holds after every step where it stands, in copies that are
replaced at the next one and never written to. So it may leave at any time, be read, and go on in any other place or
loop; a bucket that is let go, or made anew, takes nothing of it along.

Memory: a row of a bucket holds a copy of its context, as the plain loop's stacked ones do, for the most rows there were
at once, in up to `KEPT` sizes; schedules and tokens are some ten kilobytes a row. On a GPU all graphs share what one
step needs beside that.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stylemuse.decoding.captured import Pool

from .bucket import Bucket, StaticNetwork
from .canvas import Canvas, Rows, Timings

KEPT = 4
"""Sizes of pictures whose buckets are kept."""


class Buckets:
    """Whole steps (`loop.WholeSteps`) on fixed buffers.

    Two threads that decode with the same buckets at the same time get what they would get alone, but put each other's
    pictures out at every step: give each its own.

    Args:
        network: makes so many rows for pictures of a shape.
        rows: the most of one forward pass, if that is known; more are made for pictures that need them.
        graph: as in `Bucket`.
    """

    def __init__(
        self,
        network: Callable[[int, tuple[int, ...]], StaticNetwork],
        device: torch.device,
        *,
        rows: int | None = None,
        graph: bool = True,
    ) -> None:
        self._network, self._device, self._rows, self._graph = network, device, rows, graph
        self._pool: Pool | None = None  # made with the first bucket: not everybody who loads a model draws
        self._buckets: OrderedDict[tuple[int, ...], Bucket] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def decode_step(
        self, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens and unknown of each canvas after one step; ``rows`` leave out branches, for which all have a place."""
        with self._lock:
            made = self._bucket(canvases).step(canvases)
        return [tokens for tokens, _ in made], [unknown for _, unknown in made]

    def _bucket(self, canvases: Sequence[Canvas]) -> Bucket:
        shape = (len(canvases[0].tokens), *canvases[0].shape)
        bucket = self._buckets.pop(shape, None)
        if bucket is None or not bucket.fits(canvases):
            least = (1, 8, 64) if bucket is None else (bucket.rows, bucket.branches, bucket.steps)
            bucket = None  # its memory is free before the new one's is taken
            while len(self._buckets) >= KEPT:
                self._buckets.popitem(last=False)
            bucket = self._make(canvases, *least)
        self._buckets[shape] = bucket
        return bucket

    def _make(self, canvases: Sequence[Canvas], rows: int, branches: int, steps: int) -> Bucket:
        """A bucket for these canvases, of no less than that."""
        needed = sum(len(canvas.contexts) for canvas in canvases)
        if needed > rows:
            rows = _power_of_two(needed)
            rows = rows if self._rows is None else max(needed, min(rows, self._rows))
        if self._pool is None and self._graph and self._device.type == "cuda":
            self._pool = Pool(self._device)
        return Bucket(
            self._network(rows, canvases[0].shape),
            rows=rows,
            branches=max(branches, _power_of_two(max(len(canvas.contexts) for canvas in canvases))),
            steps=max(steps, _power_of_two(max(len(canvas.steps) for canvas in canvases))),
            positions=len(canvases[0].tokens),
            device=self._device,
            graph=self._graph,
            pool=None if self._pool is None else self._pool.handle,
        )


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
