"""Device functions the kernels share.

Dependent launches: a step is hundreds of short kernels, each of which must see what the one before wrote. On NVIDIA's
chips from Hopper on, a kernel may be put on the chip while the one before still runs, and wait there (CUDA programming
guide, programmatic dependent launch). `follow` is the first thing in every kernel that is launched so
(`tuning.dependent`); before it nothing may be read but weights, and nothing written.
"""

from __future__ import annotations

from .dispatch import INTERPRETED, constant, jit, tl

# numpy has no bf16: the interpreter keeps such numbers as 16-bit integers and would multiply those.
_WIDEN = constant(INTERPRETED)
_ROOT_HALF = constant(0.7071067811865476)


@jit
def multiply(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """accumulator + a b: in int32 of int8 numbers, else in fp32.

    PRECISION says how fp32 operands are multiplied (`tuning.precision`). Hopper's matrix units add fp8 products with
    about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), so there each tile's sum is added outside of them.
    """
    if _WIDEN and accumulator.dtype == tl.float32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    INEXACT: tl.constexpr = a.shape[1] if a.dtype.is_fp8() else 0
    OUT: tl.constexpr = accumulator.dtype
    return tl.dot(a, b, accumulator, PRECISION, max_num_imprecise_acc=INEXACT, out_dtype=OUT)


@jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x Phi(x), the exact form, of fp32 numbers."""
    return 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))


@jit
def follow(DEPENDENT: tl.constexpr) -> None:
    """Lets the next kernel come, and waits until all before have ended and what they wrote is there."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(at: tl.tensor) -> None:
    """Asks for the lines of 128 bytes at these pointers to be brought into the L2 cache; NVIDIA only."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )
