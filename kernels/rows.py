"""What a row carries through the network: the slot of its adapter, and the stacked tensors the slots point into.

A row is one grid of tokens seen through one prompt and one adapter slot (or none). All slots of a bank lie stacked in
one tensor per site, so that a batch with many styles is one gather of addresses and never a second set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BASE = -1
"""The slot of a row that has no adapter."""


@dataclass(frozen=True)
class Site:
    """One linear layer an adapter can change, as the checkpoint names it, and where it lies in our fused weights.

    `group` is the fused module (say, q, k and v together), `part` this layer's place in it and `parts` how many layers
    it fuses; `inputs` and `outputs` are this layer's own sizes.
    """

    group: str
    part: int
    parts: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class RowSlots:
    """Slot and scale of each row: `slots` (R,) int64 with -1 for base, `scales` (R,) fp32, the strength of its adapter.

    The tensors are not written to after construction: the grouping below is read from the device once and kept.
    """

    slots: Tensor
    scales: Tensor

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The slots, on the host."""
        numbers = tuple(self.slots.tolist())
        assert all(slot >= BASE for slot in numbers), "a slot is -1 or an index into the bank"
        return numbers

    def runs(self, widths: Tensor) -> tuple[tuple[int, slice], ...]:
        """Pairs (width, rows): neighbours whose slots have adapters of one width (S,), whatever their styles.

        A power of two at a time, and not rows that are spaced evenly, although they are a view too: oneDNN compiles a
        product for every length and spacing, and keeps it. Rows without an adapter, or of width 0, are in none.
        """
        known: list[int] = widths.tolist()
        return _runs(tuple(0 if slot == BASE else known[slot] for slot in self.numbers))


@lru_cache(maxsize=256)
def _runs(widths: tuple[int, ...]) -> tuple[tuple[int, slice], ...]:
    found: list[tuple[int, slice]] = []
    start = 0
    for width, neighbours in groupby(widths):
        end = start + len(list(neighbours))
        while start < end:
            length = 1 << ((end - start).bit_length() - 1)
            if width:
                found.append((width, slice(start, start + length)))
            start += length
    return tuple(found)


@dataclass(frozen=True)
class LowRank:
    """Low-rank pairs of one fused site: `down` (S, P, in, r_max), `up` (S, P, r_max, out_p), `ranks` (S,) int64.

    S slots, P parts of the fused projection. `ranks` holds the largest rank of a slot's parts, 0 where the slot's
    adapter does not touch this site; lanes from there on are never read. Lanes between a part's own rank and the
    slot's rank are zero.
    """

    down: Tensor
    up: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class Bottleneck:
    """StyleDrop bottlenecks of one site: `down` (S, D, H_max), `up` (S, H_max, D), `widths` (S,) int64.

    `widths` is 0 where the slot's adapter does not touch this site; lanes from a slot's width on are never read.
    In the shared form (arXiv 2306.00983, appendix) the sites have one `down` and one `up`, and each its own shifts:
    `down_shift` (S, H_max) is added to every row of down, `up_shift` (S, D) to every row of up.
    """

    down: Tensor
    up: Tensor
    widths: Tensor
    down_shift: Tensor | None = None
    up_shift: Tensor | None = None


@dataclass(frozen=True)
class RowAdapters:
    """What a forward pass is given: the rows' slots, and the stacked adapters keyed by fused site name.

    A site that is missing from `sites` is base for every row.
    """

    rows: RowSlots
    sites: Mapping[str, LowRank | Bottleneck]

    def low_rank(self, group: str) -> LowRank | None:
        """The low-rank pairs at a fused projection, or None."""
        adapter = self.sites.get(group)
        assert adapter is None or isinstance(adapter, LowRank), f"{group} is a bottleneck site"
        return adapter

    def bottleneck(self, site: str) -> Bottleneck | None:
        """The bottlenecks at a point of the residual stream, or None."""
        adapter = self.sites.get(site)
        assert adapter is None or isinstance(adapter, Bottleneck), f"{site} is a low-rank site"
        return adapter
