"""Networks -> graphs of standard ONNX operators, each as ``spec`` describes it."""

from __future__ import annotations

import numpy as np
import torch

from ...models.amused import Amused
from ...models.text import ClipText
from ...models.vq import VQ
from ..run import spec
from ..run.spec import GraphSpec
from . import sampling
from .adapters import Styling
from .graph import Graph, Value
from .text import text_nodes
from .transformer import Transformer, conditioning_axes
from .vq import decode_nodes, encode_nodes

BASE = Styling()


def begin(description: GraphSpec, precision: str) -> tuple[Graph, dict[str, Value]]:
    """An empty graph with the inputs that are described."""
    graph = Graph(description.name, precision)
    return graph, {each.name: graph.input(each) for each in description.inputs}


@torch.no_grad()
def step(network: Amused, styling: Styling = BASE, precision: str = "float32") -> tuple[GraphSpec, Graph]:
    """The graph of one decoding step."""
    config, styling = network.config, styling.part(constant=False)
    description = spec.step(conditioning_axes(network), config.vocab_size, precision, styling.inputs())
    graph, given = begin(description, precision)
    nodes = Transformer(graph, network, styling.nodes(graph, given))
    tokens, weights = given["tokens"], given["weights"]
    flat = tokens.reshape(0, -1)
    features = nodes.features(tokens.take(given["sources"]), given)

    masked = flat.equals(config.mask_id)
    places = sampling.Places(graph, masked, given["seeds"], given["steps"])
    hidden = nodes.readout(sampling.guided(features, places, given["branches"], flat.size(1))).cast(np.float32)
    weighted = hidden * places.per_place(weights).unsqueeze(2)
    hidden = graph.op("ReduceSum", weighted, graph.constant([1], np.int64), keepdims=0)

    order = sampling.word_order(config.codebook_size)
    logits = nodes.logits(hidden.cast(precision), order)
    codes, scores = sampling.draw(logits, places, order, given["token_temperature"], given["raw_logit"])
    preview = graph.op("ScatterND", flat, places.index, codes)
    again = sampling.remask(scores, places, flat, given["masked"], given["choice_temperature"])
    after = graph.op("Where", again, graph.constant(config.mask_id, np.int64), preview, dtype=np.int64)
    shape = graph.op("Shape", tokens, dtype=np.int64)
    for output, value in zip(description.outputs, (after, preview), strict=True):
        graph.output(output, graph.op("Reshape", value, shape))
    return description, graph


@torch.no_grad()
def condition(
    network: Amused, length: int, styling: Styling = BASE, precision: str = "float32"
) -> tuple[GraphSpec, Graph]:
    """The graph of what is the same at every step."""
    config, styling = network.config, styling.part(constant=True)
    widths = config.encoder_hidden_size, config.cond_embed_dim
    description = spec.condition(length, *widths, conditioning_axes(network), precision, styling.inputs())
    graph, given = begin(description, precision)
    nodes = Transformer(graph, network, styling.nodes(graph, given))
    text, pooled = (given[name].cast(precision) for name in ("text", "pooled"))
    made = nodes.condition(text, pooled, given["micro"])
    for output in description.outputs:
        graph.output(output, made[output.name])
    return description, graph


@torch.no_grad()
def text(network: ClipText, length: int) -> tuple[GraphSpec, Graph]:
    """The graph of the text encoder, in fp32."""
    config = network.config
    description = spec.text(length, config.hidden_size, config.projection_dim, config.vocab_size)
    graph, given = begin(description, "float32")
    for output, value in zip(description.outputs, text_nodes(graph, network, given["ids"]), strict=True):
        graph.output(output, value)
    return description, graph


@torch.no_grad()
def pixels(network: VQ) -> tuple[GraphSpec, Graph]:
    """The graph of the picture decoder, in fp32: published weights overflow in fp16."""
    description = spec.pixels(network.config.num_vq_embeddings)
    graph, given = begin(description, "float32")
    (output,) = description.outputs
    graph.output(output, decode_nodes(graph, network, given["tokens"]))
    return description, graph


@torch.no_grad()
def codes(network: VQ) -> tuple[GraphSpec, Graph]:
    """The graph of the picture encoder, in fp32."""
    description = spec.codes()
    graph, given = begin(description, "float32")
    (output,) = description.outputs
    graph.output(output, encode_nodes(graph, network, given["images"]))
    return description, graph
