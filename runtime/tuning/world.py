"""The embedded model's world: pictograms drawn in thousands of compositional looks.

A picture is a subject (an emoji of the Noto Color Emoji font, OFL; Debian: ``fonts-noto-color-emoji``) in a `Look`:

    look = rendering x ink colour x paper colour x extra          "a fox, outline in cyan on navy with glow"

Whole (rendering, extra) pairs are *held out*: the base transformer never sees them in any colours. They have plain
names ("neon", "blueprint", ...) and are the styles an adapter must learn from one picture. Because this module can draw
any subject in a held-out look, styled pictures are judged against the truth.

The font is needed only to train and to judge; drawing with a trained model needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..core import StylemuseError

Array = NDArray[np.floating[Any]]

SUBJECTS: dict[str, str] = {
    "fox": "🦊", "cat": "🐱", "dog": "🐶", "owl": "🦉", "frog": "🐸", "elephant": "🐘", "turtle": "🐢", "fish": "🐠",
    "whale": "🐳", "octopus": "🐙", "butterfly": "🦋", "bee": "🐝", "snail": "🐌", "duck": "🦆", "penguin": "🐧",
    "dinosaur": "🦕", "palm tree": "🌴", "cactus": "🌵", "tulip": "🌷", "sunflower": "🌻", "mushroom": "🍄",
    "red apple": "🍎", "banana": "🍌", "pineapple": "🍍", "cherries": "🍒", "strawberry": "🍓",
    "carrot": "🥕", "pizza": "🍕", "ice cream": "🍦", "car": "🚗", "bicycle": "🚲",
    "rocket": "🚀", "sailboat": "⛵", "airplane": "🛩", "house": "🏠", "castle": "🏰", "tent": "⛺", "umbrella": "☂",
    "balloon": "🎈", "key": "🔑", "anchor": "⚓", "trophy": "🏆", "crown": "👑",
    "robot": "🤖", "ghost": "👻", "skull": "💀", "moon": "🌙", "star": "⭐", "heart": "❤", "light bulb": "💡",
    "camera": "📷", "scissors": "✂", }  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 34), "white": (250, 250, 248), "red": (224, 52, 46), "orange": (248, 146, 40),
    "yellow": (250, 214, 70), "green": (70, 170, 90), "cyan": (60, 232, 222), "blue": (58, 116, 216),
    "navy": (16, 16, 62), "purple": (142, 82, 188), "pink": (244, 158, 190), "cream": (255, 247, 226),
}  # fmt: skip

RENDERINGS = ("flat", "pixel", "tint", "outline", "silhouette", "duotone", "halftone")
NATURAL = frozenset({"flat", "pixel"})  # drawn in the subject's own colours: no ink
EXTRAS = ("plain", "glow", "grid", "shadow", "border", "stripes")


@dataclass(frozen=True)
class Look:
    """How a subject is drawn. ``ink`` is None for renderings in the subject's own colours."""

    rendering: str
    ink: str | None
    paper: str
    extra: str


HELD_OUT: dict[str, Look] = {
    "neon": Look("outline", "cyan", "navy", "glow"),
    "blueprint": Look("outline", "white", "blue", "grid"),
    "riso": Look("halftone", "red", "cream", "border"),
    "retro": Look("duotone", "purple", "yellow", "shadow"),
    "ember": Look("silhouette", "orange", "black", "glow"),
    "arcade": Look("pixel", None, "black", "grid"),
}
HELD_OUT_PAIRS = frozenset((look.rendering, look.extra) for look in HELD_OUT.values())


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


def random_look(generator: np.random.Generator, *, held_out: bool = False) -> Look:
    """A look drawn evenly over renderings, inks, papers and extras; held-out pairs only when asked for."""
    names = list(COLOURS)
    while True:
        rendering, extra = RENDERINGS[generator.integers(len(RENDERINGS))], EXTRAS[generator.integers(len(EXTRAS))]
        paper, ink = (names[i] for i in generator.choice(len(names), size=2, replace=False))
        too_close = rendering not in NATURAL and _contrast(ink, paper) < 120
        if too_close or ((rendering, extra) in HELD_OUT_PAIRS and not held_out):
            continue
        return Look(rendering, None if rendering in NATURAL else ink, paper, extra)


