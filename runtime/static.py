"""A network's rows on buffers at fixed addresses, as `decoding.bucket` needs them.

A row's conditioning, adapter slot and scale are written into its place; adapters are those of the whole bank, so a
forward pass reads whichever slots the rows name at that time. A style that is swapped in, or another prompt, changes
numbers in memory and no launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.dispatch import Kernels
from .kernels.rows import BASE, RowAdapters, RowSlots
from .models.layers import Conditioning
from .reference import Context, Reference


class StaticRows:
    """So many rows of a network, of one grid (h, w); made for one `Bucket`."""

    def __init__(self, network: Reference, rows: int, grid: tuple[int, int]) -> None:
        self._network, self._grid = network, grid
        self._slots = torch.full((rows,), BASE, device=network.device)
        self._scales = torch.ones(rows, device=network.device)
        blank = network.context(network.text(""), grid)
        self._conditioning: Conditioning = {
            name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in blank.conditioning.items()
        }
        weight = network.transformer.mlm_layer.conv2.weight
        self._head = weight.detach().flatten(1)

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

    def head(self) -> tuple[Tensor, None]:
        """(V, D), without bias."""
        return self._head, None

    def seat(self, row: int, context: Context) -> None:
        """Write a context's numbers into a row."""
        assert context.grid == self._grid
        for name, value in context.conditioning.items():
            self._conditioning[name][row] = value[0]
        self._slots[row], self._scales[row] = context.slot, context.scale

    @torch.no_grad()
    def hidden(self, inputs: Tensor) -> Tensor:
        """(R, N) tokens -> (R, N, D)."""
        transformer = self._network.transformer
        # Made anew each time: the reference groups rows by the slots it finds.
        adapters = RowAdapters(RowSlots(self._slots, self._scales), self._network.bank.sites)
        features = transformer.features(inputs.view(-1, *self._grid), self._conditioning, adapters)
        return transformer.readout(features.flatten(0, 1)).view(*inputs.shape, -1)
