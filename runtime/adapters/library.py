"""A pipeline's adapters by name: added from any published file, while serving too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..core import StylemuseError
from ..kernels.rows import Site
from . import canonical, lora
from .bank import Bank
from .canonical import Adapter


class Library:
    """The adapters of one pipeline: ``add``, ``remove``, ``names``, ``in``, and by name the `Adapter`."""

    def __init__(self, bank: Bank, sites: Mapping[str, Site], base_model: str, fingerprint: Callable[[], str]) -> None:
        """``fingerprint`` hashes the model's weights; it is called when the first adapter that names a hash comes."""
        self.bank, self._sites, self._base_model, self._fingerprint = bank, sites, base_model, fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """The names a request may use, sorted."""
        return self.bank.names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Adapter:
        return self.bank.adapter(name)

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
            return replace(canonical.load(path), name=name)
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
    ) -> Adapter:
        """Register a style for the requests that come after.

        Args:
            name: how requests choose it.
            source: a canonical folder, a published LoRA file or folder, or an `Adapter`.
            alpha, recipe: the LoRA's alpha or the recipe it was trained by, where the file doesn't store it.
            swap: the name may exist and moves to the new adapter; running requests keep the old one.
        """
        adapter = replace(source, name=name) if isinstance(source, Adapter) else None
        if adapter is None:
            assert not isinstance(source, Adapter)
            adapter = self.read(name, source, alpha=alpha, recipe=recipe)
        if adapter.base_sha256 is not None:
            self.base_sha256()
        self.bank.add(adapter, replace=swap)
        return adapter

    def remove(self, name: str) -> None:
        """Forget a style; running requests finish with it."""
        self.bank.remove(name)
