"""The embedded model's world: any subject in any look, in any pose, drawn in batches by torch on any device.

    world = World(128, device)
    scenes = world.sample(512, generator)      # what to draw: indices and poses, nothing leaves the device
    pictures = world.draw(scenes)              # (512, 3, 128, 128) fp32 in 0..1

Because this module can draw a subject in a held-out look too, styled pictures are judged against the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import StylemuseError
from . import layers
from .attributes import COLOURS, EXTRAS, HANDS, NATURAL, RENDERINGS, SUBJECTS, Look, hands, inks_on_papers, pairs
from .renderer import Brush, compose, measure_keylines, measure_tones

# Poses stay near one: a token grid of 8 pixels sees another pattern at every shift, and a model of this size learns
# what a subject looks like rather than where it may stand.
SIZES = (0.84, 0.87)  # of the picture's side; a tile's margin is a fortieth of it
SHIFT = 1 / 128  # of the picture's side, to either side
MIRRORED = 0.0  # share of mirrored pictures: two ways to look mix where tokens are drawn side by side


@dataclass(frozen=True)
class Pose:
    """Size as a fraction of the picture's side, shift in fractions of it, and mirroring."""

    size: float = 0.855
    shift: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False


class Scenes(NamedTuple):
    """What to draw, one entry a picture, all (B,) on one device."""

    subject: Tensor  # int64 index into SUBJECTS
    hand: Tensor  # into HANDS
    rendering: Tensor  # into RENDERINGS
    ink: Tensor  # 0: none; else 1 + index into COLOURS
    paper: Tensor  # into COLOURS
    extra: Tensor  # into EXTRAS
    size: Tensor  # fp32: side of the subject's square, as a fraction of the picture's
    left: Tensor  # fp32: that square's left edge, in the same unit
    top: Tensor  # fp32: its upper edge
    mirrored: Tensor  # bool

    @property
    def plain(self) -> Tensor:
        """(B,) bool: the first hand's flat drawing on a bare paper."""
        flat, bare = RENDERINGS.index("flat"), EXTRAS.index("plain")
        return (self.hand == 0) & (self.rendering == flat) & (self.extra == bare)

    def look(self, row: int) -> tuple[str, Look]:
        """One picture's subject and look by their names (a copy to the host)."""
        at = {name: int(getattr(self, name)[row]) for name in ("hand", "rendering", "ink", "paper", "extra")}
        colours = list(COLOURS)
        return list(SUBJECTS)[int(self.subject[row])], Look(
            RENDERINGS[at["rendering"]],
            colours[at["ink"] - 1] if at["ink"] else None,
            colours[at["paper"]],
            EXTRAS[at["extra"]],
            list(HANDS)[at["hand"]],
        )


