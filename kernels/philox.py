"""Philox4x32-10: counter-based random numbers, the same words in torch, Triton and ONNX.

A counter and a key go in, four random 32-bit words come out; nothing is carried from one call to the next. So the noise
at (stream, step, position, code) of a picture depends on the picture's seed alone, never on batch, order or threads.

One round maps the counter (c0, c1, c2, c3) under the key (k0, k1), all unsigned 32 bit, to

    c0' = high(M1 * c2) ^ c1 ^ k0        c1' = low(M1 * c2)
    c2' = high(M0 * c0) ^ c3 ^ k1        c3' = low(M0 * c0)

and the key grows by (W0, W1) after each of the ten rounds. Words live in int64 tensors as values in [0, 2^32), because
torch lacks unsigned arithmetic; the low 64 bits of a product are the same signed or unsigned.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its library Random123,
whose published known-answer vectors are in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 10
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF

LARGEST_UNIFORM = 1.0 - 2.0**-24


def philox4x32_words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four random words for the counter (c0, c1, c2, c3) and the key (k0, k1), int64 in [0, 2^32).

    Words broadcast against each other; the four come out full.

    Counters that differ only in one word along an axis (the codes of one position) share the work of the first rounds:
    a word stays as small as what it depends on until the rounds have mixed it. Written with operators alone, so that
    numpy arrays and the values of an ONNX graph go through it too.
    """
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1
        # The low halves p0, p1 stay unmasked: they are only read by xors whose result is masked.
        c0, c1 = (p1 >> 32) ^ (c1 ^ k0), p1
        c2, c3 = (p0 >> 32) ^ (c3 ^ k1), p0
        c0 &= WORD
        c2 &= WORD
        k0, k1 = (k0 + W0) & WORD, (k1 + W1) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def split_seed(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The key (low word, high word) of 64-bit seeds; any shape, int64, values in [0, 2^63)."""
    return seed & WORD, seed >> 32


def uniform(words: Tensor) -> Tensor:
    """Random words, int64 in [0, 2^32), to fp32 numbers strictly between 0 and 1; same shape.

    u = min(((x >> 8) + 1/2) * 2^-24, 1 - 2^-24) in fp32. Above 1/2 the half is a 25th bit and fp32 rounds it to even;
    the topmost of the 2^24 values would become 1, whose Gumbel number is infinite and decides a draw alone (about once
    a picture at 256 positions x 8192 codes x 12 steps). Hence the minimum.
    """
    return (words >> 8).float().add_(0.5).mul_(2.0**-24).clamp_(max=LARGEST_UNIFORM)


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel numbers -log(-log u) of fp32 uniforms, within [-2.86, 16.64]; same shape."""
    return u.log().neg_().log_().neg_()
