"""Linear projection with the low-rank pair of each row's slot: y = x W^T + b, y[row, :, p] += scale (x A[p]) B[p].

x (R, N, in), W (P out, in), b (P out,) -> (R, N, P out). The P parts are the projections fused into one weight (q, k
and v). A (S, P, in, r) and B (S, P, r, out) are the stacked pairs of all slots, of which a row takes its own slot's;
alpha / r is already in B. Source: LoRA, arXiv 2106.09685, Eq. 3. What is around a projection comes along, in order:

    norm         of x, and its modulation, as in `norm`
    activation   "gelu": gelu(y), or "geglu": value gelu(gate), (value, gate) being the halves of y; the exact gelu
    residual     + x0, of the output's shape
    modulation   times gain plus shift, (R, 2, out), one pair per row

The reference: rows of slot -1 are bitwise what `F.linear` gives: their values are not touched, not even by adding zero.
The same holds for rows whose adapter has nothing at this site. A slot is read up to its own rank, so that a result does
not depend on the ranks of its neighbours. Differentiable in x, W, b, A and B.

The kernel: rows come in runs of N tokens, so a tile of tokens is cut from one row and has one slot: nothing is
gathered, and a base tile takes the loop without adapters, uniformly. x A is summed in the K loop beside x W^T, from the
tile of x that is there anyway; one narrow product with B follows. Apart, with R N = T tokens and e bytes a number, the
adapter would read x again and read and write y (T (in + 2 P out) e bytes), and gelu, residual and modulation would each
read and write y; here none of these bytes move. Base tiles are bitwise what the kernel gives without adapters. A norm
is the only part with a price: each program first passes over its tokens for the mean and the mean square, which finds
x in the L2 cache, and so saves a launch and T in numbers written and read. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .epilogue import finished, followed, place
from .norm import Kind, Norm, statistics
from .rows import LowRank, RowSlots
from .tile import projected_tile
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, family, named_strides, pick, power_of_two, precision

Activation = Literal["none", "gelu", "geglu"]


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
) -> Tensor:
    """The definition in plain torch."""
    return add_pairs(F.linear(x, weight, bias), x, adapter, rows)


def add_pairs(y: Tensor, x: Tensor, adapter: LowRank | None, rows: RowSlots | None) -> Tensor:
    """y plus the low-rank pair of each row's slot, in place: y must be needed by nobody else.

    Products are batched over rows of one rank, whatever their styles, so each has the shape it has for a row alone,
    and are added where they belong: on a CPU it is the passes over y and the number of calls that cost, not arithmetic.
    """
    if adapter is None or rows is None:
        return y
    parts, outputs = adapter.up.shape[1], adapter.up.shape[3]
    assert rows.slots.shape[0] == x.shape[0], "one slot per row"
    assert y.shape[-1] == parts * outputs, "the adapter's parts must tile the weight's rows"
    for rank, run in rows.runs(adapter.ranks):
        slots, scales = rows.slots[run], rows.scales[run]
        # One product for all parts: on a CPU three narrow ones cost three times as much.
        down = adapter.down[:, :, :, :rank].transpose(1, 2)[slots].flatten(2)
        up = adapter.up[:, :, :rank][slots]
        # Scaling the narrow side costs rank, not outputs, and in fp32 no half-precision rounding of the scale.
        hidden = (torch.bmm(x[run], down) * scales[:, None, None]).to(x.dtype)
        for part in range(parts):
            # In place: the matrix product's output is needed by nobody else, its gradient included.
            target = y[run, :, part * outputs : (part + 1) * outputs]
            target.baddbmm_(hidden[:, :, part * rank : (part + 1) * rank], up[:, part])
    return y


def choices(architecture: str, dtype: torch.dtype, outputs: int, activation: str) -> tuple[Launch, ...]:
    """The launches for a weight, the default first.

    Wide weights fill the chip with large tiles; narrow ones need more, smaller tiles: 512 tokens x 1024 outputs are 32
    tiles of 128 x 128, on 132 multiprocessors. A gate is a second tile. fp32 has twice the bytes.
    """
    if architecture == INTERPRETER:
        return (_launch(64, 64, 32, 4, 1),)
    if dtype == torch.float32:
        small, taller = _launch(32, 32, 16, 4, 2), _launch(64, 32, 16, 8, 2)
        if architecture == "sm_80":
            return (small,)
        return (_launch(32, 16, 16, 4, 2),) if activation == "geglu" else (taller, small)
    # Without asynchronous matrix units the tiles being multiplied lie in registers.
    depth, stages = (32, 3) if architecture in ("sm_80", "gfx942") else (64, 4)
    stages = 2 if architecture == "gfx942" else stages
    wide, middle = _launch(128, 128, depth, 8, min(stages, 3)), _launch(128, 64, depth, 8, stages)
    narrow, small = _launch(64, 64, depth, 4, stages), _launch(64, 64, depth, 8, stages)
    if activation == "geglu":
        return middle, small
    return (wide, narrow, middle) if outputs >= 2048 else (narrow, wide, middle)


def _launch(tokens: int, outputs: int, inputs: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_TOKENS": tokens, "BLOCK_OUTPUTS": outputs, "BLOCK_INPUTS": inputs}, warps, stages)


@jit
def _linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    ranks: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    residual: tl.tensor,
    modulation: tl.tensor,
    norm_weight: tl.tensor,
    norm_modulation: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
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
    residual_row: tl.tensor,
    residual_token: tl.tensor,
    residual_output: tl.tensor,
    modulation_row: tl.tensor,
    modulation_side: tl.tensor,
    modulation_output: tl.tensor,
    norm_input: tl.tensor,
    gain_row: tl.tensor,
    gain_side: tl.tensor,
    gain_input: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
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

    weight_at = weight + output * weight_output
    base = (x + row * x_row + token * x_token, weight_at, weight_at + outputs * weight_output)
    NORMED: tl.constexpr = NORM != "none"
    MODULATED: tl.constexpr = norm_modulation is not None
    norm = (0.0, 1.0, weight, weight, weight)
    if NORMED:
        gain_at = norm_weight
        if MODULATED:
            gain_at = norm_modulation + row * gain_row
        mean, inverse = statistics(
            base[0], x_input, token_inside, epsilon, NORM == "layer", INPUTS, BLOCK_TOKENS, BLOCK_INPUTS
        )
        norm = (mean, inverse, norm_weight, gain_at, gain_at + gain_side)
    steps = (
        (x_input, weight_input, norm_input, gain_input), (down_slot, down_part, down_input, down_lane),
        (up_slot, up_part, up_lane, up_output),
    )  # fmt: skip
    value, gate = projected_tile(
        base, (down, up, ranks, slots, scales), norm, steps, (row, part, column, outputs), token_inside, column_inside,
        RANK, GATED, NORMED, MODULATED, INPUTS, PRECISION, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INPUTS,
    )  # fmt: skip

    strides = (residual_row, residual_token, residual_output, modulation_row, modulation_side, modulation_output)
    value = finished(
        value, gate, (bias, residual, modulation), strides, row, token, output, outputs,
        token_inside, column_inside, ACTIVATION,
    )  # fmt: skip
    inside = token_inside[:, None] & column_inside[None, :]
    tl.store(y + row * y_row + token[:, None] * y_token + output[None, :], value.to(y.dtype.element_ty), inside)


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: LowRank | None,
    rows: RowSlots | None,
    residual: Tensor | None,
    modulation: Tensor | None,
    norm: Norm | None,
    activation: str,
    y: Tensor,
    architecture: str,
) -> Call:
    """The launch that fills y."""
    down, up, ranks = (None, None, None) if adapter is None else (adapter.down, adapter.up, adapter.ranks)
    slots, scales = (None, None) if rows is None else (rows.slots, rows.scales)
    parts = 1 if up is None else up.shape[1]
    outputs = y.shape[2] // parts
    assert weight.shape[0] == y.shape[2] * (2 if activation == "geglu" else 1)
    assert activation != "geglu" or parts == 1, "value and gate are the halves of one part"
    assert all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias, down, up)), "one number format"
    tensors = {
        "x": x, "weight": weight, "bias": bias, "down": down, "up": up, "ranks": ranks, "slots": slots,
        "scales": scales, "residual": residual, "modulation": modulation,
        "norm_weight": None if norm is None else norm.weight,
        "norm_modulation": None if norm is None else norm.modulation, "y": y,
    }  # fmt: skip
    strides = {
        **named_strides(x, "x_row", "x_token", "x_input"),
        **named_strides(weight, "weight_output", "weight_input"),
        **named_strides(down, "down_slot", "down_part", "down_input", "down_lane"),
        **named_strides(up, "up_slot", "up_part", "up_lane", "up_output"),
        **named_strides(residual, "residual_row", "residual_token", "residual_output"),
        **named_strides(modulation, "modulation_row", "modulation_side", "modulation_output"),
        **named_strides(tensors["norm_weight"], "norm_input"),
        **named_strides(tensors["norm_modulation"], "gain_row", "gain_side", "gain_input"),
        **named_strides(y, "y_row", "y_token"),
    }
    count, tokens, inputs = x.shape

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return count * ceil_div(tokens, tiles["BLOCK_TOKENS"]), parts * ceil_div(outputs, tiles["BLOCK_OUTPUTS"])

    lanes = 0 if down is None else power_of_two(down.shape[3])
    epsilon, kind = (0.0, "none") if norm is None else (float(norm.epsilon), norm.kind)
    arguments = {**tensors, "tokens": tokens, "outputs": outputs, "epsilon": epsilon, **strides}
    constants = {
        "RANK": lanes, "ACTIVATION": activation, "NORM": kind, "INPUTS": inputs, "PRECISION": precision(architecture),
    }  # fmt: skip
    return Call(_linear_kernel, arguments, constants, grid)


PACKED = (
    "Tensor? down, Tensor? up, Tensor? ranks, Tensor? slots, Tensor? scales, Tensor? norm_weight, "
    "Tensor? norm_modulation, float epsilon, str norm"
)
"""Adapter, rows and norm in an operator's schema."""


