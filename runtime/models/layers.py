"""Blocks of the aMUSEd transformer, on rows of tokens (R, N, C); channels last everywhere.

Every block has a ``name``, its path in the network. Under that name it finds its adapter (`RowAdapters`) and its
step-constant conditioning, which it computed itself in ``condition``. The definitions are those of diffusers'
``UVit2DModel``; nothing has a bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.adapted_attention import cross_attention, keys_values, self_attention
from ..kernels.bottleneck import bottleneck
from ..kernels.depthwise import depthwise_norm
from ..kernels.dispatch import REFERENCE, Kernels
from ..kernels.inputs import norm
from ..kernels.linear import linear
from ..kernels.norm import Kind, Norm
from ..kernels.product import Activation
from ..kernels.projection import Projection
from ..kernels.quantization import Quantized, quantize_reference
from ..kernels.response_norm import response_norm
from ..kernels.rows import Bottleneck, RowAdapters, RowSlots

Conditioning = dict[str, Tensor]
"""Step-constant tensors by block name, rows in front: what a prompt, a style and a size leave for the loop."""


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(...) -> (..., width): cosines, then sines, of the values at frequencies 10000 ** (-i / half)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fresh(*shape: int, std: float = 0.02) -> Tensor:
    """Random numbers to start training from. On the meta device none are drawn: torch would import its compiler."""
    values = torch.empty(*shape)
    return values if values.is_meta else values.normal_(std=std)


class Block(nn.Module):
    """A module made of operations; ``kernels`` says which of them run in Triton (see `use`)."""

    kernels: Kernels = REFERENCE


def use(network: nn.Module, kernels: Kernels) -> None:
    """From now on the blocks of this network run with these kernels."""
    for module in network.modules():
        if isinstance(module, Block):
            module.kernels = kernels


class Linear(Block):
    """y = x W^T plus the low-rank pair of each row's adapter at this place, and what follows (`kernels.linear`)."""

    quantized: Quantized | None = None
    """In place of the weight; no buffer, for ``to(dtype)`` would widen it."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(fresh(outputs, inputs))

    def quantize(self, number: torch.dtype, device: torch.device) -> None:
        """From now on in 8 bits, on this device; the weight is given up."""
        made = quantize_reference(self.weight.detach(), number)
        self.quantized = Quantized(made.values.to(device), made.scales.to(device))
        del self.weight

    def projection(self, adapters: RowAdapters | None) -> Projection:
        """Its weight with the adapters of its place."""
        weight = self.weight if self.quantized is None else self.quantized
        return Projection(weight, None if adapters is None else adapters.low_rank(self.name))

    def forward(
        self,
        x: Tensor,
        adapters: RowAdapters | None = None,
        *,
        norm: Norm | None = None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        return self.projection(adapters)(
            x, _rows(adapters), norm=norm, activation=activation, residual=residual, modulation=modulation,
            kernels=self.kernels,
        )  # fmt: skip


class RMSNorm(Block):
    """x / rms(x) * w, the mean of squares in fp32."""

    kind: Kind = "rms"

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def own(self, modulation: Tensor | None = None) -> Norm:
        """For an operation that takes the norm along; modulated by (R, 2, C) per row where that is given."""
        return Norm(self.weight, self.epsilon, self.kind, modulation)

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.own(), kernels=self.kernels)


class LayerNorm(RMSNorm):
    """(x - mean) / std * w, without bias."""

    kind: Kind = "layer"


class Mapper(Block):
    """Scale and shift of one place from the condition vector: (R, D) -> (R, 2, C) holding 1 + scale and shift."""

    def __init__(self, name: str, condition: int, width: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.zeros(2 * width, condition))

    def condition(self, activated: Tensor, into: Conditioning) -> None:
        """``activated`` is silu(cond), the same for all places."""
        scale, shift = linear(activated[:, None], self.weight, kernels=self.kernels)[:, 0].chunk(2, dim=-1)
        into[self.name] = torch.stack([1 + scale, shift], dim=1)


class AdaNorm(nn.Module):
    """norm(x) (1 + scale) + shift (diffusers ``AdaLayerNormContinuous``); ``linear`` makes scale and shift."""

    def __init__(self, name: str, width: int, condition: int, norm: RMSNorm) -> None:
        super().__init__()
        self.linear = Mapper(name, condition, width)
        self.norm = norm

    def own(self, conditioning: Conditioning) -> Norm:
        """For an operation that takes the norm along."""
        return self.norm.own(conditioning[self.linear.name])


class SelfAttention(Block):
    """Attention among the tokens of a row, of the normed stream and added to it; q, k, v are one fused projection."""

    def __init__(self, name: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(f"{name}.qkv", width, 3 * width)
        self.to_out = Linear(f"{name}.to_out", width, width)

    def forward(self, x: Tensor, norm: Norm, adapters: RowAdapters | None) -> Tensor:
        qkv, out = self.qkv.projection(adapters), self.to_out.projection(adapters)
        return self_attention(x, norm, qkv, out, self.heads, _rows(adapters), kernels=self.kernels)


class TextAttention(Block):
    """Attention from the tokens to the text, of the normed stream and added to it, and StyleDrop's bottleneck here.

    Keys and values do not depend on the step: `condition` makes them once.
    """

    def __init__(self, name: str, width: int, text: int, heads: int) -> None:
        super().__init__()
        self.name, self.heads = name, heads
        self.to_q = Linear(f"{name}.to_q", width, width)
        self.kv = Linear(f"{name}.kv", text, 2 * width)
        self.to_out = Linear(f"{name}.to_out", width, width)

    def condition(self, text: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Text (R, L, T) -> keys and values, stored as (R, 2, H, L, d)."""
        kv = self.kv.projection(adapters)
        into[self.name] = keys_values(text, kv, self.heads, _rows(adapters), kernels=self.kernels)

    def forward(self, x: Tensor, norm: Norm, conditioning: Conditioning, adapters: RowAdapters | None) -> Tensor:
        q, out = self.to_q.projection(adapters), self.to_out.projection(adapters)
        stored, rows, neck = conditioning[self.name], _rows(adapters), _neck(self.name, adapters)
        return cross_attention(x, norm, q, stored, out, rows, neck, kernels=self.kernels)


