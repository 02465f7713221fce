"""Pictures a command reads and writes: what is read is bounded, what is written is never half."""

from __future__ import annotations

import io
import warnings
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import StylemuseError
from .output import check_file, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
"""Bounds on a picture that is read; decoded it takes 4 bytes a pixel, several times over."""

WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}


def read_picture(path: Path, *, mask: bool = False) -> Image:
    """A picture as requests take it, in RGB, or a mask in greys; of an animation the first frame.

    Raises:
        StylemuseError: no file, not a picture of a known format, damaged, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    from ..adapters.files import read_bytes
    from ..requests import pictures

    data = read_bytes(path, MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READ) as file:
                width, height = file.size
                if width * height > MAX_PIXELS:
                    raise StylemuseError(f"{width} x {height} pixels; at most {MAX_PIXELS} are allowed")
                return pictures.mask(file) if mask else pictures.upright(file)
    except StylemuseError as error:
        raise StylemuseError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise StylemuseError(f"{path} is not a picture; allowed: {', '.join(READ)}") from None
    except Image.DecompressionBombError:
        raise StylemuseError(f"{path} has too many pixels; at most {MAX_PIXELS} are allowed") from None
    except Exception as error:  # Pillow's decoders share no base for what they raise on damaged files
        raise StylemuseError(f"{path} is a damaged picture: {error}") from None


def targets(out: Path, count: int = 1, *, force: bool = False) -> list[Path]:
    """Where the pictures will be: ``fox.png``, or ``fox-0.png``, ``fox-1.png``, ... for more than one.

    Where a picture is there already it is ``fox_2.png``, ``fox_3.png``, ...: the first name that is free. ``force``
    replaces it.

    Raises:
        StylemuseError: an unknown format, a folder, or a place that can't be written.
    """
    if out.is_dir():
        raise StylemuseError(f"{out} is a folder; give a file, for example {out / 'picture.png'}")
    if out.suffix.lower() not in WRITTEN:
        raise StylemuseError(f"{out}: format {out.suffix!r} is unknown; allowed: {', '.join(WRITTEN)}")
    for number in counting(1):
        stem = out.stem if number == 1 else f"{out.stem}_{number}"
        names = [stem] if count == 1 else [f"{stem}-{index}" for index in range(count)]
        paths = [out.with_name(f"{name}{out.suffix}") for name in names]
        if force or not any(path.is_file() for path in paths):
            break
    for path in paths:
        check_file(path)
    return paths


def encoded(picture: Image, suffix: str = ".png") -> bytes:
    """The picture as a file's content."""
    form, options = WRITTEN[suffix.lower()]
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def save(picture: Image, path: Path) -> None:
    """Write a picture in the format its name asks for."""
    write_file(path, encoded(picture, path.suffix))
