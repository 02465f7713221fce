"""How requests leave an engine: cancelled, late, failed, or because it closes. Nothing is held any more then."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import FOX, draw, load
from gate import SOON, Gate, idle, settled
from models import random_style

from stylemuse import (
    CancelledError,
    ClosedError,
    DeadlineError,
    Engine,
    FailedError,
    Pipeline,
    Request,
    StylemuseError,
    Ticket,
)
from stylemuse.adapters import canonical

# Leaving.


def test_a_cancelled_request_frees_its_rows_at_the_next_step(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    gone, waiting, kept = (engine.submit(Request("a fox", style="ink", seed=seed)) for seed in range(3))
    gate.arrive()
    settled(engine, lambda: engine._batcher.waiting == 0)
    gate.step()
    for ticket in (gone, waiting, gone):
        ticket.cancel()
    for ticket in (gone, waiting):
        with pytest.raises(CancelledError, match=r"^the request was cancelled$"):
            ticket.result(SOON)
    gate.step()
    alone = gate.rows[-1]
    gate.free()
    assert np.array_equal(kept.result(SOON).tokens, draw(pipe, style="ink", seed=2))
    assert alone == kept.rows
    kept.cancel()
    assert kept.result(0) is kept.result(0)
    idle(engine, pipe)


def test_leaving_an_await_cancels(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    async def leave() -> Ticket:
        ticket = engine.submit(FOX)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ticket, 0.01)
        return ticket

    ticket = asyncio.run(leave())
    with pytest.raises(CancelledError):
        ticket.result(SOON)
    gate.free()
    idle(engine, pipe)


def test_a_result_that_is_not_there_in_time_is_still_to_come(engine: Engine, gate: Gate) -> None:
    ticket = engine.submit(FOX)
    with pytest.raises(TimeoutError, match=r"^no result within 0\.01 s; the request goes on$"):
        ticket.result(0.01)
    gate.free()
    ticket.result(SOON)


def test_a_deadline_ends_a_request_running_or_waiting(pipe: Pipeline, gate: Gate) -> None:
    now = [0.0]
    with Engine(pipe, max_rows=2, clock=lambda: now[0]) as engine:
        running, waiting, free = engine.submit(FOX, timeout=5), engine.submit(FOX, timeout=9), engine.submit(FOX)
        gate.arrive()
        now[0] = 6.0
        gate.step()
        with pytest.raises(DeadlineError, match=r"^the request was not done in time$"):
            running.result(SOON)
        assert not waiting.done
        now[0] = 10.0
        gate.free()
        free.result(SOON)
        with pytest.raises(DeadlineError):
            waiting.result(SOON)
        idle(engine, pipe)


# Failing.


def test_a_crash_fails_only_the_requests_of_its_step(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    """Two sizes are two passes: the other one's request goes on, and so does the engine."""
    first = engine.submit(Request("a fox", style="ink", seed=7))
    gate.arrive()
    same, other = engine.submit(Request("a cat", seed=7)), engine.submit(Request("a fox", seed=7, size=(16, 16)))
    settled(engine, lambda: len(engine._batcher._ready) == 2)
    gate.step()
    gate.failing = True
    gate.free()
    for ticket in (first, same):
        with pytest.raises(FailedError, match=r"^a decoding step failed$") as error:
            ticket.result(SOON)
        assert str(error.value.__cause__) == "a broken kernel"
    assert np.array_equal(other.result(SOON).tokens, draw(pipe, size=(16, 16)))
    assert np.array_equal(engine.submit(FOX).result(SOON).tokens, draw(pipe))
    idle(engine, pipe)


@pytest.mark.parametrize(
    ("method", "words"),
    [("contexts", "preparing the request failed"), ("pixels", "decoding the pictures failed")],
)
def test_a_crash_elsewhere_fails_its_request(
    engine: Engine, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pipe.network, method, broken)
        with pytest.raises(FailedError, match=f"^{words}$"):
            engine.submit(Request("a fox", style="ink")).result(SOON)
    engine.submit(Request("a fox", style="ink")).result(SOON)
    idle(engine, pipe)


def test_requests_prepared_together_fail_apart(
    engine: Engine, pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, together = pipe.network.contexts, list[int]()

    def contexts(rows: Any) -> Any:
        together.append(len(rows))
        if any(grid == (4, 4) for _, grid, *_ in rows):
            raise RuntimeError("a broken kernel")
        return original(rows)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.network, "contexts", contexts)
        with engine._changed:  # all of them are there before any is prepared
            tickets = [engine.submit(Request("an owl", "ink", seed=7, size=(size, 16))) for size in (32, 16, 48)]
        gate.free()
        with pytest.raises(FailedError, match=r"^preparing the request failed$"):
            tickets[1].result(SOON)
        found = [tickets[index].result(SOON).tokens for index in (0, 2)]
    assert together[0] > together[1] >= 1
    for tokens, size in zip(found, (32, 48), strict=True):
        assert np.array_equal(tokens, draw(pipe, "an owl", style="ink", size=(size, 16)))
    idle(engine, pipe)


def test_a_style_whose_file_is_gone_says_so(tiny_model: Path, tmp_path: Path) -> None:
    pipe = load(tiny_model, slots=2)
    look = random_style(pipe.network.transformer.config, "look", seed=3)
    folder = canonical.save(look, tmp_path / "look")
    pipe.adapters.add("look", folder)
    draw(pipe, style={"ink": 0.5, "neon": 0.5})
    shutil.rmtree(folder)
    with Engine(pipe) as engine:
        with pytest.raises(StylemuseError, match=r"^look is missing"):
            engine.submit(Request("a fox", style="look")).result(SOON)
        engine.submit(FOX).result(SOON)


# Closing.


def test_closing_finishes_what_was_accepted(pipe: Pipeline) -> None:
    engine = Engine(pipe, max_rows=3)
    tickets = [engine.submit(Request("a fox", style="ink", seed=seed)) for seed in range(5)]
    engine.close()
    assert all(len(ticket.result(0).images) == 1 for ticket in tickets)
    with pytest.raises(ClosedError, match=r"^the engine is closed, or closing: it accepts no more requests$"):
        engine.submit(FOX)
    engine.close()


def test_closing_without_finishing_cancels(pipe: Pipeline, gate: Gate) -> None:
    engine = Engine(pipe, max_rows=3)
    tickets = [engine.submit(Request("a fox", style="ink", seed=seed)) for seed in range(5)]
    gate.arrive()
    closing = threading.Thread(target=lambda: engine.close(finish=False))
    closing.start()
    for ticket in tickets:
        with pytest.raises(ClosedError, match=r"^the engine was closed before the request was done$"):
            ticket.result(SOON)
    gate.free()
    closing.join(SOON)
    idle(engine, pipe)


def test_no_thread_is_left(pipe: Pipeline) -> None:
    before = threading.active_count()
    with Engine(pipe), Engine(pipe):
        assert threading.active_count() == before + 6
    assert threading.active_count() == before
