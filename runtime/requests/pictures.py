"""Pictures that a request brings, as viewers show them: upright, on white where they are transparent."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from ..core import StylemuseError

_OPAQUE = 255
_HALF = 128


def upright(picture: Image.Image) -> Image.Image:
    """The picture in RGB, turned as its EXIF says, on white where it is transparent.

    Raises:
        StylemuseError: more than 8 bits per channel, which would have to be mapped to 8 in some way or other.
    """
    turned = _turned(picture)
    if turned.has_transparency_data:
        shown = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return turned.convert("RGB")


def mask(picture: Image.Image) -> Image.Image:
    """A mask in greys, turned as its EXIF says; white marks what is drawn anew.

    Elsewhere transparency marks it. A mask that is transparent where it is not white, or the other way round, could
    mean either.

    Raises:
        StylemuseError: it is such a mask, or has more than 8 bits per channel.
    """
    turned = _turned(picture)
    if turned.has_transparency_data:
        both = turned.convert("RGBA")
        grey, alpha = (np.asarray(each) for each in (both.convert("RGB").convert("L"), both.getchannel("A")))
        if (alpha < _OPAQUE).any() and ((grey >= _HALF) != (alpha < _HALF)).any():
            raise StylemuseError(
                "the mask has transparent parts that are not its white ones; white marks what is drawn anew: "
                "give a mask without transparency"
            )
        turned = both.convert("RGB")
    return turned.convert("L")


def _turned(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise StylemuseError("the picture has more than 8 bits per channel; convert it to 8 first")
    return ImageOps.exif_transpose(picture) or picture