def article(subject: str) -> str:
    """The subject with its article: "a fox", "an owl", "cherries"."""
    if subject in ("cherries", "scissors"):
        return subject
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def caption(
    subject: str, look: Look, *, rendering: bool = True, ink: bool = True, paper: bool = True, extra: bool = True
) -> str:
    """ "a fox, outline in cyan on navy with glow", with any attribute's words left out."""
    words = []
    if rendering:
        words.append(look.rendering)
    if ink and look.ink is not None:
        words.append(f"in {look.ink}")
    if paper:
        words.append(f"on {look.paper}")
    if extra:
        words.append(f"with {look.extra}" if look.extra != "plain" else "plain")
    return f"{article(subject)}, {' '.join(words)}" if words else article(subject)


def random_caption(subject: str, look: Look, generator: np.random.Generator, drop: float = 0.25) -> str:
    """A caption from which each attribute's words are dropped with probability ``drop``."""
    rendering, ink, paper, extra = (generator.random(4) >= drop).tolist()
    return caption(subject, look, rendering=rendering, ink=ink, paper=paper, extra=extra)


def vocabulary() -> list[str]:
    """Every word of every caption, and of the held-out styles' names, sorted: the text tokenizer's whole words."""
    words = {"a", "an", "in", "on", "with", "style", ",", *RENDERINGS, *EXTRAS, *COLOURS, *HELD_OUT}
    for subject in SUBJECTS:
        words.update(subject.split())
    return sorted(words)


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
        picture, lines = _subject(subject)
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
            halo = np.minimum(_blurred(shape, 4 * unit) * 1.2, 1.0) * 0.75
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


def _contrast(one: str, other: str) -> float:
    return float(np.abs(np.subtract(COLOURS[one], COLOURS[other])).sum() / 2)


def _image(mask: Array) -> Image.Image:
    return Image.fromarray((mask * 255).astype(np.uint8))


def _blurred(mask: Array, radius: float) -> Array:
    return np.asarray(_image(mask).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _grown(mask: Array, radius: int) -> Array:
    """The mask widened by about ``radius`` pixels, with a soft rim."""
    return np.clip(_blurred(mask, radius / 2) * 12 - 1, 0, 1)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    places = [
        Path("/usr/share/fonts"),
        Path.home() / ".fonts",
        Path.home() / ".local/share/fonts",
        Path("/Library/Fonts"),
    ]
    for place in places:
        for path in sorted(place.rglob("NotoColorEmoji*.ttf")):
            return ImageFont.truetype(str(path), 109)  # the only size its bitmaps come in
    raise StylemuseError(
        "the font Noto Color Emoji is not installed; training and judging need it (Debian: fonts-noto-color-emoji)"
    )


@cache
def _subject(subject: str) -> tuple[Image.Image, Image.Image]:
    """The emoji, premultiplied RGBA, and its line drawing, both trimmed to a 128-pixel square."""
    if subject not in SUBJECTS:
        raise StylemuseError(f"unknown subject {subject!r}; the world has: {', '.join(SUBJECTS)}")
    page = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(page).text((12, 12), SUBJECTS[subject], font=_font(), embedded_color=True)
    page = page.crop(page.getbbox())
    scale = 122 / max(page.size)
    page = page.resize((round(page.width * scale), round(page.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (128, 128))
    square.paste(page, ((128 - page.width) // 2, (128 - page.height) // 2))
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    lines = _lines(pixels)
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8), "RGBA"), _image(lines)


def _lines(pixels: Array) -> Array:
    """Contours of the coverage and of the colours inside, as strokes about 4 of 128 pixels wide."""
    smooth = np.stack([_blurred(pixels[..., channel], 1.2) for channel in range(4)], axis=-1)
    down, right = np.gradient(smooth, axis=(0, 1))
    strength = np.sqrt(down**2 + right**2)
    contour = np.clip(strength[..., 3] * 8 - 0.6, 0, 1)
    inner = np.clip(strength[..., :3].max(axis=-1) * 10 - 0.7, 0, 1) * (smooth[..., 3] > 0.9)
    strokes = _blurred(np.maximum(contour, inner).astype(np.float32), 0.8)
    return np.clip(strokes * 1.7 - 0.15, 0, 1)
