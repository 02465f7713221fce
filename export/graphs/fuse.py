"""Rewrites of a graph of standard operators for ONNX Runtime's own kernels; each changes nodes, never numbers.

Every rewrite is one function that takes the nodes and gives new ones. Here are those that made a graph faster, and that
ONNX Runtime does not do itself while it loads one, as it does x sigmoid(x). `rewrite` applies them one after the other;
after each the graph is loaded, run at several sizes and compared with what it gave before, or the export fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from ..run.spec import GraphSpec
from . import check, files
from .graph import MICROSOFT, Graph


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


def group_norm(graph: Graph) -> list[NodeProto]:
    """GroupNormalization -> InstanceNormalization of the groups, a kernel, then w x + b.

    ONNX Runtime has no kernel for the former on a CPU: it falls apart into its definition, with casts between.
    """
    made = []
    for node in graph.nodes:
        if node.op_type != "GroupNormalization":
            made.append(node)
            continue
        given, (x, weight, bias) = _attributes(node), node.input
        for name in (weight, bias):
            graph.weights[name] = graph.weights[name].reshape(-1, 1, 1)
        groups = given["num_groups"]
        numbers = {"ones": np.ones(groups, np.float32), "zeros": np.zeros(groups, np.float32), "shape": [0, groups, -1]}
        for key, value in numbers.items():
            graph.weights[f"groups_{groups}.{key}"] = np.asarray(value, np.int64 if key == "shape" else np.float32)
        ones, zeros, shape = (f"groups_{groups}.{key}" for key in numbers)
        value = [f"{node.name}.{part}" for part in ("shape", "groups", "normed", "whole", "scaled")]
        made += [
            helper.make_node("Shape", [x], value[:1], name=value[0]),
            helper.make_node("Reshape", [x, shape], value[1:2], name=value[1]),
            helper.make_node(
                "InstanceNormalization", [value[1], ones, zeros], value[2:3], name=value[2], epsilon=given["epsilon"]
            ),
            helper.make_node("Reshape", [value[2], value[0]], value[3:4], name=value[3]),
            helper.make_node("Mul", [value[3], weight], value[4:5], name=value[4]),
            helper.make_node("Add", [value[4], bias], node.output, name=node.name),
        ]
    return made


REWRITES: Mapping[str, Callable[[Graph], list[NodeProto]]] = {"attention": attention, "group_norm": group_norm}


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
        errors[name] = max(check.compare(description, f"{path.name}, {name}", *pair) for pair in pairs)
    return errors


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _microsoft(kind: str, inputs: Iterable[str], outputs: Iterable[str], name: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, list(inputs), list(outputs), name=name, domain=MICROSOFT, **attributes)
