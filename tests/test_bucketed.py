"""Pipelines and engines that decode in buckets, as backend triton does, with the reference's kernels: equal tokens."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import bucketed, load, noise
from gate import SOON, idle
from models import random_style
from PIL import Image
from test_engine_laws import check, triples

from stylemuse import CFG, Engine, FailedError, ObjectInStyle, Pipeline, Request, Sampling, Style, StyleDrop
from stylemuse.backend.static import StaticRows
from stylemuse.decoding.bucket import Bucket
from stylemuse.decoding.buckets import Buckets

MASK = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((16, 16))).astype(np.uint8))
REQUESTS = [
    Request("a fox", seed=1, sampling=Sampling(3)),
    Request("a cat", "ink", n=3, seed=2, guidance=StyleDrop(2.0, 5.0), sampling=Sampling(5, "styledrop")),
    Request("a cat", {"ink": 0.5, "neon": Style(0.3, 2.0)}, seed=3, guidance=StyleDrop(2.0, 5.0)),
    Request("an owl", seed=4, guidance=CFG(1.0), size=(16, 24)),
    Request("a frog", "neon", seed=5, image=noise(), strength=0.5, sampling=Sampling(6)),
    Request("a frog", "ink", seed=6, image=noise(1), mask=MASK, sampling=Sampling(4, "maskgit")),
    Request("a fox", "ink", seed=7, guidance=ObjectInStyle("neon", "a cat"), sampling=Sampling(4, ramp="linear")),
    Request("a cat", "ink", negative_prompt="a fox", seed=8, sampling=Sampling(70, ramp="after_first")),
]
"""Schedules, numbers of branches, blends, sizes, starts, ramps; one longer than the steps a bucket begins with."""


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    return bucketed(load(tiny_model, device="cpu"))


@pytest.fixture
def plain(tiny_model: Path) -> Pipeline:
    return load(tiny_model, device="cpu")


def test_backend_triton_decodes_in_buckets(tiny_model: Path, plain: Pipeline) -> None:
    """And no other: where launches are calls, the plain loop computes less."""
    triton = load(tiny_model, backend="triton", device="cpu")
    assert isinstance(triton._decoder, Buckets)
    assert isinstance(triton.decoder(), Buckets)
    assert triton.decoder() is not triton._decoder, "everyone has their own"
    assert plain.decoder() is plain.network


def test_a_mixed_batch_is_the_plain_loops(pipe: Pipeline, plain: Pipeline) -> None:
    expected = plain.run(REQUESTS)
    for found in (pipe.run(REQUESTS), [pipe.run([request])[0] for request in REQUESTS]):
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.tokens, other.tokens)
            assert one.seeds == other.seeds
    assert set(pipe.run(REQUESTS[:1])[0].timings) == {"text", "condition", "step", "pixels", "total"}


def test_previews_are_the_plain_loops(pipe: Pipeline, plain: Pipeline) -> None:
    """Looked at in every step, and they do not change what comes after."""
    seen: list[Any] = []
    for each in (plain, pipe):
        shown: list[Any] = []

        def look(preview: Any, shown: list[Any] = shown) -> None:
            shown.extend(
                (preview.step, preview.tokens(index).cpu().numpy().copy(), preview.images(index)[0].tobytes())
                for index in preview.requests
            )

        each.run(REQUESTS[:2], on_step=look)
        seen.append(shown)
    assert len(seen[0]) == len(seen[1]) == 3 + 5
    for one, other in zip(*seen, strict=True):
        assert one[0] == other[0]
        assert np.array_equal(one[1], other[1])
        assert one[2] == other[2]


def test_styles_swapped_between_runs(pipe: Pipeline, plain: Pipeline) -> None:
    """A to B to A in the same bucket: nothing of a style stays behind."""
    config, request = pipe.network.transformer.config, REQUESTS[1]
    (first,) = pipe.run([request])
    (bucket,) = pipe._decoder._buckets.values()
    other = random_style(config, "ink", seed=9)
    for each in (pipe, plain):
        each.adapters.add("ink", other, swap=True)
    (second,) = pipe.run([request])
    assert np.array_equal(second.tokens, plain.run([request])[0].tokens)
    assert not np.array_equal(first.tokens, second.tokens)
    pipe.adapters.add("ink", random_style(config, "ink", seed=1), swap=True)
    assert np.array_equal(pipe.run([request])[0].tokens, first.tokens)
    assert list(pipe._decoder._buckets.values()) == [bucket]


def test_a_run_that_is_broken_off_leaves_nothing(pipe: Pipeline, plain: Pipeline) -> None:
    class StopError(Exception):
        pass

    def stop(_: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        pipe.run(REQUESTS[:3], on_step=stop)
    assert np.array_equal(pipe.run(REQUESTS[:1])[0].tokens, plain.run(REQUESTS[:1])[0].tokens)
    (bucket,) = pipe._decoder._buckets.values()
    assert not bucket._seats


def test_an_engine_draws_all_kinds(pipe: Pipeline, plain: Pipeline) -> None:
    """More than fit at once; each as if alone."""
    with Engine(pipe, max_rows=8) as engine:
        tickets = [engine.submit(request) for request in REQUESTS]
        for request, ticket in zip(REQUESTS, tickets, strict=True):
            assert np.array_equal(ticket.result(SOON).tokens, plain.run([request])[0].tokens), request
        idle(engine, pipe)
        assert all(not bucket._seats for bucket in engine._decoder._buckets.values())
        assert all(bucket.rows <= 8 * 64 / 24 for bucket in engine._decoder._buckets.values())


def test_an_engines_previews(pipe: Pipeline, plain: Pipeline) -> None:
    expected: list[Any] = []
    request = Request("a fox", "ink", n=2, seed=7, sampling=Sampling(6))
    plain.run([request], on_step=lambda preview: expected.append(preview.tokens(0).cpu().numpy().copy()))

    async def follow() -> list[Any]:
        with Engine(pipe) as engine:
            ticket = engine.submit(request, previews=99)
            return [snapshot async for snapshot in ticket]

    found = asyncio.run(follow())
    assert len(found) == 2 * 5
    for shot in found:
        assert np.array_equal(shot.tokens, expected[shot.step - 1][shot.picture])


@pytest.mark.slow
def test_the_laws_in_an_engine(pipe: Pipeline) -> None:
    """Alone, among any neighbours, while styles are swapped."""
    check(pipe, triples(60, 5), 16, swaps=True)


def test_who_is_cancelled_frees_its_rows_and_disturbs_nobody(pipe: Pipeline, plain: Pipeline) -> None:
    """Half of the requests are given up at any time; the others are drawn as if alone."""
    choice = random.Random(3)
    requests = [
        Request("a fox", "ink", seed=seed, sampling=Sampling(choice.choice((3, 9, 40)), "styledrop"))
        for seed in range(12)
    ]
    with Engine(pipe, max_rows=9) as engine:
        tickets = [engine.submit(request) for request in requests]
        for index, ticket in enumerate(tickets):
            if index % 2:
                engine.submit(requests[0]).result(SOON)  # some steps pass
                ticket.cancel()
        for request, ticket in list(zip(requests, tickets, strict=True))[::2]:
            assert np.array_equal(ticket.result(SOON).tokens, plain.run([request])[0].tokens)
        idle(engine, pipe)


def test_a_step_that_fails_ends_its_requests_only(
    pipe: Pipeline, plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failing = StaticRows.hidden, [True]

    def hidden(self: StaticRows, inputs: Any) -> Any:
        if failing and len(inputs) > 1:
            failing.clear()
            raise RuntimeError("a broken kernel")
        return original(self, inputs)

    monkeypatch.setattr(StaticRows, "hidden", hidden)
    request = Request("a fox", "ink", n=3, seed=7)
    with Engine(pipe) as engine:
        with pytest.raises(FailedError):
            engine.submit(request).result(SOON)
        assert np.array_equal(engine.submit(request).result(SOON).tokens, plain.run([request])[0].tokens)


def test_pictures_move_up_where_others_left(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes hardly more rows than are taken, whoever has left."""
    sizes: list[int] = []
    original = Bucket._run

    def run(self: Bucket, rows: int) -> None:
        sizes.append(rows)
        original(self, rows)

    monkeypatch.setattr(Bucket, "_run", run)
    steps = [2] * 5 + [6]
    pipe.run([Request("a fox", "ink", seed=7, guidance=StyleDrop(1.0, 1.0), sampling=Sampling(n)) for n in steps])
    assert sizes == [12, 12, 2, 2, 2, 2]


