"""What a client holds of a request it submitted: the result to come, pictures on the way, and the way out.

A ticket may be used from any thread and any event loop: ``result()`` waits, ``await ticket`` does so without blocking,
``async for snapshot in ticket`` follows the pictures as they appear, ``cancel()`` gives the request up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..backend import arrays
from ..core import Result
from ..decoding.canvas import Canvas
from ..protocols import Backend


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One picture as it stood after a step.

    Attributes:
        picture: which of the request's, from 0.
        step, steps: steps done, and of how many.
    """

    picture: int
    step: int
    steps: int
    _tokens: Any
    _unknown: Any
    _grid: tuple[int, int]
    _network: Backend

    @classmethod
    def of(cls, picture: int, canvas: Canvas, network: Backend) -> Snapshot:
        """The canvas now; its tensors are replaced at the next step, never written to."""
        grid = (canvas.shape[0], canvas.shape[1])
        return cls(picture, canvas.step, len(canvas.steps), canvas.tokens, canvas.unknown, grid, network)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(h, w) codes; masked positions hold the mask token."""
        tokens = arrays.masked(self._tokens, self._unknown, self._network.mask_id)
        return arrays.numpy(tokens).reshape(self._grid).astype(np.int64)

    def image(self) -> Image.Image:
        """The picture, masked positions as last drawn; decoded now, in the caller's thread."""
        return self._network.pixels(self._tokens.reshape(1, *self._grid))[0]


class Ticket:
    """A submitted request.

    Attributes:
        seeds: of its pictures.
        steps: decoding steps of each.
        rows: of each picture in the forward passes, at most.
        unread: the words of the prompts that are over the length that the text encoder reads.
    """

    def __init__(
        self, seeds: tuple[int, ...], steps: int, rows: int, cancel: Callable[[Ticket], None], unread: str = ""
    ) -> None:
        self.seeds, self.steps, self.rows, self.unread = seeds, steps, rows, unread
        self._cancel = cancel
        self._future: futures.Future[Result] = futures.Future()
        self._future.set_running_or_notify_cancel()  # from here on only the engine ends it
        self._snapshots: list[Snapshot] = []
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "waiting or running" if not self.done else "failed" if self._future.exception() else "done"
        return f"<Ticket of {len(self.seeds)} pictures: {state}>"

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, at most ``timeout`` seconds; an error of the request is raised."""
        try:
            return self._future.result(timeout)
        except futures.TimeoutError:
            if self.done:
                raise
            raise TimeoutError(f"no result within {timeout:g} s; the request goes on") from None

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait().__await__()

    async def _wait(self) -> Result:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()  # nobody waits any more
            raise

    async def __aiter__(self) -> AsyncIterator[Snapshot]:
        """The snapshots that were asked for, from the first, until the request has ended in whatever way."""
        loop, news, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(news.set)

        with self._lock:
            self._listeners.append(notify)
        try:
            while True:
                news.clear()
                ended = self.done
                with self._lock:
                    fresh = self._snapshots[seen:]
                for snapshot in fresh:
                    yield snapshot
                seen += len(fresh)
                if ended:
                    return
                if not fresh:
                    await news.wait()
        finally:
            with self._lock:
                self._listeners.remove(notify)

    def cancel(self) -> None:
        """Give up: the request ends with CancelledError and its rows are free at the next step. Done is done."""
        self._cancel(self)

    def _add(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._snapshots.append(snapshot)
        self._notify()

    def _end(self, outcome: Result | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for notify in listeners:
            notify()
