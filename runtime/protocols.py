"""What the rooms need of each other: of a backend, of its styles, of one version of a style.

Torch's networks and ONNX graphs are backends; the library of a model and the shelf of an exported folder are styles.
Pipeline, jobs, planning, engine, server and commands take any of them, and mypy checks that each is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray
from PIL import Image

from .core import Sizes

if TYPE_CHECKING:
    import torch

    from .adapters.canonical import Adapter

Opaque = Any
"""What a backend made and only it looks into: text, contexts."""
Pinned = Any
"""A `StyleVersion`, given back to the styles that it came from."""
Array = Any
"""A tensor of the backend's kind, torch's or numpy's; `arrays` has what may be done with either."""


class StyleVersion(Protocol):
    """A style as it was registered at one time; a request keeps the version that it chose."""

    @property
    def name(self) -> str:
        """How requests choose it."""

    @property
    def rank(self) -> int:
        """Of its widest pair."""

    @property
    def scale(self) -> float:
        """Its own strength, which a request's multiplies."""

    @property
    def descriptor(self) -> str:
        """The words that call it; they join the prompt."""

    @property
    def caption(self) -> str:
        """The full prompt of the picture it was made from."""

    @property
    def licence(self) -> str:
        """SPDX identifier or a sentence; "" where unknown."""

    @property
    def recommended(self) -> Mapping[str, str | int | float]:
        """Sampling and guidance that suit it."""

    @property
    def sha256(self) -> str:
        """Hash of its tensors."""

    @property
    def has_picture(self) -> bool:
        """Whether the picture that it was tuned from came with it."""

    def picture(self) -> bytes | None:
        """That picture, a PNG file, or None."""


class Styles(Protocol):
    """The styles of a model by name, each in a slot while requests use it; safe to use from many threads."""

    on_free: Callable[[Pinned], None] | None
    """Told of every version that nobody needs any more."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names a request may use, sorted."""

    @property
    def slots(self) -> int:
        """How many styles can be resident at once."""

    @property
    def rank(self) -> int:
        """The largest that a style may have."""

    @property
    def reserved(self) -> int:
        """Bytes that the slots take, as far as that is known."""

    @property
    def resident(self) -> tuple[str, ...]:
        """The names that have a slot now, sorted."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def version(self, name: str) -> StyleVersion:
        """What a name stands for now; StylemuseError where nothing."""

    def versions(self) -> Sequence[StyleVersion]:
        """What every name stands for now, by name."""

    def add(
        self,
        name: str,
        source: str | Path | Adapter,
        *,
        alpha: float | None = None,
        recipe: str | None = None,
        swap: bool = False,
    ) -> Adapter:
        """Register a style for the requests that come after; StylemuseError where it does not fit, or none can be."""

    def remove(self, name: str) -> None:
        """Forget a style; running requests finish with it."""

    def pin(self, name: str) -> StyleVersion:
        """`version`, kept for the caller until `unpin`; it need not have a slot."""

    def unpin(self, version: Pinned) -> None:
        """Give back what `pin` returned."""

    def is_resident(self, version: Pinned) -> bool:
        """Whether `acquire` would have nothing to read now, as far as can be told before."""

    def acquire(self, version: Pinned) -> int:
        """A pinned version's slot, kept for the caller until `release`."""

    def release(self, slot: int) -> None:
        """Give back what `acquire` returned."""


class Backend(Protocol):
    """The networks of a model, wherever they run. What one method makes, another of the same backend takes."""

    @property
    def name(self) -> str:
        """ "reference", "triton" or "onnx"."""

    @property
    def device(self) -> torch.device | str:
        """Where arrays lie."""

    @property
    def dtype(self) -> torch.dtype | str:
        """What is computed in: torch's type, or the export's precision."""

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""

    @property
    def sizes(self) -> Sizes:
        """What pictures the model draws."""

    def explain(self) -> dict[str, str]:
        """What else `Pipeline.explain` tells."""

    def row_bytes(self, ahead: int) -> int | None:
        """The peak memory of one row of a forward pass, beside which ``ahead`` more contexts are kept; None where
        nobody knows."""

    @property
    def text_length(self) -> int:
        """Ids that every prompt is padded or cut to."""

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt is; the text encoder reads `text_length` of them."""

    def text(self, prompt: str) -> Opaque:
        """What the text encoder makes of a prompt."""

    def contexts(self, rows: Sequence[tuple[Opaque, tuple[int, int], int, float]]) -> Sequence[Opaque]:
        """What stays the same over the steps for rows of (text, grid, slot, scale)."""

    def pixels(self, tokens: Array) -> list[Image.Image]:
        """(B, h, w) codes -> B pictures."""

    def codes(self, picture: Image.Image, grid: tuple[int, int]) -> Array:
        """A picture, resized to the grid -> codes (h, w)."""

    def array(self, values: NDArray[Any]) -> Array:
        """The values as an array of the backend's."""
