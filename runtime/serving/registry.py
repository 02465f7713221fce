"""Styles added to a running server: checked, durable, then in use; and back again at the next start."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..adapters.canonical import Adapter
from ..adapters.library import Library
from ..core import STYLE_NAME, StylemuseError
from .store import Store


class Registry:
    """The administration's view of a pipeline's library.

    The styles that come with the model are not its own: they can be neither replaced nor removed.
    """

    def __init__(self, library: Library, store: Store | None, folder: Path | None) -> None:
        """Brings back what ``store`` holds. ``folder`` is where `load` may look."""
        self._library, self._store = library, store
        self._folder = None if folder is None else folder.resolve()
        self._built_in, self._lock = frozenset(library.names), threading.Lock()
        for name, path in (store.adapters if store is not None else {}).items():
            self._check_name(name)
            library.add(name, path, on_free=self._discard(path))

    def load(
        self, name: str, path: str, *, alpha: float | None = None, recipe: str | None = None, swap: bool = False
    ) -> Adapter:
        """Register what lies under a name in the configured folder."""
        if self._folder is None:
            raise StylemuseError("no folder of adapters is configured; upload the file instead")
        return self._register(name, _inside(self._folder, path), alpha, recipe, "", swap)

    def upload(
        self,
        name: str,
        data: bytes,
        *,
        alpha: float | None = None,
        recipe: str | None = None,
        descriptor: str = "",
        swap: bool = False,
    ) -> Adapter:
        """Register the content of a LoRA's .safetensors file."""
        with tempfile.TemporaryDirectory(prefix="stylemuse-upload-") as folder:
            file = Path(folder) / "upload.safetensors"
            file.write_bytes(data)
            return self._register(name, file, alpha, recipe, descriptor, swap)

    def unload(self, name: str) -> None:
        """Forget a style that was registered here; running requests finish with it."""
        with self._lock:
            self._check_name(name)
            self._library.version(name)
            if self._store is not None:
                self._store.remove(name)
            self._library.remove(name)

    def _register(
        self, name: str, source: Path, alpha: float | None, recipe: str | None, descriptor: str, swap: bool
    ) -> Adapter:
        self._check_name(name)
        adapter = self._library.read(name, source, alpha=alpha, recipe=recipe)
        if descriptor:
            adapter = replace(adapter, descriptor=descriptor)
        with self._lock:
            if name in self._library and not swap:
                raise StylemuseError(f"adapter {name!r} exists already; remove it first or replace it")
            self._library.check(adapter)
            if self._store is None:
                return self._library.add(name, adapter, swap=swap)
            path = self._store.put(adapter)
            return self._library.add(name, path, swap=swap, on_free=self._discard(path))

    def _check_name(self, name: str) -> None:
        if not STYLE_NAME.fullmatch(name):
            raise StylemuseError("an adapter's name has letters, digits, '.', '_' and '-', at most 64")
        if name in self._built_in:
            raise StylemuseError(f"style {name!r} comes with the model; choose another name")

    def _discard(self, path: Path) -> Callable[[], None] | None:
        store = self._store
        return None if store is None else partial(store.discard, path)


def _inside(folder: Path, path: str) -> Path:
    """What really lies under the name, if that is in the folder: no way out by "..", a root or a link."""
    try:
        place = (folder / path).resolve()
        found = place != folder and place.is_relative_to(folder) and place.exists()
    except (OSError, ValueError):  # a name no file can have
        found = False
    if not found:
        raise StylemuseError("lora_path is not in the folder of adapters; give the name of a file or folder in it")
    return place
