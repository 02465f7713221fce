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

from ..kernels.bottleneck import bottleneck
from ..kernels.linear import linear
from ..kernels.rows import RowAdapters

Conditioning = dict[str, Tensor]
"""Step-constant tensors by block name, rows in front: what a prompt, a style and a size leave for the loop."""


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(...) -> (..., width): cosines, then sines, of the values at frequencies 10000 ** (-i / half)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, scale_shift: Tensor) -> Tensor:
    """x (1 + scale) + shift, with (R, 2, C) per row; (1 + scale) is what is stored."""
    gain, shift = scale_shift[:, :1], scale_shift[:, 1:]
    return torch.addcmul(shift, x, gain)


def fresh(*shape: int, std: float = 0.02) -> Tensor:
    """Random numbers to start training from. On the meta device none are drawn: torch would import its compiler."""
    values = torch.empty(*shape)
    return values if values.is_meta else values.normal_(std=std)


class Linear(nn.Module):
    """y = x W^T plus the low-rank pair of each row's adapter at this place."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(fresh(outputs, inputs))

    def forward(self, x: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        if adapters is None:
            return F.linear(x, self.weight)
        return linear(x, self.weight, None, adapters.low_rank(self.name), adapters.rows)


class RMSNorm(nn.Module):
    """x / rms(x) * w, the mean of squares in fp32 (torch does so)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """(x - mean) / std * w, without bias."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.epsilon)


class Mapper(nn.Module):
    """Scale and shift of one place from the condition vector: (R, D) -> (R, 2, C) holding 1 + scale and shift."""

    def __init__(self, name: str, condition: int, width: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.zeros(2 * width, condition))

    def condition(self, activated: Tensor, into: Conditioning) -> None:
        """``activated`` is silu(cond), the same for all places."""
        scale, shift = F.linear(activated, self.weight).chunk(2, dim=-1)
        into[self.name] = torch.stack([1 + scale, shift], dim=1)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return modulate(x, conditioning[self.name])


class AdaNorm(nn.Module):
    """norm(x) (1 + scale) + shift (diffusers ``AdaLayerNormContinuous``); ``linear`` makes scale and shift."""

    def __init__(self, name: str, width: int, condition: int, norm: RMSNorm | LayerNorm) -> None:
        super().__init__()
        self.linear = Mapper(name, condition, width)
        self.norm = norm

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.linear(self.norm(x), conditioning)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (R, H, N, d), k and v (R, H, L, d) -> (R, N, H d)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention among the tokens of a row; q, k and v are one fused projection."""

    def __init__(self, name: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(f"{name}.qkv", width, 3 * width)
        self.to_out = Linear(f"{name}.to_out", width, width)

    def forward(self, x: Tensor, adapters: RowAdapters | None) -> Tensor:
        fused = self.qkv(x, adapters)
        q, k, v = fused.view(*fused.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.to_out(attend(q, k, v), adapters)


class TextAttention(nn.Module):
    """Attention from the tokens to the text. Keys and values do not depend on the step: `condition` makes them once."""

    def __init__(self, name: str, width: int, text: int, heads: int) -> None:
        super().__init__()
        self.name, self.heads = name, heads
        self.to_q = Linear(f"{name}.to_q", width, width)
        self.kv = Linear(f"{name}.kv", text, 2 * width)
        self.to_out = Linear(f"{name}.to_out", width, width)

    def condition(self, text: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Text (R, L, T) -> keys and values, stored as (R, 2, H, L, d)."""
        fused = self.kv(text, adapters)
        into[self.name] = fused.view(*fused.shape[:2], 2, self.heads, -1).permute(0, 2, 3, 1, 4).contiguous()

    def forward(self, x: Tensor, conditioning: Conditioning, adapters: RowAdapters | None) -> Tensor:
        q = self.to_q(x, adapters)
        k, v = conditioning[self.name].unbind(1)
        return self.to_out(attend(q.view(*q.shape[:2], self.heads, -1).transpose(1, 2), k, v), adapters)


class GatedMLP(nn.Module):
    """down(a * gelu(g)) with (a, g) = up(x), the exact gelu (diffusers ``FeedForward`` with GEGLU)."""

    def __init__(self, name: str, width: int, inner: int) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", width, 2 * inner)
        self.down = Linear(f"{name}.down", inner, width)

    def forward(self, x: Tensor, adapters: RowAdapters | None) -> Tensor:
        value, gate = self.up(x, adapters).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate), adapters)


class TransformerLayer(nn.Module):
    """Self-attention, attention to the text, MLP; each after its modulated norm, each added to the stream.

    StyleDrop's bottlenecks act on the stream after the text attention and after the MLP (arXiv 2306.00983, figure 2).
    """

    def __init__(self, name: str, width: int, heads: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.name = name
        self.norm1 = AdaNorm(f"{name}.norm1", width, width, RMSNorm(width, epsilon))
        self.attn1 = SelfAttention(f"{name}.attn1", width, heads)
        self.norm2 = AdaNorm(f"{name}.norm2", width, width, RMSNorm(width, epsilon))
        self.attn2 = TextAttention(f"{name}.attn2", width, width, heads)
        self.norm3 = AdaNorm(f"{name}.norm3", width, width, LayerNorm(width, epsilon))
        self.ff = GatedMLP(f"{name}.ff", width, inner)

    def condition(self, text: Tensor, activated: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Everything of this layer that is the same at every step."""
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.linear.condition(activated, into)
        self.attn2.condition(text, into, adapters)

    def forward(self, x: Tensor, conditioning: Conditioning, adapters: RowAdapters | None) -> Tensor:
        x = x + self.attn1(self.norm1(x, conditioning), adapters)
        x = x + self.attn2(self.norm2(x, conditioning), conditioning, adapters)
        x = _styled(x, f"{self.name}.attn2", adapters)
        x = x + self.ff(self.norm3(x, conditioning), adapters)
        return _styled(x, f"{self.name}.ff", adapters)


class ConvBlock(nn.Module):
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
        h = self.depthwise(x.unflatten(1, grid).permute(0, 3, 1, 2))
        h = self.norm(h.permute(0, 2, 3, 1).flatten(1, 2))
        h = self.channelwise_norm(F.gelu(self.channelwise_linear_1(h)))
        return self.cond_embeds_mapper(x + self.channelwise_linear_2(h), conditioning)


class GlobalResponseNorm(nn.Module):
    """gamma (x n) + beta + x, n = |x_c| over the grid / mean over channels (ConvNeXt V2, arXiv 2301.00808)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        # `torch.linalg.vector_norm` over the positions takes 3 (bf16) to 9 times (fp32) as long on a CPU.
        norms = x.square().sum(dim=1, keepdim=True, dtype=torch.float32).sqrt().to(x.dtype)
        gain = 1 + self.gamma[0] * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))
        return torch.addcmul(self.beta[0], x, gain)


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
        x = x + self.attn1(self.norm1(x), conditioning, adapters)
        return x + self.attn2(self.norm2(x), conditioning, adapters)


def _styled(x: Tensor, site: str, adapters: RowAdapters | None) -> Tensor:
    return x if adapters is None else bottleneck(x, adapters.bottleneck(site), adapters.rows)
