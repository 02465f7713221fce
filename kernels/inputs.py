"""What a projection reads, in one launch: its x normed, or that in 8 bits, and x's low-rank shrink of each row's slot.

    values   n(x) (R, N, in) with the norm's modulation (`norm`), or x itself where no norm precedes
             quantized: Q (R, N, in) in 8 bits with a scale s (R, N) for each token, n(x) ~ s Q (`quantization`)
    hidden   scale n(x) A[p] (R, N, P, lanes), A being the slot's of each row, up to the slot's own rank

Rows without an adapter have no hidden: nothing is computed or written for them, nor lanes beyond the next multiple of
16 from the slot's rank on; those up to there are zeros. `product` adds hidden B. The parts, q, k and v, are shrunk
from one x.

The kernel has two kinds of programs, so that a row's values do not depend on who else is in the batch. Some hold a few
whole tokens each: x is read once, and its norm written once, with one rounding. Others, one for 16 tokens and a part
of rows with an adapter, norm their tokens again, piece by piece, for a product of rank columns. The norm in a launch of
its own costs T in numbers written and read, of T tokens, and gives the projection tiles that nothing touches between
the load and the matrix unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import follow, multiply
from .dispatch import REFERENCE, Kernels, constant, forward_only, jit, operator, tl
from .norm import Kind, Norm, norm_reference, normed, scaled, statistics
from .quantization import FORMATS, LARGEST, SMALLEST, formats, rounded
from .rows import LowRank, RowSlots
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, dependent, family, pick, power_of_two, precision

LANES = constant(16)
"""A rank is worked off in so many lanes at a time, the fewest of the matrix units."""
_TOKENS = constant(16)
_SMALLEST = constant(SMALLEST)


@dataclass(frozen=True)
class Inputs:
    """Fields as in the module's docstring; `scales` (R, N) fp32 where the values are quantized."""

    values: Tensor
    scales: Tensor | None = None
    hidden: Tensor | None = None


