"""int8 for the step's matrix products: x W -> the same with 8-bit activations and 7-bit weights, where it harms little.

    W ~ Q s,          Q = round(W / s) in -63..63,        s = max |W| / 63 for each output (column)      once, here
    x ~ (P - 128) t,  P = round(x / t) + 128 in 1..255,   t = max |x| / 127 for each position (row)      while running
    x W ~ t s (P - 128) Q                                 MatMulIntegerToFloat

Seven bits, because CPUs without VNNI instructions add two products of an unsigned and a signed byte in 16 bits, which
saturate: 2 * 255 * 127 does not fit, 2 * 255 * 63 does. So a graph computes the same on every CPU. A range for each
position keeps rows apart, and makes up for the lost bit: the error is half of that of one range for all.

Products of the same x (q, k and v, value and gate) share its quantization. How much a product suffers is measured: both
forms of it are computed on the activations of real decoding steps, and its error is |x W - its int8 form| / |x W|
(Frobenius). Products above the limit stay in fp32, as those of adapters do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, helper

from ..run.spec import Array, GraphSpec
from . import check
from .graph import MICROSOFT, Graph, Value

LIMIT = 0.03
"""The largest error of a product that is quantized."""


WEIGHT, ACTIVATION, ZERO = 63, 127, 128
"""The largest quantized weight and activation, and what stands for an activation of 0."""
_SMALLEST = 1e-30  # a range of a row of zeros


def weights_of(weight: Array) -> tuple[Array, Array]:
    """(in, out) -> int8 of the same shape and the scale of each output, (out,) fp32."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / WEIGHT, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def activations_of(x: Array) -> Array:
    """x (..., in) as 8-bit activations keep it: each row rounded to 127 steps up to its largest number, either way."""
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True), _SMALLEST) / np.float32(ACTIVATION)
    return (np.rint(x / step) * step).astype(np.float32)


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


def quantize(graph: Graph, errors: Mapping[str, float], limit: float = LIMIT) -> None:
    """Put the products of small error into int8; their weights are replaced in the graph."""
    chosen = {name for name, error in errors.items() if error <= limit}
    nodes, graph.nodes = graph.nodes, []
    quantized: dict[str, tuple[Value, Value]] = {}
    for node in nodes:
        if node.op_type != "MatMul" or node.name not in chosen:
            graph.nodes.append(node)
            continue
        x, weight = node.input
        if x not in quantized:
            quantized[x] = _activations(Value(graph, x, np.float32))
        numbers, step = quantized[x]
        small, scale = weights_of(graph.weights.pop(weight))
        graph.weights |= {f"{weight}.int8": small, f"{weight}.scale": scale}
        one, zero = graph.constant(1, np.float32), graph.constant(ZERO, np.uint8)
        product = f"{node.output[0]}.product"
        inputs = [numbers.name, f"{weight}.int8", one.name, f"{weight}.scale", zero.name]
        graph.nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [product], name=node.name, domain=MICROSOFT),
            helper.make_node("Mul", [product, step.name], node.output, name=f"{node.name}.step"),
        ]


def _activations(x: Value) -> tuple[Value, Value]:
    """P and t of the module's text. Two reductions read x; an absolute value would be written first."""
    graph = x.graph
    last = graph.constant([-1], np.int64)
    high, low = (graph.op(kind, x, last, keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
    step = graph.op("Max", high, graph.op("Neg", low), graph.constant(_SMALLEST, np.float32)) * (1 / ACTIVATION)
    numbers = graph.op(
        "QuantizeLinear", x / step, graph.constant(1, np.float32), graph.constant(ZERO, np.uint8), dtype=np.uint8
    )
    return numbers, step
