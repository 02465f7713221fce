"""What each graph is called, takes and gives: described once, for the builder, the checks, the manifest and the reader.

text       ids -> what a prompt says
condition  text, size -> everything that is the same at every step, for each row
step       tokens -> tokens, one decoding step of each picture
pixels     tokens -> pictures
codes      pictures -> tokens
generate   ids, seeds -> pictures: text, condition, step and pixels in one, with the loop inside

Axes given as text may have any size: "rows" (one grid seen through one prompt), "pictures", "branches" (rows that a
picture adds up), "count" (of steps), "height" and "width" (of the grid, in tokens), "text" (ids of a prompt), "slots"
(of a bank), "lanes_P" (P times a rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Axis: TypeAlias = "str | int"

GRAPHS = ("text", "condition", "step", "pixels", "codes", "generate")
ACCURACY = {"float32": (1e-4, 0.999), "float16": (2e-2, 0.7)}
"""Tolerance and agreement of the graphs whose number format is chosen. So few tokens are drawn to check one that a few
near ties are a share of them."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        high: bounds the whole numbers an input may hold, from 0 and without it; as text it is the size of that axis.
        common: the number that half of a dummy's entries are.
        summed: the axis that a product with this matrix sums over; dummies are the smaller the longer it is, or a wide
            network would saturate and answer a rounding with another number.
        overridable: also an initializer, without entries along its named axes; callers may leave it out.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    high: int | str | None = None
    common: int | None = None
    overridable: bool = False
    summed: int | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the named axes have these sizes."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class GraphSpec:
    """One graph.

    Attributes:
        tolerance: largest error against the reference, relative to the largest value.
        agreement: share of whole numbers that must be equal: where two codes all but tie, a token may fall either way.
        probe: a value inside, compared beside the outputs where these are whole numbers; "" where there is none.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float = 1e-4
    agreement: float = 0.999
    probe: str = ""

    def dummies(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
        """Random inputs of these sizes, the same for a seed."""
        random = np.random.default_rng(seed)
        made: dict[str, Array] = {}
        for tensor in self.inputs:
            shape = tensor.shape(sizes)
            if tensor.high is None:
                scale = 1.0 if tensor.summed is None else max(1, shape[tensor.summed]) ** -0.5
                made[tensor.name] = (random.standard_normal(shape) * scale).astype(tensor.dtype)
            else:
                high = sizes[tensor.high] if isinstance(tensor.high, str) else tensor.high
                made[tensor.name] = random.integers(0, high, shape).astype(tensor.dtype)
            if tensor.common is not None:
                made[tensor.name][random.random(shape) < 0.5] = tensor.common
        return made


def text(length: int, width: int, pooled: int, vocabulary: int) -> GraphSpec:
    """ids -> the text encoder's features and pooled vector."""
    return GraphSpec(
        "text",
        (Tensor("ids", "int64", ("rows", length), vocabulary),),
        (Tensor("text", "float32", ("rows", length, width)), Tensor("pooled", "float32", ("rows", pooled))),
    )


def condition(
    length: int,
    width: int,
    pooled: int,
    conditioning: Mapping[str, Sequence[Axis]],
    dtype: str,
    adapters: tuple[Tensor, ...] = (),
) -> GraphSpec:
    """Text and micro-conditions (width and height in pixels, crop x and y, aesthetic score) -> conditioning."""
    return GraphSpec(
        "condition",
        (
            Tensor("text", "float32", ("rows", length, width)),
            Tensor("pooled", "float32", ("rows", pooled)),
            Tensor("micro", "float32", ("rows", 5), 64),
            *adapters,
        ),
        tuple(Tensor(name, dtype, tuple(axes)) for name, axes in conditioning.items()),
        *ACCURACY[dtype],
    )


