"""A network's rows on buffers at fixed addresses, as `decoding.bucket` needs them.

A row's conditioning, adapter slot and scale are written into its place; adapters are those of the whole bank, so a
forward pass reads whichever slots the rows name at that time. A style that is swapped in, or another prompt, changes
numbers in memory and no launch. What a launch does depend on is which *kinds* of layers have an adapter in some row
(say, the fused q, k, v, or the bottlenecks after the MLP): a layer without is launched as for the base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.bank import kind_of
from ..kernels.dispatch import Kernels
from ..kernels.rows import BASE, RowAdapters, RowSlots
from ..models.layers import Conditioning
from .network import Context, TorchNetwork


class StaticRows:
    """So many rows of a network, of one grid (h, w); made for one `Bucket`."""

    def __init__(self, network: TorchNetwork, rows: int, grid: tuple[int, int]) -> None:
        self._network, self._grid = network, grid
        self._slots = torch.full((rows,), BASE, device=network.device)
        self._scales = torch.ones(rows, device=network.device)
        self._kinds: list[frozenset[str]] = [frozenset()] * rows
        blank = network.context(network.text(""), grid)
        self._packed = blank.packed.repeat(rows, 1)
        self._conditioning: Conditioning = blank.layout.views(self._packed)

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""
        return self._network.mask_id

    @property
    def kernels(self) -> Kernels:
        """The network's."""
        return self._network.kernels

    @property
    def capturable(self) -> bool:
        """The reference reads slots on the host, so it can't be captured."""
        return "linear" in self.kernels.triton

    @property
    def variant(self) -> frozenset[str]:
        """The kinds of layers that some row's adapter has something at."""
        return frozenset().union(*self._kinds)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """(V, D), and a bias where there is one."""
        return self._network.transformer.head()

    def seat(self, row: int, context: Context) -> None:
        """Write a context's numbers into a row."""
        assert context.grid == self._grid
        self._packed[row] = context.packed[0]
        self._slots[row], self._scales[row] = context.slot, context.scale
        if context.slot != BASE:
            self._kinds[row] = frozenset(kind_of(name) for name in self._network.bank.touched([context.slot]))

    def vacate(self, row: int) -> None:
        """Base from here on, so that nobody computes an adapter for nothing."""
        self._slots[row], self._kinds[row] = BASE, frozenset()

    @torch.no_grad()
    def hidden(self, inputs: Tensor) -> Tensor:
        """(r, N) tokens of the first rows -> (r, N, D)."""
        transformer, rows, adapters = self._network.transformer, len(inputs), None
        if kinds := self.variant:
            sites = {name: site for name, site in self._network.bank.sites.items() if kind_of(name) in kinds}
            # Made anew each time: the reference groups rows by the slots it finds.
            adapters = RowAdapters(RowSlots(self._slots[:rows], self._scales[:rows]), sites)
        conditioning = {name: value[:rows] for name, value in self._conditioning.items()}
        return transformer.hidden(transformer.features(inputs.view(-1, *self._grid), conditioning, adapters))
