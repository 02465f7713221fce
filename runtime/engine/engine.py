"""The engine: requests of many clients in the same forward passes, for embedding into a server or a program.

Three threads, so that a step waits for nothing else:

    prepare   slots for the styles (read from disk if need be), text, step-constant conditioning      in fair order
    step      one decoding step for every running picture, again and again; who is done leaves, who is ready joins
    finish    tokens -> pictures, the result; what the request held is given back

A request draws the same pixels as `Pipeline.run` draws, whatever runs beside it. An exception in a step ends the
requests of that forward pass with FailedError, and the engine goes on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import numpy as np

from ..adapters.bank import SlotsInUse
from ..backend import arrays
from ..core import Request, Result, StylemuseError
from ..decoding.canvas import Canvas
from ..decoding.loop import advance, alike
from ..pipeline import Pipeline
from ..requests.jobs import Job
from .batcher import Batcher, Entry, Turn
from .budget import rows_within
from .errors import CancelledError, ClosedError, DeadlineError, EngineError, FailedError, QueueFullError
from .pace import Pace
from .ticket import Snapshot, Ticket
from .work import Stats, Work

PRIORITIES = range(-4, 5)
MAX_ROWS = 32
"""Rows of a forward pass, unless a memory budget says how many there is room for."""
TOGETHER = 8
"""Requests whose text and conditioning are made together, at most: more are no faster, and the first waits for all."""
_RETRY_SECONDS = 0.05


class Engine:
    """Draws requests as they come; see the module's text.

    Args:
        pipe: the pipeline; its styles may be changed meanwhile. It stays usable beside the engine.
        max_rows: rows of one forward pass, in units of the model's own picture size; a larger picture takes more.
        memory: bytes the engine may take beside the model, its styles and the prompts that the pipeline keeps; decides
            ``max_rows`` where that is left out.
        max_requests: accepted and not yet answered; more are refused with QueueFullError.
        on_step: told of every step's seconds, rows and pictures. on_end: of every request's outcome ("done", "failed",
            "cancelled", "deadline", "closed") and seconds since it was accepted. Both must be quick.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        max_rows: int | None = None,
        memory: int | None = None,
        max_requests: int = 256,
        on_step: Callable[[float, float, int], None] | None = None,
        on_end: Callable[[str, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_requests", max_requests)):
            if value is not None and value < 1:
                raise StylemuseError(f"{name} = {value} is not allowed: at least 1")
        self.pipe, self.max_requests = pipe, max_requests
        room = rows_within(memory, pipe.network) if memory is not None else MAX_ROWS
        self.max_rows = room if max_rows is None else max_rows
        if memory is not None and self.max_rows > room:
            raise StylemuseError(f"max_rows = {max_rows} do not fit {memory:,} bytes; at most {room}")
        self._unit = pipe.network.sizes.side**2
        self._decoder, self._pace = pipe.decoder(self.max_rows), Pace(pipe.network.device)
        self._batcher = Batcher(self.max_rows * self._unit)
        self._on_step, self._on_end, self._clock = on_step, on_end, clock
        self._works: dict[Ticket, Work] = {}
        self._done: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._step_seconds: float | None = None
        jobs = {"prepare": self._prepare, "step": self._step, "finish": self._finish}
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"stylemuse-{name}", daemon=True)
            for name, work in jobs.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request, *, priority: int = 0, timeout: float | None = None, previews: int = 0) -> Ticket:
        """Accept a request, or refuse it at once.

        Everything is checked here, in the caller's thread; a picture to start from is encoded here too. The styles'
        versions are those of this moment.

        Args:
            priority: -4 to 4; each one more doubles the request's share of the forward passes.
            timeout: seconds after which the request ends with DeadlineError if it isn't done.
            previews: of each picture, at evenly spaced steps before the last; as many as it has such steps if more.

        Raises:
            StylemuseError: the request is wrong, or larger than the engine.
            QueueFullError, ClosedError: it is not the request's fault.
        """
        if priority not in PRIORITIES:
            raise StylemuseError(f"priority {priority!r} is not allowed: {PRIORITIES[0]} to {PRIORITIES[-1]}")
        if timeout is not None and not timeout > 0:
            raise StylemuseError(f"timeout {timeout!r} is not allowed: seconds above 0")
        if previews < 0:
            raise StylemuseError(f"previews = {previews!r} is not allowed: at least 0")
        self.pipe.check_process()
        self._admit()
        job = self.pipe.jobs.begin(request)
        try:
            work = self._work(job, priority, timeout, previews)
            with self._changed:
                self._admit()
                self._works[work.ticket] = work
                self._batcher.wait(work.entry)
                self._changed.notify_all()
        except BaseException:
            job.release()
            raise
        return work.ticket

    def stats(self) -> Stats:
        """The engine now."""
        with self._changed:
            batcher = self._batcher
            rows = batcher.load / self._unit
            return Stats(len(self._works), batcher.waiting, len(batcher.running), rows, self._step_seconds)

    def close(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Accept nothing more; finish what was accepted, for ``timeout`` seconds at most, or cancel it; then stop.

        What is cancelled ends with ClosedError. Closing a second time does no harm.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if finish:
                self._changed.wait_for(lambda: self._stopped or not self._works, timeout)
        self._stop(ClosedError("the engine was closed before the request was done"))
        for thread in self._threads:
            thread.join()
        while self._done:
            self._done.popleft().job.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(finish=kind is None)

    # Accepting.

    def refusal(self) -> ClosedError | QueueFullError | None:
        """What `submit` would raise now for any request, however good; to turn clients away before reading theirs."""
        with self._changed:
            if self._closing or self._stopped:
                return ClosedError("the engine is closed, or closing: it accepts no more requests")
            if len(self._works) >= self.max_requests:
                return QueueFullError(self.max_requests, self._retry_after())
        return None

    def _admit(self) -> None:
        if error := self.refusal():
            raise error

    def _retry_after(self) -> int:
        """Seconds until a request is likely to leave: the time for all of them, over their number."""
        entries = [work.entry for work in self._works.values()]
        tokens = sum(entry.demand * entry.pictures * entry.steps for entry in entries)
        passes = tokens / self._batcher.capacity
        return max(1, min(3600, math.ceil(passes * (self._step_seconds or 1.0) / max(1, len(entries)))))

    def _work(self, job: Job, priority: int, timeout: float | None, previews: int) -> Work:
        plan, now = job.plan, self._clock()
        steps = len(plan.starts[0].steps)
        rows = max(sum(branch.weights[step] != 0 for branch in plan.branches) for step in range(steps))
        demand = rows * plan.grid[0] * plan.grid[1]
        if demand > self._batcher.capacity:
            raise StylemuseError(
                f"a picture of {rows} branches and {plan.grid[1]} x {plan.grid[0]} tokens takes "
                f"{demand / self._unit:g} rows; this engine has {self.max_rows}"
            )
        if len(plan.styles) > self.pipe.adapters.slots:
            raise StylemuseError(f"{len(plan.styles)} styles in one request; at most {self.pipe.adapters.slots}")
        at = {round((index + 1) * steps / (previews + 1)) for index in range(previews)} if previews < steps else None
        shown = frozenset(range(1, steps)) if at is None else frozenset(at - {0, steps})
        ticket = Ticket(plan.seeds, steps, rows, self._cancelled, plan.unread)
        entry = Entry(demand, len(plan.seeds), steps, 2.0**priority)
        entry.owner = work = Work(ticket, job, shown, now, math.inf if timeout is None else now + timeout, entry)
        return work

    # Ending. Whoever takes a request out of ``_works`` ends it, so it ends once.

    def _cancelled(self, ticket: Ticket) -> None:
        self._give_up(ticket, "cancelled", CancelledError("the request was cancelled"))

    def _give_up(self, ticket: Ticket, outcome: str, error: BaseException) -> None:
        with self._changed:
            work = self._works.pop(ticket, None)
            if work is None:
                return
            running = self._batcher.end(work.entry)
            if not (running or work.held):
                self._done.append(work)  # to be released
            self._changed.notify_all()
        self._tell(work, outcome, error)

    def _tell(self, work: Work, outcome: str, result: Result | BaseException) -> None:
        work.ticket._end(result)
        if self._on_end is not None:
            self._on_end(outcome, self._clock() - work.accepted)

    def _stop(self, error: EngineError) -> None:
        with self._changed:
            self._closing = self._stopped = True
            tickets = list(self._works)
        for ticket in tickets:
            self._give_up(ticket, "closed", error)
        with self._changed:
            self._changed.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that dies takes nobody's request with it unnoticed."""
        try:
            work()
        except BaseException as error:
            broken = FailedError("the engine broke down")
            broken.__cause__ = error
            self._stop(broken)
            raise

    # The three threads.

    def _prepare(self) -> None:
        while True:
            with self._changed:
                entries: list[Entry] = []
                while not (self._stopped or entries):
                    entries = self._batcher.to_prepare(TOGETHER, lambda entry: entry.owner.job.resident)
                    if not entries:
                        self._changed.wait()
                if self._stopped:
                    return
                works: list[Work] = [entry.owner for entry in entries]
                for work in works:
                    work.held = True
            canvases = self._conditioned([work for work in works if self._acquired(work)])
            with self._changed:
                slotless = False
                for work in works:
                    work.held = False
                    if work.entry.ended:
                        self._done.append(work)
                    elif work in canvases:
                        work.timings["queue"] = self._clock() - work.accepted
                        work.turns = self._batcher.ready(work.entry, canvases[work])
                    else:
                        self._batcher.wait(work.entry)
                        slotless = True
                self._changed.notify_all()
                if slotless:
                    # Requests outside of the engine use slots too, and they don't notify.
                    self._changed.wait(_RETRY_SECONDS)

    def _acquired(self, work: Work) -> bool:
        """Whether its styles have slots; not where requests use all of them, and not where it failed and has ended."""
        try:
            work.job.acquire()
            return True
        except SlotsInUse:
            pass
        except StylemuseError as error:
            self._give_up(work.ticket, "failed", error)
        except Exception as error:
            self._give_up(work.ticket, "failed", _failed("preparing the request failed", error))
        return False

    def _conditioned(self, works: list[Work]) -> dict[Work, list[Canvas]]:
        """The canvases of those that did not fail; who failed has ended."""
        timings = {"text": 0.0, "condition": 0.0}
        try:
            made = self.pipe.jobs.canvases([work.job for work in works], timings)
        except Exception as error:
            if len(works) == 1:
                self._give_up(works[0].ticket, "failed", _failed("preparing the request failed", error))
                return {}
            # Each again on its own: nobody fails for another.
            return {work: own for each in works for work, own in self._conditioned([each]).items()}
        for work in works:
            work.timings |= timings
        return dict(zip(works, made, strict=True))

    def _step(self) -> None:
        while True:
            with self._changed:
                while True:
                    gone = [entry.owner for entry in self._batcher.purge()]
                    self._done.extend(gone)
                    late = [work for work in self._works.values() if work.deadline <= self._clock()]
                    if gone:
                        self._changed.notify_all()
                    if self._stopped or late or (turns := self._batcher.next()):
                        break
                    nearest = min((work.deadline for work in self._works.values()), default=math.inf)
                    self._changed.wait(None if nearest == math.inf else max(0.0, nearest - self._clock()))
                if self._stopped:
                    return
            for work in late:
                self._give_up(work.ticket, "deadline", DeadlineError("the request was not done in time"))
            if not late:
                self._advance(turns)

    def _advance(self, turns: list[Turn]) -> None:
        began, turn_of = time.perf_counter(), {id(turn.canvas): turn for turn in turns}
        for group in alike([turn.canvas for turn in turns]):
            self._forward(group, {turn_of[id(canvas)].entry.owner.ticket for canvas in group})
        seconds = time.perf_counter() - began
        with self._changed:
            rows = self._batcher.load / self._unit
            stepped = [turn for turn in turns if not turn.entry.ended]
            for turn in stepped:
                self._after(turn, seconds)
            for entry in self._batcher.stepped(stepped):
                entry.owner.held = True
                self._done.append(entry.owner)
            lately = self._step_seconds
            self._step_seconds = seconds if lately is None else 0.9 * lately + 0.1 * seconds
            self._changed.notify_all()
        if self._on_step is not None:
            self._on_step(seconds, rows, len(turns))

    def _forward(self, canvases: list[Canvas], tickets: set[Ticket]) -> None:
        try:
            advance(self._decoder, canvases)
            self._pace.launched()
        except Exception as error:
            for ticket in tickets:
                self._give_up(ticket, "failed", _failed("a decoding step failed", error))

    def _after(self, turn: Turn, seconds: float) -> None:
        work, canvas = turn.entry.owner, turn.canvas
        if turn.picture == 0:
            work.timings["step"].append(seconds)
        if canvas.step in work.previews and not canvas.finished:
            work.ticket._add(Snapshot.of(turn.picture, canvas, self.pipe.network))

    def _finish(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._done)
                if self._stopped:
                    return
                work = self._done.popleft()
            work.job.release()  # its tokens are drawn: the slots are for others
            with self._changed:
                self._changed.notify_all()
                wanted = work.ticket in self._works
            if wanted:
                self._draw(work)
            work.turns = []  # or their tensors would wait for the collector of cycles

    def _draw(self, work: Work) -> None:
        mark = time.perf_counter()
        try:
            tokens = arrays.stack([turn.canvas.tokens for turn in work.turns]).reshape(-1, *work.job.plan.grid)
            (images,) = self.pipe.jobs.pictures([tokens])
        except Exception as error:
            self._give_up(work.ticket, "failed", _failed("decoding the pictures failed", error))
            return
        work.timings |= {"pixels": time.perf_counter() - mark, "total": self._clock() - work.accepted}
        result = Result(images, arrays.numpy(tokens).astype(np.int64), work.ticket.seeds, work.timings)
        with self._changed:
            wanted = self._works.pop(work.ticket, None) is not None
            self._changed.notify_all()
        if wanted:
            self._tell(work, "done", result)


def _failed(what: str, cause: Exception) -> FailedError:
    error = FailedError(what)
    error.__cause__ = cause
    return error
