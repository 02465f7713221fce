"""A tile of a projection inside a kernel: x W^T + scale (x A) B for some tokens of one row, with the norm taken along.

`linear` says what is computed, and why so; this is its inner part, which other kernels use too. Outputs of the tile may
be any: a fused projection's, or one head's.
"""

from __future__ import annotations

from .device import multiply
from .dispatch import constant, jit, tl
from .epilogue import raised
from .norm import normed

NARROW = constant(16)
"""Ranks up to this take a loop of this width, the narrowest of the matrix units."""


@jit
def products(
    base: tl.tuple,
    adapter: tl.tuple,
    norm: tl.tuple,
    steps: tl.tuple,
    token_inside: tl.tensor,
    column_inside: tl.tensor,
    RANK: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    MODULATED: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> tl.tuple:
    """One tile of x W^T plus, where RANK is not 0, scale (x A) B on so many lanes; and the gate's where GATED.

    base: pointers to the tile's tokens of x, and to its outputs of W and of the gate. adapter: pointers to the row's A
    and to the tile's outputs of B and of the gate's B; scale and rank. norm: the tokens' statistics, pointers to the
    norm's weight and to the row's gain and shift. steps: strides of an input in x, W, A, the norm's weight and the
    gain, of a lane in A and B.
    """
    x, weight, gate = base
    down, up, gate_up, scale, rank = adapter
    x_input, weight_input, down_input, norm_input, gain_input, down_lane, up_lane = steps
    lanes = tl.arange(0, max(RANK, 1))
    lane_inside = lanes < rank
    ACCUMULATOR: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    value = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), ACCUMULATOR)
    gated = value
    hidden = tl.zeros((BLOCK_TOKENS, max(RANK, 1)), tl.float32)
    for first in range(0, INPUTS, BLOCK_INPUTS):
        places = first + tl.arange(0, BLOCK_INPUTS)
        x_inside, weight_inside, down_inside = token_inside[:, None], column_inside[None, :], lane_inside[None, :]
        if INPUTS % BLOCK_INPUTS != 0:
            inside = places < INPUTS
            x_inside, weight_inside = x_inside & inside[None, :], weight_inside & inside[:, None]
            down_inside = down_inside & inside[:, None]
        x_tile = tl.load(x[:, None] + places[None, :] * x_input, x_inside, 0.0)
        if NORMED:
            x_tile = normed(x_tile, norm, (norm_input, gain_input), places, MODULATED, INPUTS)
        weight_tile = tl.load(weight[None, :] + places[:, None] * weight_input, weight_inside, 0.0)
        value = multiply(x_tile, weight_tile, value, PRECISION)
        if GATED:
            gate_tile = tl.load(gate[None, :] + places[:, None] * weight_input, weight_inside, 0.0)
            gated = multiply(x_tile, gate_tile, gated, PRECISION)
        if RANK > 0:
            down_at = down + places[:, None] * down_input + lanes[None, :] * down_lane
            hidden = multiply(x_tile, tl.load(down_at, down_inside, 0.0), hidden, PRECISION)
    if RANK > 0:
        scaled = (hidden * scale).to(up.dtype.element_ty)
        value = raised(value, scaled, up, up_lane, lane_inside, column_inside, PRECISION)
        if GATED:
            gated = raised(gated, scaled, gate_up, up_lane, lane_inside, column_inside, PRECISION)
    return value, gated


@jit
def projected_tile(
    base: tl.tuple,
    stacks: tl.tuple,
    norm: tl.tuple,
    steps: tl.tuple,
    where: tl.tuple,
    token_inside: tl.tensor,
    column_inside: tl.tensor,
    RANK: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    MODULATED: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> tl.tuple:
    """The tile, fp32, and the gate's where GATED; with the pair of the row's slot where RANK is not 0.

    base, norm: as in `products`. stacks: down, up, ranks, slots, scales. steps: strides of an input in x, W, the
    norm's weight and the gain; of slot, part, input and lane in down; of slot, part, lane and output in up. where: the
    row, the part, the tile's outputs within the part, and how many a part has.
    """
    down, up, ranks, slots, scales = stacks
    x_input, weight_input, norm_input, gain_input = steps[0]
    if RANK == 0:
        weight = base[1]
        value, gate = products(
            base, (weight, weight, weight, 0.0, 0), norm, (x_input, weight_input, 0, norm_input, gain_input, 0, 0),
            token_inside, column_inside,
            0, GATED, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
        )  # fmt: skip
    else:
        row, part, column, outputs = where
        down_slot, down_part, down_input, down_lane = steps[1]
        up_slot, up_part, up_lane, up_output = steps[2]
        slot = tl.load(slots + row)
        rank = tl.load(ranks + slot, slot >= 0, 0)
        down_at = down + slot * down_slot + part * down_part
        up_at = up + slot * up_slot + part * up_part + column * up_output
        adapter = (down_at, up_at, up_at + outputs * up_output, tl.load(scales + row), rank)
        own = (x_input, weight_input, down_input, norm_input, gain_input, down_lane, up_lane)
        if rank == 0:
            value, gate = products(
                base, adapter, norm, own, token_inside, column_inside,
                0, GATED, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
            )  # fmt: skip
        elif rank <= NARROW:
            value, gate = products(
                base, adapter, norm, own, token_inside, column_inside,
                NARROW, GATED, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
            )  # fmt: skip
        else:
            value, gate = products(
                base, adapter, norm, own, token_inside, column_inside,
                RANK, GATED, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
            )  # fmt: skip
    return value, gate
