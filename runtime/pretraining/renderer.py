"""How a rendering draws a subject and an extra its surroundings, for a batch: planes in, pictures out.

Every quantity is computed for all rows and chosen by each row's numbers, so that nothing depends on what is in the
batch and nothing waits for the device. Patterns lie on the grid of 8 pixels on which tokens are drawn, and never move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import COLOURS, EXTRAS, RENDERINGS

if TYPE_CHECKING:
    from .world import Scenes

_LUMA = (0.3, 0.59, 0.11)
_BLOCKS = 32  # pixels of a pixel picture along its side
_GLOW = (3.0, 7.5)  # its two radii (standard deviations), in 128ths of the side
_SHADOW, _RIM = 6, 5.0  # shift of the shadow, width of the border, in 128ths
_CLOSE = 0.24  # a rim's mean difference to the paper below which it is lost on it
_LOST = 0.10  # share of such a rim that a subject may have without a keyline


class Brush:
    """What is the same for all pictures of one size: patterns, colours, and what each tile's colours are like."""

    def __init__(self, tones: Tensor, keylines: Tensor, size: int, device: torch.device) -> None:
        """``tones`` and ``keylines`` of all tiles, as `measure_tones` and `measure_keylines` find them."""
        self.size = size
        self.low, self.span, self.middle = tones.to(device).unbind(1)
        self.keyline = keylines.to(device)
        colours = torch.tensor(list(COLOURS.values())) / 255
        self.colours = torch.cat([torch.zeros(1, 3), colours]).to(device)  # by 1 + index; row 0 is no ink
        self.luma = torch.tensor(_LUMA, device=device)
        self.light = self.colours @ self.luma
        self.white = torch.ones(3, 1, 1, device=device)
        self.warm = torch.tensor([[1.0, 0.95, 0.72], [1.0, 0.7, 0.2]], device=device).view(2, 3, 1, 1)
        place = torch.arange(size, device=device)
        unit, period = size / 128, size // 8
        line = (place + period // 2) % period < max(1, round(2 * unit))
        self.grid = (line[:, None] | line[None, :]).float()
        wave = (place[:, None] + place[None, :] + 0.5) % (2 * period) / unit
        self.stripes = (16 - (wave - 16).abs() - 8).add(0.5).clamp(0, 1)
        ramp = (place + 0.5) / unit % 8 - 4
        across = (ramp[:, None] ** 2 + ramp[None, :] ** 2).sqrt()
        corner = ((4 - ramp.abs())[:, None] ** 2 + (4 - ramp.abs())[None, :] ** 2).sqrt()
        self.dots = torch.minimum(across, corner)  # to the nearest dot, in 128ths; two dots in 8 x 8


def compose(brush: Brush, planes: Tensor, scenes: Scenes, tile: Tensor) -> Tensor:
    """(B, 3, s, s) from the placed planes (B, 6, s, s), scenes and their tiles' indices."""
    paper = brush.colours[scenes.paper + 1][..., None, None]
    ink = brush.colours[scenes.ink][..., None, None]
    light = brush.light[scenes.paper + 1][:, None, None, None]
    shape, solid, mark = _mark(brush, planes, scenes, tile, ink, light)
    canvas = _patterned(brush, paper, light, scenes)
    cover, tone = _surroundings(brush, paper, light, ink, shape, solid, scenes)
    return torch.lerp(torch.lerp(canvas, tone, cover), mark, shape.clamp(0, 1)).clamp(0, 1)


def _mark(
    brush: Brush, planes: Tensor, scenes: Scenes, tile: Tensor, ink: Tensor, paper_light: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Coverage (B, 1, s, s) of what is drawn and of the whole subject, and colour (B, 3, s, s) of what is drawn."""
    alpha, contour, inner = planes[:, 3:4], planes[:, 4:5], planes[:, 5:6]
    low, span, middle = (part[tile][:, None, None, None] for part in (brush.low, brush.span, brush.middle))
    light = torch.einsum("bcyx,c->byx", planes[:, :3], brush.luma)[:, None] / alpha.clamp(min=1e-2)
    tone = ((light - low) / span).clamp(0, 1)
    firm = (1.8 * alpha - 0.4).clamp(0, 1)  # ink is there or not: no soft lights and smoke around a subject
    strokes = torch.maximum(contour, inner)
    whole = torch.maximum((5 * alpha - 1).clamp(0, 1), contour)  # glass belongs to the subject
    contrast = torch.where(paper_light < 0.6, 1.0, 0.12)
    keyline = brush.keyline[tile, scenes.paper][:, None, None, None]

    line = contour * (1 - alpha) * keyline  # around the subject: it takes nothing of it
    flat = (planes[:, :3] + line * contrast) / (alpha + line).clamp(min=1e-2)
    blocks, blocks_colour = _blocks(brush, planes[:, :4], keyline, contrast)
    stencil = firm * (1 - inner * (1 - contour))
    # Ink stands for what is dark, unless it is lighter than the paper.
    grey = torch.where(brush.light[scenes.ink][:, None, None, None] > paper_light, tone, 1 - tone)
    dots = ((0.9 + 2.1 * grey - brush.dots) * (brush.size / 128) + 0.5).clamp(0, 1)
    halftone = torch.maximum(strokes, firm * dots)
    shape = _choose(scenes.rendering, alpha + line, blocks, firm, strokes, stencil, whole, halftone)
    solid = _choose(scenes.rendering, torch.maximum(firm, line), blocks, firm, whole, firm, whole, whole)

    # An ink's colour at a point: so far towards white, and so bright. A glowing line is whitest in its middle, as a
    # tube is.
    dark = torch.maximum(strokes, ((middle - tone) * 8 + 0.5).clamp(0, 1))
    shining = (brush.light[scenes.ink][:, None, None, None] > paper_light) * _is(scenes.extra, EXTRAS.index("glow"))
    tube = 0.55 * strokes.square() * shining
    floor = torch.where(paper_light < 0.3, 0.55, 0.36)  # a tint's darkest part must not fall into the paper
    none, full = torch.zeros_like(tone), torch.ones_like(tone)
    white = _choose(scenes.rendering, none, none, (1.5 * tone - 0.75).relu(), tube, none, 0.62 * (1 - dark), none)
    bright = _choose(
        scenes.rendering, full, full, (floor + 2 * (1 - floor) * tone).clamp(max=1), full, full, 1 - 0.28 * dark, full
    )
    inked = torch.lerp(ink, brush.white, white) * bright
    return shape, solid, _choose(scenes.rendering, flat, blocks_colour, inked)


def _blocks(brush: Brush, planes: Tensor, keyline: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and colour of the subject in `_BLOCKS` x `_BLOCKS` blocks of few colours, with a rim where needed."""
    means = F.avg_pool2d(planes, brush.size // _BLOCKS)
    solid = (means[:, 3:] > 0.45).float()
    colour = (means[:, :3] / means[:, 3:].clamp(min=1e-2)).mul(5).round().div(5).clamp(0, 1)
    grown = torch.maximum(F.max_pool2d(solid, (3, 1), 1, (1, 0)), F.max_pool2d(solid, (1, 3), 1, (0, 1)))
    rim = (grown - solid) * keyline
    both = torch.cat([solid + rim, torch.lerp(colour, contrast.expand_as(colour), rim)], 1)
    both = F.interpolate(both, scale_factor=brush.size // _BLOCKS, mode="nearest")
    return both[:, :1], both[:, 1:]


def _patterned(brush: Brush, paper: Tensor, paper_light: Tensor, scenes: Scenes) -> Tensor:
    """The paper (B, 3, s, s) with its grid or stripes."""
    grid, stripes = (_is(scenes.extra, EXTRAS.index(name)) for name in ("grid", "stripes"))
    line = torch.where(paper_light < 0.6, 1.0, 0.25).expand_as(paper)
    return torch.lerp(paper, line, 0.30 * grid * brush.grid + 0.16 * stripes * brush.stripes)


def _surroundings(
    brush: Brush, paper: Tensor, paper_light: Tensor, ink: Tensor, shape: Tensor, solid: Tensor, scenes: Scenes
) -> tuple[Tensor, Tensor]:
    """What the extra puts between paper and subject: coverage (B, 1, s, s) and tone (B, 3, 1, 1)."""
    unit = brush.size / 128
    lines = _is(scenes.rendering, RENDERINGS.index("outline"))
    inside = (2 * solid - 1).relu()  # what lies behind goes on under the subject's soft edge: no seam of paper there
    near, far = _soft(shape, _GLOW[0] * unit, 2), _soft(shape, _GLOW[1] * unit, 4)
    # Only lines glow inwards too: where the inside is drawn by what is left out, a halo would fill it.
    halo = (0.75 * near + 0.9 * far).clamp(0, 0.85) * (1 - inside * (1 - lines))
    warm = torch.where(paper_light < 0.7, brush.warm[0], brush.warm[1])
    halo_tone = torch.where((scenes.ink == 0)[:, None, None, None], warm, ink)

    step = round(_SHADOW * unit)
    cast = F.pad(torch.lerp(solid, shape, lines), (step, -step, step, -step))
    cast_tone = torch.where(paper_light < 0.25, 0.35 + 0.4 * paper, paper * 0.45)

    rim = ((_soft(solid, 0.5 * _RIM * unit, 2) - 0.02) * 14).clamp(0, 1) * (1 - inside)
    rim_tone = torch.where(paper_light < 0.75, 1.0, 0.3 * paper)

    none = torch.zeros_like(cast)
    cover = _choose(scenes.extra, none, halo, none, cast, rim, none)
    return cover, _choose(scenes.extra, paper, halo_tone, paper, cast_tone, rim_tone, paper)


def _soft(plane: Tensor, sigma: float, coarse: int) -> Tensor:
    """A plane (B, 1, s, s) under a Gaussian of ``sigma`` pixels, computed on a grid ``coarse`` times coarser."""
    small = F.avg_pool2d(plane, coarse)
    reach = max(1, round(2.6 * sigma / coarse))
    ramp = torch.arange(-reach, reach + 1, device=plane.device, dtype=plane.dtype)
    taps = torch.exp(-0.5 * (ramp * coarse / sigma) ** 2)
    taps = taps / taps.sum()
    small = F.conv2d(small, taps.view(1, 1, 1, -1), padding=(0, reach))
    small = F.conv2d(small, taps.view(1, 1, -1, 1), padding=(reach, 0))
    return F.interpolate(small, scale_factor=coarse, mode="bilinear", align_corners=False)


def _is(chosen: Tensor, index: int) -> Tensor:
    """(B,) -> (B, 1, 1, 1) fp32: 1 where the row's number is that."""
    return (chosen == index).float()[:, None, None, None]


def _choose(chosen: Tensor, *drawn: Tensor) -> Tensor:
    """Each row's own of what is drawn for the numbers 0, 1, ...; the last stands for all numbers above it too."""
    result = drawn[0]
    for index, other in enumerate(drawn[1:], 1):
        if other is not drawn[index - 1]:
            result = torch.where((chosen >= index)[:, None, None, None], other, result)
    return result


def measure_tones(tiles: Tensor) -> Tensor:
    """(n, 3): the lightness at which a tile's tones begin, their span, and the tone that parts dark from light."""
    few = tiles[:, :, 2::4, 2::4].float().flatten(2) / 255
    inside = few[:, 3] > 0.9
    light = torch.einsum("ncp,c->np", few[:, :3], torch.tensor(_LUMA))
    ordered = torch.where(inside, light, 2.0).sort(1).values
    count = inside.sum(1, keepdim=True)
    low, high = (ordered.gather(1, (count * share).long().clamp(max=few.shape[2] - 1)) for share in (0.06, 0.92))
    span = (high - low).clamp(min=0.25)
    low = (low + high - span) / 2  # where there is one tone only, it is a middle one
    tone = ((light - low) / span).clamp(0, 1)
    # Where the two sides' means lie farthest apart for their sizes (Otsu 1979); between these means.
    best, middle = torch.zeros_like(low), torch.full_like(low, 0.5)
    for cut in torch.linspace(0.1, 0.9, 17).tolist():
        sides = [(inside & (tone < cut)).float(), (inside & (tone >= cut)).float()]
        sizes = [side.sum(1, keepdim=True) for side in sides]
        means = [
            (tone * side).sum(1, keepdim=True) / size.clamp(min=1) for side, size in zip(sides, sizes, strict=True)
        ]
        spread = sizes[0] * sizes[1] * (means[1] - means[0]) ** 2
        middle = torch.where(spread > best, (means[0] + means[1]) / 2, middle)
        best = torch.maximum(best, spread)
    middle = torch.where(best > 0.01 * count**2, middle, 0.3)  # a subject of one tone is light
    return torch.cat([low, span, middle], 1)


def measure_keylines(tiles: Tensor) -> Tensor:
    """(n, colours) fp32: 1 where a tile's rim is lost on a paper of that colour, so that a line must be drawn."""
    few = tiles[:, :, 1::2, 1::2].float().flatten(2) / 255
    rim = (few[:, 4] > 0.5) & (few[:, 3] > 0.6)
    colour = few[:, :3] / few[:, 3:4].clamp(min=1e-2)
    count = rim.sum(1).clamp(min=1)
    papers = torch.tensor(list(COLOURS.values())) / 255
    lost = [(((colour - paper.view(3, 1)).abs().mean(1) < _CLOSE) & rim).sum(1) / count for paper in papers]
    return (torch.stack(lost, 1) > _LOST).float()
