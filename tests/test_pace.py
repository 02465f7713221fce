"""Time and pace on a GPU, by events that stand for one: nothing waits but for the step before."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_loop import TinyNetwork, blank

from stylemuse.decoding.canvas import Timings, timed
from stylemuse.decoding.loop import decode
from stylemuse.decoding.schedule import amused
from stylemuse.engine.pace import Pace


class Events:
    """A device that is a second further with each event; notes what is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.awaited = 0, list[int]()
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def event(self, enable_timing: bool = False) -> Any:
        events = self

        class Event:
            number = -1

            def record(self) -> None:
                self.number, events.recorded = events.recorded, events.recorded + 1

            def synchronize(self) -> None:
                events.awaited.append(self.number)

            def elapsed_time(self, end: Event) -> float:
                assert enable_timing
                return 1000.0 * (end.number - self.number)

        return Event()


def test_an_engine_is_one_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    pace = Pace(torch.device("cuda"))
    for step in range(4):
        pace.launched()
        assert events.awaited == list(range(step))
    Pace("cpu").launched()
    assert events.recorded == 4


def test_seconds_are_read_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's clock, the waiting all after the last step."""
    events, timings = Events(monkeypatch), Timings()

    def on_step(running: Any) -> None:
        with timed(timings, "a part", "cuda:0"):
            assert not events.awaited

    decode(TinyNetwork(), [blank(9, amused(9, 9, 3))], on_step=on_step, timings=timings)
    assert timings["a part"] == [1.0] * 3
    assert events.awaited == [1, 3, 5]
