"""The engine: accepting, joining, previews, refusals; its pictures are those of the pipeline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import FOX, draw, load, noise
from gate import SOON, Gate, idle, settled
from models import random_style

from stylemuse import (
    CFG,
    Adapter,
    Engine,
    FailedError,
    Pipeline,
    QueueFullError,
    Request,
    Sampling,
    Style,
    StylemuseError,
)
from stylemuse.adapters import canonical

# Results.


def test_a_result_is_the_pipelines(engine: Engine, pipe: Pipeline) -> None:
    request = Request("a fox", style="ink", n=3, seed=7, size=(32, 16))
    ticket = engine.submit(request)
    found, expected = ticket.result(SOON), pipe.run([request])[0]
    assert np.array_equal(found.tokens, expected.tokens)
    assert found.seeds == expected.seeds == ticket.seeds
    for one, other in zip(found.images, expected.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert len(found.timings["step"]) == ticket.steps == 4
    assert all(found.timings[part] >= 0 for part in ("queue", "text", "condition", "pixels", "total"))
    assert (ticket.done, ticket.rows) == (True, 3)


def test_many_kinds_of_requests(engine: Engine, pipe: Pipeline) -> None:
    requests = [
        Request("a fox", seed=1, sampling=Sampling(3)),
        Request("a cat", seed=2, style={"ink": 0.5, "neon": Style(0.5, 2.0)}, sampling=Sampling(7, "styledrop")),
        Request("an owl", seed=3, n=5, guidance=CFG(1.0), size=(16, 16)),
        Request("a frog", seed=4, style="neon", image=noise(), strength=0.5, sampling=Sampling(6)),
        Request("a cat", seed=5, negative_prompt="a fox", sampling=Sampling(40, "maskgit", ramp="after_first")),
    ]
    tickets = [engine.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        assert np.array_equal(ticket.result(SOON).tokens, pipe.run([request])[0].tokens), request


def test_more_pictures_than_a_pass_holds(engine: Engine, pipe: Pipeline) -> None:
    request = Request("a fox", style="ink", n=20, seed=7)
    assert np.array_equal(engine.submit(request).result(SOON).tokens, pipe.run([request])[0].tokens)


def test_requests_join_at_the_next_step_and_leave_when_done(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    """Guided requests of two rows each; what is still all MASK shares its rows."""
    first = engine.submit(FOX)
    gate.arrive()
    second = engine.submit(Request("a cat", style="ink", seed=8, guidance=CFG(3.0), sampling=Sampling(6)))
    settled(engine, lambda: bool(engine._batcher._ready))
    for _ in range(4):
        gate.step()
    assert gate.rows == [2, 4, 4, 4, 2]
    first.result(SOON)
    assert not second.done
    gate.free()
    second.result(SOON)
    assert gate.rows == [2, 4, 4, 4, 2, 2, 2]


def test_a_style_swapped_while_its_request_waits_is_for_later_ones(
    engine: Engine, pipe: Pipeline, gate: Gate, tiny_model: Path
) -> None:
    expected = draw(load(tiny_model), style="ink")
    running = engine.submit(Request("a fox", style="ink", seed=7))
    gate.arrive()
    blocked = engine.submit(Request("a fox", style="ink", seed=7))
    pipe.adapters.add("ink", random_style(pipe.network.transformer.config, "ink", seed=9), swap=True)
    later = engine.submit(Request("a fox", style="ink", seed=7))
    pipe.adapters.remove("ink")
    gate.free()
    assert np.array_equal(running.result(SOON).tokens, expected)
    assert np.array_equal(blocked.result(SOON).tokens, expected)
    assert not np.array_equal(later.result(SOON).tokens, expected)
    idle(engine, pipe)


def test_more_styles_than_slots(tiny_model: Path, tmp_path: Path) -> None:
    """Six styles wait for two slots, read from disk as others leave; blends need both at once."""
    pipe, roomy = load(tiny_model, slots=2), load(tiny_model)
    names = [f"s{index}" for index in range(6)]
    for index, name in enumerate(names):
        look = random_style(pipe.network.transformer.config, name, seed=index + 10)
        path = canonical.save(look, tmp_path / name)
        pipe.adapters.add(name, path)
        roomy.adapters.add(name, path)
    blends: list[Any] = [{one: 0.5, other: 0.5} for one, other in pairwise(names)]
    requests = [Request("a fox", style=style, seed=7) for style in [*names, *blends, *names]]
    with Engine(pipe, max_rows=32) as engine:
        tickets = [engine.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            assert np.array_equal(ticket.result(SOON).tokens, roomy.run([request])[0].tokens), request.style
        with pytest.raises(StylemuseError, match=r"^3 styles in one request; at most 2$"):
            engine.submit(Request("a fox", style=dict.fromkeys(names[:3], 0.3)))
        idle(engine, pipe)


def test_no_step_waits_for_a_style_that_is_read(
    engine: Engine, pipe: Pipeline, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request finishes while another's style is still on its way from the disk."""
    look = random_style(pipe.network.transformer.config, "look", seed=3)
    pipe.adapters.add("look", canonical.save(look, tmp_path / "look"))
    version = pipe.adapters.version("look")
    with pipe.adapters._lock:
        pipe.adapters._evict(version)
    reading, go_on, read = threading.Event(), threading.Event(), version.read

    def slow() -> Adapter:
        reading.set()
        assert go_on.wait(SOON)
        return read()

    monkeypatch.setattr(version, "read", slow)
    running = engine.submit(FOX)
    gate.arrive()
    waiting = engine.submit(Request("a fox", style="look", seed=7))
    assert reading.wait(SOON)
    gate.free()
    assert running.result(SOON)
    assert not waiting.done
    go_on.set()
    assert np.array_equal(waiting.result(SOON).tokens, draw(pipe, style="look"))


