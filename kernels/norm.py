"""Norm and modulation of every token: y = n(x) w, then y gain + shift with the pair of the token's row.

x (R, N, D), w (D,), modulation (R, 2, D) holding gain and shift -> (R, N, D), where over the D channels

    "rms"     n(x) = x / sqrt(mean(x^2) + eps)                       Zhang and Sennrich, arXiv 1910.07467
    "layer"   n(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)   Ba et al., arXiv 1607.06450, without bias

and both means are taken in fp32. With modulation this is the adaptive norm of diffusers' `AdaLayerNormContinuous`.
Here are the definition and the device's functions; the launch that norms tokens is in `inputs`, with what else a
projection reads. Not inside of the projection: there every tile took the statistics again and normed its x between the
load and the matrix unit, which on an H100 made a step half as fast again (bench/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import jit, tl

Kind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A norm with its parameters, for an operation that takes it along; fields as in the module's docstring."""

    weight: Tensor
    epsilon: float
    kind: Kind = "rms"
    modulation: Tensor | None = None


def norm_reference(
    x: Tensor, weight: Tensor, epsilon: float, kind: Kind = "rms", modulation: Tensor | None = None
) -> Tensor:
    """The definition in plain torch, which takes the means in fp32."""
    if kind == "rms":
        # Under autocast the weight is fp32 beside a narrower x, which torch would take apart into six operations.
        y = F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    else:
        y = F.layer_norm(x, weight.shape, weight, None, epsilon)
    return y if modulation is None else modulate(y, modulation)


def modulate(x: Tensor, modulation: Tensor) -> Tensor:
    """x (R, N, D) times gain plus shift, the two sides of (R, 2, D)."""
    return torch.addcmul(modulation[:, 1:], x, modulation[:, :1])


@jit
def scaled(
    value: tl.tensor,
    weight: tl.tensor,
    gain: tl.tensor,
    channel: tl.tensor,
    MODULATED: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """fp32 tokens (T, C), normed, times the weight at these channels, and modulated by the row's gain and shift."""
    inside = channel < CHANNELS
    value *= tl.load(weight + channel, inside, 0.0).to(tl.float32)[None, :]
    if MODULATED:
        factor = tl.load(gain + channel, inside, 0.0).to(tl.float32)
        addend = tl.load(gain + CHANNELS + channel, inside, 0.0).to(tl.float32)
        value = value * factor[None, :] + addend[None, :]
    return value


@jit
def normed(
    value: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor,
    gain: tl.tensor,
    channel: tl.tensor,
    epsilon: tl.tensor,
    CENTRED: tl.constexpr,
    MODULATED: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Whole tokens (T, C >= CHANNELS) in fp32, 0 beyond the channels there are -> fp32."""
    if CENTRED:
        mean = tl.sum(value, 1) / CHANNELS
        value = tl.where(inside, value - mean[:, None], 0.0)
    spread = tl.sqrt(tl.sum(value * value, 1) / CHANNELS + epsilon)
    return scaled(value / spread[:, None], weight, gain, channel, MODULATED, CHANNELS)


@jit
def statistics(
    x: tl.tensor,
    token_inside: tl.tensor,
    epsilon: tl.tensor,
    CENTRED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> tl.tuple:
    """Of the tokens x points to, piece by piece: the mean to be taken off, 0 unless CENTRED, and the spread."""
    mean = tl.zeros((BLOCK_TOKENS,), tl.float32)
    if CENTRED:
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            inside = token_inside[:, None] & (channel < CHANNELS)[None, :]
            mean += tl.sum(tl.load(x[:, None] + channel[None, :], inside, 0.0).to(tl.float32), 1)
        mean = mean / CHANNELS
    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        inside = token_inside[:, None] & (channel < CHANNELS)[None, :]
        value = tl.load(x[:, None] + channel[None, :], inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - mean[:, None], 0.0)
        square += tl.sum(value * value, 1)
    return mean, tl.sqrt(square / CHANNELS + epsilon)
