"""Attention over all keys: y = softmax(q k^T / sqrt(d)) v, of every row and head; nothing is causal.

q (R, H, N, d), k and v (R, H, L, d) -> (R, N, H d). ``lengths`` (R,) int64 says how many keys a row has, the rest being
padding that is not read; a row without keys gets zeros. Source: Vaswani et al., arXiv 1706.03762; the online softmax of
FlashAttention, arXiv 2205.14135, algorithm 1.

The kernel: a program owns a tile of queries of one row and head and passes over the keys once, keeping the running
maximum, the running sum and the running weighted sum of values; the N x L scores, 2 R H N L e bytes written and read,
never reach memory. q, k and v may be any views, so the fused projection's output is read as it lies, and y is written
as the output projection reads it: no transposed copy. Head sizes are padded to a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import follow, multiply
from .dispatch import REFERENCE, Kernels, constant, forward_only, jit, operator, tl
from .tuning import (
    INTERPRETER,
    Call,
    Launch,
    Specimen,
    ceil_div,
    dependent,
    family,
    named_strides,
    pick,
    power_of_two,
    precision,
)

LOG2_E = math.log2(math.e)
"""From exp to exp2."""
_LOWEST = constant(-1e30)
"""Stands for minus infinity where a difference is taken: inf - inf is NaN."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The definition in plain torch."""
    mask = None
    if lengths is not None:
        inside = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
        # Padding may hold anything: 0 * NaN is NaN.
        k, v = (side.masked_fill(~inside[:, None, :, None], 0.0) for side in (k, v))
        mask = inside[:, None, None, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if lengths is not None:
        y = y.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return y.transpose(1, 2).flatten(2)


def choices(architecture: str, dtype: torch.dtype, size: int) -> tuple[Launch, ...]:
    """The launches for a head size, the default first; fp32 has twice the bytes."""
    if architecture == INTERPRETER:
        return (_launch(64, 32, 4, 1),)
    if dtype == torch.float32:
        return (_launch(16, 32, 4, 1),) if size > 64 else (_launch(32, 32, 4, 2), _launch(64, 32, 8, 2))
    if size > 64:
        slim = _launch(64, 32, 4, 2)
        return (slim,) if architecture == "gfx942" else (_launch(64, 64, 4, 2), slim)
    return _launch(64, 64, 4, 3), _launch(128, 64, 8, 3)


def _launch(queries: int, keys: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys}, warps, stages)


@jit
def attend(
    query: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    steps: tl.tuple,
    count: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tl.tensor:
    """A tile of queries over the first `count` keys of a head, fp32; `scale` has the factor from exp to exp2 in it.

    k, v: pointers to the head's. steps: strides of a token and a channel in k, then in v. Queries beyond the head's
    size are zero.
    """
    k_token, k_channel, v_token, v_channel = steps
    channel = tl.arange(0, PADDED)
    channel_inside = channel < SIZE
    largest = tl.full((BLOCK_QUERIES,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    sums = tl.zeros((BLOCK_QUERIES, PADDED), tl.float32)
    for first in range(0, count, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        key_inside = key < count
        k_at = k + key[None, :] * k_token + channel[:, None] * k_channel
        key_tile = tl.load(k_at, key_inside[None, :] & channel_inside[:, None], 0.0)
        scores = multiply(query, key_tile, tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32), PRECISION) * scale
        scores = tl.where(key_inside[None, :], scores, _LOWEST)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(key_inside[None, :], tl.exp2(scores - larger[:, None]), 0.0)
        kept = tl.exp2(largest - larger)
        total = total * kept + tl.sum(weights, 1)
        v_at = v + key[:, None] * v_token + channel[None, :] * v_channel
        value_tile = tl.load(v_at, key_inside[:, None] & channel_inside[None, :], 0.0)
        sums = multiply(weights.to(v.dtype.element_ty), value_tile, sums * kept[:, None], PRECISION)
        largest = larger
    return sums / tl.where(total > 0.0, total, 1.0)[:, None]


@jit
def _attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lengths: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    q_channel: tl.tensor,
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
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """A tile of the queries of one row and head; `scale` has the factor from exp to exp2 in it."""
    follow(DEPENDENT)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    token = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channel = tl.arange(0, PADDED)
    channel_inside = channel < SIZE
    inside = (token < tokens)[:, None] & channel_inside[None, :]
    q_at = q + row * q_row + head * q_head + token[:, None] * q_token + channel[None, :] * q_channel
    query = tl.load(q_at, inside, 0.0)
    k_head_at = k + row * k_row + head * k_head
    v_head_at = v + row * v_row + head * v_head
    count = keys
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + row), keys).to(tl.int32)

    result = attend(
        query, k_head_at, v_head_at, (k_token, k_channel, v_token, v_channel), count, scale,
        SIZE, PADDED, PRECISION, BLOCK_QUERIES, BLOCK_KEYS,
    )  # fmt: skip
    y_at = y + row * y_row + token[:, None] * y_token + head * SIZE + channel[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), inside)