def choices(architecture: str, dtype: torch.dtype, channels: int) -> tuple[Launch, ...]:
    """The launches for a width, the default first: about 4096 numbers a program."""
    # A shrink waits for its tokens twice in every piece, so they are few: eight took 13 us on an H100, a norm takes 3.
    pieces = 64 if architecture == INTERPRETER or dtype == torch.float32 else min(512, power_of_two(channels))
    fits = max(1, 4096 // power_of_two(channels))
    sizes = (fits, fits // 2) if fits > 1 else (1,)
    return tuple(Launch({"BLOCK_TOKENS": tokens, "BLOCK_CHANNELS": pieces}, 4, 1) for tokens in sizes)


@jit
def _write(
    at: tl.tensor,
    inside: tl.tensor,
    token_at: tl.tensor,
    token_inside: tl.tensor,
    channel: tl.tensor,
    tensors: tl.tuple,
    epsilon: tl.tensor,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
    CHANNELS: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Whole tokens, normed and, where MOST is not 0, quantized."""
    x, weight, gain, values, scales = tensors
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if NORM != "none":
        value = normed(value, inside, weight, gain, channel, epsilon, NORM == "layer", MODULATED, CHANNELS)
    if MOST > 0:
        value = value.to(x.dtype.element_ty).to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(value), 1), _SMALLEST)
        # Divisions that round to nearest, as torch's do: a product may be fused with the sum that rounds it.
        scale = tl.div_rn(most, tl.full(most.shape, MOST, tl.float32))
        value = rounded(tl.div_rn(value, scale[:, None]), values.dtype.element_ty == tl.int8)
        tl.store(scales + token_at, scale, token_inside)
    tl.store(values + at, value.to(values.dtype.element_ty), inside)


@jit
def _shrink(
    x: tl.tensor,
    weight: tl.tensor,
    gain: tl.tensor,
    down: tl.tensor,
    hidden: tl.tensor,
    token_inside: tl.tensor,
    rank: tl.tensor,
    strength: tl.tensor,
    epsilon: tl.tensor,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    """strength n(x) A of the tokens x points to, written to where hidden does; down points to A (in, RANK)."""
    mean, spread = tl.zeros((_TOKENS,), tl.float32), tl.full((_TOKENS,), 1.0, tl.float32)
    if NORM != "none":
        mean, spread = statistics(x, token_inside, epsilon, NORM == "layer", CHANNELS, _TOKENS, BLOCK_CHANNELS)
    for first_lane in range(0, rank, LANES):
        lane = first_lane + tl.arange(0, LANES)
        total = tl.zeros((_TOKENS, LANES), tl.float32)
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            inside = channel < CHANNELS
            tile = tl.load(x[:, None] + channel[None, :], token_inside[:, None] & inside[None, :], 0.0)
            if NORM != "none":
                wide = (tile.to(tl.float32) - mean[:, None]) / spread[:, None]
                tile = scaled(wide, weight, gain, channel, MODULATED, CHANNELS).to(tile.dtype)
            down_at = down + channel[:, None] * RANK + lane[None, :]
            down_tile = tl.load(down_at, inside[:, None] & (lane < rank)[None, :], 0.0)
            total = multiply(tile, down_tile, total, PRECISION)
        total = (total * strength).to(hidden.dtype.element_ty)
        tl.store(hidden[:, None] + lane[None, :], total, token_inside[:, None])


@jit
def _inputs_kernel(
    x: tl.tensor,
    norm_weight: tl.tensor,
    norm_modulation: tl.tensor,
    down: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    strengths: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    hidden: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    epsilon: tl.tensor,
    modulation_row: tl.tensor,
    WRITTEN: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    """Some tokens of one row: where values are WRITTEN the first programs do that, then come a part's hidden each."""
    follow(DEPENDENT)
    MODULATED: tl.constexpr = norm_modulation is not None
    program, writers = tl.program_id(0), 0
    if WRITTEN:
        writers = count * tl.cdiv(tokens, BLOCK_TOKENS)
    weight, gain = x, x
    if NORM != "none":
        weight, gain = norm_weight, norm_weight
    if program < writers:
        tiles = tl.cdiv(tokens, BLOCK_TOKENS)
        row = program // tiles
        token = (program % tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        token_inside, token_at, channel = token < tokens, row * tokens + token, tl.arange(0, PADDED)
        inside = token_inside[:, None] & (channel < CHANNELS)[None, :]
        if MODULATED:
            gain = norm_modulation + row * modulation_row
        _write(
            token_at[:, None] * CHANNELS + channel[None, :], inside, token_at, token_inside, channel,
            (x, weight, gain, values, scales), epsilon, NORM, MODULATED, CHANNELS, MOST,
        )  # fmt: skip
    elif PARTS > 0:
        tiles = tl.cdiv(tokens, _TOKENS)
        part, tile = (program - writers) % PARTS, (program - writers) // PARTS
        row = tile // tiles
        slot = tl.load(slots + row)
        rank = tl.load(ranks + slot, slot >= 0, 0)
        if rank > 0:
            token = (tile % tiles) * _TOKENS + tl.arange(0, _TOKENS)
            at = row * tokens + token
            if MODULATED:
                gain = norm_modulation + row * modulation_row
            _shrink(
                x + at * CHANNELS, weight, gain, down + (slot * PARTS + part) * (CHANNELS * RANK),
                hidden + (at * PARTS + part) * tl.cdiv(RANK, LANES) * LANES, token < tokens, rank,
                tl.load(strengths + row), epsilon, NORM, MODULATED, CHANNELS, RANK, PRECISION, BLOCK_CHANNELS,
            )  # fmt: skip


def empty_inputs(
    x: Tensor, norm: Norm | None = None, adapter: LowRank | None = None, number: torch.dtype | None = None
) -> Inputs:
    """Room for them; x's own where its values stay as they are."""
    scales, hidden, values = None, None, x
    if number is not None:
        values, scales = torch.empty_like(x, dtype=number), x.new_empty(x.shape[:2], dtype=torch.float32)
    elif norm is not None:
        values = torch.empty_like(x)
    if adapter is not None:
        _, parts, _, lanes = adapter.down.shape
        hidden = x.new_empty(*x.shape[:2], parts, 16 * ceil_div(lanes, 16))
    return Inputs(values, scales, hidden)


def inputs_call(
    x: Tensor, norm: Norm | None, adapter: LowRank | None, rows: RowSlots | None, into: Inputs, architecture: str
) -> Call:
    """The launch that fills them; all tensors contiguous."""
    count, tokens, channels = x.shape
    down, ranks = (None, None) if adapter is None else (adapter.down.contiguous(), adapter.ranks)
    assert down is None or (down.dtype == x.dtype and down.shape[2] == channels), "a pair of this width and format"
    assert x.numel() < 2**31, "offsets in 32 bits"
    modulation = None if norm is None or norm.modulation is None else beside(norm.modulation)
    tensors = {
        "x": x, "norm_weight": None if norm is None else norm.weight.contiguous(), "norm_modulation": modulation,
        "down": down, "ranks": ranks, "slots": None if rows is None else rows.slots,
        "strengths": None if rows is None else rows.scales, "values": into.values, "scales": into.scales,
        "hidden": into.hidden,
    }  # fmt: skip
    written = norm is not None or into.scales is not None
    parts, rank = (0, 0) if down is None else (down.shape[1], down.shape[3])
    constants = {
        "WRITTEN": written, "NORM": "none" if norm is None else norm.kind, "CHANNELS": channels,
        "PADDED": power_of_two(channels), "RANK": rank, "PARTS": parts,
        "MOST": 0.0 if into.scales is None else LARGEST[into.values.dtype],
        "DEPENDENT": dependent(architecture), "PRECISION": precision(architecture),
    }  # fmt: skip

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        writers = ceil_div(tokens, tiles["BLOCK_TOKENS"]) if written else 0
        return (count * (writers + ceil_div(tokens, 16) * parts),)

    numbers = {
        "count": count, "tokens": tokens, "epsilon": 0.0 if norm is None else float(norm.epsilon),
        "modulation_row": 0 if modulation is None else modulation.stride(0),
    }  # fmt: skip
    return Call(_inputs_kernel, {**tensors, **numbers}, constants, grid)


def beside(modulation: Tensor) -> Tensor:
    """(R, 2, D) with gain and shift of a row beside each other, as kernels read them; rows may be anywhere."""
    return modulation if modulation.stride()[1:] == (modulation.shape[2], 1) else modulation.contiguous()


def inputs(
    x: Tensor,
    norm: Norm | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
    number: torch.dtype | None = None,
) -> Inputs:
    """They in one launch, or in none where x is all; x (R, N, in) contiguous, ``number`` the 8-bit format."""
    made = empty_inputs(x, norm, adapter, number)
    if made.values is x and made.hidden is None:
        return made
    architecture, dtype = family(x.device), str(x.dtype).removeprefix("torch.")
    kind = "none" if norm is None else norm.kind
    format_ = "" if number is None else f" to {str(number).removeprefix('torch.')}"
    problem = f"{x.shape[2]} {kind} {dtype}{format_}"
    call = inputs_call(x, norm, adapter, rows, made, architecture)
    call.run(pick("inputs", problem, x.device, choices(architecture, x.dtype, x.shape[2])))
    return made


@operator(
    "norm(Tensor x, Tensor weight, float epsilon, str kind, Tensor? modulation) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
)
def _norm(x: Tensor, weight: Tensor, epsilon: float, kind: Kind, modulation: Tensor | None) -> Tensor:
    return inputs(x.contiguous(), Norm(weight, epsilon, kind, modulation)).values


def norm(x: Tensor, given: Norm, *, kernels: Kernels = REFERENCE) -> Tensor:
    """The norm of every token, and its modulation; see `norm`'s docstring."""
    parts = (given.weight, given.epsilon, given.kind, given.modulation)
    if "norm" not in kernels.triton:
        return norm_reference(x, *parts)
    forward_only(x, given.weight, given.modulation)
    return _norm(x, *parts)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, and for banks of rank 16 and 64."""
    counts = torch.empty(2, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    wanted: tuple[tuple[str, int, Kind | None, bool, tuple[int, int] | None], ...] = (
        ("norm rms", 768, "rms", False, None),
        ("norm rms modulated", 1024, "rms", True, None),
        ("norm layer modulated", 1024, "layer", True, None),
        ("norm and shrink of q,k,v", 1024, "rms", True, (3, 16)),
        ("norm and shrink, rank 64", 1024, "layer", True, (1, 64)),
        ("shrink", 2816, None, False, (1, 16)),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for number in (None, *(FORMATS[name] for name in formats(architecture) if dtype != torch.float16)):
            for what, channels, kind, modulated, pair in wanted:
                x = torch.empty(2, 256, channels, dtype=dtype, device="meta")
                modulation = x.new_empty(2, 2, channels) if modulated else None
                before = None if kind is None else Norm(x.new_empty(channels), 1e-6, kind, modulation)
                adapter = None
                if pair is not None:
                    shape = (2, pair[0], channels, pair[1])
                    adapter = LowRank(x.new_empty(shape), x.new_empty(2, pair[0], pair[1], channels), counts)
                into = empty_inputs(x, before, adapter, number)
                call = inputs_call(x, before, adapter, rows if adapter else None, into, architecture)
                format_ = "" if number is None else f", quantized to {str(number).removeprefix('torch.')}"
                yield Specimen(
                    f"inputs: {what}{format_}, {str(dtype).removeprefix('torch.')}", call,
                    choices(architecture, dtype, channels), matrix=adapter is not None, newest=False,
                )  # fmt: skip
