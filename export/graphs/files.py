"""Graphs on disk: an .onnx file with its weights inside, or beside it in the one sidecar that is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..run.spec import Array
from .graph import Graph

INSIDE = 64 << 20
"""Weights up to this many bytes stay in the .onnx file; more go to the sidecar, which is mapped instead of parsed."""
SMALL = 4096
"""Tensors up to this many bytes are always inside: shapes and axes are read while a graph is loaded."""
ALIGNMENT = 4096


class Place(NamedTuple):
    """Where a weight lies outside a graph: the name of the file, and the first of its bytes."""

    file: str
    offset: int


NOWHERE: Mapping[str, Place] = MappingProxyType({})


def sidecar(path: Path) -> Path:
    """Where the weights of a graph may lie: step.onnx has step.onnx.data."""
    return path.with_name(f"{path.name}.data")


def places(weights: Mapping[str, Array], path: Path) -> dict[str, Place]:
    """Where the weights of the graph at this path lie in its sidecar; nothing where all are inside the graph."""
    found: dict[str, Place] = {}
    if sum(array.nbytes for array in weights.values()) <= INSIDE:
        return found
    offset = 0
    for name, array in weights.items():
        if array.nbytes > SMALL:
            found[name] = Place(sidecar(path).name, offset)
            offset += array.nbytes + -array.nbytes % ALIGNMENT
    return found


def write(graph: Graph, path: Path, *, data: bool = True, elsewhere: Mapping[str, Place] = NOWHERE) -> None:
    """Write a graph with its weights.

    Args:
        data: False leaves the sidecar, if there is one, as it is.
        elsewhere: weights that lie in other graphs' sidecars already.
    """
    model, own = graph.model(), {name: array for name, array in graph.weights.items() if name not in elsewhere}
    beside = places(own, path)
    outside = {**elsewhere, **beside}
    model.graph.initializer.extend(
        _reference(name, array, outside[name]) if name in outside else onnx.numpy_helper.from_array(array, name)
        for name, array in graph.weights.items()
    )
    if beside and data:
        with sidecar(path).open("wb") as file:
            for name in beside:
                own[name].tofile(file)
                file.write(b"\0" * (-own[name].nbytes % ALIGNMENT))
    path.write_bytes(model.SerializeToString())


def _reference(name: str, array: Array, place: Place) -> TensorProto:
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place.file), ("offset", place.offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
