"""Adapters in a graph: the nodes of each form, and a style's tensors as the graphs take them.

    low-rank    y + scale (x down) up          down (in, lanes), up (lanes, out)
    bottleneck  y + scale gelu(y down) up      down (D, lanes),  up (lanes, D)

bank    down and up are stacked over slots, inputs that stay where they are; each row has a slot (0 is empty: the base)
single  one style for the rows whose `scales` isn't 0; initializers that an .onnx_adapter file overrides, empty without
fused   one style for every row, in the weights; a bottleneck, which no weight can hold, as nodes

A fused projection of P parts (q, k and v) has P r lanes: lane i P + p is number i of part p, and its row of `up` is
what it adds to that part. So all parts share one product with `down`, and a wider rank only appends lanes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..run.spec import Array, Tensor
from .graph import Graph, Value

if TYPE_CHECKING:
    from ...adapters.canonical import Adapter
    from ...kernels.rows import Site

FORMS = ("bank", "single", "fused")


def is_constant(place: str) -> bool:
    """Whether a place belongs to the step-constant part: keys and values of the text."""
    return place.endswith(".kv")


@dataclass(frozen=True)
class Place:
    """A site as the graphs see it: a projection of `parts` parts of `outputs` each, or a bottleneck (0 parts)."""

    name: str
    inputs: int
    outputs: int
    parts: int

    @property
    def lanes(self) -> str:
        """The name of its lanes' axis."""
        return f"lanes_{max(self.parts, 1)}"


def places(sites: Mapping[str, Site], bottlenecks: Mapping[str, int], used: Collection[str]) -> tuple[Place, ...]:
    """The places that the checkpoint's modules and bottleneck sites in `used` belong to, in the model's order."""
    found: dict[str, Place] = {}
    for module, site in sites.items():
        if module in used:
            found[site.group] = Place(site.group, site.inputs, site.outputs, site.parts)
    for name, width in bottlenecks.items():
        if name in used:
            found[name] = Place(name, width, width, 0)
    return tuple(found.values())


@dataclass(frozen=True)
class Styling:
    """What an export has of adapters: its form, the places they can change, and of form "fused" a bottleneck style."""

    form: str = "fused"
    places: tuple[Place, ...] = ()
    fused: tuple[Adapter, float] | None = None

    def part(self, *, constant: bool) -> Styling:
        """What of it belongs to the step-constant graph, or to the step's."""
        return replace(self, places=tuple(each for each in self.places if is_constant(each.name) is constant))

    def inputs(self) -> tuple[Tensor, ...]:
        """What a graph takes for it."""
        if not self.places:
            return ()
        bank = self.form == "bank"
        tensors = [Tensor("slots", "int64", ("rows",), "slots")] if bank else []
        tensors.append(Tensor("scales", "float32", ("rows",)))
        stacked = ("slots",) if bank else ()
        for place in self.places:
            down, up = (place.inputs, place.lanes), (place.lanes, place.outputs)
            for part, axes in (("down", down), ("up", up)):
                tensors.append(
                    Tensor(f"{place.name}.{part}", "float32", (*stacked, *axes), overridable=not bank, summed=-2)
                )
        return tuple(tensors)

    def nodes(self, graph: Graph, given: Mapping[str, Value]) -> RowAdapters | FusedBottlenecks:
        """The nodes it adds to a graph with these inputs."""
        return RowAdapters(self.places, given) if self.fused is None else FusedBottlenecks(graph, *self.fused)


class RowAdapters:
    """The nodes of the forms bank and single; nothing where there are no places. `given` are the graph's inputs."""

    def __init__(self, chosen: Collection[Place], given: Mapping[str, Value]) -> None:
        self._parts = {place.name: place.parts for place in chosen}
        self._given, self._slots = given, given.get("slots")
        self._scales = given["scales"].unsqueeze(1, 2) if chosen else None

    def linear(self, name: str, x: Value, parts: tuple[Value, ...]) -> tuple[Value, ...]:
        """y + scale (x down) up, part by part."""
        if name not in self._parts:
            return parts
        count, fused = len(parts), self._parts[name]
        hidden, up = self._scaled(self._down(name, x)), self._table(f"{name}.up", x)
        if count == 1:
            pairs = [(hidden, up)]
        elif fused == count:
            pairs = [(hidden.every(count, part, -1), up.every(count, part, -2)) for part in range(count)]
        else:  # one site, whose outputs are used in parts
            pairs = [(hidden, part) for part in up.split(count)]
        return tuple(y + own @ wide for y, (own, wide) in zip(parts, pairs, strict=True))

    def bottleneck(self, name: str, y: Value) -> Value:
        """y + scale gelu(y down) up."""
        if name not in self._parts:
            return y
        hidden = y.graph.op("Gelu", self._down(name, y))
        return y + self._scaled(hidden) @ self._table(f"{name}.up", y)

    def _down(self, name: str, x: Value) -> Value:
        return x @ self._table(f"{name}.down", x)

    def _scaled(self, hidden: Value) -> Value:
        assert self._scales is not None
        return hidden * self._scales.cast(hidden.dtype)

    def _table(self, name: str, like: Value) -> Value:
        table = self._given[name]
        return (table if self._slots is None else table.take(self._slots)).cast(like.dtype)


class FusedBottlenecks:
    """The nodes of one bottleneck style for every row, at a fixed scale."""

    def __init__(self, graph: Graph, adapter: Adapter, scale: float) -> None:
        self._graph, self._scale = graph, scale
        self._pairs = {name: (down.numpy(), up.numpy()) for name, (down, up) in adapter.tensors.items()}

    def linear(self, name: str, x: Value, parts: tuple[Value, ...]) -> tuple[Value, ...]:
        """y as it is."""
        return parts

    def bottleneck(self, name: str, y: Value) -> Value:
        """y + gelu(y down) (scale up)."""
        if name not in self._pairs:
            return y
        down, up = self._pairs[name]
        hidden = self._graph.op("Gelu", y @ self._graph.weight(f"{name}.down", down))
        return y + hidden @ self._graph.weight(f"{name}.up", np.float32(self._scale) * up)


def pack(adapter: Adapter, sites: Mapping[str, Site]) -> dict[str, Array]:
    """A style's tensors by the graphs' names, fp32, at its own rank; its scale is not in them."""
    if adapter.kind == "bottleneck":
        pairs = adapter.tensors.items()
        return {
            f"{name}.{part}": each.float().numpy()
            for name, pair in pairs
            for part, each in zip(("down", "up"), pair, strict=True)
        }
    packed: dict[str, Array] = {}
    groups: dict[str, list[str]] = {}
    for module in adapter.tensors:
        groups.setdefault(sites[module].group, []).append(module)
    for group, modules in groups.items():
        parts, rank = sites[modules[0]].parts, max(adapter.tensors[module][0].shape[0] for module in modules)
        site = sites[modules[0]]
        down = np.zeros((site.inputs, rank, parts), np.float32)
        up = np.zeros((rank, parts, site.outputs), np.float32)
        for module in modules:
            part, (narrow, wide) = sites[module].part, adapter.tensors[module]
            down[:, : len(narrow), part] = narrow.numpy().T
            up[: len(narrow), part] = wide.numpy().T
        packed[f"{group}.down"] = down.reshape(site.inputs, -1)
        packed[f"{group}.up"] = up.reshape(rank * parts, -1)
    return packed
