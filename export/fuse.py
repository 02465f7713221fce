"""Rewrites of a graph of standard operators for ONNX Runtime's own kernels; each changes nodes, never numbers.

Every rewrite is one function that takes the nodes and gives new ones. `rewrite` applies them one after the other; after
each the graph is loaded, run at several sizes and compared with what it gave before, or the export fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import NodeProto, helper

from . import check, files
from .graph import MICROSOFT, Graph
from .spec import GraphSpec


def attention(graph: Graph) -> list[NodeProto]:
    """Attention(q, k, v) -> MultiHeadAttention: a kernel that works in tiles and never holds all of q k^T."""
    made = []
    for node in graph.nodes:
        if node.op_type == "Attention":
            given = _attributes(node)
            options = {"num_heads": given["q_num_heads"], "unidirectional": given.get("is_causal", 0)}
            node = _microsoft("MultiHeadAttention", node.input, node.output, node.name, **options)
        made.append(node)
    return made


def skip_norm(graph: Graph) -> list[NodeProto]:
    """s = a + b, norm(s) -> one kernel that gives both: the stream is read once."""
    kinds = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
    spread = _spread(graph)
    sums = {node.output[0] for node in graph.nodes if node.op_type == "Add" and spread.isdisjoint(node.input)}
    norms = {node.input[0]: node for node in graph.nodes if node.op_type in kinds and node.input[0] in sums}
    fused = {id(norm) for norm in norms.values()}
    made = []
    for node in graph.nodes:
        norm = norms.get(node.output[0]) if node.op_type == "Add" else None
        if norm is not None:
            outputs = [norm.output[0], "", "", node.output[0]]
            inputs = [*node.input, *norm.input[1:]]
            made.append(
                _microsoft(kinds[norm.op_type], inputs, outputs, norm.name, epsilon=_attributes(norm)["epsilon"])
            )
        elif id(node) not in fused:
            made.append(node)
    return made


REWRITES: Mapping[str, Callable[[Graph], list[NodeProto]]] = {"attention": attention, "skip_norm": skip_norm}


def rewrite(description: GraphSpec, graph: Graph, path: Path, sizes: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Write the graph, rewritten step by step; the error that each rewrite brought, by its name, where it applied.

    Raises:
        StylemuseError: after a rewrite the graph does not load, or gives other numbers at one of these sizes.
    """
    files.write(graph, path)
    inputs = [description.dummies(each) for each in sizes]
    before, errors = check.run(path, description, inputs), {}
    for name, function in REWRITES.items():
        nodes = list(graph.nodes)
        graph.nodes = function(graph)
        if graph.nodes == nodes:
            continue
        files.write(graph, path, data=False)
        pairs = zip(before, check.run(path, description, inputs), strict=True)
        errors[name] = max(check.compare(f"{path.name}, {name}", *pair, description.tolerance) for pair in pairs)
    return errors


def _spread(graph: Graph) -> set[str]:
    """Values that are smaller than what they are added to: weights, and the scales and shifts of the rows."""
    given = {value.name for value in graph.inputs}
    parts = (node.output for node in graph.nodes if node.op_type == "Split" and node.input[0] in given)
    return {*graph.weights, *(name for names in parts for name in names)}


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _microsoft(kind: str, inputs: Iterable[str], outputs: Iterable[str], name: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, list(inputs), list(outputs), name=name, domain=MICROSOFT, **attributes)
