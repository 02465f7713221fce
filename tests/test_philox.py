"""Philox against Random123's published vectors and a plain-integer twin; the uniforms and Gumbel numbers made of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stylemuse.kernels.philox import gumbel, philox4x32_words, split_seed, uniform

# Random123 kat_vectors, philox 4x32, 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Four words (..., 4) for counters (..., 4) and keys (..., 2)."""
    return torch.stack(philox4x32_words(*counter.unbind(-1), *key.unbind(-1)), -1)


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_integers(counter: list[int], key: list[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    words = philox4x32(torch.tensor(words_of(counter)), torch.tensor(words_of(key)))
    assert words.tolist() == words_of(output)


def test_known_answers_in_one_call() -> None:
    counters, keys, outputs = (torch.tensor([words_of(row[i]) for row in KNOWN_ANSWERS]) for i in range(3))
    assert torch.equal(philox4x32(counters, keys), outputs)


word = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(counter=st.lists(word, min_size=4, max_size=4), key=st.lists(word, min_size=2, max_size=2))
def test_against_plain_integers(counter: list[int], key: list[int]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == philox_by_integers(counter, key)


def test_broadcast_words_equal_stacked_counters() -> None:
    """Odd sizes; steps and positions vary by row, blocks by column, keys by row."""
    rows, blocks = 5, 7
    step, position = torch.arange(rows)[:, None] + 3, torch.arange(rows)[:, None] * 11
    block = torch.arange(blocks)[None]
    k0, k1 = split_seed(torch.arange(rows)[:, None] * 0x123456789AB + 1)
    stream = torch.zeros(1, 1, dtype=torch.int64)
    words = torch.stack(torch.broadcast_tensors(*philox4x32_words(stream, step, position, block, k0, k1)), -1)
    counter = torch.stack(torch.broadcast_tensors(stream, step, position, block), -1)
    key = torch.stack([k0, k1], -1)
    assert words.shape == (rows, blocks, 4)
    assert torch.equal(words, philox4x32(counter, key))
    assert words.flatten().unique().numel() == words.numel()


def test_inputs_are_left_untouched() -> None:
    counter, key = torch.arange(4), torch.tensor([5, 6])
    philox4x32(counter, key)
    assert counter.tolist() == [0, 1, 2, 3]
    assert key.tolist() == [5, 6]


def test_seed_words() -> None:
    low, high = split_seed(torch.tensor([0, 1, 0x7FFFFFFF_FFFFFFFF, 0x01234567_89ABCDEF]))
    assert low.tolist() == [0, 1, 0xFFFFFFFF, 0x89ABCDEF]
    assert high.tolist() == [0, 0, 0x7FFFFFFF, 0x01234567]


def test_uniforms_are_exact() -> None:
    """Below 1/2 the half is exact; above, fp32 rounds it to even; 1 itself is never reached."""
    tops = torch.tensor([0, 1, 2, 2**23 - 1, 2**23, 2**23 + 1, 2**24 - 2, 2**24 - 1])
    expected = [0.5, 1.5, 2.5, 2**23 - 0.5, 2**23, 2**23 + 2, 2**24 - 2, 2**24 - 1]
    for low_bits in (0, 0x5A, 0xFF):
        u = uniform((tops << 8) | low_bits)
        assert u.dtype == torch.float32
        assert (u.double() * 2**24).tolist() == expected


def test_uniform_moments() -> None:
    counter = torch.stack(torch.broadcast_tensors(*[torch.tensor(c) for c in (0, 1, 2)], torch.arange(1 << 16)), -1)
    u = uniform(philox4x32(counter, torch.tensor([7, 9]))).double().flatten()
    deviation = math.sqrt(1 / 12 / u.numel())
    assert abs(float(u.mean()) - 0.5) < 4 * deviation
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / u.numel())
    g = gumbel(u.float()).double()
    assert abs(float(g.mean()) - 0.5772156649) < 4 * math.pi / math.sqrt(6 * u.numel())
    assert abs(float(g.var()) - math.pi**2 / 6) < 0.02


def test_gumbel_is_finite_at_both_ends() -> None:
    u = uniform(torch.tensor([0, 2**32 - 1]))
    low, high = gumbel(u).tolist()
    assert low == pytest.approx(-math.log(25 * math.log(2)), rel=1e-5)
    assert high == pytest.approx(24 * math.log(2), rel=1e-5)
