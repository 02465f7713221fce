"""8-bit numbers with a scale: of weights, once; of activations, at every call.

    Q = round(x / s),  s = max |x| / m        of each vector of the last dimension, in fp32
    int8    m = 127, the nearest whole number, a tie to the even one
    fp8     m = 448, the nearest e4m3 (1 sign, 4 exponent, 3 mantissa bits), whose error is a share of each number

A vector is an output of a weight, or a token: rows stay alone. Sources: scales per token and per channel, SmoothQuant,
arXiv 2211.10438; e4m3, arXiv 2209.05433.

The kernel is the first of the two that make a `quantized_linear`. It reads x (R, N, in), takes a norm along, and writes
Q (R, N, in) and s (R, N). Beside it, by programs of their own, scale x A[p] (R, N, P, lanes) is written for rows with
an adapter, of the x that is not quantized: both read the same x (SVDQuant, arXiv 2411.05007). A program passes over its
tokens for their largest number and again to divide by it, and finds them in the cache then. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import multiply
from .dispatch import INTERPRETED, constant, jit, tl
from .norm import Norm, normed, statistics
from .rows import LowRank, RowSlots
from .tile import NARROW
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, named_strides, power_of_two, precision

FORMATS: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The number formats by the name they are asked for."""
NAMES: Mapping[torch.dtype, str] = {number: name for name, number in FORMATS.items()}
LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""m: where the largest number of a vector comes to lie."""
SMALLEST = 2.0**-100
"""The largest number of a vector is taken to be at least this, so that zeros have a scale."""
_SMALLEST = constant(SMALLEST)
_WHOLE = constant(1.5 * 2**23)
"""fp32 numbers of this size have no fraction: adding it rounds to the nearest whole number, a tie to the even one."""
_ROUND_FIRST = constant(INTERPRETED)
"""Triton's interpreter drops the carry of an fp8 mantissa that is rounded up, so there it is given rounded numbers."""


@dataclass(frozen=True)
class Quantized:
    """8-bit numbers (..., n) and the fp32 scale (...) of each vector of them; together s Q."""

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """The memory both take."""
        return self.values.nbytes + self.scales.nbytes

    def wide(self) -> Tensor:
        """s Q in fp32."""
        return self.values.float() * self.scales[..., None]


def quantize_reference(x: Tensor, number: torch.dtype) -> Quantized:
    """Every vector of the last dimension with a scale of its own: weights by output, activations by token."""
    wide = x.float()
    most = wide.abs().amax(-1).clamp(min=SMALLEST)
    # By a tensor: on a GPU torch divides by a number through its reciprocal, which rounds otherwise.
    scales = most / torch.full_like(most, LARGEST[number])
    values = wide / scales[..., None]
    return Quantized((values.round() if number == torch.int8 else values).to(number), scales)


@dataclass(frozen=True)
class Activations:
    """What the first launch leaves for the second: Q_x and s_x, and scale x A (R, N, P, lanes) of rows that have an A.

    Of other rows the last is not written; lanes from the slot's rank on are not read.
    """

    small: Quantized
    hidden: Tensor | None


def empty_activations(x: Tensor, number: torch.dtype, adapter: LowRank | None) -> Activations:
    """Room for them."""
    count, tokens, _ = x.shape
    small = Quantized(
        torch.empty_like(x, dtype=number, memory_format=torch.contiguous_format),
        x.new_empty((count, tokens), dtype=torch.float32),
    )
    if adapter is None:
        return Activations(small, None)
    parts, lanes = adapter.down.shape[1], power_of_two(adapter.down.shape[3])
    return Activations(small, x.new_empty((count, tokens, parts, lanes)))


