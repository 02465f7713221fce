"""The product of a projection and what follows: tiles of y = x W^T, each finished while it is in registers.

    + scale (x A[p]) B[p]   with the pair of the row's slot; `inputs` has made the hidden side, scale x A
    + bias
    activation              "gelu", or "geglu": value gelu(gate), (value, gate) being the halves of y; the exact gelu
    + residual              of the output's shape
    modulation              times gain plus shift, (R, 2, out), one pair per row

x (R, N, in) and W (P out, in) in one number format, or both in 8 bits with a scale for each token and each output ->
(R, N, P out). The P parts are the projections fused into one weight. int8 is added in int32, without error; else fp32.

The kernel: a tile of tokens is cut from one row and has one slot, so nothing is gathered. Nothing is between the load
of a tile and the matrix unit: whole tiles come by descriptor (`tuning.Described`), on chips that have no such loads by
pointer. B takes one narrow product more for every 16 lanes of the slot's own rank, and none for base rows, which are
bitwise what they are without adapters. What follows would read and write y once each if it stood apart.

The launches of a weight have equal bits: tiles of other sizes add the same products in the same order, as long as
the inputs are worked off in one run of the matrix units (`choices`). So the launch may follow the number of tokens, and
a row is the same in any batch. Where a format is added up by tile (three TF32 products for fp32; fp8, whose sums are
kept outside of the matrix unit), all launches have one size of it. Source of the fused pair: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .device import follow, multiply, prefetch
from .dispatch import constant, jit, tl
from .epilogue import finished, raised
from .inputs import LANES, Inputs, beside
from .quantization import FORMATS, Quantized, formats
from .rows import LowRank, RowSlots
from .tuning import INTERPRETER, Call, Described, Launch, Specimen, ceil_div, dependent, describable, precision

Activation = Literal["none", "gelu", "geglu"]

_AHEAD = constant(8)
"""Lines of 128 bytes of each output's weights that are brought near while the kernel before still runs."""


def choices(
    architecture: str, dtype: torch.dtype, outputs: int, activation: str, wide: bool = False
) -> tuple[Launch, ...]:
    """The launches for a weight in a number format, the default first; all of them give the same bits.

    Wide weights fill the chip with large tiles; narrow ones need more, smaller tiles: 512 tokens x 1024 outputs are 32
    tiles of 128 x 128, on 132 multiprocessors. A gate is a second tile. ``wide``: 8-bit numbers under fp32 outputs.
    """
    gated, eight = activation == "geglu", dtype.itemsize == 1
    if architecture == INTERPRETER:
        return _launch(64, 64, 32, 4, 1), _launch(64, 32, 32, 4, 1), _launch(128, 64, 32, 4, 1)
    if dtype == torch.float32 or wide:
        depth = 64 if eight else 16
        columns = 16 if gated or (wide and architecture == "sm_100") else 32
        lower, taller = _launch(32, columns, depth, 4, 2), _launch(64, columns, depth, 8, 2)
        return (lower,) if architecture == "sm_80" or wide else (taller, lower)
    if architecture in ("sm_80", "gfx942"):
        # Without asynchronous matrix units the tiles being multiplied lie in registers.
        depth, stages = 64 if eight else 32, 2 if architecture == "gfx942" else 3
        wide_tile = _launch(128, 128, depth, 8, stages)
        narrow = _launch(64, 64, depth, 8 if gated else 4, stages), _launch(64, 32, depth, 4, stages)
        if gated:  # two large accumulators beside a pair spill
            return narrow
        return (wide_tile, *narrow) if outputs >= 2048 else (narrow[0], wide_tile, narrow[1])
    depth = 128 if eight else 64
    if gated:
        return (
            _launch(128, 128, depth, 8, 3), _launch(128, 64, depth, 8, 4), _launch(64, 128, depth, 8, 3),
            _launch(64, 64, depth, 4, 4), _launch(64, 32, depth, 4, 5), _launch(128, 32, depth, 4, 5),
        )  # fmt: skip
    large = [_launch(128, 128, depth, 8, 4), _launch(64, 256, depth, 8, 4), _launch(64, 128, depth, 4, 4)]
    # Its accumulators spill beside a gelu or the scales, and on sm_100 beside a narrow weight's residual.
    if activation == "none" and not eight and (outputs >= 2048 or architecture != "sm_100"):
        large.append(_launch(128, 256, depth, 8, 3))
    small = [
        _launch(64, 64, depth, 4, 5), _launch(64, 64, depth, 4, 3), _launch(128, 64, depth, 4, 5),
        _launch(64, 32, depth, 4, 6),
    ]  # fmt: skip
    if not eight:  # there sums run on from tile to tile
        small += [_launch(64, 64, 128, 4, 4), _launch(64, 32, 128, 4, 5), _launch(64, 128, 128, 4, 3)]
    return tuple(large + small if outputs >= 2048 else small + large)


