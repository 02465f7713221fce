"""The JSON of the API: OpenAI's Images fields, our extensions, the request they become. Unknown fields are errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core import Guidance, Request, Sampling, Style
from ..decoding.guidance import CFG, StyleDrop
from .errors import ApiError
from .settings import Settings

Name = Annotated[str, Field(min_length=1, max_length=64)]
Number = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StyleUse(_Strict):
    """A style in a blend: its weight, and the strength of its adapter."""

    weight: Share = 1.0
    strength: Number = 1.0


class Generation(_Strict):
    """POST /v1/images/generations."""

    prompt: Annotated[str, Field(min_length=1, description="What to draw.")]
    model: Annotated[str | None, Field(max_length=200, description="The base model, or a style of it.")] = None
    n: Annotated[int, Field(ge=1)] = 1
    size: Annotated[str, Field(max_length=20, description='"auto", or WIDTHxHEIGHT of those that are allowed.')] = (
        "auto"
    )
    response_format: Annotated[
        Literal["b64_json", "url"], Field(description="url gives a data: URL; nothing is stored.")
    ] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of jpeg and webp; webp is lossless without it.")
    ] = None
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto"] = "auto"
    moderation: Literal["auto"] = "auto"
    user: Annotated[str | None, Field(max_length=200, description="Goes into the log.")] = None
    stream: bool | None = False
    partial_images: Annotated[
        int | None, Field(ge=0, le=1000, description="Of each picture, evenly spaced; needs stream.")
    ] = None

    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: Annotated[Amount | None, Field(description="Classifier-free guidance in place of StyleDrop's.")] = (
        None
    )
    negative_prompt: str = ""
    style: Annotated[Name | None, Field(description="The name of a style; or use styles.")] = None
    styles: Annotated[
        dict[Name, Share | StyleUse] | None,
        Field(min_length=1, max_length=16, description="Styles with weights, what is left of 1 goes to the base."),
    ] = None
    adapter_strength: Annotated[Number | None, Field(description="Multiplies the adapter of style; 1 is as tuned.")] = (
        None
    )
    style_strength: Annotated[Amount | None, Field(description="StyleDrop's guidance towards the style.")] = None
    text_strength: Annotated[Amount | None, Field(description="StyleDrop's guidance towards the prompt.")] = None
    priority: Annotated[int, Field(ge=-4, le=4)] = 0
    timeout: Annotated[float | None, Field(gt=0, allow_inf_nan=False, description="Seconds until 504.")] = None


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    revised_prompt: str | None = None


class TokenDetails(BaseModel):
    """Where a request's input tokens come from."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Text tokens read and picture tokens drawn."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Pictures(BaseModel):
    """The answer to a generation."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: None = None
    size: str
    usage: Usage


class PictureEvent(BaseModel):
    """The data of an event: a picture on its way, or a finished one.

    A partial picture has its place among those of its picture and the decoding steps done, of how many; a finished one
    has its seed.
    """

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["auto"] = "auto"
    size: str
    index: Annotated[int, Field(description="Which of the request's n pictures.")]
    partial_image_index: int | None = None
    step: int | None = None
    steps: int | None = None
    seed: int | None = None
    usage: Usage | None = None


class Model(BaseModel):
    """What can be drawn with: the base model, whose ``parent`` is null, or a style of it.

    ``root`` is the version a style's name stands for now. Only the base has ``sizes``; a style has the rest.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    sizes: list[str] | None = None
    descriptor: str | None = None
    licence: str | None = None
    rank: int | None = None
    recommended: dict[str, str | int | float] | None = None
    reference: Annotated[bool | None, Field(description="Whether it has a reference picture.")] = None


class Models(BaseModel):
    """The base model, then its styles by name."""

    object: Literal["list"]
    data: list[Model]


Facts = Mapping[str, str | int | float]


def to_request(
    given: Generation, settings: Settings, default_steps: int, factor: int, recommended: Callable[[str], Facts]
) -> Request:
    """The request. What is out of bounds is refused before anything is made of it.

    ``factor`` is pixels per token; ``recommended`` what a style recommends.
    """
    limits = settings.limits
    _most("n", given.n, limits.pictures)
    steps = given.num_inference_steps
    _most("num_inference_steps", steps or 1, limits.steps)
    for name in ("prompt", "negative_prompt"):
        if len(getattr(given, name)) > limits.prompt:
            raise ApiError(400, f"{name} has over {limits.prompt} characters, which are allowed", param=name)
    size = _size(given.size, settings)
    work = given.n * (steps or default_steps) * size[0] * size[1] // factor**2
    if work > limits.work:
        raise ApiError(400, f"n x steps x tokens is {work}; at most {limits.work} are allowed", param="n")
    if given.partial_images is not None and not given.stream:
        raise ApiError(400, "partial_images needs stream", param="partial_images")
    if given.output_compression is not None and given.output_format == "png":
        raise ApiError(400, "output_compression is for jpeg and webp", param="output_compression")
    if given.timeout is not None and given.timeout > limits.seconds:
        raise ApiError(400, f"timeout is at most {limits.seconds:g} seconds", param="timeout")
    styles = _styles(given, settings)
    return Request(
        prompt=given.prompt,
        style=styles,
        negative_prompt=given.negative_prompt,
        n=given.n,
        seed=given.seed,
        sampling=Sampling(steps=steps),
        guidance=_guidance(given, recommended(next(iter(styles))) if styles else {}),
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
