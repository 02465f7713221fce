"""Graphs on disk: an .onnx file with its weights inside, or beside it in the one sidecar that is allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import Graph
from .spec import Array

INSIDE = 64 << 20
"""Weights up to this many bytes stay in the .onnx file; more go to the sidecar, which is mapped instead of parsed."""
SMALL = 4096
"""Tensors up to this many bytes are always inside: shapes and axes are read while a graph is loaded."""
ALIGNMENT = 4096


def sidecar(path: Path) -> Path:
    """Where the weights of a graph may lie: step.onnx has step.onnx.data."""
    return path.with_name(f"{path.name}.data")


def write(graph: Graph, path: Path, *, data: bool = True) -> None:
    """Write a graph with its weights; without `data` the sidecar, if there is one, is left as it is."""
    model = graph.model()
    if sum(array.nbytes for array in graph.weights.values()) <= INSIDE:
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(array, name) for name, array in graph.weights.items()
        )
    else:
        large: list[Array] = []
        offset = 0
        for name, array in graph.weights.items():
            if array.nbytes <= SMALL:
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
                continue
            model.graph.initializer.append(_reference(name, array, sidecar(path).name, offset))
            offset += array.nbytes + -array.nbytes % ALIGNMENT
            large.append(array)
        if data:
            with sidecar(path).open("wb") as file:
                for array in large:
                    array.tofile(file)
                    file.write(b"\0" * (-array.nbytes % ALIGNMENT))
    path.write_bytes(model.SerializeToString())


def _reference(name: str, array: Array, location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
