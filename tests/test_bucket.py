"""The loop on fixed buffers: the tokens of `loop.decode`, pictures that come and go, and one graph for all styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import load
from interpreter import DEVICE
from test_loop import TinyNetwork, blank, context, partly_known
from torch import Tensor

from stylemuse import Pipeline
from stylemuse.decoding.bucket import Bucket
from stylemuse.decoding.loop import Canvas, decode
from stylemuse.decoding.schedule import amused, maskgit, styledrop
from stylemuse.kernels.dispatch import REFERENCE, Kernels, triton_kernels
from stylemuse.kernels.rows import BASE
from stylemuse.static import StaticRows

BOTH = pytest.mark.parametrize("kernels", [REFERENCE, triton_kernels(DEVICE)], ids=lambda kernels: kernels.name)
SIZE = 21
LOADING: dict[str, Any] = {"device": str(DEVICE), "slots": 3, "rank": 4}


class StaticTiny:
    """The loop's tiny network on fixed rows."""

    mask_id, capturable = TinyNetwork.mask_id, True

    def __init__(self, rows: int, kernels: Kernels) -> None:
        self.kernels, self.tiny = kernels, TinyNetwork()
        self.seated = torch.full((rows, 6), torch.nan)

    def head(self) -> tuple[Tensor, Tensor]:
        return self.tiny.head.T.contiguous().to(DEVICE), self.tiny.bias.to(DEVICE)

    def seat(self, row: int, context: Tensor) -> None:
        self.seated[row] = context

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.tiny.readout(self.tiny.features(inputs.cpu(), list(self.seated))).to(DEVICE)


def canvases() -> list[Canvas]:
    """Different schedules, lengths, branches and shares of known positions; the last has one step."""
    tokens, unknown = partly_known(SIZE, 9, 3)
    inpainted = Canvas(tokens, unknown, 77, maskgit(SIZE, 9, 3), (context(4),), ((1.0,) * 3,))
    ramp = blank(SIZE, styledrop(SIZE, SIZE, 4), seed=2**62 + 5, branches=2, first_context=1)
    ramp.weights = ((1.0, 1.5, 2.0, 2.0), (0.0, -0.5, -1.0, -1.0))
    return [
        blank(SIZE, amused(SIZE, SIZE, 5), seed=1),
        ramp,
        inpainted,
        blank(SIZE, amused(SIZE, SIZE, 4), seed=9, branches=3, first_context=5),
        blank(SIZE, amused(SIZE, SIZE, 1), seed=11, first_context=2),
    ]


def bucket(network: Any, *, rows: int = 8, pictures: int = 5, steps: int = 5, graph: bool = True) -> Bucket:
    return Bucket(
        network, rows=rows, pictures=pictures, branches=3, steps=steps, positions=SIZE, device=DEVICE, graph=graph
    )


@BOTH
def test_the_tokens_are_those_of_the_loop(kernels: Kernels) -> None:
    expected = decode(TinyNetwork(), canvases())
    found = bucket(StaticTiny(8, kernels)).decode(canvases())
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))


def test_pictures_come_and_go() -> None:
    """Two places, three rows: everyone waits for room, joins at some step, and gets the tokens of drawing alone."""
    expected = [decode(TinyNetwork(), [canvas])[0] for canvas in canvases()]
    made, waiting = bucket(StaticTiny(3, REFERENCE), rows=3, pictures=2), list(enumerate(canvases()))
    seated: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    while waiting or seated:
        while waiting and made.fits(waiting[0][1]):
            number, canvas = waiting.pop(0)
            seated[made.enter(canvas)] = number
        assert seated
        made.step()
        for place in list(seated):
            canvas = made.read(place)
            assert int(canvas.unknown.sum()) == canvas.masked
            if canvas.finished:
                found[seated.pop(place)] = made.leave(place).tokens
    assert all(torch.equal(found[number], tokens) for number, tokens in enumerate(expected))


def test_what_leaves_early_goes_on_elsewhere() -> None:
    expected = decode(TinyNetwork(), canvases()[:2])
    made = bucket(StaticTiny(8, REFERENCE))
    places = [made.enter(canvas) for canvas in canvases()[:2]]
    made.step()
    made.step()
    left = [made.leave(place) for place in places]
    assert [canvas.step for canvas in left] == [2, 2]
    assert all(torch.equal(one, other) for one, other in zip(decode(TinyNetwork(), left), expected, strict=True))


def test_what_does_not_fit() -> None:
    made = bucket(StaticTiny(2, REFERENCE), rows=2, pictures=2, steps=4)
    one = blank(SIZE, amused(SIZE, SIZE, 4))
    assert made.fits(one)
    assert not made.fits(blank(SIZE, amused(SIZE, SIZE, 5)))
    assert not made.fits(blank(SIZE + 1, amused(SIZE + 1, SIZE + 1, 4)))
    assert not made.fits(blank(SIZE, amused(SIZE, SIZE, 4), branches=3))
    made.enter(one)
    assert not made.fits(blank(SIZE, amused(SIZE, SIZE, 4), branches=2))
    made.enter(blank(SIZE, amused(SIZE, SIZE, 4)))
    assert not made.fits(blank(SIZE, amused(SIZE, SIZE, 4)))


def seated(pipe: Pipeline, styles: list[str | None]) -> list[Canvas]:
    """A picture in each style, guided, of two steps."""
    network, bank = pipe.network, pipe.adapters.bank
    text, steps = network.text("a fox"), amused(16, 16, 2)
    slots = [BASE if style is None else bank.slot(style) for style in styles]
    contexts = [(network.context(text, (4, 4), slot), network.context(text, (4, 4))) for slot in slots]
    weights = ((2.0, 2.0), (-1.0, -1.0))
    return [
        Canvas.blank(16, seed=5 + index, steps=steps, contexts=each, weights=weights, device=network.device)
        for index, each in enumerate(contexts)
    ]


def of_model(pipe: Pipeline, *, pictures: int = 2, graph: bool = True) -> Bucket:
    static = StaticRows(pipe.network, 2 * pictures, (4, 4))
    return Bucket(
        static, rows=2 * pictures, pictures=pictures, branches=2, steps=2, positions=16, device=DEVICE, graph=graph
    )


def test_a_model_with_styles(tiny_model: Path) -> None:
    """Mixed styles in a bucket, then others in the same bucket: nothing is made anew for them."""
    pipe = load(tiny_model, **LOADING)
    made = of_model(pipe)
    for styles in ([None, "ink"], ["neon", "ink"], ["ink", None]):
        expected, found = decode(pipe.network, seated(pipe, styles)), made.decode(seated(pipe, styles))
        assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))
        assert not torch.equal(found[0], found[1])


@pytest.mark.slow
def test_a_model_through_triton(tiny_model: Path) -> None:
    expected = load(tiny_model, **LOADING)
    pipe = load(tiny_model, backend="triton", **LOADING)
    (found,) = of_model(pipe, pictures=1).decode(seated(pipe, ["ink"]))
    assert torch.equal(found, decode(expected.network, seated(expected, ["ink"]))[0])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_graph_gives_the_same_bits(tiny_model: Path) -> None:
    """Graph on and off, and styles that are seated long after it was captured."""
    pipe = load(tiny_model, backend="triton", **LOADING)
    with_graph, without = of_model(pipe), of_model(pipe, graph=False)
    for styles in ([None, "ink"], ["neon", "ink"]):
        one, other = with_graph.decode(seated(pipe, styles)), without.decode(seated(pipe, styles))
        assert all(torch.equal(*each) for each in zip(one, other, strict=True))
