"""Adapter-augmented attention, a step of the residual stream x (R, N, D):

    q, k, v = P_qkv(n(x))                       or q = P_q(n(x)) beside keys and values made once, by `keys_values`
    y = x + P_out(softmax(q k^T / sqrt(d)) v)
    y = y + scale gelu(y Wd) Wu                 where the row's adapter has a bottleneck here

n is the norm with its modulation, P(x) = x W^T + b + scale (x A) B a projection with the pair of the row's slot. Each
stage is an operation of its own, callable alone: `linear` or `quantized_linear`, `attention`, `bottleneck`. That is
four launches, the norm's being one, and one more with a bottleneck. The projection back needs all heads of a token, an
attention among tokens all tokens of a head, so no more of it can share a tile. Source: StyleDrop, arXiv 2306.00983,
figure 2.
"""

from __future__ import annotations

from torch import Tensor

from .attention import attention
from .bottleneck import bottleneck
from .dispatch import REFERENCE, Kernels
from .norm import Norm
from .projection import Projection
from .rows import Bottleneck, RowSlots


def self_attention(
    x: Tensor,
    norm: Norm,
    qkv: Projection,
    out: Projection,
    heads: int,
    rows: RowSlots | None = None,
    neck: Bottleneck | None = None,
    lengths: Tensor | None = None,
    *,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """Attention among the tokens of a row, (R, N, D) -> (R, N, D); ``lengths`` (R,) where the row ends in padding."""
    fused = qkv(x, rows, norm=norm, kernels=kernels)
    q, k, v = fused.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _returned(attention(q, k, v, lengths, kernels=kernels), x, out, rows, neck, kernels)


def cross_attention(
    x: Tensor,
    norm: Norm,
    q: Projection,
    keys_values: Tensor,
    out: Projection,
    rows: RowSlots | None = None,
    neck: Bottleneck | None = None,
    lengths: Tensor | None = None,
    *,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """Attention to cached keys and values (R, 2, H, L, d), of which ``lengths`` (R,) are no padding."""
    k, v = keys_values.unbind(1)
    query = q(x, rows, norm=norm, kernels=kernels).unflatten(2, (k.shape[1], -1)).transpose(1, 2)
    return _returned(attention(query, k, v, lengths, kernels=kernels), x, out, rows, neck, kernels)


def keys_values(
    text: Tensor, kv: Projection, heads: int, rows: RowSlots | None = None, *, kernels: Kernels = REFERENCE
) -> Tensor:
    """Text (R, L, T) -> its keys and values (R, 2, H, L, d), for `cross_attention`."""
    fused = kv(text, rows, kernels=kernels)
    return fused.unflatten(2, (2, heads, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _returned(
    attended: Tensor,
    residual: Tensor,
    out: Projection,
    rows: RowSlots | None,
    neck: Bottleneck | None,
    kernels: Kernels,
) -> Tensor:
    y = out(attended, rows, residual=residual, kernels=kernels)
    return bottleneck(y, neck, rows, kernels=kernels)