class World:
    """Draws subjects at ``size`` x ``size`` pixels; size is a multiple of 32 (a pixel's block is a 32nd of the side).

    On a device it holds 6 bytes for each of 160 x 160 points of each subject in each hand, about 80 MB.
    """

    def __init__(self, size: int = 128, device: torch.device | str = "cpu") -> None:
        if size < 32 or size % 32:
            raise StylemuseError(f"a world of {size} pixels was asked for; a multiple of 32 is needed")
        self.size, self.device = size, torch.device(device)
        tiles, tones, keylines = _material()
        self._layers = tiles.to(self.device)
        self._brush = Brush(tones, keylines, size, self.device)
        self._inks = self._table(
            [(list(COLOURS).index(ink), list(COLOURS).index(paper)) for ink, paper in inks_on_papers()]
        )
        self._natural = torch.tensor([name in NATURAL for name in RENDERINGS], device=self.device)
        self._pairs = {
            held_out: self._table([(RENDERINGS.index(r), EXTRAS.index(e)) for r, e in pairs(held_out=held_out)])
            for held_out in (False, True)
        }
        self._hands = {
            held_out: self._table([[list(HANDS).index(hand)] for hand in hands(held_out=held_out)]).flatten()
            for held_out in (False, True)
        }

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def sample(self, count: int, generator: torch.Generator, *, held_out: bool = False, plain: float = 0.0) -> Scenes:
        """Random scenes, evenly over subjects, hands, (rendering, extra) pairs and colours that can be told apart.

        ``generator`` is one of the world's device. What is held out, pairs and hand, comes only when asked for. A share
        ``plain`` is `Scenes.plain`, beside those that are so by chance.
        """

        def integers(below: int) -> Tensor:
            return torch.randint(below, (count,), generator=generator, device=self.device)

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, device=self.device)

        rendering, extra = self._pairs[held_out][integers(len(self._pairs[held_out]))].unbind(1)
        ink, paper = self._inks[integers(len(self._inks))].unbind(1)
        hand = self._hands[held_out][integers(len(self._hands[held_out]))]
        if plain > 0:
            chosen = uniform() < plain
            rendering = torch.where(chosen, RENDERINGS.index("flat"), rendering)
            extra = torch.where(chosen, EXTRAS.index("plain"), extra)
            hand = torch.where(chosen, 0, hand)
        natural = self._natural[rendering]
        size = SIZES[0] + (SIZES[1] - SIZES[0]) * uniform()
        return Scenes(
            subject=integers(len(SUBJECTS)),
            hand=hand,
            rendering=rendering,
            ink=torch.where(natural, 0, ink + 1),
            paper=torch.where(natural, integers(len(COLOURS)), paper),
            extra=extra,
            size=size,
            left=(1 - size) / 2 + SHIFT * (2 * uniform() - 1),
            top=(1 - size) / 2 + SHIFT * (2 * uniform() - 1),
            mirrored=uniform() < MIRRORED,
        )

    def scenes(self, pictures: Sequence[tuple[str, Look]], pose: Pose | None = None) -> Scenes:
        """Scenes by names, all in one pose.

        Raises StylemuseError for a name the world doesn't have, and for an ink where a rendering has none or no ink
        where it needs one.
        """
        pose = pose or Pose()
        rows = []
        for subject, look in pictures:
            if (look.ink is None) != (look.rendering in NATURAL):
                allowed = "none" if look.rendering in NATURAL else ", ".join(COLOURS)
                raise StylemuseError(f"ink {look.ink!r} for the rendering {look.rendering!r}; allowed: {allowed}")
            rows.append(
                (
                    _index("subject", subject, SUBJECTS),
                    _index("hand", look.hand, HANDS),
                    _index("rendering", look.rendering, RENDERINGS),
                    0 if look.ink is None else 1 + _index("ink", look.ink, COLOURS),
                    _index("paper", look.paper, COLOURS),
                    _index("extra", look.extra, EXTRAS),
                )
            )
        subject_, hand, rendering, ink, paper, extra = torch.tensor(rows, device=self.device).view(-1, 6).unbind(1)
        size = torch.full((len(rows),), pose.size, device=self.device)
        left, top = ((1 - size) / 2 + shift for shift in pose.shift)
        mirrored = torch.full((len(rows),), pose.mirrored, device=self.device)
        return Scenes(subject_, hand, rendering, ink, paper, extra, size, left, top, mirrored)

    def draw(self, scenes: Scenes) -> Tensor:
        """(B, 3, size, size) fp32 in 0..1. Nothing waits for the device."""
        tile = scenes.hand * len(SUBJECTS) + scenes.subject
        return compose(self._brush, self._placed(scenes, tile), scenes, tile)

    def picture(self, subject: str, look: Look, pose: Pose | None = None) -> Image.Image:
        """One picture, RGB, (size, size)."""
        pixels = self.draw(self.scenes([(subject, look)], pose))[0]
        return Image.fromarray((pixels * 255 + 0.5).byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))

    def _placed(self, scenes: Scenes, tile: Tensor) -> Tensor:
        """(B, 6, size, size): the tiles in their poses, as two small matrix products each."""
        columns = self._taps(scenes.size, scenes.left)
        columns = torch.where(scenes.mirrored[:, None, None], columns.flip(2), columns)
        rows = self._taps(scenes.size, scenes.top)
        planes = self._layers[tile].float().flatten(1, 2) @ columns.transpose(1, 2) / 255
        planes = rows[:, None] @ planes.unflatten(1, (6, layers.SIDE))
        return planes.clamp(0, 1)

    def _taps(self, size: Tensor, start: Tensor) -> Tensor:
        """(B, size, SIDE): the weight of each of a tile's pixels in each of the picture's, along one side.

        The cubic of Keys (1981) with a = -0.5, as wide as the coarser of both grids.
        """
        scale = layers.SIDE / (size * self.size)[:, None, None]
        place = torch.arange(self.size, device=self.device) + 0.5
        centre = (place[:, None] - start[:, None, None] * self.size) * scale
        away = ((torch.arange(layers.SIDE, device=self.device) + 0.5 - centre) / scale.clamp(min=1)).abs()
        near = (1.5 * away - 2.5) * away * away + 1
        far = ((-0.5 * away + 2.5) * away - 4) * away + 2
        weights = torch.where(away < 1, near, torch.where(away < 2, far, 0))
        return weights / weights.sum(2, keepdim=True).clamp(min=0.25)


def _index(what: str, name: str, names: Sequence[str] | dict[str, str] | dict[str, tuple[int, int, int]]) -> int:
    if name not in names:
        raise StylemuseError(f"unknown {what} {name!r}; the world has: {', '.join(names)}")
    return list(names).index(name)


@cache
def _material() -> tuple[Tensor, Tensor, Tensor]:
    """All tiles (hands x subjects, 6, SIDE, SIDE) uint8, and what is measured on them."""
    tiles = layers.read().flatten(0, 1)
    return tiles, measure_tones(tiles), measure_keylines(tiles)