def _call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, y: Tensor, architecture: str) -> Call:
    """The launch that fills y."""
    rows, heads, tokens, size = q.shape
    assert k.shape == v.shape, "as many keys as values"
    assert (k.shape[0], k.shape[1], k.shape[3]) == (rows, heads, size), "keys of the same rows, heads and head size"
    assert q.dtype == k.dtype == v.dtype, "one number format"
    assert size <= 128, "head sizes up to 128"
    strides = {
        **named_strides(q, "q_row", "q_head", "q_token", "q_channel"),
        **named_strides(k, "k_row", "k_head", "k_token", "k_channel"),
        **named_strides(v, "v_row", "v_head", "v_token", "v_channel"),
        **named_strides(y, "y_row", "y_token"),
    }
    sizes = {"tokens": tokens, "keys": k.shape[2], "heads": heads, "scale": size**-0.5 * LOG2_E}
    arguments = {"q": q, "k": k, "v": v, "lengths": lengths, "y": y, **sizes, **strides}

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return ceil_div(tokens, tiles["BLOCK_QUERIES"]), rows * heads

    constants = {
        "SIZE": size, "PADDED": power_of_two(size), "DEPENDENT": dependent(architecture),
        "PRECISION": precision(architecture),
    }  # fmt: skip
    return Call(_attention_kernel, arguments, constants, grid)


def _output(q: Tensor, *_: object) -> Tensor:
    """An empty y."""
    rows, heads, tokens, size = q.shape
    return q.new_empty(rows, tokens, heads * size)


@operator("attention(Tensor q, Tensor k, Tensor v, Tensor? lengths) -> Tensor", fake=_output)
def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    y, size, architecture = _output(q), q.shape[3], family(q.device)
    launches = choices(architecture, q.dtype, size)
    problem = f"{size} {str(q.dtype).removeprefix('torch.')}"
    _call(q, k, v, lengths, y, architecture).run(pick("attention", problem, q.device, launches))
    return y


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, kernels: Kernels = REFERENCE
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with the heads side by side; shapes as in the module's docstring."""
    if "attention" not in kernels.triton:
        return attention_reference(q, k, v, lengths)
    forward_only(q, k, v)
    return _attention(q, k, v, lengths)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled: aMUSEd's heads of 64, StyleDrop-PyTorch's of 72, Meissonic's of 128."""
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 72, 128):
            fused = torch.empty(2, 256, 3, 16, size, dtype=dtype, device="meta")
            q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
            cached = torch.empty(2, 2, 16, 77, size, dtype=dtype, device="meta").unbind(1)
            for what, pair, padding in (("self", (k, v), None), ("cross", cached, None), ("padded", cached, lengths)):
                yield Specimen(
                    f"attention {what}, heads of {size}, {str(dtype).removeprefix('torch.')}",
                    _call(q, pair[0], pair[1], padding, _output(q), architecture),
                    choices(architecture, dtype, size),
                    matrix=True,
                )
