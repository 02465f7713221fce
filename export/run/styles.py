"""The styles of a running export: their tensors as a graph's inputs, by slot. Neither torch nor onnx is needed here.

A slot is -1 for the base, or what a registry of names hands out. `write` puts a style there, `feeds` gives a graph what
it takes for the slots of its rows. Tables of a bank grow to the widest style written: an axis of the graphs is open.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from ...core import StylemuseError
from .spec import Array, Tensor

BASE = -1


class Styles:
    """Tensors of styles by slot, in the form a graph takes them; this class is that of exports without any."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.tensors = {tensor.name: tensor for tensor in inputs if tensor.name.endswith((".down", ".up"))}

    def write(self, slot: int, name: str, packed: Mapping[str, Array]) -> None:
        """Put a style into a slot, in place of what was there.

        Raises:
            StylemuseError: it adapts what this export has no place for, in other sizes or types, or is not finite.
        """
        if unknown := packed.keys() - self.tensors.keys():
            places = sorted({each.rpartition(".")[0] for each in self.tensors})
            raise StylemuseError(
                f"style {name} adapts {sorted(unknown)[0].rpartition('.')[0]}; this export has places for "
                f"{f'{len(places)} others, {places[0]} the first' if places else 'no style'}"
            )
        for key, array in packed.items():
            axes = self.tensors[key].axes[-2:]
            sizes = tuple(
                size if isinstance(axis, str) else axis for axis, size in zip(axes, array.shape, strict=False)
            )
            if array.shape != sizes:
                raise StylemuseError(f"style {name}: {key} is {array.shape}, this export takes {axes}")
            if array.dtype != self.tensors[key].dtype:
                raise StylemuseError(
                    f"style {name}: {key} is {array.dtype}, this export takes {self.tensors[key].dtype}"
                )
            if not np.isfinite(array).all():
                raise StylemuseError(f"style {name}: {key} has numbers that are not finite")
        self._write(slot, packed)

    def _write(self, slot: int, packed: Mapping[str, Array]) -> None:
        raise AssertionError("without places no style passes the check")

    def feeds(self, names: frozenset[str], slots: Sequence[int], scales: Sequence[float]) -> dict[str, Array]:
        """The inputs of a graph, of those in `names`, for rows with these slots and strengths."""
        assert all(slot == BASE for slot in slots), "no style passes the check"
        return {}


class Bank(Styles):
    """Form "bank": every row its own slot. Slot s lies at s + 1 of the tables; at 0 there are zeros, the base."""

    def __init__(self, inputs: Sequence[Tensor], slots: int) -> None:
        super().__init__(inputs)
        self.slots, self._lock = slots, threading.Lock()
        # Replaced as a whole when it is widened: a step never sees tables of two ranks. Its reader needs no lock.
        self._tables = {name: np.zeros(self._shape(tensor, 1), np.float32) for name, tensor in self.tensors.items()}
        self._rank = 1
        self._written: dict[int, frozenset[str]] = {}

    def _shape(self, tensor: Tensor, rank: int) -> tuple[int, ...]:
        lanes = (rank * int(axis.removeprefix("lanes_")) if isinstance(axis, str) else axis for axis in tensor.axes[1:])
        return (self.slots + 1, *lanes)

    def _write(self, slot: int, packed: Mapping[str, Array]) -> None:
        assert 0 <= slot < self.slots
        with self._lock:
            self._widen(packed)
            for name in self._written.pop(slot, frozenset()) - packed.keys():
                self._tables[name][slot + 1] = 0
            for name, array in packed.items():
                own = self._tables[name][slot + 1]
                own[: array.shape[0], : array.shape[1]] = array
                own[array.shape[0] :] = 0
                own[:, array.shape[1] :] = 0
            self._written[slot] = frozenset(packed)

    def _widen(self, packed: Mapping[str, Array]) -> None:
        """Make the tables as wide as these tensors; what runs keeps the ones it was given."""
        rank = self._rank
        for name, array in packed.items():
            for axis, size in zip(self.tensors[name].axes[1:], array.shape, strict=True):
                if isinstance(axis, str):
                    rank = max(rank, -(-size // int(axis.removeprefix("lanes_"))))
        if rank == self._rank:
            return
        wider = {}
        for name, tensor in self.tensors.items():
            old = self._tables[name]
            wider[name] = np.zeros(self._shape(tensor, rank), np.float32)
            wider[name][:, : old.shape[1], : old.shape[2]] = old
        self._tables, self._rank = wider, rank

    def feeds(self, names: frozenset[str], slots: Sequence[int], scales: Sequence[float]) -> dict[str, Array]:
        """Slots, scales and the tables."""
        rows: dict[str, Array] = {"slots": np.array(slots, np.int64) + 1, "scales": np.array(scales, np.float32)}
        return {name: array for name, array in (rows | self._tables).items() if name in names}


class Single(Styles):
    """Form "single": one style for all rows that have one; the initializers of the graph are overridden."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self._styles: dict[int, dict[str, Array]] = {}

    def _write(self, slot: int, packed: Mapping[str, Array]) -> None:
        self._styles[slot] = {name: np.ascontiguousarray(array, np.float32) for name, array in packed.items()}

    def feeds(self, names: frozenset[str], slots: Sequence[int], scales: Sequence[float]) -> dict[str, Array]:
        """Scales, 0 for the base, and the style's tensors."""
        used = sorted(set(slots) - {BASE})
        if len(used) > 1:
            raise StylemuseError(
                f"an export of form 'single' has one style at a time, not {len(used)}; draw them one after the other, "
                "or export with --form bank"
            )
        own = self._styles[used[0]] if used else {}
        rows = [0.0 if slot == BASE else scale for slot, scale in zip(slots, scales, strict=True)]
        given: dict[str, Array] = {"scales": np.array(rows, np.float32), **own}
        return {name: array for name, array in given.items() if name in names}


class Fused(Styles):
    """Form "fused" with a style: every row has it, at the scale it was exported with."""

    def __init__(self, inputs: Sequence[Tensor], scale: float) -> None:
        super().__init__(inputs)
        self._scale = scale

    def _write(self, slot: int, packed: Mapping[str, Array]) -> None:
        assert not packed

    def feeds(self, names: frozenset[str], slots: Sequence[int], scales: Sequence[float]) -> dict[str, Array]:
        """Nothing; rows of the base cannot be drawn."""
        if any(slot == BASE for slot in slots):
            raise StylemuseError(
                "an export of form 'fused' draws every branch in its style: give the style, and guidance CFG "
                "(or StyleDrop with style and text strength 0)"
            )
        if other := [scale for scale in scales if scale != self._scale]:
            raise StylemuseError(f"the style is fused at scale {self._scale:g}; {other[0]:g} needs another export")
        return {}


def make(form: str, inputs: Sequence[Tensor], slots: int, fused: float | None) -> Styles:
    """The styles of an export whose graphs take these inputs; `fused` is the scale of one in the graphs, if any."""
    if form == "fused":
        return Styles(inputs) if fused is None else Fused(inputs, fused)
    return Bank(inputs, slots) if form == "bank" else Single(inputs)