def step(
    conditioning: Mapping[str, Sequence[Axis]], vocabulary: int, dtype: str, adapters: tuple[Tensor, ...] = ()
) -> GraphSpec:
    """One decoding step of every picture.

    Inputs: `tokens`, the last of the vocabulary where a position is masked; of each row its picture, `sources`, and its
    conditioning; of each picture the rows it adds up, `branches`, with their `weights` (0 fills up), its `seeds`, which
    step this is, `steps`, how many positions are `masked` after it, the temperatures of the draw and of the choice, and
    whether a token's score is its raw logit.

    Outputs: `tokens_out`, the next step's tokens; `preview`, the same with every position drawn.
    """
    per_picture = ("pictures",)
    grid: tuple[Axis, ...] = ("pictures", "height", "width")
    return GraphSpec(
        "step",
        (
            Tensor("tokens", "int64", grid, vocabulary, common=vocabulary - 1),
            Tensor("sources", "int64", ("rows",), "pictures"),
            Tensor("branches", "int64", ("pictures", "branches"), "rows"),
            Tensor("weights", "float32", ("pictures", "branches")),
            Tensor("seeds", "int64", per_picture, 2**63 - 1),
            Tensor("steps", "int64", per_picture, 12),
            Tensor("masked", "int64", per_picture, "height"),
            Tensor("token_temperature", "float32", per_picture, 2),
            Tensor("choice_temperature", "float32", per_picture, 4),
            Tensor("raw_logit", "bool", per_picture, 2),
            *(Tensor(name, dtype, tuple(axes)) for name, axes in conditioning.items()),
            *adapters,
        ),
        (Tensor("tokens_out", "int64", grid), Tensor("preview", "int64", grid)),
        *ACCURACY[dtype],
        probe="mlm_layer.y",
    )


def pixels(codes: int) -> GraphSpec:
    """tokens -> 8-bit RGB pictures."""
    return GraphSpec(
        "pixels",
        (Tensor("tokens", "int64", ("pictures", "height", "width"), codes),),
        (Tensor("images", "uint8", ("pictures", "pixel_height", "pixel_width", 3)),),
    )


def codes() -> GraphSpec:
    """8-bit RGB pictures -> tokens."""
    return GraphSpec(
        "codes",
        (Tensor("images", "uint8", ("pictures", "pixel_height", "pixel_width", 3), 256),),
        (Tensor("tokens", "int64", ("pictures", "height", "width")),),
    )


def generate(ids: Tensor, vocabulary: int, adapters: tuple[Tensor, ...] = ()) -> GraphSpec:
    """The whole job.

    Inputs: of each row its prompt's `ids`, and its style: one of those inside (a bank), or what is given. Of each
    picture the `tokens` it starts from, the last of the vocabulary where a position is masked, the rows it adds up,
    `branches`, its `seeds`, and whether a token's score is its raw logit. For every step and picture, as ``step`` takes
    them: the `weights` of its branches, how many positions are `masked` after it, and two temperatures.

    Outputs: `images`, and `tokens_out`, the codes they are decoded from.
    """
    per_picture, per_step = ("pictures",), ("count", "pictures")
    grid: tuple[Axis, ...] = ("pictures", "height", "width")
    return GraphSpec(
        "generate",
        (
            ids,
            Tensor("tokens", "int64", grid, vocabulary, common=vocabulary - 1),
            Tensor("branches", "int64", ("pictures", "branches"), "rows"),
            Tensor("weights", "float32", ("count", "pictures", "branches")),
            Tensor("seeds", "int64", per_picture, 2**63 - 1),
            Tensor("masked", "int64", per_step, "height"),
            Tensor("token_temperature", "float32", per_step, 2),
            Tensor("choice_temperature", "float32", per_step, 4),
            Tensor("raw_logit", "bool", per_picture, 2),
            *adapters,
        ),
        (
            Tensor("images", "uint8", ("pictures", "pixel_height", "pixel_width", 3)),
            Tensor("tokens_out", "int64", grid),
        ),
    )
