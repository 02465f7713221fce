"""The decoding loop: against diffusers and a recorded StyleDrop-PyTorch run, and its laws on a tiny network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from diffusers.schedulers import scheduling_amused
from torch import Tensor

from stylemuse.core import Style, StylemuseError
from stylemuse.decoding.canvas import Canvas, Timings
from stylemuse.decoding.guidance import StyleDrop
from stylemuse.decoding.loop import advance, decode
from stylemuse.decoding.rng import SEED_LIMIT, fresh_seed, image_seeds
from stylemuse.decoding.schedule import Steps, amused, maskgit, styledrop
from stylemuse.kernels import sampling

GOLDEN = Path(__file__).parent / "golden/styledrop_pytorch/decode_trace.npz"
CODES, MASK = 23, 23


class TinyNetwork:
    """Neighbouring tokens mixed with a context vector. Elementwise throughout, so a row is bitwise its own."""

    mask_id = MASK

    def __init__(self, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(CODES + 1, width, generator=generator)
        self.head = torch.randn(width, CODES, generator=generator)
        self.bias = torch.randn(CODES, generator=generator)
        self.forwards: list[tuple[int, int]] = []
        self.read_out: list[int] = []
        self.seen_logits: list[Tensor] = []

    def features(self, tokens: Tensor, contexts: Sequence[Tensor]) -> Tensor:
        self.forwards.append((len(tokens), tokens.shape[1]))
        x = self.embedding[tokens]
        place = torch.arange(tokens.shape[1])[:, None] / 7
        return x + 0.7 * x.roll(1, 1) * torch.stack(list(contexts))[:, None] - 0.5 * x.roll(-2, 1) + place.sin()

    def readout(self, features: Tensor) -> Tensor:
        self.read_out.append(len(features))
        return features.tanh()

    def logits(self, hidden: Tensor) -> Tensor:
        total = self.bias.expand(len(hidden), -1)
        for column, row in zip(hidden.T, self.head, strict=True):
            total = total + column[:, None] * row
        self.seen_logits.append(total)
        return total


def context(number: int) -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(100 + number))


def blank(size: int, steps: Steps, *, seed: int = 5, branches: int = 1, first_context: int = 0) -> Canvas:
    """A canvas with weights 1 + n, -1, -1, ... of n other branches."""
    weights = [(float(branches),) * len(steps)] + [(-1.0,) * len(steps)] * (branches - 1)
    contexts = tuple(context(first_context + branch) for branch in range(branches))
    return Canvas.blank(size, seed=seed, steps=steps, contexts=contexts, weights=tuple(weights))


def partly_known(size: int, unknown: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:unknown]] = True
    return torch.randint(CODES, (size,), generator=generator), mask


def visible(canvas: Canvas) -> Tensor:
    return canvas.tokens.masked_fill(canvas.unknown, MASK)


@pytest.mark.parametrize("total", [1, 2, 5, 12, 36])
@pytest.mark.parametrize("size", [16, 35, 256])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_every_step_is_that_of_diffusers(size: int, total: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """AmusedScheduler.step on the same logits, with its two sources of noise replaced by ours."""
    network, seed, unknown = TinyNetwork(), size * total, int(size * share)
    tokens, mask = partly_known(size, unknown, seed)
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(total, (2, 0))
    steps = amused(size, unknown, total, starting_ratio=share)
    condition = context(0)
    canvas = Canvas(tokens, mask, seed, steps, (condition,), ((1.0,) * total,))
    sample = tokens.masked_fill(mask, MASK)[None]
    for timestep in scheduler.timesteps:
        places = torch.full((size,), seed), torch.full((size,), canvas.step), torch.arange(size)
        noise, choice_noise = sampling.token_gumbel(CODES, *places), sampling.position_gumbel(*places)

        def drawn(probs: Tensor, count: int, generator: object = None, noise: Tensor = noise) -> Tensor:
            return (probs.log() + noise).argmax(-1, keepdim=True)

        def gumbel_noise(probs: Tensor, generator: object = None, noise: Tensor = choice_noise) -> Tensor:
            return noise[None]

        logits = network.logits(network.readout(network.features(sample, [condition])[0]))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", drawn)
            patch.setattr(scheduling_amused, "gumbel_noise", gumbel_noise)
            sample = scheduler.step(logits[None], timestep, sample, starting_mask_ratio=share).prev_sample
        advance(network, [canvas])
        assert torch.equal(visible(canvas), sample[0])
    assert canvas.finished
    assert not canvas.unknown.any()
    assert torch.equal(canvas.tokens[~mask], tokens[~mask])


class Recording:
    """Hands out the recorded logits: a feature is the place's index, a context the picture's."""

    mask_id = 50

    def __init__(self, logits: Tensor) -> None:
        self.recorded = logits
        self.step = 0

    def features(self, tokens: Tensor, contexts: Sequence[Any]) -> Tensor:
        size = tokens.shape[1]
        return torch.stack([torch.arange(size) + picture * size for picture in contexts])[..., None].float()

    def readout(self, features: Tensor) -> Tensor:
        return features

    def logits(self, hidden: Tensor) -> Tensor:
        return self.recorded[self.step].flatten(0, 1)[hidden[:, 0].long()]


@pytest.mark.parametrize("part", ["", "plain_"])
def test_recorded_styledrop_run_is_replayed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and Gumbel noise of StyleDrop-PyTorch's own run: the same tokens at every step."""
    with np.load(GOLDEN) as file:
        trace = {name: torch.from_numpy(file[name]) for name in file.files}
    noise, choice_noise = trace[part + "gumbel_token"], trace[part + "gumbel_confidence"]
    monkeypatch.setattr(sampling, "token_gumbel", lambda codes, seeds, steps, places: noise[steps, seeds, places])
    monkeypatch.setattr(sampling, "position_gumbel", lambda seeds, steps, places: choice_noise[steps, seeds, places])
    network, steps = Recording(trace[part + "logits"]), styledrop(16, 16, 6)
    canvases = [Canvas.blank(16, seed=i, steps=steps, contexts=(i,), weights=((1.0,) * 6,)) for i in range(3)]
    for network.step in range(6):
        seen = torch.stack([canvas.tokens.masked_fill(canvas.unknown, 50) for canvas in canvases])
        assert torch.equal(seen, trace[part + "ids"][network.step])
        advance(network, canvases)
    if part == "":
        assert torch.equal(torch.stack([canvas.tokens for canvas in canvases]), trace["final"].flatten(1))


