"""A projection with all that belongs to it, whatever its weight is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .dispatch import REFERENCE, Kernels
from .linear import linear
from .norm import Norm
from .product import Activation
from .quantization import Quantized
from .quantized_linear import quantized_linear
from .rows import LowRank, RowSlots


@dataclass(frozen=True)
class Projection:
    """Weight (P out, in) with the low-rank pairs of all slots, and a bias (P out,) where there is one."""

    weight: Tensor | Quantized
    adapter: LowRank | None = None
    bias: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        rows: RowSlots | None = None,
        *,
        norm: Norm | None = None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        modulation: Tensor | None = None,
        kernels: Kernels = REFERENCE,
    ) -> Tensor:
        """`linear` or `quantized_linear`, as the weight is."""
        if isinstance(self.weight, Quantized):
            return quantized_linear(
                x, self.weight, self.bias, self.adapter, rows,
                norm=norm, activation=activation, residual=residual, modulation=modulation, kernels=kernels,
            )  # fmt: skip
        return linear(
            x, self.weight, self.bias, self.adapter, rows,
            norm=norm, activation=activation, residual=residual, modulation=modulation, kernels=kernels,
        )  # fmt: skip
