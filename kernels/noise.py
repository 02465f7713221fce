"""The noise of `sampling` inside Triton kernels: the same Philox words, uniforms and Gumbel numbers.

`tl.philox` is Philox4x32-10 with the key (low word, high word) of a 64-bit seed, bit for bit as in `philox`. A word of
the counter stays as small as what it depends on until the rounds have mixed it: counters that differ in the position
along one axis and in the code along the other share the first round.
"""

from __future__ import annotations

from .dispatch import constant, jit, tl
from .philox import LARGEST_UNIFORM
from .sampling import CONFIDENCE_STREAM, TOKEN_STREAM

_LARGEST = constant(LARGEST_UNIFORM)
_TOKEN_STREAM, _CONFIDENCE_STREAM = constant(TOKEN_STREAM), constant(CONFIDENCE_STREAM)


@jit
def gumbel(words: tl.tensor) -> tl.tensor:
    """Standard Gumbel numbers, fp32, of random uint32 words."""
    u = ((words >> 8).to(tl.float32) + 0.5) * (2.0**-24)
    return -tl.log(-tl.log(tl.minimum(u, _LARGEST)))


@jit
def token_words(seed: tl.tensor, step: tl.tensor, position: tl.tensor, block: tl.tensor) -> tl.tuple:
    """Four words for the codes 4 block, ..., 4 block + 3 of a token draw; seed int64, the others int32."""
    return tl.philox(seed, _TOKEN_STREAM, step, position, block)


@jit
def position_gumbel(seed: tl.tensor, step: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The Gumbel number of a confidence draw."""
    return gumbel(tl.philox(seed, _CONFIDENCE_STREAM, step, position, 0)[0])
