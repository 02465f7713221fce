"""How a request can end without pictures through no fault of its own; what a user got wrong is a StylemuseError."""

from __future__ import annotations


class EngineError(RuntimeError):
    """What went wrong, in one line that may reach a client."""


class QueueFullError(EngineError):
    """Refused: as many requests as the engine accepts are in it already.

    Attributes:
        retry_after: seconds until a place is likely to be free, at least 1.
    """

    def __init__(self, most: int, retry_after: int) -> None:
        super().__init__(f"{most} requests are in the engine already; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(EngineError):
    """The engine accepts no more requests, or was closed without finishing this one."""


class CancelledError(EngineError):
    """Somebody cancelled the request."""


class DeadlineError(EngineError):
    """The request was not done in time."""


class FailedError(EngineError):
    """Computing the request, or something in the same step, failed; the cause is chained."""
