"""The whole job in one graph: text, condition, step and pixels as they are, with the decoding loop inside.

ids -> text -> condition, once for each row; step, `count` times (an ONNX Loop); pixels, picture by picture

The parts are what was written, rewritten, quantized and compared before: their nodes are copied, and weights that lie
in their sidecars are read from there, so that large ones are on disk once. A bank's styles are inside, for rows to name
by slot; a single style is what ONNX Runtime's adapter files override, by the names they have in the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...core import AESTHETIC_SCORE
from ..run import spec, styles
from ..run.manifest import File, GraphFile
from ..run.spec import Array, GraphSpec, Tensor
from . import files
from .adapters import Styling
from .convert import begin
from .graph import Graph, Value

PARTS = ("text", "condition", "step", "pixels")

Built = Mapping[str, tuple[GraphSpec, Graph]]


def write(
    folder: Path, built: Built, styling: Styling, packed: Mapping[str, Mapping[str, Array]], factor: int
) -> GraphFile:
    """Write generate.onnx beside its parts; `packed` are the tensors of the styles, in the order of a bank's slots."""
    description, graph = compose(built, styling, packed, factor)
    elsewhere: dict[str, files.Place] = {}
    for name in PARTS:
        kept = files.places(built[name][1].weights, folder / f"{name}.onnx")
        elsewhere |= {f"{name}/{weight}": place for weight, place in kept.items()}
    path = "generate.onnx"
    files.write(graph, folder / path, elsewhere=elsewhere)
    data = File.of(folder, f"{path}.data") if files.sidecar(folder / path).exists() else None
    return GraphFile(File.of(folder, path), data, description.inputs, description.outputs, {})


def compose(
    built: Built, styling: Styling, packed: Mapping[str, Mapping[str, Array]], factor: int
) -> tuple[GraphSpec, Graph]:
    """The graph of the whole job; `factor` is pixels per token."""
    (ids,), (tokens, *_) = built["text"][0].inputs, built["step"][0].inputs
    assert isinstance(tokens.high, int), "the vocabulary's size"
    taken = styling.inputs()
    tables = _tables(taken, packed) if styling.form == "bank" else {}
    description = spec.generate(ids, tokens.high, tuple(each for each in taken if each.name not in tables))
    graph, given = begin(description, "float32")
    given |= {name: graph.weight(f"styles/{name}", table) for name, table in tables.items()}
    parts = {name: built[name][1] for name in PARTS}

    text = graph.inline(parts["text"], "text", given)
    constant = graph.inline(parts["condition"], "condition", {**given, **text, "micro": _micro(given, factor)})
    styles_of_rows = {each.name: given[each.name] for each in taken if each.axes == ("rows",)}
    chosen = given["branches"].reshape(-1)
    rows = {name: value.take(chosen) for name, value in {**constant, **styles_of_rows}.items()}
    shape = graph.op("Shape", given["branches"], dtype=np.int64)
    own = {
        **given,
        **rows,
        "branches": graph.op("Reshape", _range(given["branches"].reshape(-1)), shape),
        "sources": graph.op("Expand", _range(given["seeds"]).unsqueeze(1), shape).reshape(-1),
    }
    per_step = ("weights", "masked", "token_temperature", "choice_temperature")

    def step(index: Value, tokens: Value) -> Value:
        numbers = {name: given[name].take(index) for name in per_step}
        steps = graph.op("Expand", index, graph.op("Shape", given["seeds"], dtype=np.int64))
        return graph.inline(parts["step"], "step", {**own, **numbers, "tokens": tokens, "steps": steps})["tokens_out"]

    drawn = graph.repeat(given["masked"].size(0).reshape(), given["tokens"], step)

    def picture(index: Value) -> Value:
        made = graph.inline(parts["pixels"], "pixels", {"tokens": drawn.take(index).unsqueeze(0)})
        return graph.op("Squeeze", made["images"], graph.constant([0], np.int64))

    images = graph.stack(drawn.size(0).reshape(), picture)
    for output, value in zip(description.outputs, (images, drawn), strict=True):
        graph.output(output, value)
    return description, graph


def _tables(inputs: Sequence[Tensor], packed: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """A bank with these styles, as wide as the widest of them; at slot 0 there is the base."""
    bank = styles.Bank(inputs, len(packed))
    for slot, (name, tensors) in enumerate(packed.items()):
        bank.write(slot, name, tensors)
    return bank.feeds(frozenset(bank.tensors), (), ())


def _micro(given: Mapping[str, Value], factor: int) -> Value:
    """Width and height in pixels, crop and score: the micro-conditions (R, 5) of all rows."""
    tokens, rows = given["tokens"], given["ids"].size(0)
    graph = tokens.graph
    sizes = [(tokens.size(axis) * factor).cast(np.float32) for axis in (2, 1)]
    whole = graph.op("Concat", *sizes, graph.constant([0, 0, AESTHETIC_SCORE], np.float32), axis=0)
    return graph.op("Expand", whole, graph.op("Concat", rows, graph.constant([5], np.int64), axis=0))


def _range(values: Value) -> Value:
    """0, 1, ... as many as there are values."""
    zero, one = (values.graph.constant(number, np.int64) for number in (0, 1))
    return values.graph.op("Range", zero, values.size(0).reshape(), one)
