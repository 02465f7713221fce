"""``stylemuse demo``: every style of a model in one mixed batch, on a labelled sheet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options, pictures
from .output import document, progress, say, table

if TYPE_CHECKING:
    from PIL.Image import Image

SUBJECTS = ("pineapple", "sailboat", "castle", "skull")
"""The columns; the embedded model knows them, and none is the picture a style was tuned from."""
PLAIN = "no style"
SIDE = 128
"""Pictures are enlarged by a whole number to about this many pixels."""


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The sheet.")] = Path("out/demo.png"),
    seed: options.Seed = None,
    model: options.Model = "demo",
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Draw four subjects in every style the model comes with, all in one batch."""
    (path,) = pictures.targets(out, force=force)
    began = time.perf_counter()
    from ..core import Request
    from ..decoding.rng import fresh_seed, image_seeds
    from ..pretraining.attributes import article

    seeds = image_seeds(fresh_seed() if seed is None else seed, len(SUBJECTS))
    pipe = options.load(model, backend, device, dtype, quantization)
    loading = time.perf_counter() - began
    styles = (None, *pipe.adapters.names)
    # A column shares its seed, so that its pictures differ by the style alone.
    requests = [
        Request(article(subject), style=style, seed=own)
        for style in styles
        for subject, own in zip(SUBJECTS, seeds, strict=True)
    ]
    with progress(f"drawing {len(requests)} pictures in {len(styles)} styles") as update:
        results = pipe.run(requests, on_step=lambda done: update(done.step, done.steps, ""))
    drawn = [result.images[0] for result in results]
    rows = [drawn[i : i + len(SUBJECTS)] for i in range(0, len(drawn), len(SUBJECTS))]
    pictures.save(sheet(rows, [style or PLAIN for style in styles], SUBJECTS), path)
    parts = seconds(results[0].timings) | {"load": {"total": loading}}
    if as_json:
        facts = {"path": str(path), "model": model, "pictures": len(drawn), "subjects": list(SUBJECTS)}
        facts |= {"styles": list(styles), "seeds": list(seeds), "steps": len(results[0].timings["step"])}
        document(facts | {"seconds": parts, "explain": pipe.explain()})
        return
    table(
        ("part", "seconds", "per step"),  # a step is the transformer, the head and the sampling of it
        [(part, f"{spent['total']:.3f}", _figure(spent.get("median"))) for part, spent in parts.items()],
        numbers=("seconds", "per step"),
    )
    say(f"{path}  {len(drawn)} pictures ({len(styles)} x {len(SUBJECTS)}) in one batch, seed {seeds[0]}")


def seconds(timings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Seconds by part: the total, and of what is done at every decoding step also each step's and their median."""
    parts: dict[str, dict[str, Any]] = {}
    for part, spent in timings.items():
        if isinstance(spent, list):
            parts[part] = {"total": sum(spent), "median": statistics.median(spent), "steps": spent}
        else:
            parts[part] = {"total": spent}
    return parts


def sheet(rows: Sequence[Sequence[Image]], left: Sequence[str], top: Sequence[str]) -> Image:
    """The pictures in a grid, a row's label to its left and a column's above it."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = rows[0][0].size
    factor = max(1, SIDE // max(width, height))
    width, height = width * factor, height * factor
    font, gap = ImageFont.load_default(15), 4
    margin = 2 * gap + round(max(font.getlength(label) for label in left))
    header = 28
    page = Image.new("RGB", (margin + (width + gap) * len(top), header + (height + gap) * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for column, label in enumerate(top):
        pen.text((margin + (width + gap) * column + width // 2, header // 2), label, "black", font, anchor="mm")
    for row, (label, drawn) in enumerate(zip(left, rows, strict=True)):
        y = header + (height + gap) * row
        pen.text((margin - gap, y + height // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(drawn):
            enlarged = picture.resize((width, height), Image.Resampling.LANCZOS)
            page.paste(enlarged, (margin + (width + gap) * column, y))
    return page


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
