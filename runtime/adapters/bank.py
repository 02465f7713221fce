"""The bank: every resident adapter in stacked tensors whose addresses never change, and the names that point into it.

All memory is reserved once, uninitialised: on a CPU the pages of a slot cost nothing until it is used. Writing a slot
writes all of its lanes at every site it touches, so that lanes beyond its rank are zero and A -> B -> A is bitwise A;
sites an adapter does not touch have rank 0 and are not read.

A name points to a slot. Replacing or removing it takes effect for requests that come after; a slot in use by running
requests (`acquire`, `release`) is freed when the last of them is done, so each finishes with the adapter it began with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..core import StylemuseError
from ..kernels.rows import Bottleneck, LowRank, Site
from .canonical import Adapter
from .files import some


class SlotsInUse(StylemuseError):
    """Every slot holds an adapter that is registered or used by a running request."""


class Bank:
    """Slots for adapters of one model, and the registry of their names; safe to change while another thread serves.

    Args:
        sites: linear layers by checkpoint name; those of one group are stacked together as its parts.
        bottleneck_sites: points of the residual stream -> width D.
        slots: adapters that can be resident at once.
        rank: largest LoRA rank and largest bottleneck width.
        base_sha256: hash of the model's weights; an adapter that names another is refused.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        bottleneck_sites: Mapping[str, int],
        *,
        slots: int = 64,
        rank: int = 64,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        base_sha256: str | None = None,
    ) -> None:
        if slots < 1 or rank < 1:
            raise StylemuseError(f"a bank needs at least one slot and rank 1, not slots={slots} and rank={rank}")
        self.slots, self.rank, self.base_sha256 = slots, rank, base_sha256
        self._places, self._widths = dict(sites), dict(bottleneck_sites)
        stacks: dict[str, LowRank | Bottleneck] = {}

        def table(*shape: int) -> Tensor:
            return torch.empty(slots, *shape, device=device, dtype=dtype)

        def counts() -> Tensor:
            return torch.zeros(slots, device=device, dtype=torch.int64)

        for site in sites.values():
            if site.group not in stacks:
                down, up = table(site.parts, site.inputs, rank), table(site.parts, rank, site.outputs)
                stacks[site.group] = LowRank(down, up, counts())
            shape = (*stacks[site.group].down.shape[1:3], stacks[site.group].up.shape[-1])
            assert shape == (site.parts, site.inputs, site.outputs), f"the parts of {site.group} must have one size"
        for name, width in bottleneck_sites.items():
            assert name not in stacks, f"{name} is both a linear and a bottleneck site"
            stacks[name] = Bottleneck(table(width, rank), table(rank, width), counts())
        self.sites: Mapping[str, LowRank | Bottleneck] = MappingProxyType(stacks)
        self._adapters: dict[int, Adapter] = {}
        self._groups: dict[int, frozenset[str]] = {}
        self._names: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users = [0] * slots
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        with self._lock:
            return tuple(sorted(self._names))

    def slot(self, name: str) -> int:
        """The slot a name points to now."""
        slot = self._names.get(name)
        if slot is None:
            raise StylemuseError(f"adapter {name!r} is unknown; allowed are {', '.join(self.names) or 'none yet'}")
        return slot

    def adapter(self, name: str) -> Adapter:
        """The registered adapter, as it was given."""
        with self._lock:
            return self._adapters[self.slot(name)]

    def resident(self, slot: int) -> Adapter:
        """The adapter a slot holds."""
        return self._adapters[slot]

    def touched(self, slots: Iterable[int]) -> Mapping[str, LowRank | Bottleneck]:
        """The part of `sites` in which adapters of these slots have something; at all others their rows are base.

        The caller holds the slots, so they don't change. No lock: no step may wait until another slot is written.
        """
        names = set().union(*(self._groups[slot] for slot in slots))
        return {name: self.sites[name] for name in names}

    def add(self, adapter: Adapter, *, replace: bool = False, evict: bool = False) -> int:
        """Put an adapter into a free slot and register its name; with `replace` the name may exist and moves to it.

        With `evict` a slot is made free if need be, as `room` does.

        Raises:
            SlotsInUse: the adapter fits, but no slot is free.
        """
        pairs = self._fit(adapter)
        with self._lock:
            if adapter.name in self._names and not replace:
                raise StylemuseError(f"adapter {adapter.name!r} exists already; remove it first or replace it")
            if evict:
                self.room(make=True)
            free = self._free()
            self._write(free, adapter, pairs)
            old = self._names.pop(adapter.name, None)
            self._names[adapter.name] = free
            if old is not None:
                self._retire(old)
            return free

    def remove(self, name: str) -> None:
        """Forget a name; its slot is cleared as soon as no running request uses it."""
        with self._lock:
            slot = self.slot(name)
            del self._names[name]
            self._retire(slot)

    def acquire(self, name: str) -> int:
        """The name's slot, kept for the caller until `release` even if the name is replaced or removed meanwhile."""
        with self._lock:
            slot = self.slot(name)
            self._users[slot] += 1
            self._names.move_to_end(name)
            return slot

    def hold(self, slot: int, adapter: Adapter) -> bool:
        """Keep a slot as `acquire` does, if it still holds that adapter; whether it does."""
        with self._lock:
            if self._adapters.get(slot) is not adapter:
                return False
            self._users[slot] += 1
            if self._names.get(adapter.name) == slot:
                self._names.move_to_end(adapter.name)
            return True

    def lend(self, adapter: Adapter) -> int:
        """A slot for an adapter without a name, kept for the caller until `release`, which clears it.

        One is made free if need be, as `room` does.
        """
        pairs = self._fit(adapter)
        with self._lock:
            self.room(make=True)
            slot = self._free()
            self._write(slot, adapter, pairs)
            self._users[slot] += 1
            return slot

    def name(self, slot: int) -> None:
        """Register the adapter of a lent slot by its name, which must not be in use: it stays when it is released."""
        with self._lock:
            assert self._adapters[slot].name not in self._names
            self._names[self._adapters[slot].name] = slot

    def room(self, *, make: bool = False) -> bool:
        """Whether a slot is free or could be: its name is forgotten, of those without users the least recently used.

        With `make` that is done, so that a slot is free.
        """
        with self._lock:
            if len(self._adapters) < self.slots:
                return True
            idle = next((name for name, slot in self._names.items() if not self._users[slot]), None)
            if idle is not None and make:
                self.remove(idle)
            return idle is not None

    def release(self, slot: int) -> None:
        """Give back what `acquire` returned."""
        with self._lock:
            assert self._users[slot] > 0, f"slot {slot} was not acquired"
            self._users[slot] -= 1
            self._retire(slot)

    def _free(self) -> int:
        free = next((slot for slot in range(self.slots) if slot not in self._adapters), None)
        if free is None:
            raise SlotsInUse(f"all {self.slots} slots are in use ({some(self._names)}); remove an adapter first")
        return free

    def _retire(self, slot: int) -> None:
        adapter = self._adapters.get(slot)
        if not self._users[slot] and (adapter is None or self._names.get(adapter.name) != slot):
            self.clear(slot)

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits this bank."""
        self._fit(adapter)

    def put(self, slot: int, adapter: Adapter) -> None:
        """Write an adapter into a slot; it is checked as a whole before anything is written."""
        assert 0 <= slot < self.slots, f"slot {slot} of {self.slots}"
        self._write(slot, adapter, self._fit(adapter))

    def _write(self, slot: int, adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        with self._lock:
            self.clear(slot)
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

    def clear(self, slot: int) -> None:
        """Empty a slot: zeros where it had an adapter, rank 0 everywhere."""
        with self._lock:
            adapter = self._adapters.pop(slot, None)
            self._groups.pop(slot, None)
            for site in adapter.tensors if adapter else ():
                target, lanes = self._lanes(slot, site)
                if int(lanes[slot]):
                    lanes[slot] = 0
                    target.down[slot].zero_()
                    target.up[slot].zero_()

    def _group(self, site: str) -> str:
        return self._places[site].group if site in self._places else site

    def _lanes(self, slot: int, site: str) -> tuple[LowRank | Bottleneck, Tensor]:
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
            raise StylemuseError(f"{what} has rank {adapter.rank}; this bank allows at most {self.rank}")
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
            target = self.sites[self._places[site].group if linear else site].down
            pairs[site] = down.to(target.dtype), up.to(target.dtype)
            if not all(bool(torch.isfinite(side).all()) for side in pairs[site]):
                raise StylemuseError(f"{what}: {site} overflows {target.dtype}, in which this bank is kept")
        return pairs
