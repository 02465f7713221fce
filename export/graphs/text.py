"""CLIP's text tower as graph nodes; the mirror of ``models.text``."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import nn

from ...models.text import LEGACY_END, ClipText, TextLayer
from .graph import Graph, Value
from .transformer import numbers


def text_nodes(graph: Graph, network: ClipText, ids: Value) -> tuple[Value, Value]:
    """ids (R, L) -> penultimate (R, L, D) and pooled (R, P)."""
    config = network.config
    positions = numbers(network.position.weight)
    length = ids.size(1)
    places = graph.op("Range", graph.constant(0, np.int64), length.reshape(), graph.constant(1, np.int64))
    x = graph.weight("token", numbers(network.token.weight)).take(ids) + graph.weight("position", positions).take(
        places
    )
    penultimate = x
    for index, layer in enumerate(network.layers):
        penultimate, x = x, _layer(graph, f"layers.{index}", cast(TextLayer, layer), x)
    marks = ids if config.eos_token_id == LEGACY_END else ids.equals(config.eos_token_id).cast(np.int64)
    end = graph.op("ArgMax", marks, dtype=np.int64, axis=1, keepdims=1)
    last = graph.op("GatherND", x, end, batch_dims=1)
    projection = graph.weight("projection.weight", numbers(network.projection.weight).T)
    return penultimate, _norm(graph, "norm", network.norm, last) @ projection


def _layer(graph: Graph, name: str, layer: TextLayer, x: Value) -> Value:
    q, k, v = _affine(graph, f"{name}.qkv", layer.attention.qkv, _norm(graph, f"{name}.norm1", layer.norm1, x)).split(3)
    heads = layer.attention.heads
    mixed = graph.op("Attention", q, k, v, name=f"{name}.attention", q_num_heads=heads, kv_num_heads=heads, is_causal=1)
    x = x + _affine(graph, f"{name}.out", layer.attention.out, mixed)
    wide = _affine(graph, f"{name}.widen", layer.widen, _norm(graph, f"{name}.norm2", layer.norm2, x))
    if layer.activation is nn.functional.gelu:
        active = graph.op("Gelu", wide)
    else:
        active = wide * graph.op("Sigmoid", wide * 1.702)
    return x + _affine(graph, f"{name}.narrow", layer.narrow, active)


def _affine(graph: Graph, name: str, module: nn.Linear, x: Value) -> Value:
    product = graph.op("MatMul", x, graph.weight(f"{name}.weight", numbers(module.weight).T), name=name)
    return product + graph.weight(f"{name}.bias", numbers(module.bias))


def _norm(graph: Graph, name: str, module: nn.LayerNorm, x: Value) -> Value:
    weight, bias = (graph.weight(f"{name}.{part}", numbers(getattr(module, part))) for part in ("weight", "bias"))
    return graph.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=module.eps)
