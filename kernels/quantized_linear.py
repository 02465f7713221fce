"""Linear projection with 8-bit weights and activations (W8A8), the low-rank pair of each row's slot in full precision.

    y[row, :, p] = (Q_x Q_W^T) s_x s_W + b + scale (x A[p]) B[p]

W ~ s_W Q_W with a scale for each output, once, when a model is loaded; x ~ s_x Q_x with one for each token, at every
call, after the norm (`quantization`). x (R, N, in), Q_W (P out, in) in 8 bits and s_W (P out,) in fp32 -> (R, N,
P out); norm, activation, residual and modulation as in `linear`, the adapter's x being the unquantized one. Products of
int8 are added in int32, without error, so a row is the same to the bit whatever lies beside it; those of fp8 in fp32.

The kernels are two: `quantization`'s, which leaves Q_x, s_x and scale x A, and one that multiplies 8-bit tiles and has
in its epilogue what comes along, B being a narrow product more. With T tokens a weight is P out in bytes instead of
2 P out in, and T in bytes are read by the product instead of 2 T in, at twice the rate of the matrix units; for that a
launch and T (3 in + 8 P r) bytes are paid. Base tiles skip all of the adapter and are bitwise what they are without
adapters. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .epilogue import finished, followed, place, raised
from .linear import PACKED, Activation, add_pairs, empty_output, packed, unpacked
from .norm import Kind, Norm
from .quantization import (
    FORMATS,
    Activations,
    Quantized,
    empty_activations,
    formats,
    quantize_call,
    quantize_reference,
)
from .quantization import (
    choices as quantize_choices,
)
from .rows import LowRank, RowSlots
from .tile import NARROW, products
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, family, named_strides, pick, precision

_EXACT_INPUTS = 1040
"""Sums of so many products of int8 numbers, at most 127^2 each, are below 2^24: exact in fp32 in any order."""


def product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Q_x Q_W^T of 8-bit numbers: (..., in), (out, in) -> (..., out), int32 and exact for int8, else fp32."""
    if weight.dtype != torch.int8:
        return x.float() @ weight.float().T
    flat = x.flatten(0, -2)
    if x.device.type == "cpu" and flat.shape[1] > 1 and getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        # Only with VNNI: without, sums of two products saturate at 16 bits on the way. Of one input it is wrong.
        total = torch._int_mm(flat, weight.T)
    else:
        pairs = zip(flat.split(_EXACT_INPUTS, 1), weight.split(_EXACT_INPUTS, 1), strict=True)
        total = torch.stack([(one.float() @ other.float().T).int() for one, other in pairs]).sum(0, dtype=torch.int32)
    return total.unflatten(0, x.shape[:-1])


def quantized_linear_reference(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
) -> Tensor:
    """The definition in plain torch."""
    small = quantize_reference(x, weight.values.dtype)
    y = product_reference(small.values, weight.values).float() * small.scales[..., None] * weight.scales
    return add_pairs((y if bias is None else y + bias).to(x.dtype), x, adapter, rows)


def choices(architecture: str, dtype: torch.dtype, outputs: int, activation: str) -> tuple[Launch, ...]:
    """The launches of a product, the default first: `linear`'s with numbers of half the size.

    Where the adapter is in fp32, its product with B takes registers that larger tiles do not leave.
    """
    if architecture == INTERPRETER:
        return (_launch(64, 64, 32, 4, 1),)
    depth, stages = (64, 3) if architecture in ("sm_80", "gfx942") else (128, 4)
    if dtype == torch.float32:
        return (_launch(32, 16 if activation == "geglu" else 32, 64, 4, 2),)
    stages = 2 if architecture == "gfx942" else stages
    wide, middle = _launch(128, 128, depth, 8, min(stages, 3)), _launch(128, 64, depth, 8, stages)
    narrow, small = _launch(64, 64, depth, 4, stages), _launch(64, 64, depth, 8, stages)
    if activation == "geglu":
        return middle, small
    return (wide, narrow, middle) if outputs >= 2048 else (narrow, wide, middle)


