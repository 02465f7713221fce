"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core import StylemuseError

if TYPE_CHECKING:
    from ..core import Guidance
    from ..pipeline import Pipeline

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[
    str, typer.Option("--model", help='"demo" (embedded), a folder in diffusers layout or of an export, or a Hub id.')
]
Backend = Annotated[str, typer.Option("--backend", help="auto, reference, triton or onnx.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; chosen if left out.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16; chosen if left out.")]
Quantization = Annotated[
    str | None, typer.Option("--quantization", help="int8 or fp8: the transformer layers in 8 bits; not with onnx.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="0 to 2^63 - 1; drawn and reported if left out.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="LoRA's alpha, for files that don't store it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a picture that is there, instead of a new name.")]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Instead of --alpha: amused-256, amused-512 or alpha-is-rank."),
]


def load(model: str, backend: str, device: str | None, dtype: str | None, quantization: str | None = None) -> Pipeline:
    """The pipeline these options ask for."""
    import stylemuse

    return stylemuse.load(model, backend=backend, device=device, dtype=dtype, quantization=quantization)


def text(value: str, what: str) -> str:
    """The value, if it is text: an argument can be any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise StylemuseError(f"{what} is not UTF-8 text") from None
    return value


def styles(values: Sequence[str]) -> dict[str, float] | None:
    """["a"] -> {"a": 1.0}, ["a=0.6", "b=0.4"] -> {"a": 0.6, "b": 0.4}, [] -> None."""
    found: dict[str, float] = {}
    for value in values:
        name, given, weight = value.partition("=")
        if name in found:
            raise StylemuseError(f"--style {name} is given twice")
        found[name] = _number(weight, f"--style {value}", "NAME or NAME=WEIGHT") if given else 1.0
    return found or None


def named_paths(values: Sequence[str]) -> dict[str, Path]:
    """["ink=path/to/lora"] -> {"ink": Path}."""
    found: dict[str, Path] = {}
    for value in values:
        name, given, path = value.partition("=")
        if not (name and given and path):
            raise StylemuseError(f"--adapter {value!r} is not allowed: NAME=PATH")
        if name in found:
            raise StylemuseError(f"--adapter {name} is given twice")
        found[name] = Path(path)
    return found


def guidance(value: str | None) -> Guidance | None:
    """ "cfg:3" -> CFG(3), "styledrop:2,5" -> StyleDrop(style=2, text=5); numbers left out are the recipe's own."""
    if value is None:
        return None
    from ..decoding.guidance import CFG, StyleDrop

    allowed = "cfg:SCALE or styledrop:STYLE,TEXT"
    name, given, rest = value.partition(":")
    numbers = [_number(part, f"--guidance {value}", allowed) for part in rest.split(",")] if given else []
    if name == "cfg" and len(numbers) <= 1:
        return CFG(*numbers)
    if name == "styledrop" and len(numbers) <= 2:
        return StyleDrop(*numbers)
    raise StylemuseError(f"--guidance {value!r} is not allowed: {allowed}")


def size(value: str | None) -> tuple[int, int] | None:
    """ "64x48" -> (64, 48), width and height."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value.lower())
    if match is None:
        raise StylemuseError(f"--size {value!r} is not allowed: WIDTHxHEIGHT in pixels, for example 64x64")
    return int(match[1]), int(match[2])


def _number(value: str, option: str, allowed: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise StylemuseError(f"{option} is not allowed: {allowed}") from None
