"""Which pictures take part in the next step. No threads, no clock: the engine calls this under its lock.

The unit is a *turn*: up to ``QUANTUM`` steps of one picture. A picture takes ``demand`` tokens of every forward pass
(its tokens times its branches), and a pass holds ``capacity`` tokens. Turns begin strictly in the order of their tags,

    tag = max(V, tag of the request's turn before) + demand * steps / weight        weight = 2 ^ priority

where V is the tag of the turn that began last (self-clocked fair queueing, Golestani 1994). So a request gets its share
of the passes by its weight whatever the others ask for: a small one overtakes the later pictures of a large one, a long
one steps aside after its turn, and none waits for ever, for V grows past every tag.

Requests wait unprepared in the same order. Prepared before they begin are as many as one more pass could take; one that
comes before them is prepared too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..decoding.canvas import Canvas

QUANTUM = 32
"""Steps of a turn: most recipes finish in one."""
AHEAD = 2
"""Passes' worth of requests that are prepared and have not begun, at most; a memory budget counts on it."""


@dataclass(eq=False)
class Entry:
    """A request as the batcher sees it.

    Attributes:
        demand: tokens of one picture in a forward pass.
        pictures, steps: how many pictures, of how many steps.
        owner: the engine's own, opaque here.
        begun: a picture of it runs, or did. left: pictures that are not finished.
        ended: it takes no further part; whoever holds it lets it go.
    """

    demand: int
    pictures: int
    steps: int
    weight: float
    owner: Any = None
    tag: float = 0.0
    left: int = 0
    begun: bool = False
    ended: bool = False


@dataclass(eq=False)
class Turn:
    """A picture that is prepared: its canvas, which of the request's it is, and the steps left of this turn."""

    entry: Entry
    picture: int
    canvas: Canvas
    left: int = 0


@dataclass(order=True)
class _Place:
    tag: float
    order: int
    item: Any = field(compare=False)


class Batcher:
    """The order of all accepted requests."""

    def __init__(self, capacity: int, quantum: int = QUANTUM) -> None:
        self.capacity, self.quantum = capacity, quantum
        self.running: list[Turn] = []
        self._waiting: list[_Place] = []
        self._ready: list[_Place] = []
        self._now, self._order = 0.0, 0

    @property
    def waiting(self) -> int:
        """Requests that are not prepared yet."""
        return len(self._waiting)

    @property
    def load(self) -> int:
        """Tokens of the running pictures."""
        return sum(turn.entry.demand for turn in self.running)

    def wait(self, entry: Entry) -> None:
        """A new request, or one that could not be prepared now: it keeps its place."""
        if not entry.tag:
            entry.tag = self._tag(self._now, entry, entry.steps)
        self._push(self._waiting, entry.tag, entry)

    def to_prepare(self, most: int, quick: Callable[[Entry], bool]) -> list[Entry]:
        """The requests to prepare next, taken out, up to so many; none if there are none or enough is prepared.

        Those that are not quick come one at a time, for nobody shall wait for another's file.
        """
        taken: list[Entry] = []
        fresh = {
            id(place.item.entry): (place.tag, place.item.entry.demand)
            for place in self._ready
            if not place.item.entry.begun
        }
        while self._waiting and len(taken) < most:
            first, entry = self._waiting[0].tag, self._waiting[0].item
            before = sum(demand for tag, demand in fresh.values() if tag <= first)
            everything = sum(demand for _, demand in fresh.values())
            if before >= self.capacity or everything + entry.demand > AHEAD * self.capacity:
                break
            if taken and not (quick(taken[0]) and quick(entry)):
                break
            heapq.heappop(self._waiting)
            taken.append(entry)
            fresh[id(entry)] = (first, entry.demand)
        return taken

    def ready(self, entry: Entry, canvases: Iterable[Canvas]) -> list[Turn]:
        """A prepared request: each of its pictures has a turn."""
        turns = [Turn(entry, picture, canvas) for picture, canvas in enumerate(canvases)]
        for turn in turns:
            if turn.picture:
                entry.tag = self._tag(entry.tag, entry, entry.steps)
            self._push(self._ready, entry.tag, turn)
        entry.left = len(turns)
        return turns

    def end(self, entry: Entry) -> bool:
        """The request takes no further part; whether a step that is being done still uses it."""
        entry.ended = True
        for heap in (self._waiting, self._ready):
            heap[:] = [place for place in heap if not getattr(place.item, "entry", place.item).ended]
            heapq.heapify(heap)
        return any(turn.entry is entry for turn in self.running)

    def purge(self) -> list[Entry]:
        """Between steps: the running turns of ended requests leave; whose they were."""
        gone = {id(turn.entry): turn.entry for turn in self.running if turn.entry.ended}
        self.running = [turn for turn in self.running if not turn.entry.ended]
        return list(gone.values())

    def next(self) -> list[Turn]:
        """The turns of the next step, waiting ones begun as far as there is room."""
        load = self.load
        while self._ready and load + self._ready[0].item.entry.demand <= self.capacity:
            place = heapq.heappop(self._ready)
            turn: Turn = place.item
            self._now = max(self._now, place.tag)
            turn.entry.begun, turn.left = True, self.quantum
            self.running.append(turn)
            load += turn.entry.demand
        return list(self.running)

    def stepped(self, turns: Iterable[Turn]) -> list[Entry]:
        """These turns did a step: whose pictures are all finished now. A turn that is over gets another."""
        finished = []
        for turn in turns:
            turn.left -= 1
            if turn.canvas.finished:
                turn.entry.left -= 1
                if not turn.entry.left:
                    finished.append(turn.entry)
            elif not turn.left:
                steps = len(turn.canvas.steps) - turn.canvas.step
                turn.entry.tag = self._tag(max(self._now, turn.entry.tag), turn.entry, steps)
                self._push(self._ready, turn.entry.tag, turn)
            else:
                continue
            self.running.remove(turn)
        return finished

    def _tag(self, start: float, entry: Entry, steps: int) -> float:
        return start + entry.demand * min(steps, self.quantum) / entry.weight

    def _push(self, heap: list[_Place], tag: float, item: Any) -> None:
        self._order += 1
        heapq.heappush(heap, _Place(tag, self._order, item))