def mixed_canvases() -> list[Canvas]:
    """Three schedules, two sizes, one to three branches, one partly known."""
    tokens, mask = partly_known(35, 20, 3)
    inpainted = Canvas(tokens, mask, 2**62 + 1, maskgit(35, 20, 3), (context(0),), ((1.0,) * 3,))
    return [
        blank(35, amused(35, 35, 5), seed=1, branches=2),
        blank(35, styledrop(35, 35, 7), seed=2, branches=3),
        inpainted,
        blank(16, amused(16, 16, 4), seed=1, first_context=3),
        blank(35, amused(35, 35, 5), seed=3, branches=2, first_context=1),
    ]


def test_a_picture_does_not_notice_its_neighbours() -> None:
    """Alone, together, in reverse, and joining a step late: bitwise the same tokens."""
    network = TinyNetwork()
    alone = [decode(network, [canvas])[0] for canvas in mixed_canvases()]
    together = decode(network, mixed_canvases())
    backwards = decode(network, mixed_canvases()[::-1])[::-1]
    late = mixed_canvases()
    for count in range(1, len(late)):
        advance(network, [canvas for canvas in late[:count] if not canvas.finished])
    for results in (together, backwards, decode(network, late)):
        for got, expected in zip(results, alone, strict=True):
            assert torch.equal(got, expected)


def test_different_seeds_give_different_pictures() -> None:
    pictures = decode(TinyNetwork(), [blank(35, amused(35, 35, 5), seed=seed) for seed in range(4)])
    assert len({tuple(picture.tolist()) for picture in pictures}) == 4


@pytest.mark.parametrize("schedule", [amused, styledrop, maskgit])
def test_exactly_the_scheduled_number_stays_masked(schedule: Any) -> None:
    canvas = blank(35, schedule(35, 35, 9))
    before = canvas.unknown
    for count in canvas.steps.masked_after:
        kept = visible(canvas)
        advance(TinyNetwork(), [canvas])
        assert int(canvas.unknown.sum()) == canvas.masked == count
        assert not (canvas.unknown & ~before).any()
        assert torch.equal(canvas.tokens[~before], kept[~before])
        before = canvas.unknown
    assert int(canvas.tokens.max()) < CODES


def test_equal_confidences_are_masked_from_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "confidence", lambda scores, *others: torch.zeros_like(scores))
    canvas = blank(16, amused(16, 16, 5))
    for count in canvas.steps.masked_after:
        advance(TinyNetwork(), [canvas])
        assert canvas.unknown.nonzero()[:, 0].tolist() == list(range(count))