def _launch(tokens: int, outputs: int, inputs: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_TOKENS": tokens, "BLOCK_OUTPUTS": outputs, "BLOCK_INPUTS": inputs}, warps, stages)


@jit
def _adapted(
    value: tl.tensor,
    gate: tl.tensor,
    hidden: tl.tensor,
    up: tl.tensor,
    gate_up: tl.tensor,
    up_lane: tl.tensor,
    rank: tl.tensor,
    token_inside: tl.tensor,
    column_inside: tl.tensor,
    LANES: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tuple:
    """The tile, and the gate's where GATED, plus the lowered tokens times B on so many lanes."""
    lanes = tl.arange(0, LANES)
    lane_inside = lanes < rank
    scaled = tl.load(hidden[:, None] + lanes[None, :], token_inside[:, None] & lane_inside[None, :], 0.0)
    value = raised(value, scaled, up, up_lane, lane_inside, column_inside, PRECISION)
    if GATED:
        gate = raised(gate, scaled, gate_up, up_lane, lane_inside, column_inside, PRECISION)
    return value, gate


@jit
def _product_kernel(
    values: tl.tensor,
    value_scales: tl.tensor,
    weight: tl.tensor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    hidden: tl.tensor,
    up: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    residual: tl.tensor,
    modulation: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    up_slot: tl.tensor,
    up_part: tl.tensor,
    up_lane: tl.tensor,
    up_output: tl.tensor,
    residual_row: tl.tensor,
    residual_token: tl.tensor,
    residual_output: tl.tensor,
    modulation_row: tl.tensor,
    modulation_side: tl.tensor,
    modulation_output: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    """A tile of one row's tokens and one part's outputs; `outputs` are a part's own, those of the value where gated."""
    GATED: tl.constexpr = ACTIVATION == "geglu"
    row, part, token, column = place(tokens, outputs, BLOCK_TOKENS, BLOCK_OUTPUTS)
    token_inside, column_inside = token < tokens, column < outputs
    output = part * outputs + column
    at = row * tokens + token

    weight_at = weight + output * INPUTS
    base = (values + at * INPUTS, weight_at, weight_at + outputs * INPUTS)
    value, gate = products(
        base, (weight, weight, weight, 0.0, 0), (0.0, 1.0, weight, weight, weight), (1, 1, 0, 0, 0, 0, 0),
        token_inside, column_inside,
        0, GATED, False, False, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
    )  # fmt: skip
    scale = tl.load(value_scales + at, token_inside, 0.0)[:, None]
    value = value.to(tl.float32) * scale * tl.load(weight_scales + output, column_inside, 0.0)[None, :]
    if GATED:
        gate = gate.to(tl.float32) * scale * tl.load(weight_scales + outputs + output, column_inside, 0.0)[None, :]
    if RANK > 0:
        slot = tl.load(slots + row)
        rank = tl.load(ranks + slot, slot >= 0, 0)
        if rank > 0:
            hidden_at = hidden + (at * PARTS + part) * RANK
            up_at = up + slot * up_slot + part * up_part + column * up_output
            if rank <= NARROW:
                value, gate = _adapted(
                    value, gate, hidden_at, up_at, up_at + outputs * up_output, up_lane, rank,
                    token_inside, column_inside, NARROW, GATED, PRECISION,
                )  # fmt: skip
            else:
                value, gate = _adapted(
                    value, gate, hidden_at, up_at, up_at + outputs * up_output, up_lane, rank,
                    token_inside, column_inside, RANK, GATED, PRECISION,
                )  # fmt: skip
    strides = (residual_row, residual_token, residual_output, modulation_row, modulation_side, modulation_output)
    value = finished(
        value, gate, (bias, residual, modulation), strides, row, token, output, outputs,
        token_inside, column_inside, ACTIVATION,
    )  # fmt: skip
    inside = token_inside[:, None] & column_inside[None, :]
    tl.store(y + row * y_row + token[:, None] * y_token + output[None, :], value.to(y.dtype.element_ty), inside)


def product_call(
    made: Activations,
    weight: Quantized,
    bias: Tensor | None,
    adapter: LowRank | None,
    rows: RowSlots | None,
    residual: Tensor | None,
    modulation: Tensor | None,
    activation: str,
    y: Tensor,
    architecture: str,
) -> Call:
    """The launch that fills y."""
    up, ranks = (None, None) if adapter is None else (adapter.up, adapter.ranks)
    parts, lanes = (1, 0) if made.hidden is None else made.hidden.shape[2:]
    count, tokens, inputs = made.small.values.shape
    outputs = y.shape[2] // parts
    assert weight.values.shape == (y.shape[2] * (2 if activation == "geglu" else 1), inputs)
    assert activation != "geglu" or parts == 1, "value and gate are the halves of one part"
    assert all(tensor is None or tensor.dtype == y.dtype for tensor in (bias, up)), "one number format"
    assert weight.values.is_contiguous(), "matrix units read 8-bit weights along the inputs"
    assert weight.scales.is_contiguous()
    tensors = {
        "values": made.small.values, "value_scales": made.small.scales, "weight": weight.values,
        "weight_scales": weight.scales, "bias": bias, "hidden": made.hidden, "up": up, "ranks": ranks,
        "slots": None if rows is None else rows.slots, "residual": residual, "modulation": modulation, "y": y,
    }  # fmt: skip
    strides = {
        **named_strides(up, "up_slot", "up_part", "up_lane", "up_output"),
        **named_strides(residual, "residual_row", "residual_token", "residual_output"),
        **named_strides(modulation, "modulation_row", "modulation_side", "modulation_output"),
        **named_strides(y, "y_row", "y_token"),
    }
    constants = {
        "RANK": lanes, "PARTS": parts, "ACTIVATION": activation, "INPUTS": inputs, "PRECISION": precision(architecture),
    }  # fmt: skip

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return count * ceil_div(tokens, tiles["BLOCK_TOKENS"]), parts * ceil_div(outputs, tiles["BLOCK_OUTPUTS"])

    return Call(_product_kernel, {**tensors, "tokens": tokens, "outputs": outputs, **strides}, constants, grid)


@operator(
    "quantized_linear(Tensor x, Tensor weight, Tensor weight_scales, Tensor? bias, Tensor? residual, "
    f"Tensor? modulation, {PACKED}, str activation) -> Tensor",
    fake=lambda x, weight, *rest: empty_output(x, weight, rest[-1]),
)
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    modulation: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ranks: Tensor | None,
    slots: Tensor | None,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_modulation: Tensor | None,
    epsilon: float,
    norm: Kind | Literal["none"],
    activation: str,
) -> Tensor:
    adapter, rows, before = unpacked(down, up, ranks, slots, scales, norm_weight, norm_modulation, epsilon, norm)
    architecture, number = family(x.device), str(weight.dtype).removeprefix("torch.")
    dtype, (outputs, inputs) = str(x.dtype).removeprefix("torch."), weight.shape
    made = empty_activations(x, weight.dtype, adapter)
    launches = quantize_choices(architecture, x.dtype)
    call = quantize_call(x, adapter, rows, before, made, architecture)
    call.run(pick("quantize", f"{inputs} {norm} {number} {dtype}", x.device, launches))
    y = empty_output(x, weight, activation)
    launches = choices(architecture, x.dtype, outputs, activation)
    scaled = Quantized(weight, weight_scales)
    call = product_call(made, scaled, bias, adapter, rows, residual, modulation, activation, y, architecture)
    problem = f"{outputs} x {inputs} {activation} {number} {dtype}"
    call.run(pick("quantized_linear", problem, x.device, launches))
    return y


def quantized_linear(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    modulation: Tensor | None = None,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """`linear` with a quantized weight and quantized activations; see the module's docstring."""
    if "quantized_linear" not in kernels.triton:
        x = x if norm is None else norm.apply(x, kernels)
        y = quantized_linear_reference(x, weight, bias, adapter, rows)
        return followed(y, activation, residual, modulation)
    forward_only(x, bias, residual, modulation)
    around = packed(x, adapter, rows, norm)
    return _quantized_linear(x, weight.values, weight.scales, bias, residual, modulation, *around, activation)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the product is compiled for amused-256, and for a bank of rank 64."""
    width, inner, slots, lanes = 1024, 2816, 2, 64
    shapes: tuple[tuple[str, int, int, Activation, bool], ...] = (
        ("q,k,v", 3, width, "none", False),
        ("projection and residual", 1, width, "none", True),
        ("gated up-projection", 1, 2 * inner, "geglu", False),
    )
    counts = torch.empty(slots, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    for name in formats(architecture):
        for dtype in (torch.bfloat16, torch.float32):
            empty = partial(torch.empty, dtype=dtype, device="meta")
            for what, parts, outputs, activation, follows in shapes:
                x = empty(2, 256, width)
                scales = torch.empty(parts * outputs, device="meta")
                weight = Quantized(torch.empty(parts * outputs, width, dtype=FORMATS[name], device="meta"), scales)
                y = empty_output(x, weight.values, activation)
                pair = LowRank(empty(slots, parts, width, lanes), empty(slots, parts, lanes, outputs), counts)
                launches = choices(architecture, dtype, parts * outputs, activation)
                for adapter in (None, pair):
                    made = empty_activations(x, FORMATS[name], adapter)
                    call = product_call(
                        made, weight, None, adapter, rows if adapter else None, y if follows else None, None,
                        activation, y, architecture,
                    )  # fmt: skip
                    with_adapter = " with adapter" if adapter else ""
                    number = str(dtype).removeprefix("torch.")
                    newest = name != "int8" or architecture != "sm_100"
                    yield Specimen(f"{name} linear {what}{with_adapter}, {number}", call, launches, True, newest)
