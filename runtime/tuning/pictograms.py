"""Pictograms to draw from: emoji of the Noto Color Emoji font, and line drawings made of them.

The font (OFL; Debian: ``fonts-noto-color-emoji``) is needed only to train and to judge.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..core import StylemuseError
from .looks import SUBJECTS

Array = NDArray[np.floating[Any]]
"""Pixels, fp32 in 0..1: (h, w) or (h, w, channels)."""


@cache
def font() -> ImageFont.FreeTypeFont:
    """The emoji font, searched where systems keep fonts."""
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
def pictogram(subject: str) -> tuple[Image.Image, Image.Image]:
    """The emoji, premultiplied RGBA, and its line drawing, both trimmed to a 128-pixel square."""
    if subject not in SUBJECTS:
        raise StylemuseError(f"unknown subject {subject!r}; the world has: {', '.join(SUBJECTS)}")
    page = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(page).text((12, 12), SUBJECTS[subject], font=font(), embedded_color=True)
    page = page.crop(page.getbbox())
    scale = 122 / max(page.size)
    page = page.resize((round(page.width * scale), round(page.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (128, 128))
    square.paste(page, ((128 - page.width) // 2, (128 - page.height) // 2))
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    lines = _lines(pixels)
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8), "RGBA"), to_image(lines)


def to_image(mask: Array) -> Image.Image:
    """A mask (h, w) as a picture of one channel."""
    return Image.fromarray((mask * 255).astype(np.uint8))


def blurred(mask: Array, radius: float) -> Array:
    """A mask (h, w) under a Gaussian of this radius in pixels."""
    return np.asarray(to_image(mask).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _lines(pixels: Array) -> Array:
    """Contours of the coverage and of the colours inside, as strokes about 4 of 128 pixels wide."""
    smooth = np.stack([blurred(pixels[..., channel], 1.2) for channel in range(4)], axis=-1)
    down, right = np.gradient(smooth, axis=(0, 1))
    strength = np.sqrt(down**2 + right**2)
    contour = np.clip(strength[..., 3] * 8 - 0.6, 0, 1)
    inner = np.clip(strength[..., :3].max(axis=-1) * 10 - 0.7, 0, 1) * (smooth[..., 3] > 0.9)
    strokes = blurred(np.maximum(contour, inner).astype(np.float32), 0.8)
    return np.clip(strokes * 1.7 - 0.15, 0, 1)