def packed(x: Tensor, adapter: LowRank | None, rows: RowSlots | None, norm: Norm | None) -> tuple[Any, ...]:
    """As an operator takes them."""
    stacks: tuple[Tensor | None, ...] = (None,) * 5
    if adapter is not None and rows is not None:
        assert rows.slots.shape[0] == x.shape[0], "one slot per row"
        stacks = (adapter.down, adapter.up, adapter.ranks, rows.slots, rows.scales)
    before = (None, None, 0.0, "none") if norm is None else (norm.weight, norm.modulation, norm.epsilon, norm.kind)
    return *stacks, *before


def unpacked(
    down: Tensor | None,
    up: Tensor | None,
    ranks: Tensor | None,
    slots: Tensor | None,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_modulation: Tensor | None,
    epsilon: float,
    norm: Kind | Literal["none"],
) -> tuple[LowRank | None, RowSlots | None, Norm | None]:
    """What `packed` was given."""
    adapter, rows, before = None, None, None
    if down is not None and up is not None and ranks is not None and slots is not None and scales is not None:
        adapter, rows = LowRank(down, up, ranks), RowSlots(slots, scales)
    if norm_weight is not None and norm != "none":
        before = Norm(norm_weight, epsilon, norm, norm_modulation)
    return adapter, rows, before


