"""Attention of projected tokens to keys and values that are there already: the projection's tile is the head's queries.

    q = n(x) W^T + b, plus scale (x A) B with the pair of the row's slot        as in `linear`
    y = softmax(q k^T / sqrt(d)) v, heads side by side                          as in `attention`

x (R, N, in), W (H d, in), k and v (R, H, L, d) -> (R, N, H d).

The kernel: a projection is cut into tiles of outputs anyway; where a tile is one head's, all that attention needs of it
is in registers, so q, 2 R N H d numbers written and read, never reaches memory, and one launch is left of two. That is
for few keys: q is computed once whatever their number, but the tile cannot be wider than a head. q is rounded to the
number format as `linear` would write it. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .attention import LOG2_E, attend, attention
from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .linear import PACKED, linear, packed, unpacked
from .norm import Kind, Norm, statistics
from .rows import LowRank, RowSlots
from .tile import projected_tile
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, family, named_strides, pick, power_of_two, precision


def query_attention_reference(
    x: Tensor,
    weight: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
    lengths: Tensor | None = None,
    *,
    norm: Norm | None = None,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """The definition: one operation after the other, each with these kernels."""
    q = linear(x, weight, bias, adapter, rows, norm=norm, kernels=kernels)
    return attention(q.unflatten(2, (k.shape[1], -1)).transpose(1, 2), k, v, lengths, kernels=kernels)


def fits(architecture: str, dtype: torch.dtype, size: int) -> bool:
    """Whether a head's queries leave room in the registers: in fp32, 16 of 128 channels with a pair do not."""
    return size <= 64 or dtype != torch.float32 or architecture == INTERPRETER


def choices(architecture: str, dtype: torch.dtype, size: int) -> tuple[Launch, ...]:
    """The launches for a head size that `fits`, the default first; fp32 has twice the bytes."""
    if architecture == INTERPRETER:
        return (_launch(64, 32, 32, 4, 1),)
    if dtype == torch.float32:
        return (_launch(16, 16, 32, 4, 2),) if architecture == "sm_80" else (_launch(32, 16, 32, 4, 2),)
    if architecture == "gfx942":
        return (_launch(64, 32, 32, 4, 2),)
    if size > 64:
        return (_launch(64, 32, 32, 8, 2),)
    middle, small = _launch(64, 64, 32, 4, 3), _launch(32, 64, 32, 4, 3)
    # With more keys a tile spills where there are no asynchronous matrix units.
    return (middle, small) if architecture == "sm_80" else (middle, _launch(64, 64, 64, 8, 3), small)


