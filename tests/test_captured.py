"""A function as one launch: the same numbers, one capture for a set of shapes, results that stay, few graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch
from drawing import load
from interpreter import DEVICE
from models import SIDE
from torch import Tensor

from stylemuse.decoding.captured import KEPT, Captured, Pool, capture
from stylemuse.kernels.rows import BASE

gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")


class StandIn:
    """What a graph is: the launches again, on the same memory. The results lie where they lay when it was made."""

    def __init__(self, run: Callable[[], object], made: list[StandIn]) -> None:
        self.replays, self._run = 0, run
        run()
        made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self._run()


class Doubler:
    """x -> 2 x, x + 1, at addresses of their own for a shape, as a graph's results are."""

    def __init__(self) -> None:
        self.places: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self.graphs: list[StandIn] = []
        self.captured = Captured(self, lambda run: StandIn(run, self.graphs))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.places.setdefault(x.shape, (torch.empty_like(x), torch.empty_like(x)))
        torch.mul(x, 2, out=made[0])
        torch.add(x, 1, out=made[1])
        return made if self.graphs else (made[0].clone(), made[1].clone())


def test_results_are_the_functions_and_stay() -> None:
    doubler = Doubler()
    given = [torch.full((3,), float(number)) for number in range(4)]
    found = [doubler.captured(x) for x in given]
    for x, (double, more) in zip(given, found, strict=True):
        assert torch.equal(double, 2 * x)
        assert torch.equal(more, x + 1)
    assert [graph.replays for graph in doubler.graphs] == [3], "called once, captured once, then replayed"


def test_a_graph_for_each_set_of_shapes_and_formats_and_few_of_them() -> None:
    doubler = Doubler()
    for size in (*range(1, KEPT + 1), 1, KEPT + 1, 1):
        assert torch.equal(doubler.captured(torch.ones(size))[1], torch.full((size,), 2.0))
    assert [graph.replays for graph in doubler.graphs] == [2, *[0] * KEPT], "the one used last is kept"
    doubler.captured(torch.ones(2))
    assert len(doubler.graphs) == KEPT + 2, "the one used longest ago was let go"
    doubler.captured(torch.ones(2, dtype=torch.float64))
    assert len(doubler.graphs) == KEPT + 3


def test_what_fails_is_not_kept() -> None:
    failing = [True]
    graphs: list[StandIn] = []

    def function(x: Tensor) -> tuple[Tensor]:
        if failing:
            raise RuntimeError("a broken kernel")
        return (x + 1,)

    captured = Captured(function, lambda run: StandIn(run, graphs))
    with pytest.raises(RuntimeError, match="a broken kernel"):
        captured(torch.ones(2))
    failing.clear()
    for number in range(3):
        assert torch.equal(captured(torch.full((2,), float(number)))[0], torch.full((2,), number + 1.0))
    assert len(graphs) == 1


def test_without_a_capture_it_is_the_function() -> None:
    given = torch.ones(2)
    assert Captured(lambda x: (x,), None)(given)[0] is given


def test_threads_take_turns() -> None:
    """A result is copied out before another call writes over it."""
    doubler = Doubler()
    doubler.captured(torch.zeros(1000))
    wrong: list[float] = []

    def right(number: float) -> bool:
        return torch.equal(doubler.captured(torch.full((1000,), number))[0], torch.full((1000,), 2 * number))

    def work(first: int) -> None:
        wrong.extend(number for number in range(first, first + 200) if not right(float(number)))

    threads = [Thread(target=work, args=(first,)) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_parts_of_a_model_are_bitwise_those_that_are_called(tiny_model: Path) -> None:
    """Text, conditioning of base and styled rows, pictures: the first call runs them, later ones are graphs."""
    network = load(tiny_model, backend="triton", device=str(DEVICE), slots=3, rank=4).network
    slot = 0
    grid = (SIDE // 4, SIDE // 4)
    codes = torch.arange(3 * grid[0] * grid[1], device=DEVICE).view(3, *grid) % 64
    called, replayed = [], []
    for into in (called, replayed):
        texts = [network.text(prompt) for prompt in ("a fox", "a cat")]
        contexts = network.contexts([(texts[0], grid, BASE, 1.0), (texts[1], grid, BASE, 1.0)])
        contexts += network.contexts([(texts[0], grid, slot, 0.7), (texts[1], grid, BASE, 1.0)])
        into += [value for text in texts for value in text] + [context.packed for context in contexts]
        into += [torch.tensor(list(picture.tobytes())) for picture in network.pixels(codes)]
    assert all(torch.equal(one, other) for one, other in zip(called, replayed, strict=True))
    assert len(network._draw._held) == len(network._encode._held) == 1
    assert len(network._condition._held) == 2, "with styles, and without"
    assert torch.equal(contexts[1].packed, contexts[3].packed), "base rows do not notice styled neighbours"


@gpu
def test_memory_is_shared_again_after_all_its_graphs_are_gone() -> None:
    """With a product in it, whose workspace stays."""
    pool, x = Pool(DEVICE), torch.randn(64, 64, device=DEVICE)
    expected = x @ x
    for _ in range(3):
        made: list[Tensor] = []
        graph = capture(partial(_product, x, made), DEVICE, pool.handle)
        graph.replay()
        assert torch.equal(made[0], expected)
        del graph, made


def _product(x: Tensor, into: list[Tensor]) -> None:
    into[:] = [x @ x]
