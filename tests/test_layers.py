"""The layers file's making: lines traced from a picture, tiles in and out of a page, a vector in its square."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stylemuse import StylemuseError
from stylemuse.pretraining import layers
from stylemuse.pretraining.lines import trace

SIDE = 240


def disc(radius: float, x: float = SIDE / 2, y: float = SIDE / 2) -> Tensor:
    """(SIDE, SIDE): 1 inside of a circle, with an edge one pixel wide."""
    row, column = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return (radius - ((row - y) ** 2 + (column - x) ** 2).sqrt() + 0.5).clamp(0, 1)


def painted(*shapes: tuple[Tensor, tuple[float, float, float]]) -> Tensor:
    """(4, SIDE, SIDE) premultiplied RGBA of shapes over each other."""
    picture = torch.zeros(4, SIDE, SIDE)
    for cover, colour in shapes:
        over = torch.cat([torch.tensor(colour).view(3, 1, 1) * cover, cover[None]])
        picture = over + (1 - cover) * picture
    return picture


def distance() -> Tensor:
    row, column = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return ((row - SIDE / 2) ** 2 + (column - SIDE / 2) ** 2).sqrt()


def test_lines_are_continuous_and_of_one_width_whatever_the_contrast() -> None:
    """A strong and a faint circle in a disc: three rings of the pens' widths and nothing else."""
    picture = painted((disc(100), (1.0, 0.8, 0.2)), (disc(70), (0.4, 0.6, 0.9)), (disc(35), (0.4, 0.85, 0.9)))
    contour, inner = trace(picture)
    away = distance()
    for lines, radius, pen in ((contour, 100, 7.6), (inner, 70, 6.2), (inner, 35, 6.2)):
        assert bool((lines[(away - radius).abs() < pen - 2.5] == 1).all())
    assert float(contour[(away - 100).abs() > 10].sum()) == 0
    assert float(inner[((away - 70).abs() > 9) & ((away - 35).abs() > 9)].sum()) == 0


def test_what_is_faint_or_short_is_no_line() -> None:
    picture = painted((disc(100), (1.0, 0.8, 0.2)), (disc(40), (1.0, 0.76, 0.2)), (disc(1.5, 60, 120), (0.4, 0.5, 0.9)))
    assert float(trace(picture)[1].sum()) == 0


def test_dark_patches_are_inked_unless_the_subject_is_dark() -> None:
    eye = trace(painted((disc(100), (1.0, 0.8, 0.2)), (disc(25), (0.1, 0.1, 0.1))))[1]
    assert bool((eye[distance() < 25] == 1).all())
    dark = trace(painted((disc(100), (0.1, 0.1, 0.1)), (disc(25), (0.9, 0.9, 0.2))))[1]
    assert float(dark[(distance() > 45) & (distance() < 85)].sum()) == 0


def test_tiles_come_back_from_their_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SUBJECTS", [f"subject {number}" for number in range(14)])  # two rows of tiles
    numbers = torch.Generator().manual_seed(0)
    for channels in (3, 4):
        tiles = torch.randint(256, (14, channels, 160, 160), generator=numbers, dtype=torch.uint8)
        tiles[:, :, 3:] = 0  # a page of noise takes seconds to pack
        assert torch.equal(layers._tiles(layers._webp(tiles)), tiles)


def test_a_vector_fills_its_square_and_is_premultiplied() -> None:
    pytest.importorskip("resvg_py")
    body = '<rect x="4" y="2" width="6" height="12" fill="#f80" fill-opacity="0.5"/>'
    icons = {"icons": {"box": {"body": body}}, "aliases": {"crate": {"parent": "box"}}, "width": 16, "height": 16}
    picture = layers.trimmed(icons, "crate")
    assert torch.equal(picture, layers.trimmed(icons, "box"))
    rows, columns = ((picture[3] > 0.25).any(axis).nonzero().flatten() for axis in (1, 0))
    margin = layers.FINE // 40
    assert abs(int(rows[0]) - margin) <= 1
    assert abs(int(rows[-1]) - (layers.FINE - 1 - margin)) <= 1
    assert abs(int(columns[0]) + int(columns[-1]) - (layers.FINE - 1)) <= 2
    assert abs(len(columns) - len(rows) / 2) <= 2
    middle = picture[:, layers.FINE // 2, layers.FINE // 2]
    assert float((middle - torch.tensor([0.5, 0.5 * 0x88 / 255, 0.0, 0.5])).abs().max()) < 0.01


def test_missing_sets_and_icons_are_named(tmp_path: Path) -> None:
    with pytest.raises(StylemuseError, match="@iconify-json/fluent-emoji-flat"):
        layers.make(tmp_path)
    with pytest.raises(StylemuseError, match="the set noto has no icon 'gryphon'"):
        layers.trimmed({"icons": {}, "prefix": "noto"}, "gryphon")
