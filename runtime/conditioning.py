"""What stays the same over the steps for a row, in one piece of memory: kept, copied and seated as one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .models.layers import Conditioning


@dataclass(frozen=True)
class Layout:
    """Where the tensors of the blocks lie in a row's numbers: name and shape of each, one after the other."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, conditioning: Conditioning) -> Layout:
        """That of tensors (R, ...) by block name."""
        return cls(tuple((name, tuple(value.shape[1:])) for name, value in conditioning.items()))

    def pack(self, conditioning: Conditioning) -> Tensor:
        """Tensors (R, ...), all of one number format -> (R, T)."""
        return torch.cat([conditioning[name].flatten(1) for name, _ in self.shapes], dim=1)

    def views(self, packed: Tensor) -> Conditioning:
        """(R, T) -> the tensors (R, ...) in it, by block name; their rows are T numbers apart."""
        return dict(self._views(packed))

    def _views(self, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
        first = 0
        for name, shape in self.shapes:
            size = math.prod(shape)
            yield name, packed[:, first : first + size].unflatten(1, shape)
            first += size
