"""Imported before stylemuse: without a GPU, Triton kernels run interpreted, and are made for that when imported."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the tests of kernels run."""


def exact_dots() -> None:
    """Let an interpreted dot be the rounded sum of exact products.

    Triton's own is numpy's matmul in the accumulator's type, whose order of sums depends on the tile's shape and on the
    CPU's instructions: two kernels that are equal bit by bit on a GPU differ there. Products of fp32 are exact in
    fp64, and their sum is so near that the order of it does not show in fp32. Integers are exact below 2 ** 53, and
    multiplied by BLAS rather than one by one.
    """
    from triton.language import float16
    from triton.runtime import interpreter

    def create_dot(_: object, a: Any, b: Any, accumulator: Any, *__: object) -> Any:
        factors = []
        for given in (a, b):
            data = given.data
            if given.dtype.is_floating() and given.dtype.primitive_bitwidth == 8:
                data = interpreter._convert_float(data, given.dtype, float16, None).view(np.float16)
            factors.append(data.astype(np.float64))
        product = np.matmul(*factors).astype(accumulator.data.dtype)
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    exact_dots()
