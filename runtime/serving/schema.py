"""The JSON of the API: OpenAI's Images fields and our extensions. Unknown fields are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    unread: Annotated[str | None, Field(description="Words of a prompt that is longer than the model reads.")] = None


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
    unread: str | None = None


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
