"""A builder of ONNX graphs: values with operators, weights by name, every node named by what it computes.

A `Value` behaves like an array where arithmetic is concerned, so that a function written with operators alone (Philox,
say) makes nodes when it is given values, and numbers when it is given numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..run.spec import Array, Axis, Tensor

OPSET = 23
"""The first with `Attention` and `RMSNormalization`."""
IR_VERSION = 11
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators; only the rewrites of ``fuse`` bring them in."""


class Value:
    """One tensor of a graph: its name and element type."""

    __array_ufunc__ = None  # numpy scalars leave their operators to this class

    def __init__(self, graph: Graph, name: str, dtype: Any) -> None:
        self.graph, self.name, self.dtype = graph, name, np.dtype(dtype)

    def _with(self, kind: str, other: Value | float, dtype: Any = None) -> Value:
        value = other if isinstance(other, Value) else self.graph.constant(other, self.dtype)
        return self.graph.op(kind, self, value, dtype=dtype)

    def __add__(self, other: Value | float) -> Value:
        return self._with("Add", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._with("Mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with("Div", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._with("BitwiseXor", other)

    def __and__(self, other: Value | int) -> Value:
        return self._with("BitwiseAnd", other)

    def __rshift__(self, bits: int) -> Value:
        return self.graph.op("BitShift", self, self.graph.constant(bits, self.dtype), direction="RIGHT")

    def __matmul__(self, other: Value) -> Value:
        return self._with("MatMul", other)

    def equals(self, other: Value | float) -> Value:
        """Elementwise ==, bool."""
        return self._with("Equal", other, bool)

    def less(self, other: Value | float) -> Value:
        """Elementwise <, bool."""
        return self._with("Less", other, bool)

    def cast(self, dtype: Any) -> Value:
        """The same numbers in another type."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self if self.dtype == dtype else self.graph.op("Cast", self, dtype=dtype, to=kind)

    def reshape(self, *sizes: int | Value) -> Value:
        """As ONNX's Reshape: 0 keeps a size, -1 is what is left; values are one-element int64."""
        if all(isinstance(size, int) for size in sizes):
            return self.graph.op("Reshape", self, self.graph.constant(list(sizes), np.int64))
        parts = [size if isinstance(size, Value) else self.graph.constant([size], np.int64) for size in sizes]
        return self.graph.op("Reshape", self, self.graph.op("Concat", *parts, axis=0))

    def transpose(self, *axes: int) -> Value:
        """The axes in this order."""
        return self.graph.op("Transpose", self, perm=list(axes))

    def unsqueeze(self, *axes: int) -> Value:
        """New axes of size 1 at these places."""
        return self.graph.op("Unsqueeze", self, self.graph.constant(list(axes), np.int64))

    def take(self, indices: Value, axis: int = 0) -> Value:
        """The entries at these indices of an axis."""
        return self.graph.op("Gather", self, indices, axis=axis)

    def first(self, count: int, axis: int) -> Value:
        """The first entries of an axis."""
        ends = [self.graph.constant([number], np.int64) for number in (0, count, axis)]
        return self.graph.op("Slice", self, *ends)

    def every(self, step: int, start: int, axis: int) -> Value:
        """The entries start, start + step, ... of an axis."""
        ends = [self.graph.constant([number], np.int64) for number in (start, np.iinfo(np.int64).max, axis, step)]
        return self.graph.op("Slice", self, *ends)

    def split(self, parts: int, axis: int = -1) -> tuple[Value, ...]:
        """Equal parts along an axis."""
        return self.graph.ops("Split", self, outputs=parts, axis=axis, num_outputs=parts)

    def size(self, axis: int) -> Value:
        """The size of an axis, (1,) int64."""
        return self.graph.op("Shape", self, dtype=np.int64, start=axis, end=axis + 1)


class Graph:
    """Nodes, inputs, outputs and weights under construction; `precision` is the type weights are kept in."""

    def __init__(self, name: str, precision: Any = np.float32) -> None:
        self.name, self.precision = name, np.dtype(precision)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Array] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._names: dict[str, int] = {}

    def input(self, tensor: Tensor) -> Value:
        """An input; an axis given as text may have any size, the same wherever that text stands."""
        self.inputs.append(_info(tensor.name, tensor.dtype, tensor.axes))
        if tensor.overridable:
            empty = tuple(0 if isinstance(axis, str) else axis for axis in tensor.axes)
            self.weights[tensor.name] = np.zeros(empty, tensor.dtype)
        return Value(self, tensor.name, tensor.dtype)

    def output(self, tensor: Tensor, value: Value) -> None:
        """Make a value this output."""
        assert value.dtype == tensor.dtype, f"{tensor.name} is {value.dtype}"
        self.nodes.append(helper.make_node("Identity", [value.name], [tensor.name], name=f"{tensor.name}.output"))
        self.outputs.append(_info(tensor.name, tensor.dtype, tensor.axes))

    def weight(self, name: str, array: Array) -> Value:
        """A tensor of the model, in the graph's precision where it is of floating point; the same name is the same."""
        if name not in self.weights:
            wanted = self.precision if np.issubdtype(array.dtype, np.floating) else array.dtype
            self.weights[name] = np.asarray(array, dtype=wanted)  # views stay views: a model's weights exist once
        return Value(self, name, self.weights[name].dtype)

    def constant(self, value: Any, dtype: Any) -> Value:
        """A small tensor of numbers; equal ones are one."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self.weights[name] = array
            self._constants[key] = Value(self, name, dtype)
        return self._constants[key]

    def op(self, kind: str, *inputs: Value | None, dtype: Any = None, name: str = "", **attributes: Any) -> Value:
        """A node with one output, of its first input's type unless another is given."""
        return self.ops(kind, *inputs, outputs=1, dtype=dtype, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: Value | None, outputs: int, dtype: Any = None, name: str = "", **attributes: Any
    ) -> tuple[Value, ...]:
        """A node with several outputs."""
        assert inputs[0] is not None, "a node's first input is never left out"
        label = self._unique(name or kind)
        made = [f"{label}.{index}" if outputs > 1 else f"{label}.y" for index in range(outputs)]
        given = ["" if value is None else value.name for value in inputs]
        self.nodes.append(helper.make_node(kind, given, made, name=label, **attributes))
        return tuple(Value(self, each, dtype or inputs[0].dtype) for each in made)

    def inline(self, part: Graph, name: str, given: Mapping[str, Value]) -> dict[str, Value]:
        """The nodes and weights of another graph, named after this part; what it gives, by the names of its outputs.

        What it takes is found in `given` by name; initializers that callers may override are inputs here, too.
        """
        inputs = {each.name: given[each.name].name for each in part.inputs}

        def renamed(value: str) -> str:
            return inputs.get(value, value and f"{name}/{value}")

        self.weights |= {renamed(key): array for key, array in part.weights.items() if key not in inputs}
        for node in part.nodes:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.name = f"{name}/{node.name}"
            copy.input[:], copy.output[:] = map(renamed, node.input), map(renamed, node.output)
            self.nodes.append(copy)
        kinds = {each.name: helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type) for each in part.outputs}
        return {key: Value(self, renamed(key), kind) for key, kind in kinds.items()}

    def repeat(self, count: Value, state: Value, body: Callable[[Value, Value], Value]) -> Value:
        """The state after `count` () times state = body(index, state); the index is () int64."""
        return self._loop(count, [state], body)

    def stack(self, count: Value, body: Callable[[Value], Value]) -> Value:
        """body(0), body(1), ... of `count` () indices, one after the other, along a new first axis."""
        return self._loop(count, [], body)

    def _loop(self, count: Value, states: Sequence[Value], body: Callable[..., Value]) -> Value:
        """A Loop; its body sees all values and weights that are there already, which stay where they are."""
        label, outside = self._unique("Loop"), self.nodes
        index, going = Value(self, f"{label}.index", np.int64), Value(self, f"{label}.going", np.bool_)
        carried = [Value(self, f"{label}.state_{place}", state.dtype) for place, state in enumerate(states)]
        self.nodes = []
        try:
            result = body(index, *carried)
            on = self.op("Identity", going)
        finally:
            inside, self.nodes = self.nodes, outside
        inputs = [_info(index.name, index.dtype, ()), _info(going.name, going.dtype, ()), *map(_untold, carried)]
        graph = helper.make_graph(inside, f"{label}.body", inputs, [_untold(on), _untold(result)])
        return self.op("Loop", count, None, *states, dtype=result.dtype, name=label, body=graph)

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, -1) + 1
        return name if count == 0 else f"{name}_{count}"

    def model(self) -> onnx.ModelProto:
        """The model without its weights, which are in `weights`: they may be larger than a message can be."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="stylemuse")


def _info(name: str, dtype: Any, axes: Sequence[Axis]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(axes))


def _untold(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
