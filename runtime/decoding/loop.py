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

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .canvas import Canvas, Network, Rows, Timings, WholeSteps, timed

if TYPE_CHECKING:
    from torch import Tensor


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
