"""Halving and doubling of the grid by 2 x 2 convolutions that do not overlap: a projection of patches.

    halved:   (R, h w, C) -> (R, h w / 4, D)    y[p] = sum over the four tokens s of patch p of K[:, :, s] x[s]
    doubled:  (R, h w, C) -> (R, 4 h w, D)      y[s] = K[:, :, s] x[p] for the four tokens s of patch p

K (D, C, 2, 2) or, doubled, (C, D, 2, 2); of x normed, where a norm is given. The definition is a convolution of stride
2 and its transpose. In Triton they are `linear` on the patches side by side: a row has the same bits in any batch,
which a convolution does not promise.
"""

from __future__ import annotations

from torch import Tensor

from .convolution import convolve
from .dispatch import REFERENCE, Kernels
from .inputs import norm as normed
from .linear import linear
from .norm import Norm


def halve(
    x: Tensor, grid: tuple[int, int], kernel: Tensor, norm: Norm | None = None, *, kernels: Kernels = REFERENCE
) -> Tensor:
    """A quarter of the tokens; both sides of the grid are even."""
    x = x if norm is None else normed(x, norm, kernels=kernels)
    planes = x.unflatten(1, grid)
    if "linear" not in kernels.triton:
        return convolve(planes.permute(0, 3, 1, 2), kernel, stride=2).permute(0, 2, 3, 1).flatten(1, 2)
    patches = planes.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    return linear(patches.flatten(3).flatten(1, 2), kernel.flatten(1), kernels=kernels)


def double(
    x: Tensor, grid: tuple[int, int], kernel: Tensor, norm: Norm | None = None, *, kernels: Kernels = REFERENCE
) -> Tensor:
    """Four times the tokens."""
    if "linear" not in kernels.triton:
        x = x if norm is None else normed(x, norm, kernels=kernels)
        planes = x.unflatten(1, grid).permute(0, 3, 1, 2)
        return convolve(planes, kernel, stride=2, transposed=True).permute(0, 2, 3, 1).flatten(1, 2)
    patches = linear(x, kernel.flatten(1).T, norm=norm, kernels=kernels).unflatten(2, (-1, 2, 2)).unflatten(1, grid)
    # (R, h, w, D, 2, 2) -> (R, h, 2, w, 2, D)
    return patches.permute(0, 1, 4, 2, 5, 3).flatten(1, 4)
