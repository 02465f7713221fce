"""aMUSEd's masked transformer: tokens and text in, a distribution over codes at every position out.

    tokens -> embedding -> [halve] conv blocks -> transformer layers -> conv blocks [double] -> head

The network takes no timestep, so a request's text and size leave the same conditioning at every step:
`Amused.condition` computes it once (keys and values of the text, every scale and shift), `features` is what a step
costs, and `readout` and `logits` are the head, split where guidance's weighted sum goes. Peer: diffusers
``UVit2DModel``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import StylemuseError
from ..kernels.dispatch import Kernels
from ..kernels.linear import linear
from ..kernels.resample import double, halve
from ..kernels.rows import RowAdapters, Site
from .layers import (
    Block,
    Conditioning,
    ConvBlock,
    Linear,
    RMSNorm,
    TextBlock,
    TransformerLayer,
    fresh,
    sinusoids,
    use,
)

_FIXED: dict[str, Any] = {"use_bias": False, "ln_elementwise_affine": True}


@dataclass(frozen=True)
class AmusedConfig:
    """Sizes of the transformer, as in ``transformer/config.json``; defaults are amused-256's."""

    hidden_size: int = 1024
    cond_embed_dim: int = 768
    micro_cond_encode_dim: int = 256
    micro_cond_embed_dim: int = 1280
    encoder_hidden_size: int = 768
    vocab_size: int = 8256
    codebook_size: int = 8192
    in_channels: int = 768
    block_out_channels: int = 768
    num_res_blocks: int = 3
    downsample: bool = False
    upsample: bool = False
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    sample_size: int = 16

    @property
    def mask_id(self) -> int:
        """The token of a masked position: the last of the vocabulary."""
        return self.vocab_size - 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AmusedConfig:
        """From a diffusers config; a variant this class does not compute is an error that names it."""
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise StylemuseError(f"transformer config: {name} = {config[name]!r}; supported: {value!r}")
        made = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        if made.downsample != made.upsample:
            raise StylemuseError("transformer config: downsample and upsample must be both true or both false")
        return made

    def sites(self) -> dict[str, Site]:
        """Linear layers an adapter may change, by its name in the checkpoint, with its place in our fused weights."""
        table: dict[str, Site] = {}

        def add(module: str, group: str, widths: tuple[int, int], part: int = 0, parts: int = 1) -> None:
            table[module] = Site(group=group, part=part, parts=parts, inputs=widths[0], outputs=widths[1])

        def text_attention(name: str, width: int) -> None:
            add(f"{name}.to_q", f"{name}.to_q", (width, width))
            add(f"{name}.to_k", f"{name}.kv", (width, width), 0, 2)
            add(f"{name}.to_v", f"{name}.kv", (width, width), 1, 2)
            add(f"{name}.to_out.0", f"{name}.to_out", (width, width))

        for index in range(self.num_hidden_layers):
            layer, width = f"transformer_layers.{index}", self.hidden_size
            for part, letter in enumerate("qkv"):
                add(f"{layer}.attn1.to_{letter}", f"{layer}.attn1.qkv", (width, width), part, 3)
            add(f"{layer}.attn1.to_out.0", f"{layer}.attn1.to_out", (width, width))
            text_attention(f"{layer}.attn2", width)
            add(f"{layer}.ff.net.0.proj", f"{layer}.ff.up", (width, 2 * self.intermediate_size))
            add(f"{layer}.ff.net.2", f"{layer}.ff.down", (self.intermediate_size, width))
        for side in ("down_block", "up_block"):
            for index in range(self.num_res_blocks):
                for attention in ("attn1", "attn2"):
                    text_attention(f"{side}.attention_blocks.{index}.{attention}", self.block_out_channels)
        return table

    def bottleneck_sites(self) -> dict[str, int]:
        """Places of StyleDrop's bottlenecks and their width: after each layer's text attention and after its MLP."""
        layers = range(self.num_hidden_layers)
        return {f"transformer_layers.{i}.{place}": self.hidden_size for i in layers for place in ("attn2", "ff")}


