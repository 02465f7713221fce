"""The loop on fixed buffers: the tokens of `loop.decode`, pictures that come and go, and one graph for all styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import load
from interpreter import DEVICE
from test_loop import TinyNetwork, blank, context, partly_known, visible
from torch import Tensor

from stylemuse import Pipeline
from stylemuse.backend.static import StaticRows
from stylemuse.decoding.bucket import size
from stylemuse.decoding.buckets import KEPT, Buckets
from stylemuse.decoding.canvas import Canvas
from stylemuse.decoding.loop import advance, decode
from stylemuse.decoding.schedule import amused, maskgit, styledrop
from stylemuse.kernels.dispatch import REFERENCE, Kernels, triton_kernels
from stylemuse.kernels.rows import BASE

BOTH = pytest.mark.parametrize("kernels", [REFERENCE, triton_kernels(DEVICE)], ids=lambda kernels: kernels.name)
SIZE = 21
LOADING: dict[str, Any] = {"device": str(DEVICE), "slots": 3, "rank": 4}


class StaticTiny:
    """The loop's tiny network on fixed rows; what nobody sits in is NaN."""

    mask_id, capturable, variant = TinyNetwork.mask_id, False, None

    def __init__(self, rows: int, kernels: Kernels) -> None:
        self.kernels, self.tiny = kernels, TinyNetwork()
        self.seated = torch.full((rows, 6), torch.nan)
        self.forwards: list[int] = []

    def head(self) -> tuple[Tensor, Tensor]:
        return self.tiny.head.T.contiguous().to(DEVICE), self.tiny.bias.to(DEVICE)

    def seat(self, row: int, context: Tensor) -> None:
        assert self.seated[row].isnan().all(), "somebody sits here"
        self.seated[row] = context

    def vacate(self, row: int) -> None:
        self.seated[row] = torch.nan

    def hidden(self, inputs: Tensor) -> Tensor:
        self.forwards.append(len(inputs))
        return self.tiny.readout(self.tiny.features(inputs.cpu(), list(self.seated[: len(inputs)]))).to(DEVICE)


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


class Made:
    """Buckets of tiny networks, which are kept to look at."""

    def __init__(self, kernels: Kernels = REFERENCE, rows: int | None = None) -> None:
        self.networks: list[StaticTiny] = []
        self.sizes: list[int] = []

        def make(count: int, shape: tuple[int, ...]) -> StaticTiny:
            self.sizes.append(count)
            self.networks.append(StaticTiny(count, kernels))
            return self.networks[-1]

        self.buckets = Buckets(make, DEVICE, rows=rows)


def alone() -> list[Tensor]:
    """What the plain loop draws, each canvas by itself."""
    return [decode(TinyNetwork(), [canvas])[0] for canvas in canvases()]


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))


@BOTH
def test_the_tokens_are_those_of_the_loop(kernels: Kernels) -> None:
    """And what is masked after every step."""
    expected, found = canvases(), canvases()
    made, network = Made(kernels), TinyNetwork()
    while running := [index for index, canvas in enumerate(expected) if not canvas.finished]:
        advance(network, [expected[index] for index in running])
        advance(made.buckets, [found[index] for index in running])
        for one, other in zip(found, expected, strict=True):
            assert (one.step, one.masked) == (other.step, other.masked)
            assert torch.equal(visible(one).cpu(), visible(other).cpu())
            assert int(one.unknown.sum()) == one.masked
    assert equal([canvas.tokens for canvas in found], [canvas.tokens for canvas in expected])
    assert made.networks[0].forwards == [8, 7, 7, 6, 1], "as many rows as are taken, and the last step has one picture"


def test_pictures_come_and_go() -> None:
    """Three rows: everyone waits for room, joins at some step, steps aside after two, and is drawn as if alone."""
    made, waiting = Made(rows=3), canvases()
    done: list[Canvas] = []
    order = {id(canvas): index for index, canvas in enumerate(waiting)}
    while waiting:
        running: list[Canvas] = []
        for canvas in waiting:
            if sum(len(each.contexts) for each in (*running, canvas)) <= 3:
                running.append(canvas)
        advance(made.buckets, running)
        previews = [(canvas.tokens, canvas.tokens.clone()) for canvas in running]
        advance(made.buckets, [canvas for canvas in running if not canvas.finished])
        assert all(torch.equal(tokens, copy) for tokens, copy in previews), "a preview does not change"
        ran = {id(canvas) for canvas in running}
        aside = [canvas for canvas in running if not canvas.finished]
        waiting = [canvas for canvas in waiting if id(canvas) not in ran] + aside
        done += [canvas for canvas in running if canvas.finished]
    done.sort(key=lambda canvas: order[id(canvas)])
    assert equal([canvas.tokens for canvas in done], alone())
    assert made.sizes == [3]


def test_what_was_decoded_elsewhere_meanwhile_is_seated_anew() -> None:
    """A step in buckets, one in the plain loop, one in other buckets, and back."""
    found, made, other = canvases()[1:4], Made(), Made()
    for stepper in (made.buckets, TinyNetwork(), other.buckets, made.buckets):
        advance(stepper, [canvas for canvas in found if not canvas.finished])
    assert equal(decode(TinyNetwork(), found), alone()[1:4])


