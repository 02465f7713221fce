"""What comes along with a product, on a tile that is still in registers, fp32: the pair's B, and what follows.

In order: + scaled B where the row has an adapter, + bias, the activation, + residual, times gain plus shift. `followed`
is the definition of what comes after the bias, in plain torch; `raised` and `finished` are the device's.
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
def raised(
    value: tl.tensor,
    lowered: tl.tensor,
    up: tl.tensor,
    lane: tl.tensor,
    lane_inside: tl.tensor,
    column_inside: tl.tensor,
    width: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """value + lowered B: lowered (tokens, lanes), up points to the tile's outputs in B (rank, width)."""
    tile = tl.load(up[None, :] + lane[:, None] * width, lane_inside[:, None] & column_inside[None, :], 0.0)
    return multiply(lowered, tile, value, PRECISION)


@jit
def finished(
    value: tl.tensor,
    gate: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    modulation: tl.tensor,
    modulation_row: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    output: tl.tensor,
    outputs: tl.tensor,
    token_inside: tl.tensor,
    column_inside: tl.tensor,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """The tile with all that follows; ``at``: its tokens among all, ``output``: its outputs among all parts'."""
    GATED: tl.constexpr = ACTIVATION == "geglu"
    if bias is not None:
        value += tl.load(bias + output, column_inside, 0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + outputs + output, column_inside, 0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        value = gelu(value)
    if GATED:
        value = value * gelu(gate)
    width = PARTS * outputs
    if residual is not None:
        residual_at = residual + at[:, None] * width + output[None, :]
        value += tl.load(residual_at, token_inside[:, None] & column_inside[None, :], 0.0).to(tl.float32)
    if modulation is not None:
        factor_at = modulation + row * modulation_row + output
        factor = tl.load(factor_at, column_inside, 0.0).to(tl.float32)
        addend = tl.load(factor_at + width, column_inside, 0.0).to(tl.float32)
        value = value * factor[None, :] + addend[None, :]
    return value
