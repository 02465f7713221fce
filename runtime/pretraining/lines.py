"""A line drawing made of a flat picture: its contour, and the lines and dark patches inside.

Edges are found as by Canny (1986): gradient of the smoothed picture, thinned to its ridges, weak ridges kept where
they touch strong ones. Short pieces are dropped, and what is left is drawn with a round pen of one width, so that
strokes are continuous and even whatever the contrast was.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# In pixels of a picture of 480; a subject is drawn about 105 of 128 wide, so 4.6 of these are one pixel there.
_SMOOTH = 2.4
_CONTOUR, _INNER = 7.6, 6.2  # the pens' radii: strokes of 3.3 and 2.7 pixels
_WEAK, _STRONG = 0.016, 0.032  # gradient: what a step of 0.10 and of 0.19 in one channel gives
_SHORT = 26  # pixels of a line: what is shorter is dropped
_DARK, _PATCHES = 0.26, 0.30  # lightness of what is inked whole, unless more than this share of the subject is


def trace(picture: Tensor) -> tuple[Tensor, Tensor]:
    """(4, s, s) premultiplied RGBA -> contour (s, s) and inner lines (s, s), 0 or 1."""
    alpha = picture[3]
    shape = blurred(alpha, 1.5) > 0.5
    rim = shape & ~_eroded(shape)
    contour = _drawn(rim, _CONTOUR)
    colour = picture[:3] / alpha.clamp(min=1e-3)
    # Outside, the colours just inside go on: the shape's own rim must not count as an inner line.
    colour = torch.where(alpha > 0.5, colour, _spread(picture))
    smooth = torch.stack([blurred(channel, _SMOOTH) for channel in colour])
    inside = ~_drawn(~shape, 5.0).bool()
    ridge, strength = _ridges(smooth)
    ridge &= inside
    edges = _lines(ridge & (strength > _STRONG), ridge & (strength > _WEAK))
    light = (smooth * torch.tensor([0.3, 0.59, 0.11]).view(3, 1, 1)).sum(0)
    dark = shape & (light < _DARK)
    patches = dark if float(dark.sum()) < _PATCHES * float(shape.sum()) else torch.zeros_like(dark)
    return contour, torch.maximum(_drawn(edges, _INNER), patches.float()) * shape


def blurred(plane: Tensor, sigma: float) -> Tensor:
    """A plane (h, w) under a Gaussian of this many pixels, its border repeated."""
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=plane.dtype) / sigma) ** 2)
    taps /= taps.sum()
    padded = F.pad(plane[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[0, 0]


def _spread(picture: Tensor) -> Tensor:
    """(3, s, s): near the shape, the mean of the colours around; far from it, black."""
    wide = torch.stack([blurred(channel, 6.0) for channel in picture])
    return wide[:3] / wide[3].clamp(min=1e-3)


def _eroded(mask: Tensor) -> Tensor:
    return ~(F.max_pool2d((~mask).float()[None], 3, 1, 1)[0] > 0)


def _drawn(mask: Tensor, radius: float) -> Tensor:
    """The mask under a round pen, (s, s) fp32, 0 or 1."""
    reach = math.ceil(radius)
    ramp = torch.arange(-reach, reach + 1, dtype=torch.float32)
    pen = (ramp[:, None] ** 2 + ramp[None, :] ** 2 <= radius**2).float()
    return (F.conv2d(mask.float()[None, None], pen[None, None], padding=reach)[0, 0] > 0.5).float()


def _ridges(smooth: Tensor) -> tuple[Tensor, Tensor]:
    """(3, s, s) -> where the gradient is largest across its own direction, and its size, both (s, s)."""
    down = (smooth.roll(-1, 1) - smooth.roll(1, 1)) / 2
    right = (smooth.roll(-1, 2) - smooth.roll(1, 2)) / 2
    # The direction in which all channels together change most (Di Zenzo 1986).
    yy, xx, xy = (down * down).sum(0), (right * right).sum(0), (down * right).sum(0)
    strength = ((xx + yy + ((xx - yy) ** 2 + 4 * xy**2).sqrt()) / 2).sqrt()
    angle = torch.atan2(2 * xy, xx - yy) / 2
    sector = (angle * (4 / math.pi)).round().remainder(4)
    ridge = torch.zeros_like(strength, dtype=torch.bool)
    for number, (dy, dx) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        before, after = strength.roll((dy, dx), (0, 1)), strength.roll((-dy, -dx), (0, 1))
        ridge |= (sector == number) & (strength >= before) & (strength > after)
    ridge[[0, -1]] = False
    ridge[:, [0, -1]] = False
    return ridge, strength


def _lines(strong: Tensor, weak: Tensor) -> Tensor:
    """The connected pieces of ``weak`` (s, s) that hold a strong pixel and at least `_SHORT` pixels."""
    left = {(y, x) for y, x in weak.nonzero().tolist()}
    seeds = {(y, x) for y, x in strong.nonzero().tolist()}
    kept = torch.zeros_like(weak)
    while left:
        piece = [left.pop()]
        for y, x in piece:  # grows while it is walked through
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            fresh = [place for place in around if place in left]
            left.difference_update(fresh)
            piece.extend(fresh)
        if len(piece) >= _SHORT and not seeds.isdisjoint(piece):
            kept[tuple(torch.tensor(piece).T)] = True
    return kept