def _launch(tokens: int, outputs: int, inputs: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_TOKENS": tokens, "BLOCK_OUTPUTS": outputs, "BLOCK_INPUTS": inputs}, warps, stages)


@jit
def operand(
    source: tl.tensor,
    first_row: tl.tensor,
    first_input: tl.tensor,
    rows: tl.tensor,
    INPUTS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> tl.tensor:
    """A tile of a matrix (rows, INPUTS), 0 beyond its inputs: by descriptor, or from a pointer."""
    if DESCRIBED:
        tile = source.load([first_row, first_input])
    else:
        row, place = first_row + tl.arange(0, BLOCK_ROWS), first_input + tl.arange(0, BLOCK_INPUTS)
        inside = (row < rows)[:, None]
        if INPUTS % BLOCK_INPUTS != 0:
            inside = inside & (place < INPUTS)[None, :]
        tile = tl.load(source + row[:, None] * INPUTS + place[None, :], inside, 0.0)
    return tile


@jit
def _product_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    weight: tl.tensor,
    weight_at: tl.tensor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    hidden: tl.tensor,
    up: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    residual: tl.tensor,
    modulation: tl.tensor,
    y: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    modulation_row: tl.tensor,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUTS: tl.constexpr,
    INTEGER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    """A tile of one row's tokens and one part's outputs; `outputs` are a part's own, those of the value where gated."""
    GATED: tl.constexpr = ACTIVATION == "geglu"
    tiles, columns = tl.cdiv(tokens, BLOCK_TOKENS), tl.cdiv(outputs, BLOCK_OUTPUTS)
    row, part = tl.program_id(0) // tiles, tl.program_id(1) // columns
    first_token = (tl.program_id(0) % tiles) * BLOCK_TOKENS
    first_column = (tl.program_id(1) % columns) * BLOCK_OUTPUTS
    first_at, first_output = row * tokens + first_token, part * outputs + first_column
    token, column = first_token + tl.arange(0, BLOCK_TOKENS), first_column + tl.arange(0, BLOCK_OUTPUTS)
    token_inside, column_inside = token < tokens, column < outputs
    at, output = row * tokens + token, part * outputs + column
    if DEPENDENT:
        # The weights are nobody's output.
        BYTES: tl.constexpr = weight_at.dtype.element_ty.primitive_bitwidth // 8
        LINES: tl.constexpr = min(_AHEAD, INPUTS * BYTES // 128)
        if LINES == _AHEAD:
            line = tl.arange(0, _AHEAD) * (128 // BYTES)
            near = tl.minimum(output, PARTS * outputs - 1)
            prefetch(weight_at + near[:, None] * INPUTS + line[None, :])
            if GATED:
                prefetch(weight_at + (outputs + near)[:, None] * INPUTS + line[None, :])
    follow(DEPENDENT)
    rank = 0
    slot = row
    if RANK > 0:
        # Asked for here, there at the end: one after the other they take a microsecond.
        slot = tl.load(slots + row)
        rank = tl.load(ranks + slot, slot >= 0, 0)

    value = tl.zeros((BLOCK_TOKENS, BLOCK_OUTPUTS), tl.int32 if INTEGER else tl.float32)
    gate = value
    for first in range(0, INPUTS, BLOCK_INPUTS):
        x_tile = operand(x, first_at, first, count * tokens, INPUTS, DESCRIBED, BLOCK_TOKENS, BLOCK_INPUTS)
        tile = operand(weight, first_output, first, PARTS * outputs, INPUTS, DESCRIBED, BLOCK_OUTPUTS, BLOCK_INPUTS)
        value = multiply(x_tile, tile.T, value, PRECISION)
        if GATED:
            tile = operand(
                weight, outputs + first_output, first, 2 * outputs, INPUTS, DESCRIBED, BLOCK_OUTPUTS, BLOCK_INPUTS
            )
            gate = multiply(x_tile, tile.T, gate, PRECISION)
    if x_scales is not None:
        scale = tl.load(x_scales + at, token_inside, 0.0)[:, None]
        value = value.to(tl.float32) * scale * tl.load(weight_scales + output, column_inside, 0.0)[None, :]
        if GATED:
            gate = gate.to(tl.float32) * scale * tl.load(weight_scales + outputs + output, column_inside, 0.0)[None, :]
    if RANK > 0:
        hidden_at = hidden + (at * PARTS + part) * (tl.cdiv(RANK, LANES) * LANES)
        width = outputs * (2 if GATED else 1)
        up_at = up + (slot * PARTS + part) * (RANK * width) + column
        for first in tl.range(0, rank, LANES, num_stages=1):
            lane = first + tl.arange(0, LANES)
            lane_inside = lane < rank
            # Lanes from the rank on are zeros there: a mask by lane would make them scalar loads.
            lowered = tl.load(hidden_at[:, None] + lane[None, :], token_inside[:, None], 0.0)
            value = raised(value, lowered, up_at, lane, lane_inside, column_inside, width, PRECISION)
            if GATED:
                gate = raised(gate, lowered, up_at + outputs, lane, lane_inside, column_inside, width, PRECISION)
    value = finished(
        value, gate, bias, residual, modulation, modulation_row, row, at, output, outputs,
        token_inside, column_inside, PARTS, ACTIVATION,
    )  # fmt: skip
    inside = token_inside[:, None] & column_inside[None, :]
    tl.store(y + at[:, None] * (PARTS * outputs) + output[None, :], value.to(y.dtype.element_ty), inside)


def empty_output(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0] // (2 if activation == "geglu" else 1))


def product_call(
    given: Inputs,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    adapter: LowRank | None,
    rows: RowSlots | None,
    residual: Tensor | None,
    modulation: Tensor | None,
    activation: str,
    y: Tensor,
    architecture: str,
) -> Call:
    """The launch that fills y, contiguous as all but the rows of the modulation."""
    matrix, scales = (weight.values, weight.scales) if isinstance(weight, Quantized) else (weight, None)
    up, ranks = (None, None) if adapter is None else (adapter.up.contiguous(), adapter.ranks)
    x, parts = given.values, 1 if up is None else up.shape[1]
    outputs = y.shape[2] // parts
    assert matrix.shape == (y.shape[2] * (2 if activation == "geglu" else 1), x.shape[2])
    assert activation != "geglu" or parts == 1, "value and gate are the halves of one part"
    assert all(tensor is None or tensor.dtype == y.dtype for tensor in (bias, up)), "one number format"
    assert max(x.numel(), y.numel(), matrix.numel()) < 2**31, "offsets in 32 bits"
    count, tokens, inputs = x.shape
    if up is None and modulation is None:
        # Nothing belongs to a row: a tile may run over its end.
        count, tokens = 1, count * tokens
    modulation = None if modulation is None else beside(modulation)
    flat, matrix = x.flatten(0, 1), matrix.contiguous()
    described = architecture not in ("sm_80", "gfx942") and describable(flat) and describable(matrix)
    tensors = {
        "x": Described(flat, ("BLOCK_TOKENS", "BLOCK_INPUTS")) if described else flat, "x_scales": given.scales,
        "weight": Described(matrix, ("BLOCK_OUTPUTS", "BLOCK_INPUTS")) if described else matrix,
        "weight_at": matrix, "weight_scales": scales, "bias": bias, "hidden": given.hidden,
        "up": up, "ranks": ranks, "slots": None if up is None or rows is None else rows.slots,
        "residual": None if residual is None else residual.contiguous(),
        "modulation": modulation, "y": y,
    }  # fmt: skip
    numbers = {
        "count": count, "tokens": tokens, "outputs": outputs,
        "modulation_row": 0 if modulation is None else modulation.stride(0),
    }  # fmt: skip
    constants = {
        "RANK": 0 if up is None else up.shape[2], "PARTS": parts, "ACTIVATION": activation, "INPUTS": inputs,
        "INTEGER": matrix.dtype == torch.int8, "DESCRIBED": described,
        "DEPENDENT": dependent(architecture), "PRECISION": precision(architecture),
    }  # fmt: skip

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return count * ceil_div(tokens, tiles["BLOCK_TOKENS"]), parts * ceil_div(outputs, tiles["BLOCK_OUTPUTS"])

    return Call(_product_kernel, {**tensors, **numbers}, constants, grid)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, and for a bank of rank 64."""
    width, inner, slots, lanes = 1024, 2816, 2, 64
    shapes: tuple[tuple[str, int, int, int, Activation, bool], ...] = (
        ("q,k,v", 3, width, width, "none", False),
        ("projection, residual and modulation", 1, width, width, "none", True),
        ("gated up-projection", 1, width, 2 * inner, "geglu", False),
        ("down-projection and residual", 1, inner, width, "none", True),
        ("gelu", 1, 768, 3072, "gelu", False),
    )
    counts = torch.empty(slots, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    numbers: list[tuple[torch.dtype, torch.dtype]] = [
        (each, each) for each in (torch.bfloat16, torch.float16, torch.float32)
    ]
    numbers += [(FORMATS[name], each) for name in formats(architecture) for each in (torch.bfloat16, torch.float32)]
    for number, dtype in numbers:
        empty = partial(torch.empty, dtype=dtype, device="meta")
        for what, parts, inputs, outputs, activation, follows in shapes:
            matrix = torch.empty(parts * outputs, inputs, dtype=number, device="meta")
            y = empty_output(empty(2, 256, inputs), matrix, activation)
            residual, modulation = (y, empty(2, 2, outputs)) if follows else (None, None)
            launches = choices(architecture, number, parts * outputs, activation, number != dtype == torch.float32)
            for pair in (
                None,
                LowRank(empty(slots, parts, inputs, lanes), empty(slots, parts, lanes, outputs), counts),
            ):
                hidden = None if pair is None else empty(2, 256, parts, lanes)
                given = Inputs(torch.empty(2, 256, inputs, dtype=number, device="meta"), None, hidden)
                weight: Tensor | Quantized = matrix
                if number != dtype:
                    scales = torch.empty(2, 256, device="meta"), torch.empty(parts * outputs, device="meta")
                    given, weight = Inputs(given.values, scales[0], hidden), Quantized(matrix, scales[1])
                call = product_call(
                    given, weight, None, pair, rows if pair else None, residual, modulation, activation, y, architecture
                )
                format_ = str(dtype).removeprefix("torch.")
                format_ = format_ if number == dtype else f"{str(number).removeprefix('torch.')} and {format_}"
                # Triton has no asynchronous int8 products on sm_100.
                newest = not (number == torch.int8 and architecture == "sm_100")
                yield Specimen(
                    f"product {what}{' with adapter' if pair else ''}, {format_}", call, launches, matrix=True,
                    newest=newest,
                )  # fmt: skip