def _launch(queries: int, inputs: int, keys: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_QUERIES": queries, "BLOCK_INPUTS": inputs, "BLOCK_KEYS": keys}, warps, stages)


@jit
def _query_attention_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    norm_weight: tl.tensor,
    norm_modulation: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lengths: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_input: tl.tensor,
    weight_output: tl.tensor,
    weight_input: tl.tensor,
    down_slot: tl.tensor,
    down_part: tl.tensor,
    down_input: tl.tensor,
    down_lane: tl.tensor,
    up_slot: tl.tensor,
    up_part: tl.tensor,
    up_lane: tl.tensor,
    up_output: tl.tensor,
    norm_input: tl.tensor,
    gain_row: tl.tensor,
    gain_side: tl.tensor,
    gain_input: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    k_channel: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    v_channel: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    RANK: tl.constexpr,
    NORM: tl.constexpr,
    INPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """A tile of the queries of one row and head; `scale` has the factor from exp to exp2 in it."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    token = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channel = tl.arange(0, PADDED)
    token_inside, channel_inside = token < tokens, channel < SIZE
    output = head * SIZE + channel

    weight_at = weight + output * weight_output
    base = (x + row * x_row + token * x_token, weight_at, weight_at)
    NORMED: tl.constexpr = NORM != "none"
    MODULATED: tl.constexpr = norm_modulation is not None
    norm = (0.0, 1.0, weight, weight, weight)
    if NORMED:
        gain_at = norm_weight
        if MODULATED:
            gain_at = norm_modulation + row * gain_row
        mean, inverse = statistics(
            base[0], x_input, token_inside, epsilon, NORM == "layer", INPUTS, BLOCK_QUERIES, BLOCK_INPUTS
        )
        norm = (mean, inverse, norm_weight, gain_at, gain_at + gain_side)
    steps = (
        (x_input, weight_input, norm_input, gain_input), (down_slot, down_part, down_input, down_lane),
        (up_slot, up_part, up_lane, up_output),
    )  # fmt: skip
    value, _ = projected_tile(
        base, (down, up, ranks, slots, scales), norm, steps, (row, 0, output, 0), token_inside, channel_inside,
        RANK, False, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_QUERIES, PADDED, BLOCK_INPUTS,
    )  # fmt: skip
    if bias is not None:
        value += tl.load(bias + output, channel_inside, 0.0).to(tl.float32)[None, :]

    count = keys
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + row), keys).to(tl.int32)
    result = attend(
        value.to(k.dtype.element_ty), k + row * k_row + head * k_head, v + row * v_row + head * v_head,
        (k_token, k_channel, v_token, v_channel), count, scale, SIZE, PADDED, PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
    )  # fmt: skip
    y_at = y + row * y_row + token[:, None] * y_token + output[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), token_inside[:, None] & channel_inside[None, :])


def _call(
    x: Tensor,
    weight: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    adapter: LowRank | None,
    rows: RowSlots | None,
    lengths: Tensor | None,
    norm: Norm | None,
    y: Tensor,
    architecture: str,
) -> Call:
    """The launch that fills y."""
    (count, tokens, inputs), (_, heads, keys, size) = x.shape, k.shape
    assert k.shape == v.shape, "as many keys as values"
    assert (k.shape[0], weight.shape) == (count, (heads * size, inputs)), "keys of the same rows, heads of the weight"
    assert size <= 128, "head sizes up to 128"
    down, up, ranks = (None, None, None) if adapter is None else (adapter.down, adapter.up, adapter.ranks)
    slots, scales = (None, None) if rows is None else (rows.slots, rows.scales)
    assert up is None or up.shape[1] == 1, "one projection"
    numbers = (weight, bias, down, up, k, v)
    assert all(tensor is None or tensor.dtype == x.dtype for tensor in numbers), "one number format"
    norm_weight, gain = (None, None) if norm is None else (norm.weight, norm.modulation)
    tensors = {
        "x": x, "weight": weight, "bias": bias, "down": down, "up": up, "ranks": ranks, "slots": slots,
        "scales": scales, "norm_weight": norm_weight, "norm_modulation": gain, "k": k, "v": v, "lengths": lengths,
        "y": y,
    }  # fmt: skip
    strides = {
        **named_strides(x, "x_row", "x_token", "x_input"),
        **named_strides(weight, "weight_output", "weight_input"),
        **named_strides(down, "down_slot", "down_part", "down_input", "down_lane"),
        **named_strides(up, "up_slot", "up_part", "up_lane", "up_output"),
        **named_strides(norm_weight, "norm_input"),
        **named_strides(gain, "gain_row", "gain_side", "gain_input"),
        **named_strides(k, "k_row", "k_head", "k_token", "k_channel"),
        **named_strides(v, "v_row", "v_head", "v_token", "v_channel"),
        **named_strides(y, "y_row", "y_token"),
    }
    epsilon, kind = (0.0, "none") if norm is None else (float(norm.epsilon), norm.kind)
    sizes = {"tokens": tokens, "keys": keys, "heads": heads, "scale": size**-0.5 * LOG2_E, "epsilon": epsilon}

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return ceil_div(tokens, tiles["BLOCK_QUERIES"]), count * heads

    lanes = 0 if down is None else power_of_two(down.shape[3])
    constants = {
        "RANK": lanes, "NORM": kind, "INPUTS": inputs, "SIZE": size, "PADDED": power_of_two(size),
        "PRECISION": precision(architecture),
    }  # fmt: skip
    return Call(_query_attention_kernel, {**tensors, **sizes, **strides}, constants, grid)


def _output(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


@operator(
    f"query_attention(Tensor x, Tensor weight, Tensor k, Tensor v, Tensor? bias, Tensor? lengths, {PACKED}) -> Tensor",
    fake=_output,
)
def _query_attention(
    x: Tensor,
    weight: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ranks: Tensor | None,
    slots: Tensor | None,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_modulation: Tensor | None,
    epsilon: float,
    norm: Kind | Literal["none"],
) -> Tensor:
    y, architecture, size = _output(x, weight), family(x.device), k.shape[3]
    adapter, rows, before = unpacked(down, up, ranks, slots, scales, norm_weight, norm_modulation, epsilon, norm)
    call = _call(x, weight, k, v, bias, adapter, rows, lengths, before, y, architecture)
    problem = f"{size} of {weight.shape[1]} {norm} {str(x.dtype).removeprefix('torch.')}"
    call.run(pick("query_attention", problem, x.device, choices(architecture, x.dtype, size)))
    return y


def query_attention(
    x: Tensor,
    weight: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
    lengths: Tensor | None = None,
    *,
    norm: Norm | None = None,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q projected from x; see the module's docstring."""
    if "query_attention" not in kernels.triton or not fits(family(x.device), x.dtype, k.shape[3]):
        return query_attention_reference(x, weight, k, v, bias, adapter, rows, lengths, norm=norm, kernels=kernels)
    forward_only(x, weight, bias, k, v)
    return _query_attention(x, weight, k, v, bias, lengths, *packed(x, adapter, rows, norm))


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, for a bank of rank 64; and heads of 128 as Meissonic's."""
    slots, lanes = 2, 64
    counts = torch.empty(slots, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        empty = partial(torch.empty, dtype=dtype, device="meta")
        shapes = (768, 64, False), (1024, 64, True), (1024, 128, True)
        for width, size, modulated in (each for each in shapes if fits(architecture, dtype, each[1])):
            x, weight = empty(2, 256, width), empty(width, width)
            k, v = empty(2, 2, width // size, 77, size).unbind(1)
            norm = Norm(empty(width), 1e-6, "rms", empty(2, 2, width) if modulated else None)
            pair = LowRank(empty(slots, 1, width, lanes), empty(slots, 1, lanes, width), counts)
            for adapter in (None, pair):
                name = f"query attention of {width}, heads of {size}{', with adapter' if adapter else ''}"
                own, y = rows if adapter else None, _output(x, weight)
                yield Specimen(
                    f"{name}, {str(dtype).removeprefix('torch.')}",
                    _call(x, weight, k, v, None, adapter, own, None, norm, y, architecture),
                    choices(architecture, dtype, size),
                    matrix=True,
                )
