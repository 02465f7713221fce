"""Noise inside Triton kernels: the words, and the numbers made of them, are those of plain torch."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE
from test_philox import KNOWN_ANSWERS, words_of
from torch import Tensor

from stylemuse.kernels import sampling
from stylemuse.kernels.dispatch import jit, tl
from stylemuse.kernels.noise import gumbel, position_gumbel, token_words
from stylemuse.kernels.philox import gumbel as torch_gumbel
from stylemuse.kernels.philox import philox4x32_words, split_seed
from stylemuse.kernels.philox import uniform as torch_uniform


@jit
def _philox_kernel(counter, seed, out) -> None:
    words = tl.philox(tl.load(seed), tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3))
    for word in tl.static_range(4):
        tl.store(out + word, words[word].to(tl.int32, bitcast=True))


@jit
def _token_kernel(seed, step, places, out_words, out_noise, BLOCKS: tl.constexpr) -> None:
    place, block = tl.load(places + tl.arange(0, 4)), tl.arange(0, BLOCKS)
    words = token_words(tl.load(seed), tl.load(step), place[:, None], block[None, :])
    at = tl.arange(0, 4)[:, None] * 4 * BLOCKS + 4 * block[None, :]
    for word in tl.static_range(4):
        tl.store(out_words + at + word, words[word].to(tl.int32, bitcast=True))
        tl.store(out_noise + at + word, gumbel(words[word]))


@jit
def _position_kernel(seed, step, places, out) -> None:
    lane = tl.arange(0, 4)
    tl.store(out + lane, position_gumbel(tl.load(seed), tl.load(step), tl.load(places + lane)))


@jit
def _gumbel_kernel(words, out) -> None:
    lane = tl.arange(0, 8)
    tl.store(out + lane, gumbel(tl.load(words + lane).to(tl.uint32, bitcast=True)))


def as_int32(words: Tensor | list[int]) -> Tensor:
    """Words in [0, 2^32) to the signed numbers of the same bits."""
    words = torch.as_tensor(words)
    return torch.where(words >= 2**31, words - 2**32, words).int().to(DEVICE)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    low, high = words_of(key)
    seed = low | ((high - 2**32 if high >= 2**31 else high) << 32)
    words = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    _philox_kernel[(1,)](as_int32(words_of(counter)), torch.tensor([seed], device=DEVICE), words)
    assert torch.equal(words, as_int32(words_of(output)))


@pytest.mark.parametrize("seed", [0, 7, 0x7FFF_FFFF_FFFF_FFFF, 0x0123_4567_89AB_CDEF])
def test_noise_is_that_of_plain_torch(seed: int) -> None:
    """Words bit for bit; Gumbel numbers to the rounding of two logarithms, 2 ulp each and steeper near u = 1."""
    blocks, places, step = 8, torch.tensor([0, 3, 77, 4095]), 11
    words = torch.zeros(4, 4 * blocks, dtype=torch.int32, device=DEVICE)
    noise = torch.full((4, 4 * blocks), torch.nan, device=DEVICE)
    confidence = torch.full((4,), torch.nan, device=DEVICE)
    given = torch.tensor([seed], device=DEVICE), as_int32([step]), as_int32(places)
    _token_kernel[(1,)](*given, words, noise, BLOCKS=blocks)
    _position_kernel[(1,)](*given, confidence)

    seeds, steps = torch.full((4,), seed), torch.full((4,), step)
    low, high = split_seed(torch.tensor(seed))
    zero = torch.tensor(sampling.TOKEN_STREAM)
    expected = philox4x32_words(zero, torch.tensor(step), places[:, None], torch.arange(blocks)[None], low, high)
    assert torch.equal(words, as_int32(torch.stack(expected, -1).flatten(1)))
    torch.testing.assert_close(
        noise.cpu(), sampling.token_gumbel(4 * blocks, seeds, steps, places), rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(confidence.cpu(), sampling.position_gumbel(seeds, steps, places), rtol=2e-6, atol=2e-6)


def test_gumbel_at_both_ends() -> None:
    """The topmost uniform would round to 1, whose Gumbel number is infinite."""
    words = torch.tensor([0, 255, 256, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 256, 2**32 - 1])
    out = torch.full((8,), torch.nan, device=DEVICE)
    _gumbel_kernel[(1,)](as_int32(words), out)
    assert out.isfinite().all()
    torch.testing.assert_close(out.cpu(), torch_gumbel(torch_uniform(words)), rtol=2e-6, atol=2e-6)
