"""How a rendering draws a subject and an extra its surroundings, for a batch: planes in, pictures out.

Every quantity is computed for all rows and chosen by each row's numbers, so that nothing depends on what is in the
batch and nothing waits for the device. Patterns lie on the grid of 8 pixels on which tokens are drawn, and never move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .looks import COLOURS, EXTRAS, NATURAL, RENDERINGS

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

    def __init__(self, tiles: Tensor, size: int, device: torch.device) -> None:
        """``tiles`` (n, 6, s, s) uint8 as the layers file gives them."""
        self.size, self.device = size, device
        colours = torch.tensor(list(COLOURS.values())) / 255
        darkness, self.keyline = (part.to(device) for part in (_tones(tiles), _keylines(tiles, colours)))
        self.low, self.span, self.middle = darkness.unbind(1)
        self.colours = torch.cat([torch.zeros(1, 3), colours]).to(device)  # by 1 + index; row 0 is no ink
        self.light = (colours @ torch.tensor(_LUMA)).to(device)
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
        self.natural = torch.tensor([name in NATURAL for name in RENDERINGS], device=device)


def compose(brush: Brush, planes: Tensor, scenes: Scenes, tile: Tensor) -> Tensor:
    """(B, 3, s, s) from the placed planes (B, 6, s, s), scenes and their tiles' indices."""
    paper = brush.colours[scenes.paper + 1][..., None, None]
    ink = brush.colours[scenes.ink][..., None, None]
    paper_light = brush.light[scenes.paper][:, None, None, None]
    contrast = torch.where(paper_light < 0.6, 1.0, 0.12)
    shape, solid, mark = _mark(brush, planes, scenes, tile, ink, paper_light, contrast)
    canvas = _patterned(brush, paper, paper_light, scenes)
    canvas = _surrounded(brush, canvas, paper, paper_light, ink, shape, solid, scenes)
    return (canvas + shape * (mark - canvas)).clamp(0, 1)


