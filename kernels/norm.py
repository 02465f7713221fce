"""Norm and modulation of every token: y = n(x) w, then y gain + shift with the pair of the token's row.

x (R, N, D), w (D,), modulation (R, 2, D) holding gain and shift -> (R, N, D), where over the D channels

    "rms"     n(x) = x / sqrt(mean(x^2) + eps)                       Zhang and Sennrich, arXiv 1910.07467
    "layer"   n(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)   Ba et al., arXiv 1607.06450, without bias

and both means are taken in fp32. With modulation this is the adaptive norm of diffusers' `AdaLayerNormContinuous`.

The kernel: a program keeps whole tokens in registers, so that x is read once and y written once, with one rounding;
norm and modulation apart read and write T D numbers twice. Projections can take a `Norm` along, by `statistics` and
`normed`. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .tuning import Call, Launch, Specimen, ceil_div, named_strides, pick, power_of_two

Kind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A norm with its parameters, for an operation that takes it along; fields as in the module's docstring."""

    weight: Tensor
    epsilon: float
    kind: Kind = "rms"
    modulation: Tensor | None = None

    def apply(self, x: Tensor, kernels: Kernels) -> Tensor:
        """The norm on its own."""
        return norm(x, self.weight, self.epsilon, self.kind, self.modulation, kernels=kernels)


def norm_reference(
    x: Tensor, weight: Tensor, epsilon: float, kind: Kind = "rms", modulation: Tensor | None = None
) -> Tensor:
    """The definition in plain torch, which takes the means in fp32."""
    if kind == "rms":
        y = F.rms_norm(x, weight.shape, weight, epsilon)
    else:
        y = F.layer_norm(x, weight.shape, weight, None, epsilon)
    return y if modulation is None else modulate(y, modulation)


def modulate(x: Tensor, modulation: Tensor) -> Tensor:
    """x (R, N, D) times gain plus shift, the two sides of (R, 2, D)."""
    return torch.addcmul(modulation[:, 1:], x, modulation[:, :1])


