"""Imported before stylemuse: without a GPU, Triton kernels run interpreted, and are made for that when imported."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
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


def spare_work() -> None:
    """Leave out what Triton's interpreter does in vain.

    It computes whether whole numbers overflow, and throws the answer away where ``debug`` is not set. It patches the
    language at every call of a function from a kernel, where the kernel's launch has patched it already. Together they
    are more than half of the time.
    """
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        seen = [each for each in self.fn.__globals__.values() if each is language or each is language.core]
        if any(language.core.is_builtin(each.load) for each in seen):
            patch(self.fn)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    exact_dots()
    spare_work()
