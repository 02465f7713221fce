"""One comparison for all kernels: largest and root-mean-square error against fp64, with a tolerance per number format.

u is the largest relative error of one rounding: 2^-24 (fp32), 2^-11 (fp16), 2^-8 (bf16). Triton's interpreter cuts bf16
numbers off, it doesn't round them: there u is 2^-7. A kernel rounds to its number format r times on the way to a result
and adds D products in fp32, whose errors walk at random in steps of 2^-24, at most 4 sqrt(D) of them in practice:

    tolerance = r u + 4 sqrt(D) 2^-24

relative to the largest exact value for the largest error, and to the root mean square of the exact values for the
root-mean-square error. The one sees an error that sits in a few places, the other a small one everywhere.
"""

from __future__ import annotations

import torch
from interpreter import DEVICE
from torch import Tensor

from stylemuse.kernels.dispatch import Kernels, triton_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TRITON: Kernels = triton_kernels(DEVICE)

_ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if DEVICE.type == "cpu" else 2.0**-8,
}


def assert_close(found: Tensor, exact: Tensor, *, depth: int, roundings: int = 1) -> None:
    """``exact`` is fp64, from the same inputs; depth D and roundings r as above."""
    assert found.shape == exact.shape
    assert exact.dtype == torch.float64
    assert bool(exact.isfinite().all()), "the test's own values"
    assert bool(found.isfinite().all()), "something that was not written, or padding that was read"
    tolerance = roundings * _ROUNDING[found.dtype] + 4 * depth**0.5 * 2.0**-24
    error = found.double() - exact
    largest = float(error.abs().max() / exact.abs().max())
    spread = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    assert largest <= tolerance, f"largest error {largest:.2e}, allowed {tolerance:.2e}"
    assert spread <= tolerance, f"root-mean-square error {spread:.2e}, allowed {tolerance:.2e}"
