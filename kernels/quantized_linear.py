"""Linear projection with 8-bit weights and activations (W8A8), the low-rank pair of each row's slot in full precision.

    y[row, :, p] = (Q_x Q_W^T) s_x s_W + b + scale (x A[p]) B[p]

W ~ s_W Q_W with a scale for each output, once, when a model is loaded; x ~ s_x Q_x with one for each token, at every
call, after the norm (`quantization`). x (R, N, in), Q_W (P out, in) in 8 bits and s_W (P out,) in fp32 -> (R, N,
P out); norm, activation, residual and modulation as in `linear`, the adapter's x being the unquantized one. Products of
int8 are added in int32, without error, so a row is the same to the bit whatever lies beside it; those of fp8 in fp32.

In Triton it is `linear`'s two launches: the first leaves Q_x, s_x and scale x A, the second multiplies tiles of 8 bits.
With T tokens a weight is P out in bytes instead of 2 P out in, and T in bytes are read by the product instead of 2 T
in, at twice the rate of the matrix units; for that the first launch is there also where no norm precedes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .dispatch import REFERENCE, Kernels
from .epilogue import followed
from .inputs import norm as normed
from .linear import add_pairs, projected
from .norm import Norm
from .product import Activation
from .quantization import Quantized, quantize_reference
from .rows import LowRank, RowSlots

_EXACT_INPUTS = 1040
"""Sums of so many products of int8 numbers, at most 127^2 each, are below 2^24: exact in fp32 in any order."""


@cache
def int_mm_is_exact() -> bool:
    """Whether torch's product of int8 numbers adds in 32 bits on this CPU; without VNNI two products are added in 16,
    which saturate. The product itself is asked: oneDNN may be told to leave instructions unused."""
    most = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, -most.T) == -64 * 127**2).all())


def product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Q_x Q_W^T of 8-bit numbers: (..., in), (out, in) -> (..., out), int32 and exact for int8, else fp32."""
    if weight.dtype != torch.int8:
        return x.float() @ weight.float().T
    flat = x.flatten(0, -2)
    if x.device.type == "cpu" and flat.shape[1] > 1 and int_mm_is_exact():  # of one input it is wrong
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
    if "quantized_linear" in kernels.triton:
        return projected(x, weight, bias, adapter, rows, norm, activation, residual, modulation)
    x = x if norm is None else normed(x, norm, kernels=kernels)
    return followed(quantized_linear_reference(x, weight, bias, adapter, rows), activation, residual, modulation)
