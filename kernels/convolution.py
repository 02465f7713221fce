"""Convolutions over the grid, fp32 where their numbers are.

On a GPU torch multiplies fp32 convolutions in TF32 by default, 10 bits of 23. That is a setting of the process, which
isn't ours to change, not even for a moment, since threads share it. The operation below the public ones takes it as an
argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """``F.conv2d`` or ``F.conv_transpose2d``; for training too, where the process's setting holds."""
    if x.device.type == "cuda" and x.dtype == torch.float32 and not torch.is_grad_enabled():
        return exact(x, kernel, bias, stride, padding, groups, transposed)
    if transposed:
        return F.conv_transpose2d(x, kernel, bias, stride, padding, groups=groups)
    return F.conv2d(x, kernel, bias, stride, padding, groups=groups)


def exact(
    x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int, transposed: bool
) -> Tensor:
    """Without TF32; it has no gradient."""
    return torch._convolution(
        x, kernel, bias, (stride, stride), (padding, padding), (1, 1), transposed, (0, 0), groups,
        benchmark=False, deterministic=False, cudnn_enabled=True, allow_tf32=False,
    )  # fmt: skip
