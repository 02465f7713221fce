"""Linear projection with the low-rank pair of each row's slot: y = x W^T + b, y[row, :, p] += scale (x A[p]) B[p].

x (R, N, in), W (P out, in), b (P out,) -> (R, N, P out). The P parts are the projections fused into one weight (q, k
and v). A (S, P, in, r) and B (S, P, r, out) are the stacked pairs of all slots, of which a row takes its own slot's;
alpha / r is already in B. Source: LoRA, arXiv 2106.09685, Eq. 3. A norm of x may come along (`norm`), and what follows
(`product`): bias, activation, residual, modulation.

The reference: rows of slot -1 are bitwise what `F.linear` gives: their values are not touched, not even by adding zero.
The same holds for rows whose adapter has nothing at this site. A slot is read up to its own rank, so that a result does
not depend on the ranks of its neighbours. Differentiable in x, W, b, A and B.

In Triton it is one operation and at most two launches: `inputs` norms x and shrinks it by A, `product` multiplies by W
and adds what B raises. Without a norm and without a pair the first is left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import REFERENCE, Kernels, forward_only, operator
from .epilogue import followed
from .inputs import inputs
from .inputs import norm as normed
from .norm import Kind, Norm
from .product import Activation, choices, empty_output, product_call
from .quantization import Quantized
from .rows import LowRank, RowSlots
from .tuning import family, pick

_MANY_INPUTS = 512


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
) -> Tensor:
    """The definition in plain torch."""
    return add_pairs(_product(x, weight, bias), x, adapter, rows)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, each row as it is alone.

    With many inputs in bf16 oneDNN adds in an order that hangs on the number of tokens: there rows are products of
    their own, which takes as long at aMUSEd's sizes and a third longer at small ones.
    """
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if narrow and x.shape[0] > 1 and x.shape[-1] >= _MANY_INPUTS and not torch.is_grad_enabled():
        return torch.cat([F.linear(row, weight, bias) for row in x.split(1)])
    return F.linear(x, weight, bias)


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


@operator(
    "projection(Tensor x, Tensor weight, Tensor? weight_scales, Tensor? bias, Tensor? residual, Tensor? modulation, "
    "Tensor? down, Tensor? up, Tensor? ranks, Tensor? slots, Tensor? scales, Tensor? norm_weight, "
    "Tensor? norm_modulation, float epsilon, str norm, str activation) -> Tensor",
    fake=lambda x, weight, *rest: empty_output(x, weight, rest[-1]),
)
def _projection(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
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
    adapter, rows, before = None, None, None
    if down is not None and up is not None and ranks is not None and slots is not None and scales is not None:
        adapter, rows = LowRank(down, up, ranks), RowSlots(slots, scales)
    if norm_weight is not None and norm != "none":
        before = Norm(norm_weight, epsilon, norm, norm_modulation)
    number, dtype = weight.dtype, str(x.dtype).removeprefix("torch.")
    given = inputs(x.contiguous(), before, adapter, rows, None if weight_scales is None else number)
    y, architecture, (outputs, wide) = empty_output(x, weight, activation), family(x.device), weight.shape
    matrix = weight if weight_scales is None else Quantized(weight, weight_scales)
    call = product_call(given, matrix, bias, adapter, rows, residual, modulation, activation, y, architecture)
    launches = choices(architecture, number, outputs, activation, number != x.dtype == torch.float32)
    format_ = dtype if weight_scales is None else f"{str(number).removeprefix('torch.')} {dtype}"
    problem, tokens = f"{outputs} x {wide} {activation} {format_}", x.shape[0] * x.shape[1]
    call.run(pick("linear", problem, x.device, launches, tokens))
    return y


def projected(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    adapter: LowRank | None,
    rows: RowSlots | None,
    norm: Norm | None,
    activation: Activation,
    residual: Tensor | None,
    modulation: Tensor | None,
) -> Tensor:
    """By the kernels: `linear`, and `quantized_linear`."""
    matrix, scales = (weight.values, weight.scales) if isinstance(weight, Quantized) else (weight, None)
    forward_only(x, matrix, bias, residual, modulation)
    assert all(tensor is None or tensor.dtype == x.dtype for tensor in (bias, residual)), "one number format"
    assert scales is not None or matrix.dtype == x.dtype, "one number format"
    stacks: tuple[Tensor | None, ...] = (None,) * 5
    if adapter is not None and rows is not None:
        assert rows.slots.shape[0] == x.shape[0], "one slot per row"
        stacks = (adapter.down, adapter.up, adapter.ranks, rows.slots, rows.scales)
    before: tuple[Any, ...] = (None, None, 0.0, "none")
    if norm is not None:
        before = (norm.weight, norm.modulation, norm.epsilon, norm.kind)
    return _projection(x, matrix, scales, bias, residual, modulation, *stacks, *before, activation)


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
    if "linear" in kernels.triton:
        return projected(x, weight, bias, adapter, rows, norm, activation, residual, modulation)
    x = x if norm is None else normed(x, norm, kernels=kernels)
    return followed(linear_reference(x, weight, bias, adapter, rows), activation, residual, modulation)