def test_only_branches_with_weight_are_run() -> None:
    """StyleDrop's after_first ramp: one row at the first step, then three."""
    branches = StyleDrop(2.0, 5.0).branches("t", "n", {"ink": Style()}, 4, "after_first")
    contexts = tuple(context(i) for i in range(len(branches)))
    network, steps = TinyNetwork(), styledrop(16, 16, 4)
    weights = tuple(branch.weights for branch in branches)
    decode(network, [Canvas.blank(16, seed=1, steps=steps, contexts=contexts, weights=weights)])
    assert [rows for rows, _ in network.forwards] == [1, 3, 3, 3]


def test_first_forward_is_shared_and_only_masked_places_are_read() -> None:
    """Four pictures of one request, one of another and one partly known, all of 16 tokens."""
    steps = amused(16, 16, 3)
    shared, other = (context(0), context(1)), (context(2), context(1))
    tokens, mask = partly_known(16, 9, 1)

    def canvases() -> list[Canvas]:
        weights = ((3.0,) * 3, (-2.0,) * 3)
        same = [Canvas.blank(16, seed=i, steps=steps, contexts=shared, weights=weights) for i in range(4)]
        more = Canvas.blank(16, seed=9, steps=steps, contexts=(shared[0], other[0]), weights=weights)
        return [*same, more, Canvas(tokens, mask, 3, amused(16, 9, 3), shared, weights)]

    network = TinyNetwork()
    together = decode(network, canvases())
    assert [rows for rows, _ in network.forwards] == [3 + 2, 12, 12]
    counts = [(5 * masked + known) * 2 for masked, known in ((16, 9), (13, 8), (7, 7))]
    assert network.read_out == counts
    for canvas, picture in zip(canvases(), together, strict=True):
        assert torch.equal(decode(TinyNetwork(), [canvas])[0], picture)


def test_last_step_draws_no_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, confidence = [], sampling.confidence

    def counted(scores: Tensor, *others: Tensor) -> Tensor:
        calls.append(len(scores))
        return confidence(scores, *others)

    monkeypatch.setattr(sampling, "confidence", counted)
    decode(TinyNetwork(), [blank(16, amused(16, 16, 3))])
    assert calls == [16, 13]


def test_weighted_sum_before_the_head_is_the_guided_logits() -> None:
    """Weights that sum to 1 commute with an affine head, bias included."""
    network, canvas = TinyNetwork(), blank(35, amused(35, 35, 2), branches=3)
    advance(network, [canvas])
    got = network.seen_logits[0]
    tokens = torch.full((1, 35), MASK)
    branches = [network.logits(network.readout(network.features(tokens, [c])[0])) for c in canvas.contexts]
    assert torch.allclose(got, 3 * branches[0] - branches[1] - branches[2], atol=1e-5)


def test_timings_and_callback() -> None:
    timings: Timings = {}
    seen: list[int] = []
    canvases = [blank(16, amused(16, 16, 4)), blank(16, amused(16, 16, 2))]
    decode(TinyNetwork(), canvases, on_step=lambda running: seen.append(len(running)), timings=timings)
    assert seen == [2, 2, 1, 1]
    assert {part: len(seconds) for part, seconds in timings.items()} == dict.fromkeys(
        ("transformer", "head", "sampling", "remask", "step"), 4
    )
    for whole, *parts in zip(
        *(timings[part] for part in ("step", "transformer", "head", "sampling", "remask")), strict=True
    ):
        assert whole >= sum(parts) > 0


def test_image_seeds() -> None:
    seeds = image_seeds(7, 50)
    assert seeds[0] == 7
    assert len(set(seeds)) == 50
    assert all(0 <= seed < SEED_LIMIT for seed in seeds)
    assert image_seeds(7, 3) == seeds[:3]
    assert image_seeds(seeds[2], 1) == (seeds[2],)
    assert set(image_seeds(8, 50)).isdisjoint(seeds)
    assert image_seeds(SEED_LIMIT - 1, 2)[0] == SEED_LIMIT - 1
    assert 0 <= fresh_seed() < 2**53
    assert fresh_seed() != fresh_seed()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(StylemuseError, match=rf"^seed {seed} is not allowed: 0 to 2\^63 - 1$"):
        image_seeds(seed, 1)
    with pytest.raises(StylemuseError, match=r"^0 pictures are not allowed: at least 1$"):
        image_seeds(1, 0)
