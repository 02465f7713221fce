"""How many rows of a forward pass fit a memory budget.

Beside its own context a row needs those of `AHEAD` passes that are prepared. The draw's noise is made a chunk at a time
and takes the same for any number of rows.
"""

from __future__ import annotations

from ..core import StylemuseError
from ..kernels.sampling import CHUNK
from ..protocols import Backend
from .batcher import AHEAD

NOISE_BYTES = 32 * CHUNK
"""Philox's words of a chunk in int64 and what is made of them."""


def rows_within(memory: int, network: Backend) -> int:
    """Rows that fit; at least one branch must, or the budget is refused."""
    each = network.row_bytes(AHEAD)
    if each is None:
        raise StylemuseError(f"memory is a budget for networks in torch; give max_rows for backend {network.name!r}")
    if memory < NOISE_BYTES + each:
        raise StylemuseError(f"memory = {memory:,} bytes is not enough: one row takes {NOISE_BYTES + each:,}")
    return (memory - NOISE_BYTES) // each
