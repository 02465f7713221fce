"""int8 for the step's matrix products: x W -> the same with 8-bit weights and activations, where it does little harm.

    W ~ Q s,  Q = round(W / s) in int8, s = max |W| / 127 for each output (column)   once, here
    x ~ (P - z) t,  P in uint8, t and z from the smallest and largest number of x   while running
    x W ~ t s (P - z) Q                                                              one kernel: DynamicQuantizeMatMul

Products of the same x (q, k and v, value and gate) share its quantization: DynamicQuantizeLinear, MatMulIntegerToFloat.

How much a product suffers is measured: both forms of it are computed on the activations of real decoding steps, and its
error is |x W - its int8 form| / |x W| (Frobenius). Products above the limit stay in fp32, as those of adapters do.

The range of x is that of all rows together, so that in int8, and only there, a picture depends a little on the pictures
drawn with it. On CPUs without VNNI instructions sums of two products saturate at 16 bits: use fp32 there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, helper

from . import check
from .graph import MICROSOFT, Graph
from .spec import Array, GraphSpec

LIMIT = 0.03
"""The largest error of a product that is quantized."""


def weights_of(weight: Array) -> tuple[Array, Array]:
    """(in, out) -> int8 of the same shape and the scale of each output, (out,) fp32."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def activations_of(x: Array) -> Array:
    """x as 8-bit activations keep it: rounded to 255 steps between its smallest and largest number, 0 among them."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    return ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)


def products(graph: Graph) -> dict[str, NodeProto]:
    """The matrix products with a weight of the model, by name; what a caller may override is an adapter's."""
    fixed = graph.weights.keys() - {value.name for value in graph.inputs}
    return {node.name: node for node in graph.nodes if node.op_type == "MatMul" and node.input[1] in fixed}


def sensitivity(
    description: GraphSpec, graph: Graph, path: Path, inputs: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """The error that int8 brings to each product of the written graph on these inputs; the largest of them."""
    nodes = products(graph)
    seen = check.run(path, description, inputs, sorted({node.input[0] for node in nodes.values()}))
    errors = {}
    for name, node in nodes.items():
        weight = graph.weights[node.input[1]].astype(np.float32)
        small, scale = weights_of(weight)
        kept = small * scale
        worst = 0.0
        for values in seen:
            x = values[node.input[0]].reshape(-1, len(weight))
            exact = x @ weight
            size = float(np.linalg.norm(exact))
            worst = max(worst, float(np.linalg.norm(exact - activations_of(x) @ kept)) / size if size else 0.0)
        errors[name] = worst
    return errors


def quantize(graph: Graph, errors: Mapping[str, float], limit: float = LIMIT) -> list[NodeProto]:
    """The nodes with the products of small error in int8; their weights are replaced in the graph."""
    chosen = {name for name, error in errors.items() if error <= limit}
    shared = Counter(node.input[0] for name, node in products(graph).items() if name in chosen)
    made: list[NodeProto] = []
    quantized: set[str] = set()
    for node in graph.nodes:
        if node.op_type != "MatMul" or node.name not in chosen:
            made.append(node)
            continue
        x, weight = node.input
        small, scale = weights_of(graph.weights.pop(weight))
        graph.weights |= {f"{weight}.int8": small, f"{weight}.scale": scale}
        if shared[x] == 1:
            inputs, kind = [x, f"{weight}.int8", f"{weight}.scale"], "DynamicQuantizeMatMul"
        else:
            values = [f"{x}.{part}" for part in ("uint8", "scale", "zero")]
            if x not in quantized:
                quantized.add(x)
                made.append(helper.make_node("DynamicQuantizeLinear", [x], values, name=f"{x}.quantize"))
            inputs = [values[0], f"{weight}.int8", values[1], f"{weight}.scale", values[2]]
            kind = "MatMulIntegerToFloat"
        made.append(helper.make_node(kind, inputs, node.output, name=node.name, domain=MICROSOFT))
    return made
