"""A pipeline's adapters by name: added from any published file, while serving too.

More can be registered than the bank has slots. Every name has a `Version`; a request pins the versions it chose and
acquires their slots when it is about to run. A version without a slot is read again from where it came, in the place of
the one used longest ago that no request uses.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..core import StylemuseError, unknown
from ..kernels.rows import Site
from . import canonical, lora
from .bank import Bank, SlotsInUse
from .canonical import Adapter
from .versions import Version


class Library:
    """The adapters of one pipeline: ``add``, ``remove``, ``names``, ``in``, and by name the `Adapter`.

    Attributes:
        on_free: told of every version that nobody needs any more; quick, for the library may be locked meanwhile.
    """

    on_free: Callable[[Version], None] | None = None

    def __init__(self, bank: Bank, sites: Mapping[str, Site], base_model: str, fingerprint: Callable[[], str]) -> None:
        """``fingerprint`` hashes the model's weights; it is called when the first adapter that names a hash comes."""
        self.bank, self._sites, self._base_model, self._fingerprint = bank, sites, base_model, fingerprint
        self._versions: dict[str, Version] = {}
        self._unused = set(range(bank.slots))
        self._held: OrderedDict[int, Version] = OrderedDict()  # by slot, the one used longest ago first
        self._lock, self._reading = threading.RLock(), threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names a request may use, sorted."""
        with self._lock:
            return tuple(sorted(self._versions))

    @property
    def slots(self) -> int:
        """How many can be resident at once."""
        return self.bank.slots

    @property
    def rank(self) -> int:
        """The largest that one may have."""
        return self.bank.rank

    @property
    def resident(self) -> tuple[str, ...]:
        """The names that have a slot now, sorted."""
        with self._lock:
            return tuple(sorted(name for name, version in self._versions.items() if version.slot is not None))

    @property
    def reserved(self) -> int:
        """Bytes that the slots take."""
        return self.bank.reserved

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._versions)

    def __getitem__(self, name: str) -> Adapter:
        with self._lock:
            version = self.version(name)
            if version.slot is not None:
                return self.bank.adapter(version.slot)
        return version.read()

    def version(self, name: str) -> Version:
        """What a name stands for now."""
        version = self._versions.get(name)
        if version is None:
            raise StylemuseError(unknown("style", name, self.names))
        return version

    def versions(self) -> list[Version]:
        """What every name stands for now, by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits this model."""
        if adapter.base_sha256 is not None:
            self.base_sha256()
        self.bank.check(adapter)

    def base_sha256(self) -> str:
        """The hash of the model's weights, which adapters made for it carry."""
        if self.bank.base_sha256 is None:
            self.bank.base_sha256 = self._fingerprint()
        return self.bank.base_sha256

    def read(self, name: str, source: str | Path, *, alpha: float | None = None, recipe: str | None = None) -> Adapter:
        """An adapter from a canonical folder or a published LoRA file, checked for this model but not registered."""
        path = Path(source).expanduser()
        if (path / "adapter.json").is_file():
            if alpha is not None or recipe is not None:
                raise StylemuseError(f"{path.name} is a canonical adapter, which has its scale; drop alpha and recipe")
            return canonical.renamed(canonical.load(path), name)
        return lora.read(
            path,
            name=name,
            sites=self._sites,
            alpha=alpha,
            recipe=recipe,
            base_model=self._base_model,
        )

    def add(
        self,
        name: str,
        source: str | Path | Adapter,
        *,
        alpha: float | None = None,
        recipe: str | None = None,
        swap: bool = False,
        on_free: Callable[[], None] | None = None,
    ) -> Adapter:
        """Register a style for the requests that come after.

        Args:
            name: how requests choose it.
            source: a canonical folder, a published LoRA file or folder, which is read again when the style had to leave
                its slot; or an `Adapter`, which is kept.
            alpha, recipe: the LoRA's alpha or the recipe it was trained by, where the file doesn't store it.
            swap: the name may exist and moves to the new adapter; running requests keep the old one.
            on_free: called when the name stands for something else and no request needs this source any more.
        """
        again: Callable[[], Adapter] | None = None
        folder: Path | None = None
        if isinstance(source, Adapter):
            adapter = canonical.renamed(source, name)
        else:
            path = Path(source).expanduser().absolute()
            folder = path if path.is_dir() else None
            adapter = self.read(name, path, alpha=alpha, recipe=recipe)

            def again() -> Adapter:
                return self.read(name, path, alpha=alpha, recipe=recipe)

        self.check(adapter)
        version = Version(adapter, again, on_free, folder)
        with self._lock:
            if name in self._versions and not swap:
                raise StylemuseError(f"adapter {name!r} exists already; remove it first or replace it")
            old = self._versions.get(name)
            slot = self._free_slot(old)
            if slot is not None:  # else it has none until a request needs it
                self._put(slot, version, adapter)
            self._versions[name] = version
            if old is not None:
                self._retire(old)
        return adapter

    def remove(self, name: str) -> None:
        """Forget a style; running requests finish with it."""
        with self._lock:
            self.version(name)
            self._retire(self._versions.pop(name))

    def pin(self, name: str) -> Version:
        """What the name stands for now, kept for the caller until `unpin`; it need not have a slot."""
        with self._lock:
            version = self.version(name)
            version.pins += 1
            return version

    def unpin(self, version: Version) -> None:
        """Give back what `pin` returned."""
        with self._lock:
            version.pins -= 1
            free = version.retired and not version.pins
        if free:
            self._free(version)

    def is_resident(self, version: Version) -> bool:
        """Whether `acquire` would have nothing to read now, as far as can be told before."""
        return version.slot is not None

    def acquire(self, version: Version) -> int:
        """A pinned version's slot, kept for the caller until `release`; read into one if it has none.

        Raises:
            SlotsInUse: requests use all slots; a later try may succeed.
            StylemuseError: its file is gone or changed.
        """
        slot = self._use(version)
        if slot is not None:
            return slot
        with self._reading:
            slot = self._use(version)  # another may have read it meanwhile
            if slot is not None:
                return slot
            full = SlotsInUse(f"requests use all {self.bank.slots} slots; style {version.name!r} needs one")
            with self._lock:
                if not self._unused and all(held.users for held in self._held.values()):
                    raise full  # before its file is read
            adapter = version.read()
            with self._lock:
                slot = self._free_slot()
                if slot is None:
                    raise full
                self._put(slot, version, adapter)
                version.users += 1
                return slot

    def release(self, slot: int) -> None:
        """Give back what `acquire` returned."""
        with self._lock:
            version = self._held[slot]
            assert version.users > 0, f"slot {slot} was not acquired"
            version.users -= 1
            if version.retired and not version.users:
                self._evict(version)

    def _use(self, version: Version) -> int | None:
        with self._lock:
            if version.slot is not None:
                version.users += 1
                self._held.move_to_end(version.slot)
            return version.slot

    def _put(self, slot: int, version: Version, adapter: Adapter) -> None:
        self.bank.write(slot, adapter)
        self._unused.discard(slot)
        self._held[slot], version.slot = version, slot

    def _free_slot(self, first: Version | None = None) -> int | None:
        """An empty slot; else that of ``first``, or of the version used longest ago, of those that no request uses."""
        if self._unused:
            return min(self._unused)
        candidates = [*([first] if first is not None and first.slot is not None else []), *self._held.values()]
        idle = next((version for version in candidates if not version.users), None)
        return None if idle is None else self._evict(idle)

    def _evict(self, version: Version) -> int:
        """Its slot, which is empty now."""
        slot, version.slot = version.slot, None
        assert slot is not None
        self.bank.clear(slot)
        del self._held[slot]
        self._unused.add(slot)
        return slot

    def _retire(self, version: Version) -> None:
        version.retired = True
        if version.slot is not None and not version.users:
            self._evict(version)
        if not version.pins:
            self._free(version)

    def _free(self, version: Version) -> None:
        version.free()
        if self.on_free is not None:
            self.on_free(version)
