"""Numbers per step: against diffusers' AmusedScheduler, the recorded StyleDrop-PyTorch run, and MaskGIT's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from hypothesis import given
from hypothesis import strategies as st

from stylemuse.core import StylemuseError
from stylemuse.decoding.schedule import SCHEDULES, Curve, Steps, amused, maskgit, styledrop

MASK = 9
GOLDEN = Path(__file__).parent / "golden/styledrop_pytorch/decode_trace.npz"


def masked_by_diffusers(tokens: int, unknown: int, steps: int, *, ratio: float, first: int, curve: Curve) -> list[int]:
    """Run the peer's scheduler on random logits and count what it leaves masked."""
    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=curve)
    scheduler.set_timesteps(steps, (2, 0))
    generator = torch.Generator().manual_seed(tokens * steps)
    sample = torch.zeros(1, tokens, dtype=torch.int64)
    sample[0, torch.randperm(tokens, generator=generator)[:unknown]] = MASK
    counts = []
    for timestep in scheduler.timesteps[first:]:
        logits = torch.randn(1, tokens, 5, generator=generator)
        sample = scheduler.step(logits, timestep, sample, starting_mask_ratio=ratio, generator=generator).prev_sample
        counts.append(int((sample == MASK).sum()))
    return counts


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 12, 36])
@pytest.mark.parametrize("tokens", [16, 35, 256])
@pytest.mark.parametrize("curve", ["cosine", "linear"])
def test_amused_counts_are_those_of_diffusers(tokens: int, steps: int, curve: Curve) -> None:
    cases = [(tokens, 1.0, 0), (tokens // 3, 1.0, steps // 2), (tokens // 2, 0.5, 0), (2, 1.0, 0)]
    for unknown, ratio, first in cases:
        ours = amused(tokens, unknown, steps, starting_ratio=ratio, first=first, curve=curve)
        peer = masked_by_diffusers(tokens, unknown, steps, ratio=ratio, first=first, curve=curve)
        assert list(ours.masked_after) == peer
        assert len(ours) == steps - first


def test_amused_counts_for_many_steps_and_sizes() -> None:
    """The scheduler's own fp32 expression, without its noise: every T to 64."""
    for tokens in (16, 35, 100, 256, 1024):
        for steps in range(1, 65):
            masked, expected = tokens, []
            for step in range(steps - 1):
                share = torch.cos((torch.tensor([[step]]) + 1) / steps * math.pi / 2)
                masked = max(1, min(masked - 1, int((tokens * share).floor())))
                expected.append(masked)
            assert amused(tokens, tokens, steps).masked_after == (*expected, 0)


def test_amused_reveals_for_256_tokens_in_12_steps() -> None:
    masked = (256, *amused(256, 256, 12).masked_after)
    assert [before - after for before, after in pairwise(masked)] == [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33]


@pytest.mark.parametrize("temperature", [(2.0, 0.0), (3.5, 0.25), 1.5])
def test_amused_temperatures_are_those_of_diffusers(temperature: float | tuple[float, float]) -> None:
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(7, temperature)
    steps = amused(35, 35, 7, temperature=temperature, first=2)
    assert steps.choice_temperature == tuple(scheduler.temperatures.tolist()[2:])
    assert steps.token_temperature == (1.0,) * 5
    assert steps.score == "log_probability"


def test_amused_temperatures_are_torch_s_to_the_bit() -> None:
    for steps in range(1, 1001):
        for pair in ((2.0, 0.0), (4.5, 0.01), (0.3, 1.7)):
            expected = tuple(torch.linspace(*pair, steps).tolist())
            assert amused(2048, 2048, steps, temperature=pair).choice_temperature == expected


@pytest.mark.parametrize("part", ["ids", "plain_ids"])
def test_styledrop_counts_are_the_recorded_ones(part: str) -> None:
    with np.load(GOLDEN) as trace:
        masked = (trace[part] == 50).sum(-1)
    counts = styledrop(16, 16, 6).masked_after
    for image in range(masked.shape[1]):
        assert masked[0, image] == 16
        assert counts[:-1] == tuple(masked[1:, image])


def test_styledrop_follows_its_float64_formula() -> None:
    for tokens in (16, 35, 256):
        for total in range(1, 65):
            steps = styledrop(tokens, tokens, total)
            masked = tokens
            for step in range(total - 1):
                aim = np.floor(tokens * np.cos(1.0 * (step + 1) / total * math.pi * 0.5))
                masked = int(max(1, min(masked - 1, aim)))
                assert steps.masked_after[step] == masked
    assert steps.token_temperature == steps.choice_temperature
    assert steps.token_temperature[-1] == 0.0
    assert steps.token_temperature[15] == pytest.approx(4.5 * 0.75)
    assert steps.score == "logit"


def test_maskgit_counts_from_the_initially_unknown() -> None:
    """floor(n0 cos(pi/2 (k+1)/T)), at least 1, fewer than before: by hand for n0 = 100, T = 8."""
    steps = maskgit(256, 100, 8)
    assert steps.masked_after == (98, 92, 83, 70, 55, 38, 19, 0)
    assert steps.choice_temperature == pytest.approx([4.5 * (1 - (k + 1) / 8) for k in range(8)])
    assert steps.token_temperature == (1.0,) * 8
    assert maskgit(256, 3, 8).masked_after == (2, 1, 1, 1, 1, 1, 1, 0)


@given(data=st.data(), name=st.sampled_from(sorted(SCHEDULES)))
def test_every_schedule_shrinks_to_nothing(data: st.DataObject, name: str) -> None:
    tokens = data.draw(st.integers(1, 1100))
    unknown = data.draw(st.integers(1, tokens))
    total = data.draw(st.integers(1, 50))
    first = data.draw(st.integers(0, total - 1))
    counts = (unknown, *SCHEDULES[name](tokens, unknown, total, first=first).masked_after)
    assert len(counts) == total - first + 1
    assert counts[-1] == 0
    assert all(after < before or before == after == 1 for before, after in pairwise(counts))


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_errors_say_what_is_allowed(schedule: Callable[..., Steps]) -> None:
    with pytest.raises(StylemuseError, match=r"^0 decoding steps are not allowed: at least 1$"):
        schedule(16, 16, 0)
    with pytest.raises(StylemuseError, match=r"^0 masked positions of 16 are not allowed: 1 to 16$"):
        schedule(16, 0, 4)
    with pytest.raises(StylemuseError, match=r"^17 masked positions of 16"):
        schedule(16, 17, 4)
    with pytest.raises(StylemuseError, match=r"first 4 of 4 steps is not allowed: 0 to 3$"):
        schedule(16, 16, 4, first=4)
    with pytest.raises(StylemuseError, match=r"^temperature nan is not allowed"):
        schedule(16, 16, 4, temperature=math.nan)


def test_errors_of_single_options() -> None:
    with pytest.raises(StylemuseError, match=r"^starting ratio 0 is not allowed: above 0, at most 1$"):
        amused(16, 16, 4, starting_ratio=0)
    with pytest.raises(StylemuseError, match=r"^masking curve 'square' is unknown: 'cosine' or 'linear'$"):
        amused(16, 16, 4, curve="square")  # type: ignore[arg-type]