def empty_output(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0] // (2 if activation == "geglu" else 1))


@operator(
    f"linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? modulation, {PACKED}, str activation) "
    "-> Tensor",
    fake=lambda x, weight, *rest: empty_output(x, weight, rest[-1]),
)
def _linear(
    x: Tensor,
    weight: Tensor,
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
    y = empty_output(x, weight, activation)
    adapter, rows, before = unpacked(down, up, ranks, slots, scales, norm_weight, norm_modulation, epsilon, norm)
    outputs, inputs = weight.shape
    problem = f"{outputs} x {inputs} {norm} {activation} {str(x.dtype).removeprefix('torch.')}"
    architecture = family(x.device)
    launches = choices(architecture, x.dtype, outputs, activation)
    call = _call(x, weight, bias, adapter, rows, residual, modulation, before, activation, y, architecture)
    call.run(pick("linear", problem, x.device, launches))
    return y


def linear(
    x: Tensor,
    weight: Tensor,
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
    """y = x W^T + b, plus the low-rank pair of each row's slot, and what is around; see the module's docstring."""
    if norm is not None and not {"linear", "norm_in_linear"} <= kernels.triton:
        x, norm = norm.apply(x, kernels), None
    if "linear" not in kernels.triton:
        y = linear_reference(x, weight, bias, adapter, rows)
        return followed(y, activation, residual, modulation)
    forward_only(x, weight, bias, residual, modulation)
    return _linear(x, weight, bias, residual, modulation, *packed(x, adapter, rows, norm), activation)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, and for a bank of rank 64."""
    width, inner, slots, lanes = 1024, 2816, 2, 64
    shapes: tuple[tuple[str, int, int, str, Activation, bool], ...] = (
        ("norm and q,k,v", 3, width, "modulated rms", "none", False),
        ("norm and query", 1, width, "rms", "none", False),
        ("projection, residual and modulation", 1, width, "", "none", True),
        ("norm and gated up-projection", 1, 2 * inner, "modulated layer", "geglu", False),
        ("gelu", 1, 3072, "", "gelu", False),
    )
    counts = torch.empty(slots, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        empty = partial(torch.empty, dtype=dtype, device="meta")
        for what, parts, outputs, kind, activation, follows in shapes:
            x, weight = empty(2, 256, width), empty(parts * outputs, width)
            y = empty_output(x, weight, activation)
            residual, modulation = (y, empty(2, 2, outputs)) if follows else (None, None)
            own_gain = empty(2, 2, width) if "modulated" in kind else None
            norm = Norm(empty(width), 1e-6, "layer" if "layer" in kind else "rms", own_gain) if kind else None
            pair = LowRank(empty(slots, parts, width, lanes), empty(slots, parts, lanes, outputs), counts)
            launches = choices(architecture, dtype, weight.shape[0], activation)
            for adapter in (None, pair):
                name = f"linear {what}{' with adapter' if adapter else ''}, {str(dtype).removeprefix('torch.')}"
                own = rows if adapter else None
                call = _call(x, weight, None, adapter, own, residual, modulation, norm, activation, y, architecture)
                yield Specimen(name, call, launches, matrix=True)
