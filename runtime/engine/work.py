"""What the engine keeps of each accepted request, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..requests.jobs import Job
from .batcher import Entry, Turn
from .ticket import Ticket


@dataclass(frozen=True)
class Stats:
    """The engine at one moment.

    Attributes:
        accepted: requests that are in it; waiting: those not prepared yet.
        pictures, rows: running, and their rows in units of the model's own picture size.
        step_seconds: of a step lately; None before the first.
    """

    accepted: int
    waiting: int
    pictures: int
    rows: float
    step_seconds: float | None


@dataclass(eq=False)
class Work:
    """An accepted request."""

    ticket: Ticket
    job: Job
    previews: frozenset[int]
    accepted: float
    deadline: float
    entry: Entry
    turns: list[Turn] = field(default_factory=list)
    held: bool = False  # by the prepare or the finish thread, which lets it go
    timings: dict[str, Any] = field(default_factory=lambda: {"text": 0.0, "condition": 0.0, "step": []})
