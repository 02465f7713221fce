"""Launches compiled by parallel processes, so that Triton's cache has them when they are launched.

The key of that cache is made by Triton's own launcher from the arguments it is given, so each process gives it
arguments of the same kinds: tensors of the same number formats and alignment, with nothing in them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from stylemuse.kernels.tuning import Call, Described, Launch


@dataclass(frozen=True)
class Order:
    """A launch without its tensors: their number formats, and which are described by what tile."""

    module: str
    kernel: str
    arguments: dict[str, Any]
    constants: dict[str, Any]
    launch: Launch


@dataclass(frozen=True)
class _Like:
    """A tensor of a number format; described where it has a tile."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    tile: tuple[str, str] | None = None


def order(call: Call, launch: Launch) -> Order:
    """What a process needs to know."""
    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if isinstance(value, Described):
            arguments[name] = _Like(value.tensor.dtype, tuple(value.tensor.shape), value.tile)
        else:
            arguments[name] = _Like(value.dtype) if isinstance(value, Tensor) else value
    kernel = call.kernel.fn
    return Order(kernel.__module__, kernel.__name__, arguments, dict(call.constants), launch)


def distinct(calls: Sequence[Call]) -> list[int]:
    """One call of each kind among them: they differ in what is absent, a residual say."""
    kinds: dict[tuple[str, ...], int] = {}
    for index, call in enumerate(calls):
        kinds.setdefault(tuple(name for name, value in call.arguments.items() if value is None), index)
    return list(kinds.values())


def compile_one(given: Order) -> str | None:
    """Compile it, on the GPU that is there; what went wrong, if something did."""
    arguments = {name: _made(value) for name, value in given.arguments.items()}
    call = Call(getattr(import_module(given.module), given.kernel), arguments, given.constants, lambda _: (1,))
    try:
        call.compile(given.launch)
    except Exception as error:  # a launch that does not compile is not tried; Triton's errors share no base
        return f"{given.kernel} {given.launch}: {str(error).splitlines()[0] if str(error) else repr(error)}"
    return None


def _made(value: Any) -> Any:
    if not isinstance(value, _Like):
        return value
    tensor = torch.empty(value.shape or (16,), dtype=value.dtype, device="cuda")
    return tensor if value.tile is None else Described(tensor, value.tile)


def warm(launches: Iterable[tuple[Call, Launch]], *, workers: int, seconds: float) -> list[str]:
    """Compile them all, or as many as there is time for; what went wrong."""
    until, faults = time.monotonic() + seconds, []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(compile_one, order(*each)) for each in launches]
        for done in as_completed(waiting):
            if (fault := done.result()) is not None:
                faults.append(fault)
            if time.monotonic() > until:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return faults
