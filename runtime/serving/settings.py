"""What a server is told at its start, and the limits that are checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core import StylemuseError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    Attributes:
        pictures, steps: at most.
        prompt: characters of a prompt.
        work: n * steps * tokens of a picture.
        body: bytes of a request's body; upload: of an adapter's file.
        seconds: a request may ask for less time.
        body_seconds: until a request's body must be there.
    """

    pictures: int = 16
    steps: int = 100
    prompt: int = 2000
    work: int = 16 * 100 * 1024
    body: int = 1 << 20
    upload: int = 256 << 20
    seconds: float = 300.0
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """A server's configuration.

    Attributes:
        model: how clients name the base model.
        sizes: (width, height) that may be asked for; the first is the one that is drawn if none is.
        token: what clients must present as bearer, except for health and the page; None asks for none.
        admin_token: the administration's.
        adapters: the only folder that adapters are loaded from by name; None allows uploads only.
        state: where registrations are kept; they come back at the next start.
    """

    model: str
    sizes: tuple[tuple[int, int], ...]
    token: str | None = None
    admin_token: str | None = None
    adapters: Path | None = None
    state: Path | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name in ("token", "admin_token"):
            token = getattr(self, name)
            if token is not None and not (len(token) >= 8 and token.isascii() and token.isprintable()):
                raise StylemuseError(f"the {name.replace('_', ' ')} must have at least 8 printable ASCII characters")