class Embedding(Block):
    """Token -> embedding -> norm -> 1x1 convolution: a function of the token alone, so a table once weights rest."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        sizes = (config.vocab_size, config.in_channels)
        self.embeddings = nn.Embedding(*sizes, _weight=fresh(*sizes, std=0.5))
        self.layer_norm = RMSNorm(config.in_channels, config.layer_norm_eps)
        self.conv = nn.Conv2d(config.in_channels, config.block_out_channels, 1, bias=False)
        self._table: Tensor | None = None

    def rest(self) -> None:
        """Make the table; call it again when the weights or their place have changed."""
        self._table = self._compute().detach()

    def forward(self, tokens: Tensor) -> Tensor:
        table = self._compute() if self._table is None or self.training else self._table
        return F.embedding(tokens, table)

    def _compute(self) -> Tensor:
        table, weight = self.embeddings.weight[None], self.conv.weight.flatten(1)
        return linear(table, weight, norm=self.layer_norm.own(), kernels=self.kernels)[0]


class Condition(nn.Module):
    """Pooled text and micro-conditions (R, P) -> the condition vector (R, D), by an MLP."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear("cond_embed.linear_1", inputs, width)
        self.linear_2 = Linear("cond_embed.linear_2", width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x[:, None])))[:, 0]


