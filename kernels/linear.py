"""Linear projection with the low-rank pair of each row's slot: y = x W^T + b, y[row, :, p] += scale (x A[p]) B[p].

x (R, N, in), W (P out, in), b (P out,) -> (R, N, P out). The P parts are the projections fused into one weight (q, k
and v). A (S, P, in, r) and B (S, P, r, out) are the stacked pairs of all slots, of which a row takes its own slot's;
alpha / r is already in B. Source: LoRA, arXiv 2106.09685, Eq. 3.

Rows of slot -1 are bitwise what `F.linear` gives: their values are not touched, not even by adding zero. The same
holds for rows whose adapter has nothing at this site. A slot is read up to its own rank, so that a result does not
depend on the ranks of its neighbours. Differentiable in x, W, b, A and B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import LowRank, RowSlots


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
) -> Tensor:
    """The definition in plain torch.

    Products are batched over the rows of a slot, so that each has the shape it has for a row alone, and are added where
    they belong: on a CPU it is the passes over y that cost, not the arithmetic.
    """
    y = F.linear(x, weight, bias)
    if adapter is None or rows is None:
        return y
    parts, outputs = adapter.up.shape[1], adapter.up.shape[3]
    assert rows.slots.shape[0] == x.shape[0], "one slot per row"
    assert y.shape[-1] == parts * outputs, "the adapter's parts must tile the weight's rows"
    for slot, run in rows.runs:
        rank = int(adapter.ranks[slot])
        if rank == 0:
            continue
        own, scales = x[run], rows.scales[run]
        # One product for all parts: on a CPU three narrow ones cost three times as much.
        down = adapter.down[slot, :, :, :rank].transpose(0, 1).flatten(1)
        # Scaling the narrow side costs rank, not outputs, and in fp32 no half-precision rounding of the scale.
        hidden = (torch.bmm(own, down.expand(len(own), -1, -1)) * scales[:, None, None]).to(x.dtype)
        for part in range(parts):
            up = adapter.up[slot, part, :rank].expand(len(own), -1, -1)
            # In place: the matrix product's output is needed by nobody else, its gradient included.
            target = y[run, :, part * outputs : (part + 1) * outputs]
            target.baddbmm_(hidden[:, :, part * rank : (part + 1) * rank], up)
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    rows: RowSlots | None = None,
) -> Tensor:
    """y = x W^T + b, plus the low-rank pair of each row's slot; shapes as in the module's docstring."""
    return linear_reference(x, weight, bias, adapter, rows)
