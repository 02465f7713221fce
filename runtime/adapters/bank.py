"""The bank: every resident adapter in stacked tensors whose addresses never change. Slots, and nothing of names.

A kind of layer (the fused q, k, v of all layers, say) gets its stacks when the first adapter touches it, for all layers
at once, and keeps them: what a captured graph reads stays where it was. Memory is reserved uninitialised: on a CPU the
pages of a slot cost nothing until it is used. Writing a slot writes all of its lanes at every site it touches, so that
lanes beyond its rank are zero and A -> B -> A is bitwise A; sites it does not touch have rank 0 and are not read.

One thread at a time may write (the `Library` sees to it); others may read what they hold meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..core import StylemuseError
from ..kernels.rows import Bottleneck, LowRank, Site
from .canonical import Adapter
from .files import some

Stack = LowRank | Bottleneck


class SlotsInUse(StylemuseError):
    """Every slot holds an adapter that is used by a running request."""


def kind_of(site: str) -> str:
    """The kind of layer a place in the bank belongs to: the last part of its name, which the layers have in common."""
    return site.rpartition(".")[2]


class Bank:
    """Slots for adapters of one model.

    Args:
        sites: linear layers by checkpoint name; those of one group are stacked together as its parts.
        bottleneck_sites: points of the residual stream -> width D.
        slots: adapters that can be resident at once.
        rank: largest LoRA rank and largest bottleneck width.
        base_sha256: hash of the model's weights; an adapter that names another is refused.

    Attributes:
        sites: the stacks that there are, by group; a new mapping when there are more.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        bottleneck_sites: Mapping[str, int],
        *,
        slots: int = 64,
        rank: int = 32,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        base_sha256: str | None = None,
    ) -> None:
        if slots < 1 or rank < 1:
            raise StylemuseError(f"a bank needs at least one slot and rank 1, not slots={slots} and rank={rank}")
        self.slots, self.rank, self.base_sha256 = slots, rank, base_sha256
        self._device, self._dtype = torch.device(device), dtype
        self._places, self._widths = dict(sites), dict(bottleneck_sites)
        self._sizes: dict[str, tuple[int, int, int]] = {}
        for site in sites.values():
            sizes = self._sizes.setdefault(site.group, (site.parts, site.inputs, site.outputs))
            assert sizes == (site.parts, site.inputs, site.outputs), f"the parts of {site.group} must have one size"
        assert self._sizes.keys().isdisjoint(bottleneck_sites), "a name is both a linear and a bottleneck site"
        self.sites: Mapping[str, Stack] = MappingProxyType({})
        self._adapters: dict[int, Adapter] = {}
        self._groups: dict[int, frozenset[str]] = {}

    @property
    def reserved(self) -> int:
        """Bytes of the stacks that there are."""
        return sum(stack.down.nbytes + stack.up.nbytes for stack in self.sites.values())

    def adapter(self, slot: int) -> Adapter:
        """What a slot holds, as it was given."""
        return self._adapters[slot]

    def touched(self, slots: Iterable[int]) -> Mapping[str, Stack]:
        """The part of `sites` in which adapters of these slots have something; at all others their rows are base.

        The caller holds the slots, so they don't change. No lock: no step may wait until another slot is written.
        """
        names = set().union(*(self._groups[slot] for slot in slots))
        return {name: self.sites[name] for name in names}

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits this bank."""
        self._fit(adapter)

    def add(self, adapter: Adapter) -> int:
        """Write an adapter into the first empty slot; the slot.

        Raises:
            SlotsInUse: the adapter fits, but no slot is empty.
        """
        pairs = self._fit(adapter)
        free = next((slot for slot in range(self.slots) if slot not in self._adapters), None)
        if free is None:
            raise SlotsInUse(f"all {self.slots} slots hold an adapter")
        self._write(free, adapter, pairs)
        return free

    def write(self, slot: int, adapter: Adapter) -> None:
        """Write an adapter into a slot; it is checked as a whole before anything is written."""
        assert 0 <= slot < self.slots, f"slot {slot} of {self.slots}"
        self._write(slot, adapter, self._fit(adapter))

    def clear(self, slot: int) -> None:
        """Empty a slot: zeros where it had an adapter, rank 0 everywhere."""
        adapter = self._adapters.pop(slot, None)
        self._groups.pop(slot, None)
        for site in adapter.tensors if adapter else ():
            target, lanes = self._lanes(slot, site)
            if int(lanes[slot]):
                lanes[slot] = 0
                target.down[slot].zero_()
                target.up[slot].zero_()

    def _write(self, slot: int, adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.clear(slot)
        self._reserve({kind_of(self._group(site)) for site in pairs})
        for site, (down, up) in pairs.items():
            target, lanes = self._lanes(slot, site)
            if not int(lanes[slot]):
                target.down[slot].zero_()
                target.up[slot].zero_()
            part = () if isinstance(target, Bottleneck) else (self._places[site].part,)
            target.down[(slot, *part)][:, : down.shape[1]].copy_(down)
            target.up[(slot, *part)][: up.shape[0]].copy_(up)
            lanes[slot] = max(int(lanes[slot]), down.shape[1])
        self._adapters[slot] = adapter
        self._groups[slot] = frozenset(self._group(site) for site in pairs)

    def _reserve(self, kinds: set[str]) -> None:
        """Stacks of these kinds, in all layers."""
        missing = kinds - {kind_of(name) for name in self.sites}
        if not missing:
            return
        stacks = dict(self.sites)
        for group, (parts, inputs, outputs) in self._sizes.items():
            if kind_of(group) in missing:
                tables = self._table(parts, inputs, self.rank), self._table(parts, self.rank, outputs)
                stacks[group] = LowRank(*tables, self._counts())
        for name, width in self._widths.items():
            if kind_of(name) in missing:
                tables = self._table(width, self.rank), self._table(self.rank, width)
                stacks[name] = Bottleneck(*tables, self._counts())
        # Replaced, not added to: a step may be going through the old mapping.
        self.sites = MappingProxyType(stacks)

    def _table(self, *shape: int) -> Tensor:
        return torch.empty(self.slots, *shape, device=self._device, dtype=self._dtype)

    def _counts(self) -> Tensor:
        return torch.zeros(self.slots, device=self._device, dtype=torch.int64)

    def _group(self, site: str) -> str:
        return self._places[site].group if site in self._places else site

    def _lanes(self, slot: int, site: str) -> tuple[Stack, Tensor]:
        target = self.sites[self._group(site)]
        return target, target.ranks if isinstance(target, LowRank) else target.widths

    def _fit(self, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        """The pairs as the bank stores them, (in, r) and (r, out) in its dtype; an error if they do not fit."""
        what = f"adapter {adapter.name}"
        if self.base_sha256 and adapter.base_sha256 and adapter.base_sha256 != self.base_sha256:
            made_for = adapter.base_model or adapter.base_sha256[:12]
            raise StylemuseError(f"{what} is made for another base model ({made_for}), whose weights differ")
        linear = adapter.kind == "lora"
        allowed = self._places.keys() if linear else self._widths.keys()
        if unknown := adapter.tensors.keys() - allowed:
            raise StylemuseError(
                f"{what} is made for another model: it adapts {some(unknown)}; allowed are {some(allowed) or 'none'}"
            )
        if adapter.rank > self.rank:
            raise StylemuseError(
                f"{what} has rank {adapter.rank}; this bank allows at most {self.rank}, the rank it was loaded with"
            )
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for site, (down, up) in adapter.tensors.items():
            if linear:
                down, up = down.T, up.T
                sizes = self._places[site].inputs, self._places[site].outputs
            else:
                sizes = self._widths[site], self._widths[site]
            if (down.shape[0], up.shape[1]) != sizes:
                raise StylemuseError(
                    f"{what} is made for another model: {site} maps {down.shape[0]} to {up.shape[1]}, here it is "
                    f"{sizes[0]} to {sizes[1]}"
                )
            pairs[site] = down.to(self._dtype), up.to(self._dtype)
            if not all(bool(torch.isfinite(side).all()) for side in pairs[site]):
                raise StylemuseError(f"{what}: {site} overflows {self._dtype}, in which this bank is kept")
        return pairs