class GatedMLP(Block):
    """down(a gelu(g)) with (a, g) = up(norm(x)), the exact gelu (diffusers ``FeedForward`` with GEGLU), added to x.

    StyleDrop's bottleneck of this place follows.
    """

    def __init__(self, name: str, width: int, inner: int) -> None:
        super().__init__()
        self.name = name
        self.up = Linear(f"{name}.up", width, 2 * inner)
        self.down = Linear(f"{name}.down", inner, width)

    def forward(self, x: Tensor, norm: Norm, adapters: RowAdapters | None) -> Tensor:
        y = self.down(self.up(x, adapters, norm=norm, activation="geglu"), adapters, residual=x)
        return bottleneck(y, _neck(self.name, adapters), _rows(adapters), kernels=self.kernels)


class TransformerLayer(nn.Module):
    """Self-attention, attention to the text, MLP; each after its modulated norm, each added to the stream.

    StyleDrop's bottlenecks act on the stream after the text attention and after the MLP (arXiv 2306.00983, figure 2).
    """

    def __init__(self, name: str, width: int, heads: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.norm1 = AdaNorm(f"{name}.norm1", width, width, RMSNorm(width, epsilon))
        self.attn1 = SelfAttention(f"{name}.attn1", width, heads)
        self.norm2 = AdaNorm(f"{name}.norm2", width, width, RMSNorm(width, epsilon))
        self.attn2 = TextAttention(f"{name}.attn2", width, width, heads)
        self.norm3 = AdaNorm(f"{name}.norm3", width, width, LayerNorm(width, epsilon))
        self.ff = GatedMLP(f"{name}.ff", width, inner)

    def projections(self) -> tuple[Linear, ...]:
        """Those of a step; keys and values of the text are made once."""
        attentions = self.attn1.qkv, self.attn1.to_out, self.attn2.to_q, self.attn2.to_out
        return *attentions, self.ff.up, self.ff.down

    def condition(self, text: Tensor, activated: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Everything of this layer that is the same at every step."""
        for place in (self.norm1, self.norm2, self.norm3):
            place.linear.condition(activated, into)
        self.attn2.condition(text, into, adapters)

    def forward(self, x: Tensor, conditioning: Conditioning, adapters: RowAdapters | None) -> Tensor:
        x = self.attn1(x, self.norm1.own(conditioning), adapters)
        x = self.attn2(x, self.norm2.own(conditioning), conditioning, adapters)
        return self.ff(x, self.norm3.own(conditioning), adapters)


class ConvBlock(Block):
    """ConvNeXt block on the grid: depthwise 3x3, norm, MLP with global response norm, then a scale and shift."""

    def __init__(self, name: str, width: int, condition: int, epsilon: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = RMSNorm(width, epsilon)
        self.channelwise_linear_1 = Linear(f"{name}.channelwise_linear_1", width, 4 * width)
        self.channelwise_norm = GlobalResponseNorm(4 * width)
        self.channelwise_linear_2 = Linear(f"{name}.channelwise_linear_2", 4 * width, width)
        self.cond_embeds_mapper = Mapper(f"{name}.cond_embeds_mapper", condition, width)

    def forward(self, x: Tensor, grid: tuple[int, int], conditioning: Conditioning) -> Tensor:
        h = depthwise_norm(x, grid, self.depthwise.weight, self.norm.weight, self.norm.epsilon, kernels=self.kernels)
        h = self.channelwise_norm(self.channelwise_linear_1(h, activation="gelu"))
        modulation = conditioning[self.cond_embeds_mapper.name]
        return self.channelwise_linear_2(h, residual=x, modulation=modulation)


class GlobalResponseNorm(Block):
    """gamma (x n) + beta + x, n = |x_c| over the grid / mean over channels (ConvNeXt V2, arXiv 2301.00808)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return response_norm(x, self.gamma.flatten(), self.beta.flatten(), kernels=self.kernels)


class TextBlock(nn.Module):
    """Two attentions, both to the text mapped to the block's width (diffusers ``SkipFFTransformerBlock``)."""

    def __init__(self, name: str, width: int, text: int, heads: int) -> None:
        super().__init__()
        self.kv_mapper = Linear(f"{name}.kv_mapper", text, width) if text != width else None
        self.norm1 = RMSNorm(width, 1e-6)
        self.attn1 = TextAttention(f"{name}.attn1", width, width, heads)
        self.norm2 = RMSNorm(width, 1e-6)
        self.attn2 = TextAttention(f"{name}.attn2", width, width, heads)

    def condition(self, text: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Keys and values of both attentions."""
        mapped = text if self.kv_mapper is None else self.kv_mapper(F.silu(text))
        self.attn1.condition(mapped, into, adapters)
        self.attn2.condition(mapped, into, adapters)

    def forward(self, x: Tensor, conditioning: Conditioning, adapters: RowAdapters | None) -> Tensor:
        x = self.attn1(x, self.norm1.own(), conditioning, adapters)
        return self.attn2(x, self.norm2.own(), conditioning, adapters)


def _rows(adapters: RowAdapters | None) -> RowSlots | None:
    return None if adapters is None else adapters.rows


def _neck(site: str, adapters: RowAdapters | None) -> Bottleneck | None:
    return None if adapters is None else adapters.bottleneck(site)
