"""The embedded model's world: any subject in any look, in any pose.

Because this module can draw a subject in a held-out look too, styled pictures are judged against the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from .looks import COLOURS, SUBJECTS, Look, random_look
from .pictograms import Array, blurred, pictogram


@dataclass(frozen=True)
class Pose:
    """Size as a fraction of the picture's side, shift in fractions of it, and mirroring."""

    size: float = 0.80
    shift: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False


def random_pose(generator: np.random.Generator) -> Pose:
    """A little jitter: size within 3 %, place within a 64th of the side, mirrored half of the time."""
    shift = generator.integers(-1, 2, size=2) / 64
    return Pose(
        float(generator.uniform(0.78, 0.82)), (float(shift[0]), float(shift[1])), bool(generator.random() < 0.5)
    )


class World:
    """Draws subjects at ``size`` x ``size`` pixels (drawn at twice that and averaged down)."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._side = 2 * size

    def draw(self, subject: str, look: Look, pose: Pose | None = None) -> Image.Image:
        """One picture, RGB, (size, size)."""
        return Image.fromarray((self.array(subject, look, pose) * 255 + 0.5).astype(np.uint8))

    def array(self, subject: str, look: Look, pose: Pose | None = None) -> Array:
        """One picture as (size, size, 3) fp32 in 0..1."""
        colour, alpha, light, edges = self._posed(subject, pose or Pose())
        paper = _rgb(look.paper)
        ink = paper if look.ink is None else _rgb(look.ink)
        shape, mark = self._mark(look.rendering, ink, colour, alpha, light, edges)
        canvas = self._paper(look.extra, paper)
        canvas = self._behind(look, canvas, shape, alpha, ink)
        canvas += shape[..., None] * (mark - canvas)
        small = canvas.reshape(self.size, 2, self.size, 2, 3).mean(axis=(1, 3))
        return np.clip(small, 0.0, 1.0, dtype=np.float32)

    def samples(self, generator: np.random.Generator, *, held_out: bool = False) -> Iterator[tuple[str, Look, Array]]:
        """Endless random (subject, look, picture)."""
        names = list(SUBJECTS)
        while True:
            subject, look = names[generator.integers(len(names))], random_look(generator, held_out=held_out)
            yield subject, look, self.array(subject, look, random_pose(generator))

    def _posed(self, subject: str, pose: Pose) -> tuple[Array, Array, Array, Array]:
        """The subject's colour (s, s, 3), coverage, lightness and line map (s, s), s = twice the size, in place."""
        side = round(self._side * pose.size)
        left, top = (round((self._side - side) / 2 + self._side * shift) for shift in pose.shift)
        picture, lines = pictogram(subject)
        layers = []
        for layer in (picture, lines):
            small = layer.resize((side, side), Image.Resampling.BOX if side < 128 else Image.Resampling.BILINEAR)
            full = Image.new(layer.mode, (self._side, self._side))
            full.paste(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if pose.mirrored else small, (left, top))
            layers.append(np.asarray(full, dtype=np.float32) / 255)
        alpha = layers[0][..., 3]
        colour = layers[0][..., :3] / np.maximum(alpha, 1e-3)[..., None]
        return colour, alpha, colour @ np.array([0.3, 0.59, 0.11], dtype=np.float32), layers[1]

    def _mark(
        self, rendering: str, ink: Array, colour: Array, alpha: Array, light: Array, edges: Array
    ) -> tuple[Array, Array]:
        """Coverage (s, s) and colour (s, s, 3) of the subject as the rendering draws it."""
        if rendering == "flat":
            return alpha, colour
        if rendering == "pixel":
            cell = self._side // 16
            blocks = np.concatenate([colour * alpha[..., None], alpha[..., None]], axis=-1)
            means = blocks.reshape(16, cell, 16, cell, 4).mean(axis=(1, 3))
            full = means.repeat(cell, axis=0).repeat(cell, axis=1)
            solid = (full[..., 3] > 0.35).astype(np.float32)
            return solid, full[..., :3] / np.maximum(full[..., 3:], 1e-3)
        if rendering == "tint":
            return alpha, ink * (0.35 + 0.5 * light)[..., None] + 0.3 * light[..., None]
        if rendering == "outline":
            return np.minimum(edges, 1.0), ink
        if rendering == "silhouette":
            return alpha, ink
        if rendering == "duotone":
            bright = (light > 0.55)[..., None]
            return alpha, np.where(bright, ink + 0.45 * (1 - ink), ink * 0.75)
        dots = self._dots < (0.50 + 0.60 * (1 - light)) ** 2
        return alpha * dots, ink

    @cached_property
    def _dots(self) -> Array:
        """Squared distance to the centre of a halftone cell of 4 output pixels, 1 at the middle of its sides."""
        cell = self._side // 16
        ramp = (np.arange(self._side) % cell + 0.5) / cell * 2 - 1
        return np.asarray(ramp[:, None] ** 2 + ramp[None, :] ** 2, dtype=np.float32)

    def _paper(self, extra: str, paper: Array) -> Array:
        canvas = np.broadcast_to(paper, (self._side, self._side, 3)).copy()
        if extra in ("grid", "stripes"):
            strength = 0.35 if extra == "grid" else 0.18
            line = paper + strength * ((1.0 if paper.mean() < 0.6 else 0.25) - paper)
            period = self._side // (8 if extra == "grid" else 4)
            position = np.arange(self._side)
            if extra == "grid":
                on = position % period < self._side // 64
                canvas[on] = line
                canvas[:, on] = line
            else:
                canvas[(position[:, None] + position[None, :]) % period < period // 2] = line
        return canvas

    def _behind(self, look: Look, canvas: Array, shape: Array, alpha: Array, ink: Array) -> Array:
        """What the extra puts between paper and subject."""
        unit = self._side / 128
        if look.extra == "glow":
            halo = np.minimum(blurred(shape, 4 * unit) * 1.2, 1.0) * 0.75
            tone = ink if look.ink is not None else np.array([1.0, 0.95, 0.75], dtype=np.float32)
            canvas += halo[..., None] * (tone - canvas)
        elif look.extra == "shadow":
            step = round(8 * unit)
            cast = np.zeros_like(alpha)
            cast[step:, step:] = shape[:-step, :-step]
            canvas *= (1 - 0.6 * cast)[..., None]
        elif look.extra == "border":
            grown = _grown(alpha, round(8 * unit))
            tone = (
                np.array([0.45, 0.45, 0.47], dtype=np.float32)
                if canvas.mean() > 0.6
                else np.array([0.98, 0.98, 0.97], dtype=np.float32)
            )
            canvas += grown[..., None] * (tone - canvas)
            if look.rendering in ("outline", "halftone"):
                canvas += alpha[..., None] * (_rgb(look.paper) - canvas)
        return canvas


def _rgb(name: str) -> Array:
    return np.asarray(COLOURS[name], dtype=np.float32) / 255


def _grown(mask: Array, radius: int) -> Array:
    """The mask widened by about ``radius`` pixels, with a soft rim."""
    return np.clip(blurred(mask, radius / 2) * 12 - 1, 0, 1)
