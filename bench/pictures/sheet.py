"""A contact sheet: what each style draws, and under it the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN, _TITLE = 3, 60, 14
_PAPER, _TEXT = (255, 255, 255), (60, 60, 60)


@dataclass(frozen=True)
class Row:
    """A label, and as many pictures as the sheet has columns; None stays empty."""

    label: str
    pictures: Sequence[Image.Image | None]


def contact_sheet(titles: Sequence[str], rows: Sequence[Row], *, cell: int = 64, zoom: int = 2) -> Image.Image:
    """Pictures in ``cell`` x ``cell`` pixels under their columns' titles; ``zoom`` enlarges all without smoothing."""
    width, height = _MARGIN + len(titles) * (cell + _GAP), _TITLE + len(rows) * (cell + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    for i, row in enumerate(rows):
        assert len(row.pictures) == len(titles)
        for j, picture in enumerate(row.pictures):
            if picture is not None:
                fitted = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(fitted, (_MARGIN + j * (cell + _GAP), _TITLE + i * (cell + _GAP)))
    sheet = sheet.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=6 * zoom)
    for i, row in enumerate(rows):
        pen.text((2 * zoom, (_TITLE + i * (cell + _GAP) + cell // 2 - 4) * zoom), row.label, fill=_TEXT, font=font)
    for j, title in enumerate(titles):
        pen.text(((_MARGIN + j * (cell + _GAP)) * zoom, 3 * zoom), title, fill=_TEXT, font=font)
    return sheet
