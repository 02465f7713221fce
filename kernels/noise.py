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
_LN_2_OF_BITS = constant(0.6931471805599453 * 2.0**-23)
"""From the exponent where it lies in a number's bits."""
_TOKEN_STREAM, _CONFIDENCE_STREAM = constant(TOKEN_STREAM), constant(CONFIDENCE_STREAM)


@jit
def _log(x: tl.tensor) -> tl.tensor:
    """Of positive normal fp32 numbers, within 1.2e-7 of it: noise is most of a draw, and a library's takes half more.

    x = 2^e (1 + f) with f in [-1/3, 1/3), near 1 without rounding; log(1 + f) = f - f^2 / 2 + f^3 q(f), with q of
    degree 6 by least squares.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, 0.1366174966096878, -0.14899945259094238)
    q = tl.fma(q, f, 0.14073917269706726)
    q = tl.fma(q, f, -0.1650906205177307)
    q = tl.fma(q, f, 0.20006105303764343)
    q = tl.fma(q, f, -0.2500282824039459)
    q = tl.fma(q, f, 0.33333292603492737)
    q = tl.fma(tl.fma(q, f, -0.5), f * f, f)
    return tl.fma(exponent.to(tl.float32), _LN_2_OF_BITS, q)


@jit
def gumbel(words: tl.tensor) -> tl.tensor:
    """Standard Gumbel numbers, fp32, of random uint32 words."""
    u = ((words >> 8).to(tl.float32) + 0.5) * (2.0**-24)
    return -_log(-_log(tl.minimum(u, _LARGEST)))


@jit
def token_words(seed: tl.tensor, step: tl.tensor, position: tl.tensor, block: tl.tensor) -> tl.tuple:
    """Four words for the codes 4 block, ..., 4 block + 3 of a token draw; seed int64, the others int32."""
    return tl.philox(seed, _TOKEN_STREAM, step, position, block)


@jit
def position_gumbel(seed: tl.tensor, step: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The Gumbel number of a confidence draw."""
    return gumbel(tl.philox(seed, _CONFIDENCE_STREAM, step, position, 0)[0])