def _mark(
    brush: Brush, planes: Tensor, scenes: Scenes, tile: Tensor, ink: Tensor, paper_light: Tensor, contrast: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Coverage (B, 1, s, s) of what is drawn and of the whole subject, and colour (B, 3, s, s) of what is drawn."""
    alpha, contour, inner = planes[:, 3:4], planes[:, 4:5], planes[:, 5:6]
    colour = (planes[:, :3] / alpha.clamp(min=1e-2)).clamp(0, 1)
    keyline = brush.keyline[tile, scenes.paper][:, None, None, None]
    body = torch.maximum(alpha, contour)
    light = (colour * torch.tensor(_LUMA, device=brush.device).view(3, 1, 1)).sum(1, keepdim=True)
    low, span, middle = (part[tile][:, None, None, None] for part in (brush.low, brush.span, brush.middle))
    tone = ((light - low) / span).clamp(0, 1)

    line = contour * (1 - alpha) * keyline  # around the subject: it takes nothing of it
    flat = (planes[:, :3] + line * contrast) / (alpha + line).clamp(min=1e-2)
    blocks, blocks_colour = _blocks(brush, planes[:, :4], keyline, contrast)
    tint = torch.where(tone < 0.5, ink * (0.36 + 1.28 * tone), _mix(ink, torch.ones_like(ink), 1.5 * (tone - 0.5)))
    strokes = torch.maximum(contour, inner)
    stencil = torch.maximum(alpha * (1 - inner), contour)
    dark = torch.maximum(strokes, ((middle - tone) * 6 + 0.5).clamp(0, 1))
    duotone = _mix(ink + 0.62 * (1 - ink), ink * 0.72, dark)
    # Ink stands for what is dark, unless it is lighter than the paper.
    grey = torch.where((ink * torch.tensor(_LUMA, device=brush.device).view(3, 1, 1)).sum(1, keepdim=True) > paper_light,
                       tone, 1 - tone)  # fmt: skip
    dots = ((0.9 + 2.5 * grey - brush.dots) * (brush.size / 128) + 0.5).clamp(0, 1)
    halftone = torch.maximum(strokes, alpha * dots)
    # A glowing line is whitest in its middle, as a tube is.
    tube = _mix(ink, torch.ones_like(ink), 0.55 * strokes.square() * _is(scenes, extra="glow"))

    shape = _choose(scenes, alpha + line, blocks, alpha, strokes, stencil, body, halftone)
    solid = _choose(scenes, alpha + line, blocks, alpha, body, body, body, body)
    mark = _choose(scenes, flat, blocks_colour, tint, tube, ink, duotone, ink)
    return shape, solid, mark


def _blocks(brush: Brush, planes: Tensor, keyline: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and colour of the subject in `_BLOCKS` x `_BLOCKS` blocks of few colours, with a rim where needed."""
    means = F.avg_pool2d(planes, brush.size // _BLOCKS)
    solid = (means[:, 3:] > 0.45).float()
    colour = (means[:, :3] / means[:, 3:].clamp(min=1e-2)).mul(5).round().div(5).clamp(0, 1)
    grown = torch.maximum(F.max_pool2d(solid, (3, 1), 1, (1, 0)), F.max_pool2d(solid, (1, 3), 1, (0, 1)))
    rim = (grown - solid) * keyline
    both = torch.cat([solid + rim, _mix(colour, contrast, rim)], 1)
    both = both.repeat_interleave(brush.size // _BLOCKS, 2).repeat_interleave(brush.size // _BLOCKS, 3)
    return both[:, :1], both[:, 1:]


def _patterned(brush: Brush, paper: Tensor, paper_light: Tensor, scenes: Scenes) -> Tensor:
    """The paper (B, 3, s, s) with its grid or stripes."""
    pattern = 0.30 * brush.grid * _is(scenes, extra="grid") + 0.16 * brush.stripes * _is(scenes, extra="stripes")
    return _mix(paper, torch.where(paper_light < 0.6, 1.0, 0.25), pattern)


def _surrounded(
    brush: Brush,
    canvas: Tensor,
    paper: Tensor,
    paper_light: Tensor,
    ink: Tensor,
    shape: Tensor,
    solid: Tensor,
    scenes: Scenes,
) -> Tensor:
    """The canvas with what the extra puts between paper and subject."""
    unit = brush.size / 128
    natural = brush.natural[scenes.rendering][:, None, None, None]
    warm = torch.where(paper_light < 0.7, 0.72, 0.2)
    warm = torch.cat([torch.ones_like(warm), torch.where(paper_light < 0.7, 0.95, 0.7), warm], 1)
    near, far = _soft(shape, _GLOW[0] * unit, 2), _soft(shape, _GLOW[1] * unit, 4)
    outline = _is(scenes, rendering="outline")
    # Only lines glow inwards too: where the inside is drawn by what is left out, a halo would fill it.
    halo = (0.75 * near + 0.9 * far).clamp(0, 0.85) * (1 - solid * (1 - outline)) * _is(scenes, extra="glow")
    canvas = _mix(canvas, torch.where(natural, warm, ink), halo)

    step = round(_SHADOW * unit)
    cast = F.pad(torch.lerp(solid, shape, outline), (step, -step, step, -step)) * _is(scenes, extra="shadow")
    canvas = _mix(canvas, torch.where(paper_light < 0.25, 0.35 + 0.4 * paper, paper * 0.45), cast)

    rim = ((_soft(solid, 0.5 * _RIM * unit, 2) - 0.02) * 14).clamp(0, 1) * _is(scenes, extra="border")
    canvas = _mix(canvas, torch.where(paper_light < 0.75, 1.0, 0.3 * paper), rim)
    return _mix(canvas, paper, solid * _is(scenes, extra="border"))


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


def _mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return one + share * (other - one)


def _is(scenes: Scenes, *, rendering: str | None = None, extra: str | None = None) -> Tensor:
    """(B, 1, 1, 1) fp32: 1 where the row has that rendering or extra."""
    found = scenes.extra == EXTRAS.index(extra) if extra else scenes.rendering == RENDERINGS.index(rendering or "")
    return found.float()[:, None, None, None]


def _choose(scenes: Scenes, *drawn: Tensor) -> Tensor:
    """Each row's own of what the renderings, in their order, have drawn."""
    chosen = drawn[0]
    for index, other in enumerate(drawn[1:], 1):
        chosen = torch.where((scenes.rendering == index)[:, None, None, None], other, chosen)
    return chosen


def _tones(tiles: Tensor) -> Tensor:
    """(n, 3): the lightness at which a tile's tones begin, their span, and the tone that parts dark from light."""
    few = tiles[:, :, 2::4, 2::4].float().flatten(2) / 255
    inside = few[:, 3] > 0.9
    light = torch.einsum("ncp,c->np", few[:, :3], torch.tensor(_LUMA))
    ordered = torch.where(inside, light, 2.0).sort(1).values
    count = inside.sum(1, keepdim=True)
    low, high = (ordered.gather(1, (count * share).long().clamp(max=few.shape[2] - 1)) for share in (0.06, 0.92))
    span = (high - low).clamp(min=0.25)
    tone = ((light[:, :] - low) / span).clamp(0, 1) * inside
    middle = (tone.sum(1, keepdim=True) / count.clamp(min=1)).clamp(0.3, 0.7)
    return torch.cat([low, span, middle], 1)


def _keylines(tiles: Tensor, colours: Tensor) -> Tensor:
    """(n, colours) fp32: 1 where a tile's rim is lost on a paper of that colour, so that a line must be drawn."""
    few = tiles[:, :, 1::2, 1::2].float().flatten(2) / 255
    rim = (few[:, 4] > 0.5) & (few[:, 3] > 0.6)
    colour = few[:, :3] / few[:, 3:4].clamp(min=1e-2)
    count = rim.sum(1).clamp(min=1)
    lost = [(((colour - paper.view(3, 1)).abs().mean(1) < _CLOSE) & rim).sum(1) / count for paper in colours]
    return (torch.stack(lost, 1) > _LOST).float()
