"""A generation as the API asks for it -> the request that is drawn. What is out of bounds is refused before that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..core import Guidance, Request, Sampling, Style
from ..decoding.guidance import CFG, StyleDrop
from ..requests.planning import recommended_steps
from .errors import ApiError
from .schema import Generation, StyleUse
from .settings import Settings

Facts = Mapping[str, str | int | float]


def to_request(
    given: Generation, settings: Settings, defaults: Mapping[str, Any], factor: int, recommended: Callable[[str], Facts]
) -> Request:
    """The request. What is out of bounds is refused before anything is made of it.

    ``defaults`` is what the model recommends, ``recommended`` what a style does; ``factor`` is pixels per token.
    """
    limits = settings.limits
    _most("n", given.n, limits.pictures)
    steps = given.num_inference_steps
    _most("num_inference_steps", steps or 1, limits.steps)
    for name in ("prompt", "negative_prompt"):
        if len(getattr(given, name)) > limits.prompt:
            raise ApiError(400, f"{name} has over {limits.prompt} characters, which are allowed", param=name)
    size = _size(given.size, settings)
    if given.partial_images is not None and not given.stream:
        raise ApiError(400, "partial_images needs stream", param="partial_images")
    if given.output_compression is not None and given.output_format == "png":
        raise ApiError(400, "output_compression is for jpeg and webp", param="output_compression")
    if given.timeout is not None and given.timeout > limits.seconds:
        raise ApiError(400, f"timeout is at most {limits.seconds:g} seconds", param="timeout")
    styles = _styles(given, settings)
    told = {name: recommended(name) for name in styles or ()}
    work = given.n * (steps or recommended_steps(told, defaults)) * size[0] * size[1] // factor**2
    if work > limits.work:
        raise ApiError(400, f"n x steps x tokens is {work}; at most {limits.work} are allowed", param="n")
    return Request(
        prompt=given.prompt,
        style=styles,
        negative_prompt=given.negative_prompt,
        n=given.n,
        seed=given.seed,
        sampling=Sampling(steps=steps),
        guidance=_guidance(given, next(iter(told.values()), {})),
        size=size,
    )


def _most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ApiError(400, f"{name} = {value} is not allowed: at most {most}", param=name)


def _size(given: str, settings: Settings) -> tuple[int, int]:
    if given == "auto":
        return settings.sizes[0]
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", given)
    size = (int(match[1]), int(match[2])) if match else None
    if size not in settings.sizes:
        allowed = ", ".join(f"{width}x{height}" for width, height in settings.sizes)
        raise ApiError(400, f"size {given!a} is not allowed: auto, {allowed}", param="size")
    return size


def _styles(given: Generation, settings: Settings) -> dict[str, float | Style] | None:
    """From ``style``, from ``styles``, or from a ``model`` that is the name of a style."""
    named = given.model if given.model not in (None, settings.model) else None
    chosen = [name for name, value in (("style", given.style), ("styles", given.styles), ("model", named)) if value]
    if len(chosen) > 1:
        raise ApiError(400, f"{' and '.join(chosen)} both choose a style; give one of them", param=chosen[-1])
    if given.adapter_strength is not None and not (given.style or named):
        raise ApiError(400, "adapter_strength needs style; in styles give each its strength", param="adapter_strength")
    if given.styles:
        return {
            name: Style(use.weight, use.strength) if isinstance(use, StyleUse) else use
            for name, use in given.styles.items()
        }
    name = given.style or named
    strength = 1.0 if given.adapter_strength is None else given.adapter_strength
    return None if name is None else {name: Style(strength=strength)}


def _guidance(given: Generation, recommended: Facts) -> Guidance | None:
    """CFG or StyleDrop as asked for; a strength that is left out is what the style recommends."""
    styledrop = {"style": given.style_strength, "text": given.text_strength}
    named = {name: value for name, value in styledrop.items() if value is not None}
    if given.guidance_scale is not None:
        if named:
            raise ApiError(400, "guidance_scale and style_strength or text_strength exclude each other")
        return CFG(given.guidance_scale)
    if not named:
        return None
    own = {
        name: float(recommended[name])
        for name in styledrop
        if recommended.get("guidance") == "StyleDrop" and name in recommended
    }
    return StyleDrop(**own | named)
