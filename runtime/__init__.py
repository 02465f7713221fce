"""stylemuse: many styles in one forward pass, on masked generative transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters.canonical import Adapter
    from .core import Branch, Guidance, Request, Result, Sampling, Style, StylemuseError
    from .decoding.guidance import CFG, ObjectInStyle, StyleDrop
    from .engine.engine import Engine
    from .engine.errors import CancelledError, ClosedError, DeadlineError, EngineError, FailedError, QueueFullError
    from .engine.ticket import Snapshot, Ticket
    from .entry import load
    from .pipeline import Pipeline, Preview

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "Adapter",
    "Branch",
    "CancelledError",
    "ClosedError",
    "DeadlineError",
    "Engine",
    "EngineError",
    "FailedError",
    "Guidance",
    "ObjectInStyle",
    "Pipeline",
    "Preview",
    "QueueFullError",
    "Request",
    "Result",
    "Sampling",
    "Snapshot",
    "Style",
    "StyleDrop",
    "StylemuseError",
    "Ticket",
    "load",
]

_ROOMS = {
    "adapters.canonical": ("Adapter",),
    "core": ("Branch", "Guidance", "Request", "Result", "Sampling", "Style", "StylemuseError"),
    "decoding.guidance": ("CFG", "ObjectInStyle", "StyleDrop"),
    "engine.engine": ("Engine",),
    "engine.errors": (
        "CancelledError",
        "ClosedError",
        "DeadlineError",
        "EngineError",
        "FailedError",
        "QueueFullError",
    ),
    "engine.ticket": ("Snapshot", "Ticket"),
    "entry": ("load",),
    "pipeline": ("Pipeline", "Preview"),
}


def __getattr__(name: str) -> object:
    # On first use: the command line's help and a server's configuration need no torch, which takes seconds to import.
    for room, names in _ROOMS.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{room}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
