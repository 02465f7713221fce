"""The VQ tokenizer as graph nodes, tokens to pictures and back; the mirror of ``models.vq``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from ...models.vq import VQ, Level, ResnetBlock
from ..run.spec import Array
from .graph import Graph, Value
from .transformer import numbers, silu


def decode_nodes(graph: Graph, network: VQ, tokens: Value) -> Value:
    """Tokens (B, h, w) -> pictures (B, H, W, 3), 8 bits a colour."""
    decoder = network.decoder
    x = graph.weight("codebook", numbers(network.quantize.embedding.weight)).take(tokens).transpose(0, 3, 1, 2)
    x = _conv(graph, "conv_in", decoder.conv_in, _conv(graph, "post_quant_conv", network.post_quant_conv, x))
    for name, level in (("mid_block", decoder.mid_block), *_levels(decoder.up_blocks)):
        x = _level(graph, name, level, x)
    x = _conv(graph, "conv_out", decoder.conv_out, silu(_norm(graph, "conv_norm_out", decoder.conv_norm_out, x)))
    low, high = (graph.constant(bound, np.float32) for bound in (0, 255))
    return graph.op("Round", graph.op("Clip", x * 255.0, low, high)).transpose(0, 2, 3, 1).cast(np.uint8)


def encode_nodes(graph: Graph, network: VQ, pictures: Value) -> Value:
    """Pictures (B, H, W, 3), 8 bits a colour -> tokens (B, h, w): the nearest codes."""
    encoder = network.encoder
    x = _conv(graph, "conv_in", encoder.conv_in, pictures.cast(np.float32).transpose(0, 3, 1, 2) / 255.0)
    for name, level in (*_levels(encoder.down_blocks), ("mid_block", encoder.mid_block)):
        x = _level(graph, name, level, x)
    x = _conv(graph, "conv_out", encoder.conv_out, silu(_norm(graph, "conv_norm_out", encoder.conv_norm_out, x)))
    latent = _conv(graph, "quant_conv", network.quant_conv, x).transpose(0, 2, 3, 1)
    table = numbers(network.quantize.embedding.weight)
    products = latent @ graph.weight("codebook", -2.0 * table.T)
    distance = products + graph.weight("codebook.squares", np.square(table).sum(1))
    return graph.op("ArgMin", distance, dtype=np.int64, axis=-1, keepdims=0)


def _levels(blocks: nn.ModuleList) -> Iterator[tuple[str, Level]]:
    for index, level in enumerate(blocks):
        assert isinstance(level, Level)
        yield f"blocks.{index}", level


def _level(graph: Graph, name: str, level: Level, x: Value) -> Value:
    for index, block in enumerate(level.resnets):
        assert isinstance(block, ResnetBlock)
        x = _resnet(graph, f"{name}.resnets.{index}", block, x)
    for block in getattr(level, "downsamplers", ()):
        far = graph.constant([0, 0, 0, 0, 0, 0, 1, 1], np.int64)
        x = _conv(graph, f"{name}.downsample", block.conv, graph.op("Pad", x, far))
    for block in getattr(level, "upsamplers", ()):
        scales = graph.constant([1, 1, 2, 2], np.float32)
        modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        x = _conv(graph, f"{name}.upsample", block.conv, graph.op("Resize", x, None, scales, **modes))
    return x


def _resnet(graph: Graph, name: str, block: ResnetBlock, x: Value) -> Value:
    h = _conv(graph, f"{name}.conv1", block.conv1, silu(_norm(graph, f"{name}.norm1", block.norm1, x)))
    h = _conv(graph, f"{name}.conv2", block.conv2, silu(_norm(graph, f"{name}.norm2", block.norm2, h)))
    return h + (x if block.conv_shortcut is None else _conv(graph, f"{name}.shortcut", block.conv_shortcut, x))


def _conv(graph: Graph, name: str, module: nn.Conv2d, x: Value) -> Value:
    weight, bias = graph.weight(f"{name}.weight", numbers(module.weight)), graph.weight(f"{name}.bias", _bias(module))
    return graph.op(
        "Conv", x, weight, bias, name=name, strides=list(module.stride), pads=[int(side) for side in module.padding] * 2
    )


def _bias(module: nn.Conv2d) -> Array:
    assert module.bias is not None
    return numbers(module.bias)


def _norm(graph: Graph, name: str, module: nn.GroupNorm, x: Value) -> Value:
    weight, bias = (graph.weight(f"{name}.{part}", numbers(getattr(module, part))) for part in ("weight", "bias"))
    return graph.op("GroupNormalization", x, weight, bias, name=name, num_groups=module.num_groups, epsilon=module.eps)
