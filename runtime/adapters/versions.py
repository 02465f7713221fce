"""A registered style at one time: its facts stay in memory, its tensors come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from ..core import StylemuseError
from .canonical import Adapter, Kind
from .files import read_bytes

MAX_PICTURE_BYTES = 4 << 20


class Version:
    """One adapter under one name: what a request that chose it keeps, whatever the name stands for later.

    Facts (name, kind, descriptor, scale, recommended, ...) are those of the `Adapter`. Its tensors are in a slot of the
    bank while they are needed, and otherwise where they came from.

    Attributes, which are the library's own:
        slot: where its tensors are in the bank, if they are. pins: requests that chose it. users: those that hold its
        slot. retired: its name stands for another, or for nothing.
    """

    def __init__(
        self,
        adapter: Adapter,
        source: Callable[[], Adapter] | None = None,
        on_free: Callable[[], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Without a ``source`` to read again the adapter itself is kept.

        ``on_free``: called when nobody needs the source. ``folder``: where its reference picture may be.
        """
        self.name: str = adapter.name
        self.kind: Kind = adapter.kind
        self.rank: int = adapter.rank
        self.scale: float = adapter.scale
        self.descriptor: str = adapter.descriptor
        self.caption: str = adapter.caption
        self.licence: str = adapter.licence
        self.recommended: Mapping[str, str | int | float] = adapter.recommended
        self._kept = adapter if source is None else None
        self._source, self._on_free = source, on_free
        reference = None if folder is None else folder / "reference.png"
        self._picture = reference if reference is not None and reference.is_file() else None
        if source is not None:
            vars(self)["sha256"] = adapter.sha256  # what is read again must be this
        self.slot: int | None = None
        self.pins = self.users = 0
        self.retired = False

    @cached_property
    def sha256(self) -> str:
        """Hash of the tensors: name@sha256 is this version for ever."""
        assert self._kept is not None
        return self._kept.sha256

    def read(self) -> Adapter:
        """The adapter with its tensors, from where it came."""
        if self._kept is not None:
            return self._kept
        assert self._source is not None
        adapter = self._source()
        if adapter.sha256 != self.sha256:
            raise StylemuseError(
                f"the file of style {self.name!r} is another than when it was registered; add it again"
            )
        return adapter

    @property
    def has_picture(self) -> bool:
        """Whether the picture it was tuned from came with it."""
        return self._picture is not None

    def picture(self) -> bytes | None:
        """That picture, a PNG file, or None."""
        if self._picture is None or not self._picture.is_file():
            return None
        data = read_bytes(self._picture, MAX_PICTURE_BYTES)
        return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None

    def free(self) -> None:
        """Called once, when its name stands for another and no request keeps it."""
        if self._on_free is not None:
            self._on_free()