class Resample(Block):
    """Norm, then a 2x2 convolution of stride 2 (halving) or its transpose (doubling), over the grid."""

    def __init__(self, width: int, epsilon: float, *, double: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon)
        kind = nn.ConvTranspose2d if double else nn.Conv2d
        self.conv = kind(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        resample = halve if isinstance(self.conv, nn.Conv2d) else double
        return resample(x, grid, self.conv.weight, self.norm.own(), kernels=self.kernels)


class ConvStage(nn.Module):
    """The conv and text blocks before or after the transformer layers, at the working resolution."""

    def __init__(self, name: str, config: AmusedConfig, *, double: bool) -> None:
        super().__init__()
        width, text = config.block_out_channels, config.hidden_size
        self.res_blocks = nn.ModuleList(
            ConvBlock(f"{name}.res_blocks.{i}", width, text, config.layer_norm_eps)
            for i in range(config.num_res_blocks)
        )
        self.attention_blocks = nn.ModuleList(
            TextBlock(f"{name}.attention_blocks.{i}", width, text, config.block_num_heads)
            for i in range(config.num_res_blocks)
        )
        resampled = config.upsample if double else config.downsample
        self.resample = Resample(width, config.layer_norm_eps, double=double) if resampled else None

    def condition(self, text: Tensor, activated: Tensor, into: Conditioning, adapters: RowAdapters | None) -> None:
        """Scales and shifts, keys and values of all blocks."""
        for convolution, attention in self.pairs():
            convolution.cond_embeds_mapper.condition(activated, into)
            attention.condition(text, into, adapters)

    def forward(
        self, x: Tensor, grid: tuple[int, int], conditioning: Conditioning, adapters: RowAdapters | None
    ) -> Tensor:
        for convolution, attention in self.pairs():
            x = attention(convolution(x, grid, conditioning), conditioning, adapters)
        return x

    def pairs(self) -> Iterator[tuple[ConvBlock, TextBlock]]:
        """The blocks, in the order they run."""
        return cast("Iterator[tuple[ConvBlock, TextBlock]]", zip(self.res_blocks, self.attention_blocks, strict=True))


class Head(Block):
    """1x1 convolution, norm, and the linear layer onto the codes."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.block_out_channels, config.in_channels, 1, bias=False)
        self.layer_norm = RMSNorm(config.in_channels, config.layer_norm_eps)
        self.conv2 = nn.Conv2d(config.in_channels, config.codebook_size, 1, bias=False)


class Amused(nn.Module):
    """The masked transformer; see the module's text."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        self.config = config
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.encoder_proj = Linear("encoder_proj", config.encoder_hidden_size, width)
        self.encoder_proj_layer_norm = RMSNorm(width, epsilon)
        self.cond_embed = Condition(config.micro_cond_embed_dim + config.cond_embed_dim, width)
        self.embed = Embedding(config)
        self.down_block = ConvStage("down_block", config, double=False)
        self.project_to_hidden_norm = RMSNorm(config.block_out_channels, epsilon)
        self.project_to_hidden = Linear("project_to_hidden", config.block_out_channels, width)
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(
                f"transformer_layers.{i}", width, config.num_attention_heads, config.intermediate_size, epsilon
            )
            for i in range(config.num_hidden_layers)
        )
        self.project_from_hidden_norm = RMSNorm(width, epsilon)
        self.project_from_hidden = Linear("project_from_hidden", width, config.block_out_channels)
        self.up_block = ConvStage("up_block", config, double=True)
        self.mlm_layer = Head(config)

    def rest(self, kernels: Kernels | None = None) -> Amused:
        """Weights are final: switch to evaluation, to these kernels if given, and make the embedding table."""
        self.eval()
        if kernels is not None:
            use(self, kernels)
        with torch.no_grad():
            self.embed.rest()
        return self

    def quantize(self, number: torch.dtype, device: torch.device) -> tuple[Linear, ...]:
        """Projections of the transformer layers in 8 bits from now on, on this device; which they are.

        They are nearly all of a step's arithmetic. What is left is little, or near the tokens or the head, where an
        error is not evened out by what follows.
        """
        layers = cast("Iterable[TransformerLayer]", self.transformer_layers)
        chosen = tuple(each for layer in layers for each in layer.projections())
        for projection in chosen:
            projection.quantize(number, device)
        return chosen

    def condition(
        self, text: Tensor, pooled: Tensor, micro: Tensor, adapters: RowAdapters | None = None
    ) -> Conditioning:
        """What a row's text, size and adapter contribute, the same at every step.

        text (R, L, E): the text encoder's features; pooled (R, P); micro (R, 5): width and height in pixels, crop x
        and y, aesthetic score. Returns tensors with R in front, by block name.
        """
        text, activated = self.prepare(text, pooled, micro)
        made: Conditioning = {}
        for block in (self.down_block, *self.transformer_layers, self.up_block):
            block.condition(text, activated, made, adapters)
        return made

    def prepare(self, text: Tensor, pooled: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks make their conditioning of: the text (R, L, D), and silu of the condition vector (R, D)."""
        dtype = self.encoder_proj.weight.dtype
        text = self.encoder_proj_layer_norm(self.encoder_proj(text.to(dtype)))
        sizes = sinusoids(micro, self.config.micro_cond_encode_dim).flatten(1)
        return text, F.silu(self.cond_embed(torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=1)))

    def enter(self, tokens: Tensor, conditioning: Conditioning, adapters: RowAdapters | None = None) -> Tensor:
        """Tokens (R, h, w) -> the transformer layers' input (R, positions of the working grid, D)."""
        x = self.embed(tokens.flatten(1))
        if self.down_block.resample is not None:
            x = self.down_block.resample(x, (tokens.shape[1], tokens.shape[2]))
        x = self.down_block(x, self.working_grid(tokens), conditioning, adapters)
        return self.project_to_hidden(x, norm=self.project_to_hidden_norm.own())

    def leave(
        self, x: Tensor, grid: tuple[int, int], conditioning: Conditioning, adapters: RowAdapters | None = None
    ) -> Tensor:
        """What `enter` gave, on its working grid -> features (R, h w, C)."""
        for layer in self.transformer_layers:
            x = layer(x, conditioning, adapters)
        x = self.project_from_hidden(x, norm=self.project_from_hidden_norm.own())
        x = self.up_block(x, grid, conditioning, adapters)
        return x if self.up_block.resample is None else self.up_block.resample(x, grid)

    def features(self, tokens: Tensor, conditioning: Conditioning, adapters: RowAdapters | None = None) -> Tensor:
        """Tokens (R, h, w) -> features (R, h w, C), before the head: what one decoding step computes for each row."""
        entered = self.enter(tokens, conditioning, adapters)
        return self.leave(entered, self.working_grid(tokens), conditioning, adapters)

    def working_grid(self, tokens: Tensor) -> tuple[int, int]:
        """The grid of the layers for tokens (R, h, w): half of it each way where the network halves it."""
        halves = 1 if self.down_block.resample is None else 2
        return (tokens.shape[1] // halves, tokens.shape[2] // halves)

    def hidden(self, features: Tensor) -> Tensor:
        """Features (R, N, C) -> normalized hidden states (R, N, D).

        Linear and without bias from here on, so branches are combined here: sum_b w_b head(h_b) = head(sum_b w_b h_b).
        """
        head = self.mlm_layer
        return head.layer_norm(linear(features, head.conv1.weight.flatten(1), kernels=head.kernels))

    def readout(self, features: Tensor) -> Tensor:
        """Features (M, C) of any positions -> normalized hidden states (M, D), fp32, to be summed."""
        return self.hidden(features[None])[0].float()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K, D) and bias of the linear layer onto the codes; aMUSEd's has no bias."""
        return self.mlm_layer.conv2.weight.detach().flatten(1), None

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (M, D) fp32 -> logits over the codes (M, K), fp32."""
        head = self.mlm_layer
        weight = head.conv2.weight.flatten(1)
        return linear(hidden.to(weight.dtype)[None], weight, kernels=head.kernels)[0].float()
