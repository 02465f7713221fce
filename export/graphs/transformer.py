"""aMUSEd's transformer as graph nodes: `condition`, what is the same at every step, and `features`, what a step costs.

The mirror of ``models.layers`` and ``models.amused``, whose modules are read here; values are rows (R, N, C). Keys and
values of the text enter a step as (R, L, C), scales and shifts as (R, 2, C), under the names `conditioning_axes` lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...models.amused import Amused, ConvStage, Resample
from ...models.layers import (
    AdaNorm,
    ConvBlock,
    GatedMLP,
    LayerNorm,
    Linear,
    Mapper,
    RMSNorm,
    SelfAttention,
    TextAttention,
    TextBlock,
    TransformerLayer,
)
from ..run.spec import Array, Axis
from .graph import Graph, Value

Conditioning = dict[str, Value]
Grid = tuple[Value, Value]


class Adapters(Protocol):
    """What a form of export adds at the places an adapter can change; see ``adapters``."""

    def linear(self, name: str, x: Value, parts: tuple[Value, ...]) -> tuple[Value, ...]:
        """The parts of y = x W^T -> the same with the low-rank pair of each row."""

    def bottleneck(self, name: str, y: Value) -> Value:
        """y -> y with the bottleneck of each row."""


def numbers(tensor: Tensor) -> Array:
    """A parameter as an array; the memory is shared where it can be."""
    return tensor.detach().float().cpu().numpy()


def linear(graph: Graph, module: Linear, x: Value, adapters: Adapters, parts: int = 1) -> tuple[Value, ...]:
    """x W^T in equal parts, say q, k and v, and what the form of export adds to them.

    A product for each: one product would have to be copied apart, which costs more than reading x again.
    """
    made = []
    for index, weight in enumerate(np.split(numbers(module.weight).T, parts, axis=1)):
        name = module.name if parts == 1 else f"{module.name}.{index}"
        made.append(graph.op("MatMul", x, graph.weight(f"{name}.weight", weight), name=name))
    return adapters.linear(module.name, x, tuple(made))


def normalize(graph: Graph, module: RMSNorm | LayerNorm, name: str, x: Value) -> Value:
    """The norm with its weight, over the last axis."""
    weight = graph.weight(f"{name}.weight", numbers(module.weight))
    kind = "LayerNormalization" if isinstance(module, LayerNorm) else "RMSNormalization"
    return graph.op(kind, x, weight, name=name, axis=-1, epsilon=module.epsilon)


def silu(x: Value) -> Value:
    """x sigmoid(x)."""
    return x * x.graph.op("Sigmoid", x)


def modulate(module: Mapper, x: Value, conditioning: Conditioning) -> Value:
    """x gain + shift, the pair (R, 2, C) of the row."""
    gain, shift = conditioning[module.name].split(2, axis=1)
    return x * gain + shift


def attend(q: Value, k: Value, v: Value, heads: int, name: str) -> Value:
    """softmax(q k^T / sqrt(d)) v of (R, N, H d) and (R, L, H d) -> (R, N, H d)."""
    return q.graph.op("Attention", q, k, v, name=f"{name}.attention", q_num_heads=heads, kv_num_heads=heads)


class Transformer:
    """The nodes of one network in one graph; `adapters` is what the form of export adds."""

    def __init__(self, graph: Graph, network: Amused, adapters: Adapters) -> None:
        self.graph, self.network, self.adapters = graph, network, adapters

    # What is the same at every step.

    def condition(self, text: Value, pooled: Value, micro: Value) -> Conditioning:
        """Text (R, L, E), pooled (R, P) and micro (R, 5) -> the conditioning of every block, by name."""
        graph, network = self.graph, self.network
        text = self._linear(network.encoder_proj, text)
        text = normalize(graph, network.encoder_proj_layer_norm, "encoder_proj_layer_norm", text)
        half = network.config.micro_cond_encode_dim // 2
        rates = np.exp(-np.log(10000) * np.arange(half, dtype=np.float32) / half, dtype=np.float32)
        angles = micro.unsqueeze(2) * graph.constant(rates, np.float32)
        sizes = graph.op("Concat", graph.op("Cos", angles), graph.op("Sin", angles), axis=-1).reshape(0, -1)
        vector = graph.op("Concat", pooled, sizes.cast(pooled.dtype), axis=-1)
        hidden = silu(self._linear(network.cond_embed.linear_1, vector))
        activated = silu(self._linear(network.cond_embed.linear_2, hidden))
        made: Conditioning = {}
        for mapper in mappers(network):
            pair = activated @ graph.weight(f"{mapper.name}.weight", numbers(mapper.weight).T)
            made[mapper.name] = pair.reshape(0, 2, -1) + graph.constant([[1], [0]], pair.dtype)
        for block in text_blocks(network):
            mapped = text if block.kv_mapper is None else self._linear(block.kv_mapper, silu(text))
            for attention in (block.attn1, block.attn2):
                self._keys_values(attention, mapped, made)
        for layer in layers(network):
            self._keys_values(layer.attn2, text, made)
        return made

    def _keys_values(self, module: TextAttention, text: Value, into: Conditioning) -> None:
        keys, values = self._parts(module.kv, text, 2)
        into |= {f"{module.name}.keys": keys, f"{module.name}.values": values}

    # What a step costs.

    def features(self, tokens: Value, conditioning: Conditioning) -> Value:
        """Tokens (R, h, w) -> features (R, h w, C)."""
        graph, network = self.graph, self.network
        table = network.embed(torch.arange(network.config.vocab_size))
        x = graph.weight("embed.table", numbers(table)).take(tokens.reshape(0, -1))
        grid: Grid = tokens.size(1), tokens.size(2)
        if network.down_block.resample is not None:
            x = self._resample(network.down_block.resample, "down_block.resample", x, grid)
            grid = grid[0] / 2, grid[1] / 2
        x = self._stage(network.down_block, x, grid, conditioning)
        x = normalize(graph, network.project_to_hidden_norm, "project_to_hidden_norm", x)
        x = self._linear(network.project_to_hidden, x)
        for layer in layers(network):
            x = self._layer(layer, x, conditioning)
        x = normalize(graph, network.project_from_hidden_norm, "project_from_hidden_norm", x)
        x = self._linear(network.project_from_hidden, x)
        x = self._stage(network.up_block, x, grid, conditioning)
        if network.up_block.resample is None:
            return x
        return self._resample(network.up_block.resample, "up_block.resample", x, grid)

    def readout(self, features: Value) -> Value:
        """Features (..., C) of single positions -> normalized hidden states (..., D)."""
        head = self.network.mlm_layer
        weight = self.graph.weight("mlm_layer.conv1.weight", numbers(head.conv1.weight.flatten(1)).T)
        x = self.graph.op("MatMul", features, weight, name="mlm_layer.conv1")
        return normalize(self.graph, head.layer_norm, "mlm_layer.layer_norm", x)

    def logits(self, hidden: Value, order: Array) -> Value:
        """Hidden states (M, D) -> logits (M, K) of the codes in this order, fp32."""
        weight = numbers(self.network.mlm_layer.conv2.weight.flatten(1))[order]
        made = self.graph.op("MatMul", hidden, self.graph.weight("mlm_layer.conv2.weight", weight.T), name="mlm_layer")
        return made.cast(np.float32)

    def _linear(self, module: Linear, x: Value) -> Value:
        return self._parts(module, x, 1)[0]

    def _parts(self, module: Linear, x: Value, parts: int) -> tuple[Value, ...]:
        return linear(self.graph, module, x, self.adapters, parts)

    def _ada(self, module: AdaNorm, x: Value, conditioning: Conditioning) -> Value:
        name = module.linear.name.removesuffix(".linear")
        return modulate(module.linear, normalize(self.graph, module.norm, name, x), conditioning)

    def _layer(self, layer: TransformerLayer, x: Value, conditioning: Conditioning) -> Value:
        x = x + self._self_attention(layer.attn1, self._ada(layer.norm1, x, conditioning))
        x = x + self._text_attention(layer.attn2, self._ada(layer.norm2, x, conditioning), conditioning)
        x = self.adapters.bottleneck(layer.attn2.name, x)
        x = x + self._mlp(layer.ff, self._ada(layer.norm3, x, conditioning))
        return self.adapters.bottleneck(layer.ff.name, x)

    def _self_attention(self, module: SelfAttention, x: Value) -> Value:
        q, k, v = self._parts(module.qkv, x, 3)
        name = module.to_out.name.removesuffix(".to_out")
        return self._linear(module.to_out, attend(q, k, v, module.heads, name))

    def _text_attention(self, module: TextAttention, x: Value, conditioning: Conditioning) -> Value:
        keys, values = conditioning[f"{module.name}.keys"], conditioning[f"{module.name}.values"]
        mixed = attend(self._linear(module.to_q, x), keys, values, module.heads, module.name)
        return self._linear(module.to_out, mixed)

    def _mlp(self, module: GatedMLP, x: Value) -> Value:
        value, gate = self._parts(module.up, x, 2)
        return self._linear(module.down, value * self.graph.op("Gelu", gate))

    def _stage(self, stage: ConvStage, x: Value, grid: Grid, conditioning: Conditioning) -> Value:
        for convolution, attention in stage.pairs():
            x = self._conv_block(convolution, x, grid, conditioning)
            for index, (norm, attends) in enumerate(
                ((attention.norm1, attention.attn1), (attention.norm2, attention.attn2)), 1
            ):
                name = attends.name.removesuffix(f".attn{index}")
                normed = normalize(self.graph, norm, f"{name}.norm{index}", x)
                x = x + self._text_attention(attends, normed, conditioning)
        return x

    def _conv_block(self, block: ConvBlock, x: Value, grid: Grid, conditioning: Conditioning) -> Value:
        graph, name = self.graph, block.cond_embeds_mapper.name.removesuffix(".cond_embeds_mapper")
        weight = graph.weight(f"{name}.depthwise.weight", numbers(block.depthwise.weight))
        h = self._on_grid(x, grid)
        h = graph.op("Conv", h, weight, name=f"{name}.depthwise", group=block.depthwise.groups, pads=[1, 1, 1, 1])
        h = normalize(graph, block.norm, f"{name}.norm", self._off_grid(h))
        h = graph.op("Gelu", self._linear(block.channelwise_linear_1, h))
        h = self._response_norm(block, name, h)
        return modulate(block.cond_embeds_mapper, x + self._linear(block.channelwise_linear_2, h), conditioning)

    def _response_norm(self, block: ConvBlock, name: str, x: Value) -> Value:
        """x (1 + gamma n) + beta, n = the norm of a channel over the grid / its mean over channels."""
        graph, norm = self.graph, block.channelwise_norm
        # ONNX Runtime sums over a middle axis fast, but not in ReduceSumSquare.
        wide = x.cast(np.float32)
        squares = graph.op("ReduceSum", wide * wide, graph.constant([1], np.int64))
        norms = graph.op("Sqrt", squares).cast(x.dtype)
        mean = graph.op("ReduceMean", norms, graph.constant([-1], np.int64))
        gamma = graph.weight(f"{name}.channelwise_norm.gamma", numbers(norm.gamma)[0])
        beta = graph.weight(f"{name}.channelwise_norm.beta", numbers(norm.beta)[0])
        return x * (gamma * (norms / (mean + 1e-6)) + 1.0) + beta

    def _resample(self, module: Resample, name: str, x: Value, grid: Grid) -> Value:
        weight = self.graph.weight(f"{name}.conv.weight", numbers(module.conv.weight))
        kind = "ConvTranspose" if type(module.conv).__name__ == "ConvTranspose2d" else "Conv"
        h = self._on_grid(normalize(self.graph, module.norm, f"{name}.norm", x), grid)
        return self._off_grid(self.graph.op(kind, h, weight, name=f"{name}.conv", strides=[2, 2]))

    def _on_grid(self, x: Value, grid: Grid) -> Value:
        """(R, h w, C) -> (R, C, h, w)."""
        keep = self.graph.constant([0], np.int64)
        return x.reshape(keep, *grid, x.size(2)).transpose(0, 3, 1, 2)

    def _off_grid(self, x: Value) -> Value:
        """(R, C, h, w) -> (R, h w, C)."""
        return x.transpose(0, 2, 3, 1).reshape(0, -1, x.size(1))


def layers(network: Amused) -> Iterator[TransformerLayer]:
    """The transformer layers."""
    yield from network.transformer_layers  # type: ignore[misc]


def mappers(network: Amused) -> Iterator[Mapper]:
    """Every place with a scale and a shift."""
    for module in network.modules():
        if isinstance(module, Mapper):
            yield module


def text_blocks(network: Amused) -> Iterator[TextBlock]:
    """The blocks that attend to the text mapped to their width."""
    for stage in (network.down_block, network.up_block):
        yield from (attention for _, attention in stage.pairs())


def conditioning_axes(network: Amused) -> dict[str, tuple[Axis, ...]]:
    """Names and axes of what `condition` gives and a step takes."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for mapper in mappers(network):
        axes[mapper.name] = ("rows", 2, mapper.weight.shape[0] // 2)
    for module in network.modules():
        if isinstance(module, TextAttention):
            width = module.to_out.weight.shape[0]
            axes |= {f"{module.name}.{part}": ("rows", "text", width) for part in ("keys", "values")}
    return axes