def choices(architecture: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    """The launches of a quantization, the default first: few tokens a program, so that there are many programs."""
    if architecture == INTERPRETER:
        return (Launch({"BLOCK_TOKENS": 16, "BLOCK_INPUTS": 64}, 4, 1),)
    if dtype == torch.float32:
        return (Launch({"BLOCK_TOKENS": 16, "BLOCK_INPUTS": 64}, 4, 2),)
    sizes = (16,) if architecture == "sm_80" else (16, 32)  # there 32 tokens with a modulated norm spill
    return tuple(Launch({"BLOCK_TOKENS": tokens, "BLOCK_INPUTS": 128}, 4, 2) for tokens in sizes)


@jit
def _tile(
    x: tl.tensor,
    x_input: tl.tensor,
    norm: tl.tuple,
    norm_strides: tl.tuple,
    token_inside: tl.tensor,
    places: tl.tensor,
    NORMED: tl.constexpr,
    MODULATED: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """The numbers at `places` of the tokens x points to, normed, in x's number format; 0 where nothing is."""
    tile = tl.load(x[:, None] + places[None, :] * x_input, token_inside[:, None] & (places < INPUTS)[None, :], 0.0)
    if NORMED:
        tile = normed(tile, norm, norm_strides, places, MODULATED, INPUTS)
    return tile


@jit
def _statistics(
    x: tl.tensor,
    x_input: tl.tensor,
    weight: tl.tensor,
    gain: tl.tensor,
    gain_side: tl.tensor,
    token_inside: tl.tensor,
    epsilon: tl.tensor,
    NORM: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> tl.tuple:
    """What `normed` needs of the tokens x points to; nothing is computed without a norm."""
    if NORM == "none":
        norm = (0.0, 1.0, x, x, x)
    else:
        mean, inverse = statistics(
            x, x_input, token_inside, epsilon, NORM == "layer", INPUTS, BLOCK_TOKENS, BLOCK_INPUTS
        )
        norm = (mean, inverse, weight, gain, gain + gain_side)
    return norm


@jit
def _rounded(value: tl.tensor, INTEGER: tl.constexpr) -> tl.tensor:
    """fp32 numbers at which the 8-bit format has one."""
    if INTEGER:
        value = (value + _WHOLE) - _WHOLE
    elif _ROUND_FIRST:
        # Adding 1.5 2^23 times the step between neighbours, which is 2^-9 at least, rounds to one of them.
        bits = value.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) & 255, 121)
        far = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        nearest = (tl.abs(value) + far) - far
        value = (nearest.to(tl.int32, bitcast=True) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    return value


@jit
def _lowered(
    x: tl.tensor,
    x_input: tl.tensor,
    norm: tl.tuple,
    norm_strides: tl.tuple,
    down: tl.tensor,
    down_strides: tl.tuple,
    rank: tl.tensor,
    strength: tl.tensor,
    hidden: tl.tensor,
    token_inside: tl.tensor,
    LANES: tl.constexpr,
    NORMED: tl.constexpr,
    MODULATED: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    """Writes strength x A on so many lanes to where hidden points; strides of an input and of a lane in A."""
    lanes = tl.arange(0, LANES)
    lowered = tl.zeros((BLOCK_TOKENS, LANES), tl.float32)
    for first in range(0, INPUTS, BLOCK_INPUTS):
        places = first + tl.arange(0, BLOCK_INPUTS)
        tile = _tile(x, x_input, norm, norm_strides, token_inside, places, NORMED, MODULATED, INPUTS)
        down_at = down + places[:, None] * down_strides[0] + lanes[None, :] * down_strides[1]
        down_tile = tl.load(down_at, (places < INPUTS)[:, None] & (lanes < rank)[None, :], 0.0)
        lowered = multiply(tile, down_tile, lowered, PRECISION)
    lowered = (lowered * strength).to(hidden.dtype.element_ty)
    tl.store(hidden[:, None] + lanes[None, :], lowered, token_inside[:, None])


@jit
def _quantize_kernel(
    x: tl.tensor,
    down: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    norm_weight: tl.tensor,
    norm_modulation: tl.tensor,
    values: tl.tensor,
    value_scales: tl.tensor,
    hidden: tl.tensor,
    tokens: tl.tensor,
    epsilon: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_input: tl.tensor,
    down_slot: tl.tensor,
    down_part: tl.tensor,
    down_input: tl.tensor,
    down_lane: tl.tensor,
    norm_input: tl.tensor,
    gain_row: tl.tensor,
    gain_side: tl.tensor,
    gain_input: tl.tensor,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    INPUTS: tl.constexpr,
    MOST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    """Some tokens of one row: program (., 0) quantizes them, program (., 1 + p) lowers them by part p's A."""
    row_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_inside = token < tokens
    at = row * tokens + token
    part = tl.program_id(1) - 1

    x_at = x + row * x_row + token * x_token
    NORMED: tl.constexpr = NORM != "none"
    MODULATED: tl.constexpr = norm_modulation is not None
    gain_at, norm_strides = x, (norm_input, gain_input)
    if MODULATED:
        gain_at = norm_modulation + row * gain_row
    if part < 0:
        norm = _statistics(
            x_at, x_input, norm_weight, gain_at, gain_side, token_inside, epsilon, NORM, INPUTS,
            BLOCK_TOKENS, BLOCK_INPUTS,
        )  # fmt: skip
        most = tl.full((BLOCK_TOKENS,), _SMALLEST, tl.float32)
        for first in range(0, INPUTS, BLOCK_INPUTS):
            places = first + tl.arange(0, BLOCK_INPUTS)
            tile = _tile(x_at, x_input, norm, norm_strides, token_inside, places, NORMED, MODULATED, INPUTS)
            most = tl.maximum(most, tl.max(tl.abs(tile.to(tl.float32)), 1))
        # Divisions that round to nearest, as torch's do: a product may be fused with the sum that rounds it.
        scale = tl.div_rn(most, tl.full((BLOCK_TOKENS,), MOST, tl.float32))
        for first in range(0, INPUTS, BLOCK_INPUTS):
            places = first + tl.arange(0, BLOCK_INPUTS)
            tile = _tile(x_at, x_input, norm, norm_strides, token_inside, places, NORMED, MODULATED, INPUTS)
            number = _rounded(tl.div_rn(tile.to(tl.float32), scale[:, None]), values.dtype.element_ty == tl.int8)
            inside = token_inside[:, None] & (places < INPUTS)[None, :]
            tl.store(values + at[:, None] * INPUTS + places[None, :], number.to(values.dtype.element_ty), inside)
        tl.store(value_scales + at, scale, token_inside)
    elif RANK > 0:
        slot = tl.load(slots + row)
        rank = tl.load(ranks + slot, slot >= 0, 0)
        if rank > 0:
            norm = _statistics(
                x_at, x_input, norm_weight, gain_at, gain_side, token_inside, epsilon, NORM, INPUTS,
                BLOCK_TOKENS, BLOCK_INPUTS,
            )  # fmt: skip
            down_at, down_strides = down + slot * down_slot + part * down_part, (down_input, down_lane)
            strength = tl.load(scales + row)
            hidden_at = hidden + (at * PARTS + part) * RANK
            if rank <= NARROW:
                _lowered(
                    x_at, x_input, norm, norm_strides, down_at, down_strides, rank, strength, hidden_at, token_inside,
                    NARROW, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_INPUTS,
                )  # fmt: skip
            else:
                _lowered(
                    x_at, x_input, norm, norm_strides, down_at, down_strides, rank, strength, hidden_at, token_inside,
                    RANK, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_INPUTS,
                )  # fmt: skip


def quantize_call(
    x: Tensor, adapter: LowRank | None, rows: RowSlots | None, norm: Norm | None, into: Activations, architecture: str
) -> Call:
    """The launch that fills them."""
    down, ranks = (None, None) if adapter is None else (adapter.down, adapter.ranks)
    slots, scales = (None, None) if rows is None else (rows.slots, rows.scales)
    assert down is None or down.dtype == x.dtype, "one number format"
    gain, modulation = (None, None) if norm is None else (norm.weight, norm.modulation)
    number, (count, tokens, inputs) = into.small.values.dtype, x.shape
    tensors = {
        "x": x, "down": down, "ranks": ranks, "slots": slots, "scales": scales, "norm_weight": gain,
        "norm_modulation": modulation, "values": into.small.values, "value_scales": into.small.scales,
        "hidden": into.hidden,
    }  # fmt: skip
    strides = {
        **named_strides(x, "x_row", "x_token", "x_input"),
        **named_strides(down, "down_slot", "down_part", "down_input", "down_lane"),
        **named_strides(gain, "norm_input"),
        **named_strides(modulation, "gain_row", "gain_side", "gain_input"),
    }
    parts, lanes = (0, 0) if into.hidden is None else into.hidden.shape[2:]
    epsilon, kind = (0.0, "none") if norm is None else (float(norm.epsilon), norm.kind)
    constants = {
        "RANK": lanes, "PARTS": parts, "NORM": kind, "INPUTS": inputs, "MOST": LARGEST[number],
        "PRECISION": precision(architecture),
    }  # fmt: skip

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return count * ceil_div(tokens, tiles["BLOCK_TOKENS"]), 1 + parts

    return Call(_quantize_kernel, {**tensors, "tokens": tokens, "epsilon": epsilon, **strides}, constants, grid)


def obstacle(name: str, device: torch.device) -> str | None:
    """What keeps the kernels from a format on a device, as a sentence that says what is needed; None where nothing."""
    if name != "fp8" or device.type == "cpu":
        return None
    if torch.version.hip:
        return "AMD's GPUs have another fp8 than e4m3; allowed here: int8"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    return f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}; allowed here: int8"


def formats(architecture: str) -> tuple[str, ...]:
    """The names of those that an architecture's matrix units multiply."""
    return ("int8", "fp8") if architecture in ("sm_90", "sm_100", INTERPRETER) else ("int8",)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, and for a bank of rank 64."""
    width, slots, lanes, parts = 1024, 2, 64, 3
    counts = torch.empty(slots, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    for name in formats(architecture):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(2, 256, width, dtype=dtype, device="meta")
            norm = Norm(x.new_empty(width), 1e-6, "layer", x.new_empty(2, 2, width))
            pair = LowRank(x.new_empty(slots, parts, width, lanes), x.new_empty(slots, parts, lanes, width), counts)
            for adapter, before in ((None, None), (None, norm), (pair, None), (pair, norm)):
                what = f"{' of the norm' if before else ''}{' with adapter' if adapter else ''}"
                into = empty_activations(x, FORMATS[name], adapter)
                call = quantize_call(x, adapter, rows if adapter else None, before, into, architecture)
                number = str(dtype).removeprefix("torch.")
                yield Specimen(
                    f"quantize to {name}{what}, {number}", call, choices(architecture, dtype), adapter is not None
                )
