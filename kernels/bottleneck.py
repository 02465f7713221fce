"""StyleDrop's bottleneck, one per row: out[row] = y + scale gelu(y Wd[slot]) Wu[slot].

y (R, N, D) -> (R, N, D). Wd (S, D, H) and Wu (S, H, D) are the stacked adapters of all slots, without bias; gelu is
the exact form. Source: StyleDrop, arXiv 2306.00983; the gelu as in `libs/uvit_t2i_vq.py` of StyleDrop-PyTorch.

Not linear in y, so it cannot be merged into a weight. Rows of slot -1, and rows whose adapter has nothing at this
site, are bitwise y. Differentiable in y, Wd and Wu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import Bottleneck, RowSlots


def bottleneck_reference(y: Tensor, adapter: Bottleneck | None = None, rows: RowSlots | None = None) -> Tensor:
    """The definition in plain torch; returns y itself where no row has a bottleneck here."""
    if adapter is None or rows is None:
        return y
    assert rows.slots.shape[0] == y.shape[0], "one slot per row"
    out = y
    for slot, run in rows.runs:
        width = int(adapter.widths[slot])
        if width == 0:
            continue
        own, scales = y[run], rows.scales[run]
        hidden = F.gelu(torch.bmm(own, adapter.down[slot, :, :width].expand(len(own), -1, -1)))
        hidden = (hidden * scales[:, None, None]).to(y.dtype)
        if out is y:
            out = y.clone()
        out[run].baddbmm_(hidden, adapter.up[slot, :width].expand(len(own), -1, -1))
    return out


def bottleneck(y: Tensor, adapter: Bottleneck | None = None, rows: RowSlots | None = None) -> Tensor:
    """y + scale gelu(y Wd) Wu with the bottleneck of each row's slot; shapes as in the module's docstring."""
    return bottleneck_reference(y, adapter, rows)
