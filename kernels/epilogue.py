"""What comes along with a projection, for every kernel that has one: its tile, the pair's B, and what follows.

In order: + scaled B where the row has an adapter, + bias, the activation, + residual, times gain plus shift. `followed`
is the definition of what comes after the bias, in plain torch; `raised` and `finished` are the device's, on a tile
that is still in registers, fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .device import gelu, multiply
from .dispatch import jit, tl
from .norm import modulate


def followed(y: Tensor, activation: str, residual: Tensor | None, modulation: Tensor | None) -> Tensor:
    """What comes after the projection, in plain torch."""
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    if residual is not None:
        y = residual + y
    return y if modulation is None else modulate(y, modulation)


@jit
def place(tokens: tl.tensor, outputs: tl.tensor, BLOCK_TOKENS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr) -> tl.tuple:
    """The program's row and part, its tokens of the row and its columns of the part, of which there are `outputs`."""
    row_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    part_tiles = tl.cdiv(outputs, BLOCK_OUTPUTS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    part = tl.program_id(1) // part_tiles
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = (tl.program_id(1) % part_tiles) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    return row, part, token, column


@jit
def raised(
    value: tl.tensor,
    scaled: tl.tensor,
    up: tl.tensor,
    up_lane: tl.tensor,
    lane_inside: tl.tensor,
    column_inside: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """value + scaled B: scaled (tokens, lanes) is scale x A in B's number format, up points to the tile's outputs."""
    lanes = tl.arange(0, scaled.shape[1])
    tile = tl.load(up[None, :] + lanes[:, None] * up_lane, lane_inside[:, None] & column_inside[None, :], 0.0)
    return multiply(scaled, tile, value, PRECISION)


@jit
def finished(
    value: tl.tensor,
    gate: tl.tensor,
    around: tl.tuple,
    strides: tl.tuple,
    row: tl.tensor,
    token: tl.tensor,
    output: tl.tensor,
    outputs: tl.tensor,
    token_inside: tl.tensor,
    column_inside: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """The tile with all that follows.

    around: pointers to the bias, the residual and the modulation, or None. strides: those of the residual's row, token
    and output, and of the modulation's row, side and output. `outputs` lie between the bias of a value and its gate's.
    """
    bias, residual, modulation = around
    residual_row, residual_token, residual_output, modulation_row, modulation_side, modulation_output = strides
    GATED: tl.constexpr = ACTIVATION == "geglu"
    if bias is not None:
        value += tl.load(bias + output, column_inside, 0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + outputs + output, column_inside & GATED, 0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        value = gelu(value)
    if GATED:
        value = value * gelu(gate)
    if residual is not None:
        at = residual + row * residual_row + token[:, None] * residual_token + output[None, :] * residual_output
        value += tl.load(at, token_inside[:, None] & column_inside[None, :], 0.0).to(tl.float32)
    if modulation is not None:
        factor_at = modulation + row * modulation_row + output * modulation_output
        factor = tl.load(factor_at, column_inside, 0.0).to(tl.float32)
        addend = tl.load(factor_at + modulation_side, column_inside, 0.0).to(tl.float32)
        value = value * factor[None, :] + addend[None, :]
    return value
