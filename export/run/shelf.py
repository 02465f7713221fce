"""The styles of an exported folder by name, as a pipeline asks for them. Neither torch nor onnx is needed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime

from ...core import StylemuseError, unknown
from .manifest import File, Manifest, StyleFile
from .spec import Array


class Shelf:
    """What ``adapters.library.Library`` is to a model: here the styles are those that were exported, each in a slot."""

    on_free: Callable[[StyleFile], None] | None = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._styles = folder, tuple(manifest.styles.values())
        self._slots = {style.name: slot for slot, style in enumerate(self._styles)}
        self.slots = max(1, len(self._styles))
        self.rank = max((style.rank for style in self._styles), default=0)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names that have a slot: all."""
        return self.names

    @property
    def names(self) -> tuple[str, ...]:
        """The names a request may use, sorted."""
        return tuple(sorted(self._slots))

    @property
    def reserved(self) -> int:
        """0: what ONNX Runtime takes is its own affair."""
        return 0

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._styles)

    def __getitem__(self, name: str) -> StyleFile:
        return self._styles[self.slot(name)]

    def version(self, name: str) -> StyleFile:
        """What the name stands for, which is for ever."""
        return self[name]

    def versions(self) -> list[StyleFile]:
        """All of them, by name."""
        return [self[name] for name in self.names]

    def slot(self, name: str) -> int:
        """The slot of a style."""
        if name not in self._slots:
            raise StylemuseError(unknown("style", name, self.names))
        return self._slots[name]

    def pin(self, name: str) -> StyleFile:
        """What the name stands for, which is for ever."""
        return self[name]

    def unpin(self, version: StyleFile) -> None:
        """Nothing: a style stays what it is."""

    def is_resident(self, version: StyleFile) -> bool:
        """True: every style has a slot."""
        return True

    def acquire(self, version: StyleFile) -> int:
        """Its slot."""
        return self.slot(version.name)

    def release(self, slot: int) -> None:
        """Nothing: a style stays where it is."""

    def holder(self, slot: int) -> StyleFile:
        """The style of a slot."""
        return self._styles[slot]

    def add(self, name: str, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise StylemuseError(
            f"style {name[:80]!r}: an exported folder has the styles it was exported with; export again"
        )

    def remove(self, name: str) -> NoReturn:
        """Refused."""
        self.add(name)

    def tensors(self, slot: int) -> Mapping[str, Array]:
        """A style's tensors, read from its files."""
        made: dict[str, Array] = {}
        for file in self._styles[slot].files.values():
            made |= _read(self._folder, file)
        return made


def _read(folder: Path, file: File) -> dict[str, Array]:
    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(folder / file.path))
        # Copied: the arrays lie in the file's own memory, which is gone with it.
        return {name: np.array(value.numpy()) for name, value in read.get_parameters().items()}
    except Exception as error:  # ONNX Runtime's errors share no base but Exception
        raise StylemuseError(f"{file.path} cannot be read: {str(error).splitlines()[0][:200]}") from error