def test_a_step_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvases go on from where they were, in the same buckets."""
    found, made = canvases()[:3], Made()
    advance(made.buckets, found)
    before = [(canvas.tokens, canvas.step) for canvas in found]
    hidden = made.networks[-1].hidden

    def broken(inputs: Tensor) -> Tensor:
        hidden(inputs)
        raise RuntimeError("a broken kernel")

    with monkeypatch.context() as patch:
        patch.setattr(made.networks[-1], "hidden", broken)
        with pytest.raises(RuntimeError, match="a broken kernel"):
            advance(made.buckets, found)
    assert [(canvas.tokens, canvas.step) for canvas in found] == before
    assert equal(decode(made.buckets, found), alone()[:3])


def test_buckets_grow_and_are_few() -> None:
    """Twice as large where more rows are wanted, up to what is given; the sizes of pictures used last are kept."""
    made = Made(rows=6)
    for count, sizes in (
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 4]),
        (4, [1, 2, 4]),
        (5, [1, 2, 4, 6]),
        (7, [1, 2, 4, 6, 7]),
    ):
        decode(made.buckets, [blank(SIZE, amused(SIZE, SIZE, 1), seed=seed) for seed in range(count)])
        assert made.sizes == sizes
    decode(made.buckets, [blank(SIZE, amused(SIZE, SIZE, 99), branches=9)])
    assert made.sizes == [1, 2, 4, 6, 7, 9], "more branches, and more steps, than it was made for"
    decode(made.buckets, [blank(SIZE, amused(SIZE, SIZE, 1), branches=2)])
    for tokens in range(1, KEPT + 1):
        decode(made.buckets, [blank(tokens, amused(tokens, tokens, 1))])
    assert len(made.sizes) == 6 + KEPT
    decode(made.buckets, [blank(KEPT, amused(KEPT, KEPT, 1))])
    assert len(made.sizes) == 6 + KEPT
    decode(made.buckets, [blank(SIZE, amused(SIZE, SIZE, 1))])
    assert len(made.sizes) == 7 + KEPT, "the one used longest ago was let go"


@pytest.mark.parametrize(("rows", "computed"), [(1, 1), (7, 7), (8, 8), (9, 10), (16, 16), (17, 20), (33, 40)])
def test_few_sizes_of_steps(rows: int, computed: int) -> None:
    assert size(rows) == computed
    assert all(size(size(each)) == size(each) < 1.25 * each + 1 for each in range(1, 400))


def seated(pipe: Pipeline, styles: list[str | None]) -> list[Canvas]:
    """A picture in each style, guided, of two steps."""
    network = pipe.network
    text, steps = network.text("a fox"), amused(16, 16, 2)
    slots = [BASE if style is None else pipe.adapters.version(style).slot for style in styles]
    contexts = [(network.context(text, (4, 4), slot), network.context(text, (4, 4))) for slot in slots]
    weights = ((2.0, 2.0), (-1.0, -1.0))
    made = [
        Canvas.blank(16, seed=5 + index, steps=steps, contexts=each, weights=weights, device=network.device)
        for index, each in enumerate(contexts)
    ]
    return [replace(canvas, shape=(4, 4)) for canvas in made]


def of_model(pipe: Pipeline, *, graph: bool = True) -> Buckets:
    return Buckets(partial(StaticRows, pipe.network), DEVICE, graph=graph)


def test_a_model_with_styles(tiny_model: Path) -> None:
    """Mixed styles in a bucket, then others in the same bucket: nothing is made anew for them."""
    pipe = load(tiny_model, **LOADING)
    made, bucket = of_model(pipe), None
    for styles in ([None, "ink"], ["neon", "ink"], ["ink", None]):
        expected, found = decode(pipe.network, seated(pipe, styles)), decode(made, seated(pipe, styles))
        assert equal(found, expected)
        assert not torch.equal(found[0], found[1])
        (bucket_now,) = made._buckets.values()
        assert bucket is None or bucket_now is bucket
        bucket = bucket_now


def test_a_launch_knows_only_where_adapters_are(tiny_model: Path) -> None:
    """LoRAs on queries, keys and values share launches with one another, and the base has its own."""
    pipe = load(tiny_model, **LOADING)
    rows = StaticRows(pipe.network, 2, (4, 4))
    variants = []
    for style in (None, "ink", "neon"):
        (canvas,) = seated(pipe, [style])
        rows.seat(0, canvas.contexts[0])
        variants.append(rows.variant)
        rows.vacate(0)
    assert variants == [frozenset(), {"qkv", "to_q", "kv"}, {"qkv", "to_q", "kv"}]
    assert rows.variant == frozenset()


@pytest.mark.slow
def test_a_model_through_triton(tiny_model: Path) -> None:
    expected = load(tiny_model, **LOADING)
    pipe = load(tiny_model, backend="triton", **LOADING)
    (found,) = decode(of_model(pipe), seated(pipe, ["ink"]))
    assert torch.equal(found, decode(expected.network, seated(expected, ["ink"]))[0])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_graph_gives_the_same_bits(tiny_model: Path) -> None:
    """Graph on and off, and styles that are seated long after it was captured."""
    pipe = load(tiny_model, backend="triton", **LOADING)
    with_graph, without = of_model(pipe), of_model(pipe, graph=False)
    for styles in ([None, "ink"], ["neon", "ink"], ["ink", "neon"]):
        assert equal(decode(with_graph, seated(pipe, styles)), decode(without, seated(pipe, styles)))
    (bucket,) = with_graph._buckets.values()
    assert len(bucket._graphs) == 1, "no style has a graph of its own"