# Previews.


def test_previews_are_the_picture_on_its_way(engine: Engine, pipe: Pipeline) -> None:
    seen: list[Any] = []
    request = Request("a fox", style="ink", n=2, seed=7, sampling=Sampling(6))
    pipe.run([request], on_step=lambda preview: seen.append((preview.tokens(0).cpu().numpy(), preview.images(0))))

    async def follow() -> list[Any]:
        ticket = engine.submit(request, previews=99)
        found = [snapshot async for snapshot in ticket]
        again = [snapshot async for snapshot in ticket]
        assert again == found, "whoever comes later sees all of them"
        await ticket
        return found

    found = asyncio.run(follow())
    assert sorted((shot.picture, shot.step) for shot in found) == [(n, k) for n in range(2) for k in range(1, 6)]
    for shot in found:
        tokens, images = seen[shot.step - 1]
        assert shot.steps == 6
        assert np.array_equal(shot.tokens, tokens[shot.picture])
        assert np.array_equal(np.asarray(shot.image()), np.asarray(images[shot.picture]))


@pytest.mark.parametrize(("previews", "steps", "at"), [(0, 4, []), (1, 4, [2]), (3, 12, [3, 6, 9]), (9, 4, [1, 2, 3])])
def test_previews_are_evenly_spaced(engine: Engine, previews: int, steps: int, at: list[int]) -> None:
    ticket = engine.submit(Request("a fox", sampling=Sampling(steps)), previews=previews)

    async def follow() -> list[int]:
        return [snapshot.step async for snapshot in ticket]

    assert asyncio.run(follow()) == at


def test_following_a_request_that_fails_ends(engine: Engine, gate: Gate) -> None:
    async def follow() -> None:
        ticket = engine.submit(FOX, previews=3)
        gate.failing = True
        gate.free()
        assert [snapshot async for snapshot in ticket] == []
        with pytest.raises(FailedError):
            await ticket

    asyncio.run(follow())


# Refusals.


def test_wrong_requests_are_refused_at_once(engine: Engine, pipe: Pipeline) -> None:
    wrong: dict[str, Callable[[], object]] = {
        "style 'nope' is unknown; allowed: ink, neon": lambda: engine.submit(Request("a fox", style="nope")),
        "size 20 x 32 is impossible": lambda: engine.submit(Request("a fox", size=(20, 32))),
        r"2 branches and 32 x 32 tokens takes 32 rows; this engine has 8$": lambda: engine.submit(
            Request("a fox", size=(128, 128))
        ),
        "priority 5 is not allowed: -4 to 4": lambda: engine.submit(FOX, priority=5),
        "timeout 0 is not allowed": lambda: engine.submit(FOX, timeout=0),
        "previews = -1 is not allowed": lambda: engine.submit(FOX, previews=-1),
        "max_rows = 0 is not allowed": lambda: Engine(pipe, max_rows=0),
        "memory = 9 bytes is not enough": lambda: Engine(pipe, memory=9),
        r"max_rows = 1000 do not fit 9,000,000 bytes": lambda: Engine(pipe, max_rows=1000, memory=9_000_000),
    }
    for words, action in wrong.items():
        with pytest.raises(StylemuseError, match=words):
            action()
    idle(engine, pipe)


def test_a_full_engine_says_when_to_come_again(pipe: Pipeline, gate: Gate) -> None:
    with Engine(pipe, max_requests=2) as engine:
        tickets = [engine.submit(FOX) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are in the engine already; try again in 1 s") as error:
            engine.submit(FOX)
        assert error.value.retry_after == 1
        gate.free()
        assert all(ticket.result(SOON) for ticket in tickets)
        engine.submit(FOX).result(SOON)


# Telling.


def test_what_it_tells(pipe: Pipeline, gate: Gate) -> None:
    steps: list[Any] = []
    ends: list[Any] = []
    with Engine(pipe, on_step=lambda *facts: steps.append(facts), on_end=lambda *facts: ends.append(facts)) as engine:
        ticket = engine.submit(Request("a fox", n=2, seed=7))
        gate.arrive()
        stats = engine.stats()
        assert (stats.accepted, stats.waiting, stats.pictures, stats.rows) == (1, 0, 2, 4.0)
        assert stats.step_seconds is None
        gate.free()
        ticket.result(SOON)
        engine.submit(FOX).cancel()
        idle(engine, pipe)
        assert engine.stats().step_seconds is not None
    assert [(rows, pictures) for _, rows, pictures in steps[:4]] == [(4.0, 2)] * 4
    assert [outcome for outcome, _ in ends] == ["done", "cancelled"]
