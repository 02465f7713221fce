"""The layers file: every subject in every hand, as pixels and as line maps, so that drawing needs no vector library.

    python -m stylemuse.pretraining.layers --sets FOLDER --out FILE

FOLDER holds the vector sets as their npm packages unpack: ``fluent-emoji-flat/icons.json`` and so on (data/README.md
names them, their authors and licences). The file is safetensors with two lossless WebP pictures a hand, rows of tiles
of `SIDE` x `SIDE` pixels in the order of SUBJECTS: ``<hand>.colour``, premultiplied RGBA; ``<hand>.lines``, contour in
red and inner lines in green. Needs ``resvg-py``; reading the file needs Pillow only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..core import StylemuseError
from .attributes import HANDS, SUBJECTS
from .lines import trace

# A strict editable install links the modules, not what the wheel leaves out.
PATH = Path(__file__).resolve().parent / "data" / "layers.safetensors"
_COMMAND = "python -m stylemuse.pretraining.layers"
SIDE = 160
FINE = 3 * SIDE  # what is rendered and traced, before it is averaged down
PACKAGES = {"fluent": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
_COLUMNS = 12
_MARGIN = 4 / SIDE  # of a tile, at each side: half of a contour's stroke lies outside of the shape


def read(path: Path = PATH) -> Tensor:
    """(hands, subjects, 6, SIDE, SIDE) uint8: premultiplied red, green, blue, coverage, contour, inner lines.

    Raises StylemuseError where the file is missing or was made for other subjects or hands.
    """
    if not path.is_file():
        raise StylemuseError(f"{path} is missing; make it with: {_COMMAND}")
    with safe_open(path, framework="pt") as file:
        made_for = file.metadata() or {}
        if made_for.get("subjects") != ",".join(SUBJECTS) or made_for.get("hands") != ",".join(HANDS):
            raise StylemuseError(
                f"{path} was made for other subjects; make it anew: python -m stylemuse.pretraining.layers"
            )
        hands = []
        for hand in HANDS:
            colour, lines = (_tiles(file.get_tensor(f"{hand}.{part}")) for part in ("colour", "lines"))
            hands.append(torch.cat([colour, lines[:, :2]], 1))
    return torch.stack(hands)


def draw(body: Mapping[str, Any], box: tuple[float, float, float, float], side: int) -> Tensor:
    """(4, side, side) fp32: what lies in ``box`` (left, top, width, height) of an icon, premultiplied RGBA."""
    import resvg_py  # the only use of the library

    svg = (  # with a size in whole pixels: without one, resvg rounds the box up to whole units
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{" ".join(map(str, box))}">{body["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32) / 255
    picture = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    picture[:3] *= picture[3:]
    return picture


def trimmed(icons: Mapping[str, Any], name: str) -> Tensor:
    """(4, FINE, FINE): the icon as large as the tile's margin allows, in the middle."""
    icon = _icon(icons, name)
    width, height = (float(icon.get(part, icons.get(part, 16))) for part in ("width", "height"))
    left, top = float(icon.get("left", 0)), float(icon.get("top", 0))
    side = max(width, height)
    whole = draw(icon, (left, top, side, side), FINE)[3] > 0.1
    rows, columns = whole.any(1).nonzero().flatten(), whole.any(0).nonzero().flatten()
    unit = side / FINE
    first = (float(columns[0]) * unit, float(rows[0]) * unit)
    last = (float(columns[-1] + 1) * unit, float(rows[-1] + 1) * unit)
    span = max(last[0] - first[0], last[1] - first[1]) / (1 - 2 * _MARGIN)
    middle = (left + (first[0] + last[0]) / 2, top + (first[1] + last[1]) / 2)
    return draw(icon, (middle[0] - span / 2, middle[1] - span / 2, span, span), FINE)


def make(sets: Path) -> bytes:
    """The layers file's content. Raises StylemuseError where a set or an icon is missing."""
    tensors = {}
    for hand in HANDS:
        path = sets / PACKAGES[hand] / "icons.json"
        if not path.is_file():
            raise StylemuseError(f"{path} is missing; unpack the npm package @iconify-json/{PACKAGES[hand]} there")
        icons = json.loads(path.read_text(encoding="utf-8"))
        colours, lines = [], []
        for name in SUBJECTS.values():
            fine = trimmed(icons, name)
            contour, inner = trace(fine)
            colours.append(_averaged(fine))
            lines.append(_averaged(torch.stack([contour, inner, torch.zeros_like(inner)])))
        tensors[f"{hand}.colour"] = _webp(torch.stack(colours))
        tensors[f"{hand}.lines"] = _webp(torch.stack(lines))
    return save(tensors, {"subjects": ",".join(SUBJECTS), "hands": ",".join(HANDS)})


def _icon(icons: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    aliases = icons.get("aliases", {})
    while name in aliases:
        name = aliases[name]["parent"]
    if name not in icons["icons"]:
        raise StylemuseError(f"the set {icons.get('prefix')} has no icon {name!r}")
    icon: Mapping[str, Any] = icons["icons"][name]
    return icon


def _averaged(fine: Tensor) -> Tensor:
    """(c, FINE, FINE) in 0..1 -> (c, SIDE, SIDE) uint8."""
    return (torch.nn.functional.avg_pool2d(fine[None], FINE // SIDE)[0] * 255 + 0.5).to(torch.uint8)


def _webp(tiles: Tensor) -> Tensor:
    """(n, c, SIDE, SIDE) uint8 -> the bytes of one lossless picture, `_COLUMNS` tiles a row."""
    count, channels = tiles.shape[:2]
    rows = -(-count // _COLUMNS)
    page = torch.zeros(rows * _COLUMNS, channels, SIDE, SIDE, dtype=torch.uint8)
    page[:count] = tiles
    page = page.view(rows, _COLUMNS, channels, SIDE, SIDE).permute(0, 3, 1, 4, 2)
    pixels = page.reshape(rows * SIDE, _COLUMNS * SIDE, channels).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exact=True, quality=100, method=6)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _tiles(content: Tensor) -> Tensor:
    """The reverse: (subjects, c, SIDE, SIDE) uint8."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content.numpy().tobytes()))))
    rows, channels = pixels.shape[0] // SIDE, pixels.shape[2]
    tiles = pixels.view(rows, SIDE, _COLUMNS, SIDE, channels).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * _COLUMNS, channels, SIDE, SIDE)[: len(SUBJECTS)]


def main() -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m stylemuse.pretraining.layers", description=__doc__)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the unpacked vector sets")
    parser.add_argument("--out", type=Path, default=PATH, help="file to write")
    options = parser.parse_args()
    content = make(options.sets)
    options.out.write_bytes(content)
    print(f"{options.out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