def test_a_graph_is_captured_once_for_all_styles(
    pipe: Pipeline, plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with graphs that call what they captured: other styles, prompts, schedules and swaps need none."""
    captured: list[tuple[int, int]] = []

    class Graph:
        def __init__(self, bucket: Bucket, rows: int, branches: int) -> None:
            self.replay = partial(bucket._launch, rows, branches)

    def capture(self: Bucket, rows: int, branches: int) -> Graph:
        captured.append((rows, branches))
        return Graph(self, rows, branches)

    made = Bucket.__init__

    def capturing(self: Bucket, *given: Any, **options: Any) -> None:
        made(self, *given, **options)
        self._captured = True

    monkeypatch.setattr(Bucket, "_capture", capture)
    monkeypatch.setattr(Bucket, "__init__", capturing)
    ink, neon = (Request("a fox", style, seed=1, guidance=StyleDrop(2.0, 5.0)) for style in ("ink", "neon"))
    others = [neon, replace(ink, prompt="an owl"), replace(ink, sampling=Sampling(9, "styledrop"))]
    for request in (ink, *others):
        assert np.array_equal(pipe.run([request])[0].tokens, plain.run([request])[0].tokens)
    look = random_style(pipe.network.transformer.config, "ink", seed=9)
    for each in (pipe, plain):
        each.adapters.add("ink", look, swap=True)
    assert np.array_equal(pipe.run([ink])[0].tokens, plain.run([ink])[0].tokens)
    assert captured == [(3, 3)]
    pipe.run([replace(ink, style=None, guidance=CFG(2.0))])
    pipe.run([neon, ink])
    assert captured == [(3, 3), (2, 2), (6, 3)], "the base, and as many rows again, in a bucket twice as large"
