"""The small faults of a picture generator, put on clean pictures so that a judge learns to look past them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
"""Side of a token in pixels: what a wrong token spoils."""

_CLEAN = 0.25  # share of pictures left as they are
_SHIFT, _ZOOM = 3 / 64, 0.05  # of half the side, as `affine_grid` counts; of the size
_SPOILED = 0.08  # share of blocks
_NOISE, _TONE = 0.04, 0.04  # standard deviations of pixels and of a channel's offset, of 1


def flawed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) in 0..1 -> the same with faults of random severity: moved, resized, blurred, noisy, off in tone, and
    with blocks of `BLOCK` pixels replaced by blocks from elsewhere in the picture or from another picture.

    H and W must be multiples of `BLOCK`. A quarter of the pictures stays as it is.
    """
    rows, _, height, width = pictures.shape

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    severity = (((random(rows) - _CLEAN) / (1 - _CLEAN)).clamp(min=0)).view(rows, 1, 1, 1)
    moved = _moved(pictures, severity.flatten(), random(rows, 3) * 2 - 1)
    soft = F.avg_pool2d(F.pad(moved, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    x = torch.lerp(moved, soft, severity * random(rows, 1, 1, 1))
    spoiled = random(rows, 1, height // BLOCK, width // BLOCK) < severity * random(rows, 1, 1, 1) * _SPOILED
    own = x.roll((BLOCK * 3, -BLOCK * 5), dims=(2, 3))
    other = torch.where(random(rows, 1, 1, 1) < 0.5, own, x.roll(1, dims=0))
    x = torch.where(F.interpolate(spoiled.float(), scale_factor=BLOCK) > 0, other, x)
    noise = torch.randn(x.shape, generator=generator) * _NOISE * random(rows, 1, 1, 1)
    tone = torch.randn((rows, 3, 1, 1), generator=generator) * _TONE
    return (x + severity * (noise + tone)).clamp(0, 1)


def _moved(pictures: Tensor, severity: Tensor, move: Tensor) -> Tensor:
    """Shifted and resized by ``move`` (B, 3) in -1..1 times ``severity`` (B,), the edges continued."""
    scaled = move * severity[:, None]
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + _ZOOM * scaled[:, 0]
    theta[:, :, 2] = 2 * _SHIFT * scaled[:, 1:]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
