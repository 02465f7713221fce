"""The laws in an engine: a request draws the same bytes alone and among any neighbours, through swaps and threads."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import process
import pytest
import torch
from drawing import load
from models import random_style, write_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import stylemuse
from stylemuse import Engine, Pipeline, Request, Result, Sampling
from stylemuse.decoding.canvas import Canvas
from stylemuse.decoding.loop import advance
from stylemuse.decoding.schedule import amused
from stylemuse.engine.batcher import AHEAD
from stylemuse.engine.budget import NOISE_BYTES, rows_within

SOON = 120.0
STYLES = (None, "ink", "neon", {"ink": 0.5, "neon": 0.5})


def triples(
    count: int, seed: int, styles: Iterable[object] = STYLES, steps: Iterable[int] = (2, 3, 4)
) -> list[Request]:
    """Requests with random prompt, seed, style and steps."""
    choice, prompts = random.Random(seed), ("a fox", "a cat", "an owl", "the red castle")
    return [
        Request(
            choice.choice(prompts),
            style=choice.choice(list(styles)),  # type: ignore[arg-type]
            seed=choice.getrandbits(60),
            sampling=Sampling(choice.choice(list(steps))),
        )
        for _ in range(count)
    ]


def same(one: Result, other: Result) -> bool:
    pictures = zip(one.images, other.images, strict=True)
    return np.array_equal(one.tokens, other.tokens) and all(a.tobytes() == b.tobytes() for a, b in pictures)


def check(pipe: Pipeline, requests: list[Request], max_rows: int, *, swaps: bool, threads: int = 1) -> None:
    """Every request alone, then all through an engine at once while other styles come and go."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [pipe.run([request])[0] for request in requests]
    torch.set_num_threads(threads)
    config, ended = pipe.network.transformer.config, threading.Event()

    def swap() -> None:
        count = 0
        while not ended.wait(0.02):
            pipe.adapters.add("other", random_style(config, "other", seed=count % 7), swap="other" in pipe.adapters)
            count += 1

    swapper = threading.Thread(target=swap)
    if swaps:
        swapper.start()
    try:
        with Engine(pipe, max_rows=max_rows) as engine:
            tickets = [engine.submit(request) for request in requests]
            for request, ticket, expected in zip(requests, tickets, alone, strict=True):
                assert same(ticket.result(SOON), expected), request
    finally:
        torch.set_num_threads(before)
        ended.set()
        if swaps:
            swapper.join()


@pytest.mark.parametrize("max_rows", [4, 16])
def test_the_same_bytes_alone_and_among_neighbours(tiny_model: Path, max_rows: int) -> None:
    check(load(tiny_model), triples(24, max_rows), max_rows, swaps=False)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_hundred_requests_before_and_after_swaps(tiny_model: Path, threads: int) -> None:
    """Alone on one thread, then in the engine on one and two; a fourth style comes and goes meanwhile."""
    check(load(tiny_model, slots=4), triples(200, threads), 48, swaps=True, threads=threads)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
def test_the_embedded_model_too(dtype: str, threads: int) -> None:
    """Its steps and pictures are large enough for torch to split among threads."""
    pipe = stylemuse.load("demo", dtype=dtype)
    check(pipe, triples(7, 5, (None, *pipe.adapters.names), steps=(1, 2)), 16, swaps=False, threads=threads)


def test_two_engines_in_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """Other weights under the same names, at the same time."""
    pipes = [load(tiny_model), load(write_tiny_model(tmp_path / "other", seed=5))]
    requests = triples(8, 3)
    alone = [[pipe.run([request])[0] for request in requests] for pipe in pipes]
    with Engine(pipes[0], max_rows=9) as one, Engine(pipes[1], max_rows=9) as other:
        tickets = [[engine.submit(request) for request in requests] for engine in (one, other)]
        found = [[ticket.result(SOON) for ticket in each] for each in tickets]
    for ours, theirs in zip(alone, found, strict=True):
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not all(same(a, b) for a, b in zip(*alone, strict=True))


def test_an_engine_leaves_the_process_as_it_was(tiny_model: Path) -> None:
    pipe, before = load(tiny_model), process.state()
    with Engine(pipe) as engine:
        engine.submit(Request("a fox", style="ink")).result(SOON)
    assert process.state() == before


class Peak(TorchDispatchMode):
    """The most bytes that tensors made by operations took at once; what an operation takes inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or not size:
            return
        self._known.add(address)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(address)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_memory_budget_holds(dtype: str) -> None:
    """What a step of the embedded model takes is within what its rows are counted with, and not far from it."""
    pipe = stylemuse.load("demo", dtype=dtype)
    network, config = pipe.network, pipe.network.transformer.config
    each = network.row_bytes(AHEAD)
    rows = 12
    with torch.no_grad():
        contexts = [network.context(network.text(f"a fox {index}"), (16, 16)) for index in range(rows)]
    steps = amused(config.sample_size**2, config.sample_size**2, 4)
    canvases = [
        Canvas.blank(config.sample_size**2, seed=index, steps=steps, contexts=(context,), weights=((1.0,) * 4,))
        for index, context in enumerate(contexts)
    ]
    for canvas in canvases:
        canvas.shape = (config.sample_size, config.sample_size)
    with Peak() as peak:
        advance(network, canvases)
    taken = peak.most + sum(context.bytes for context in contexts)
    budget = NOISE_BYTES + each * rows
    assert budget / 3 < taken < budget
    assert rows_within(budget, network) == rows
    with Engine(pipe, memory=budget) as engine:
        assert engine.max_rows == rows
