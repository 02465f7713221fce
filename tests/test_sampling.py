"""Draw, score, confidence and re-masking: the noise law, the distribution, row isolation, exact counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from test_philox import philox4x32
from torch import Tensor

from stylemuse.kernels import sampling
from stylemuse.kernels.philox import gumbel, uniform

SEED = 0x0123_4567_89AB_CDEF


def rows(count: int, *, seed: int = SEED, step: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, steps and positions of ``count`` places of one picture."""
    return torch.full((count,), seed), torch.full((count,), step), torch.arange(count)


def mixed_rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of several pictures at several steps."""
    index = torch.arange(count)
    return (index % 5) * 0x1234_5678_9ABC + 7, index % 3, (index * 37) % 256


@pytest.mark.parametrize("codes", [1, 3, 4, 50, 1027])
def test_noise_follows_the_counter_law(codes: int) -> None:
    """Counter (stream, step, position, code // 4), word code % 4, key (low, high) of the seed."""
    seeds, steps, positions = mixed_rows(7)
    noise = sampling.token_gumbel(codes, seeds, steps, positions)
    assert noise.shape == (7, codes)
    for row in range(7):
        key = torch.tensor([int(seeds[row]) % 2**32, int(seeds[row]) // 2**32])
        place = [int(steps[row]), int(positions[row])]
        counters = torch.tensor([[0, *place, code // 4] for code in range(codes)])
        words = philox4x32(counters, key)[torch.arange(codes), torch.arange(codes) % 4]
        assert torch.equal(noise[row], gumbel(uniform(words)))
        word = philox4x32(torch.tensor([1, *place, 0]), key)[:1]
        assert torch.equal(sampling.position_gumbel(seeds, steps, positions)[row, None], gumbel(uniform(word)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_drawn_tokens_follow_softmax(temperature: float) -> None:
    codes, draws = 13, 40_000
    logits = torch.randn(codes, generator=torch.Generator().manual_seed(1)) * 1.5
    tau = torch.full((draws,), temperature)
    tokens, _ = sampling.draw(logits.expand(draws, -1), *rows(draws), tau, torch.zeros(draws, dtype=torch.bool))
    expected = (logits.double() / temperature).softmax(-1) * draws
    assert expected.min() > 5
    assert chisquare(tokens.bincount(minlength=codes), expected).pvalue > 1e-4


def test_noise_is_gumbel_and_streams_are_independent() -> None:
    places = rows(20_000)
    token, place = sampling.token_gumbel(1, *places)[:, 0].double(), sampling.position_gumbel(*places).double()
    assert kstest(token.numpy(), "gumbel_r").pvalue > 1e-4
    assert kstest(place.numpy(), "gumbel_r").pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack([token, place]))[0, 1])) < 4 / 20_000**0.5


def test_zero_temperature_is_greedy() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(2))
    logits[0, [7, 30]] = 9.0
    tokens, _ = sampling.draw(logits, *rows(9), torch.zeros(9), torch.ones(9, dtype=torch.bool))
    assert torch.equal(tokens, logits.argmax(-1))
    assert tokens[0] == 7


def test_excluded_codes_are_never_drawn() -> None:
    logits = torch.zeros(300, 11)
    logits[:, 4:] = -torch.inf
    tokens, scores = sampling.draw(logits, *rows(300), torch.ones(300), torch.zeros(300, dtype=torch.bool))
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    assert torch.allclose(scores, torch.tensor(0.25).log())


def test_score_is_log_probability_or_logit_by_row() -> None:
    logits = torch.randn(35, 101, generator=torch.Generator().manual_seed(3)) * 4
    raw = torch.arange(35) % 2 == 0
    tokens, scores = sampling.draw(logits, *rows(35), torch.full((35,), 1.7), raw)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    log_probability = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(scores[raw], chosen[raw])
    assert torch.allclose(scores[~raw].double(), log_probability[~raw], atol=2e-6, rtol=0)


@pytest.mark.parametrize("codes", [1, 37, 50, 1024, 8192])
def test_a_row_does_not_notice_its_neighbours(codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: alone, in a batch, in another order, and cut into other chunks."""
    count = 11
    generator = torch.Generator().manual_seed(codes)
    logits = torch.randn(count, codes, generator=generator)
    places = mixed_rows(count)
    tau, choice = torch.rand(count, generator=generator) * 2, torch.rand(count, generator=generator)
    raw = torch.arange(count) % 3 == 0

    def run(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = [value[index] for value in places]
        tokens, scores = sampling.draw(logits[index], *part, tau[index], raw[index])
        return tokens, scores, sampling.confidence(scores, *part, choice[index])

    together = run(torch.arange(count))
    order = torch.randperm(count, generator=generator)
    monkeypatch.setattr(sampling, "CHUNK", 3 * codes)
    shuffled = run(order)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], part)
    for row in range(count):
        for whole, alone in zip(together, run(torch.tensor([row])), strict=True):
            assert torch.equal(whole[row, None], alone)


def test_nothing_to_draw() -> None:
    tokens, scores = sampling.draw(torch.empty(0, 50), *rows(0), torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert tokens.shape == scores.shape == (0,)
    assert tokens.dtype == torch.int64


def test_confidence_adds_scaled_noise() -> None:
    places = rows(35)
    scores = torch.linspace(-3, 0, 35)
    scores[4] = torch.inf
    choice = torch.linspace(0, 2, 35)
    got = sampling.confidence(scores, *places, choice)
    assert torch.equal(got, scores + choice * sampling.position_gumbel(*places))
    assert got[4] == torch.inf
    assert got[0] == scores[0]


def test_remask_takes_ties_from_the_left() -> None:
    confidences = torch.tensor([1.0, 0.0, torch.inf, 0.0, -1.0, 0.0, 1.0])
    expected = {0: [], 1: [4], 2: [1, 4], 3: [1, 3, 4], 4: [1, 3, 4, 5], 5: [0, 1, 3, 4, 5], 6: [0, 1, 3, 4, 5, 6]}
    for count, places in expected.items():
        assert sampling.remask(confidences, torch.tensor(count)).nonzero()[:, 0].tolist() == places


@given(data=st.data())
def test_remask_counts_exactly(data: st.DataObject) -> None:
    """A batch of grids, each with its own count, many ties: as sorting (confidence, index) by hand."""
    grids, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    level = st.sampled_from([-2.0, -1.0, -0.5, 0.0, float("inf")])
    confidences = torch.tensor([[data.draw(level) for _ in range(size)] for _ in range(grids)])
    counts = [data.draw(st.integers(0, int(row.isfinite().sum()))) for row in confidences]
    mask = sampling.remask(confidences, torch.tensor(counts))
    for row, count, got in zip(confidences.tolist(), counts, mask, strict=True):
        by_hand = sorted(range(size), key=lambda place: (row[place], place))[:count]
        assert got.nonzero()[:, 0].tolist() == sorted(by_hand)
    assert not (mask & confidences.isinf()).any()