def choices(channels: int) -> tuple[Launch, ...]:
    """The launches for a width, the default first: about 4096 numbers a program."""
    fits = max(1, 4096 // power_of_two(channels))
    return tuple(Launch({"BLOCK_TOKENS": tokens}, 4, 1) for tokens in (fits, max(1, fits // 4)))


@jit
def _norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    modulation: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    epsilon: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_channel: tl.tensor,
    weight_channel: tl.tensor,
    modulation_row: tl.tensor,
    modulation_side: tl.tensor,
    modulation_channel: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    CENTRED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Some tokens of one row."""
    row_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    channel_inside = channel < CHANNELS
    inside = (token < tokens)[:, None] & channel_inside[None, :]
    at = x + row * x_row + token[:, None] * x_token + channel[None, :] * x_channel
    value = tl.load(at, inside, 0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(value, 1) / CHANNELS
        value = tl.where(inside, value - mean[:, None], 0.0)
    spread = tl.sqrt(tl.sum(value * value, 1) / CHANNELS + epsilon)
    gain = tl.load(weight + channel * weight_channel, channel_inside, 0.0).to(tl.float32)
    value = value / spread[:, None] * gain[None, :]
    if modulation is not None:
        gain_at = modulation + row * modulation_row + channel * modulation_channel
        gain = tl.load(gain_at, channel_inside, 0.0).to(tl.float32)
        shift = tl.load(gain_at + modulation_side, channel_inside, 0.0).to(tl.float32)
        value = value * gain[None, :] + shift[None, :]
    y_at = y + row * y_row + token[:, None] * y_token + channel[None, :]
    tl.store(y_at, value.to(y.dtype.element_ty), inside)


@jit
def statistics(
    x: tl.tensor,
    x_input: tl.tensor,
    token_inside: tl.tensor,
    epsilon: tl.tensor,
    CENTRED: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> tl.tuple:
    """Of the tokens x points to: the mean to be taken off, 0 unless CENTRED, and one over the spread."""
    mean = tl.zeros((BLOCK_TOKENS,), tl.float32)
    if CENTRED:
        for first in range(0, INPUTS, BLOCK_INPUTS):
            places = first + tl.arange(0, BLOCK_INPUTS)
            inside = token_inside[:, None] & (places < INPUTS)[None, :]
            mean += tl.sum(tl.load(x[:, None] + places[None, :] * x_input, inside, 0.0).to(tl.float32), 1)
        mean = mean / INPUTS
    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for first in range(0, INPUTS, BLOCK_INPUTS):
        places = first + tl.arange(0, BLOCK_INPUTS)
        inside = token_inside[:, None] & (places < INPUTS)[None, :]
        value = tl.load(x[:, None] + places[None, :] * x_input, inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - mean[:, None], 0.0)
        square += tl.sum(value * value, 1)
    return mean, 1.0 / tl.sqrt(square / INPUTS + epsilon)


@jit
def normed(
    tile: tl.tensor,
    norm: tl.tuple,
    strides: tl.tuple,
    places: tl.tensor,
    MODULATED: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """A tile of x at the inputs `places`, normed, in x's number format.

    norm: the tokens' statistics, pointers to the norm's weight and to the row's gain and shift. strides: of an input in
    the norm's weight and in the gain.
    """
    mean, inverse, weight, gain_at, shift_at = norm
    weight_input, gain_input = strides
    inside = places < INPUTS
    wide = (tile.to(tl.float32) - mean[:, None]) * inverse[:, None]
    wide *= tl.load(weight + places * weight_input, inside, 0.0).to(tl.float32)[None, :]
    if MODULATED:
        gain = tl.load(gain_at + places * gain_input, inside, 0.0).to(tl.float32)
        shift = tl.load(shift_at + places * gain_input, inside, 0.0).to(tl.float32)
        wide = wide * gain[None, :] + shift[None, :]
    return wide.to(tile.dtype)


def _call(x: Tensor, weight: Tensor, epsilon: float, kind: str, modulation: Tensor | None, y: Tensor) -> Call:
    """The launch that fills y."""
    rows, tokens, channels = x.shape
    assert weight.shape == (channels,), "one weight per channel"
    assert modulation is None or modulation.shape == (rows, 2, channels), "one gain and one shift per row and channel"
    strides = {
        **named_strides(x, "x_row", "x_token", "x_channel"),
        **named_strides(weight, "weight_channel"),
        **named_strides(modulation, "modulation_row", "modulation_side", "modulation_channel"),
        **named_strides(y, "y_row", "y_token"),
    }
    tensors = {"x": x, "weight": weight, "modulation": modulation, "y": y}
    constants = {"CENTRED": kind == "layer", "CHANNELS": channels, "BLOCK_CHANNELS": power_of_two(channels)}

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return (rows * ceil_div(tokens, tiles["BLOCK_TOKENS"]),)

    return Call(_norm_kernel, {**tensors, "tokens": tokens, "epsilon": float(epsilon), **strides}, constants, grid)


def _output(x: Tensor, *_: object) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape)


@operator("norm(Tensor x, Tensor weight, float epsilon, str kind, Tensor? modulation) -> Tensor", fake=_output)
def _norm(x: Tensor, weight: Tensor, epsilon: float, kind: str, modulation: Tensor | None) -> Tensor:
    y = _output(x)
    problem = f"{x.shape[2]} {kind} {str(x.dtype).removeprefix('torch.')}"
    call = _call(x, weight, epsilon, kind, modulation, y)
    call.run(pick("norm", problem, x.device, choices(x.shape[2])))
    return y


def norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    kind: Kind = "rms",
    modulation: Tensor | None = None,
    *,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """The norm of every token, and its modulation; see the module's docstring."""
    if "norm" not in kernels.triton:
        return norm_reference(x, weight, epsilon, kind, modulation)
    forward_only(x, weight, modulation)
    return _norm(x, weight, epsilon, kind, modulation)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kinds: tuple[tuple[Kind, int, bool], ...] = (("rms", 768, False), ("rms", 1024, True), ("layer", 1024, True))
        for kind, channels, modulated in kinds:
            x, weight = (torch.empty(*shape, channels, dtype=dtype, device="meta") for shape in ((2, 256), ()))
            modulation = x.new_empty(2, 2, channels) if modulated else None
            name = f"norm {kind}{' modulated' if modulated else ''}, {str(dtype).removeprefix('torch.')}"
            yield Specimen(name, _call(x, weight, 1e-6, kind, modulation, _output(x)), choices(channels), matrix=False)
