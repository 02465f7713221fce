"""Seeds: one 64-bit number per picture, from which all of its randomness follows.

A picture's noise is Philox keyed by its seed (``kernels.philox``, ``kernels.sampling``). Picture i of a request has a
seed of its own, reported back, so that a request for one picture with that seed gives the same picture again.
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from stylemuse.core import StylemuseError
from stylemuse.kernels.philox import WORD, philox4x32_words

IMAGE_STREAM = 2
SEED_LIMIT = 2**63


def image_seeds(seed: int, n: int) -> tuple[int, ...]:
    """Seeds of the n pictures of a request with this seed; the first is the seed itself.

    The others are words 0 (low) and 1 (high) of Philox with key ``seed`` and counter (IMAGE_STREAM, 0, 0, i), less the
    topmost bit: every seed is in [0, 2^63), and doesn't depend on n.

    Raises:
        StylemuseError: the seed is not in [0, 2^63), or n is less than 1.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise StylemuseError(f"seed {seed} is not allowed: 0 to 2^63 - 1")
    if n < 1:
        raise StylemuseError(f"{n} pictures are not allowed: at least 1")
    pictures, zeros = np.arange(n), np.zeros(n, np.int64)
    low, high = philox4x32_words(zeros + IMAGE_STREAM, zeros, zeros, pictures, *key_of(seed))[:2]
    derived = low | ((high & 0x7FFFFFFF) << 32)
    return (seed, *derived[1:].tolist())


def key_of(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The key (low word, high word) of a seed, (1,) int64 each."""
    return np.array([seed & WORD]), np.array([seed >> 32])


def fresh_seed() -> int:
    """A seed from the operating system, for a request that names none; below 2^53, which every JSON reader keeps."""
    return secrets.randbits(53)
