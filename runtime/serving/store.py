"""Registrations that survive: what was acknowledged is there after a crash, what was not is not.

    versions/NAME@SHA/     a canonical folder, complete before the registry names it
    registry.json          {"schema": 1, "adapters": {NAME: "NAME@SHA"}}, replaced in one move

A version's folder goes when no name stands for it and no request needs it; what a crash left goes at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from ..adapters import canonical
from ..adapters.canonical import Adapter
from ..adapters.files import MAX_JSON_BYTES, parse_json, read_bytes, sync_folder
from ..core import STYLE_NAME, StylemuseError

SCHEMA = 1
_SHA = 16


class Store:
    """The folder of a server's own adapters. One process at a time uses it; its threads may share this."""

    def __init__(self, folder: Path) -> None:
        """Reads the registry and removes what a crash left; a StylemuseError if the folder is damaged."""
        self._folder, self._versions = folder, folder / "versions"
        self._lock = threading.RLock()
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            self._adapters = self._read()
            named = set(self._adapters.values())
            for path in [*self._versions.iterdir(), *folder.glob(".registry-*")]:
                if path.name not in named:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            raise StylemuseError(f"{folder.name} cannot be used for registrations: {error.strerror}") from None

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The folder of each registered name."""
        with self._lock:
            return {name: self._versions / version for name, version in self._adapters.items()}

    def put(self, adapter: Adapter) -> Path:
        """Register an adapter under its name, in the place of another; durable once this returns."""
        version = f"{adapter.name}@{adapter.sha256[:_SHA]}"
        folder = self._versions / version
        with self._lock:
            if not folder.exists():
                canonical.save(adapter, folder)
            self._write({**self._adapters, adapter.name: version})
        return folder

    def remove(self, name: str) -> None:
        """Forget a name; durable once this returns. Its folder stays until `discard`."""
        with self._lock:
            self._write({known: version for known, version in self._adapters.items() if known != name})

    def discard(self, folder: Path) -> None:
        """Remove a version's folder, unless a name stands for it again."""
        with self._lock:
            if folder.name not in self._adapters.values():
                shutil.rmtree(folder, ignore_errors=True)

    def _read(self) -> dict[str, str]:
        path = self._folder / "registry.json"
        if not path.exists():
            return {}
        facts = parse_json(read_bytes(path, MAX_JSON_BYTES), path.name)
        adapters = facts.get("adapters")
        if facts.get("schema") != SCHEMA or not isinstance(adapters, dict):
            raise StylemuseError(f"registry.json: schema {facts.get('schema')!r}; this release reads {SCHEMA}")
        for name, version in adapters.items():
            known = STYLE_NAME.fullmatch(name) and isinstance(version, str) and version.startswith(f"{name}@")
            if not known or "/" in version or not (self._versions / version).is_dir():
                raise StylemuseError(f"registry.json: the folder of {name!a} is not there")
        return adapters

    def _write(self, adapters: dict[str, str]) -> None:
        temporary = self._folder / f".registry-{os.getpid()}"
        with temporary.open("wb") as file:
            file.write(json.dumps({"schema": SCHEMA, "adapters": adapters}, indent=1, sort_keys=True).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._folder / "registry.json")
        sync_folder(self._folder)
        self._adapters = adapters
