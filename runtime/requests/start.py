"""Where decoding begins: all masked, from a picture, or with a region to fill.

Start        unknown positions                                              schedule
none         all                                                            from its first step
picture      round-down N cos(pi/2 first/T) of them, placed by Philox       from step first = T - floor(T strength)
with mask    the masked region                                              likewise; aMUSEd's curve is linear here

Peers: AmusedImg2ImgPipeline and AmusedInpaintPipeline (diffusers). There a strength of 1.0 masks nothing, because the
index of the first step wraps around; here it masks everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core import Request, Sampling, StylemuseError
from ..decoding.rng import key_of
from ..decoding.schedule import SCHEDULES, Steps
from ..kernels.philox import philox4x32_words
from . import pictures

START_STREAM = 3
"""Philox stream of the choice which positions a picture loses at the start."""


class Tokenizer(Protocol):
    """What is needed of a backend: a picture's codes, and arrays as its canvases hold them."""

    def codes(self, picture: Image.Image, grid: tuple[int, int]) -> Any:
        """The picture, resized to the grid -> (h, w) int64."""

    def array(self, values: NDArray[Any]) -> Any:
        """The values as a tensor of the backend's."""


@dataclass(frozen=True)
class Start:
    """Tokens (N,), which of them are unknown (N,) bool and how many, and the numbers of the steps from here."""

    tokens: Any
    unknown: Any
    masked: int
    steps: Steps


def prepare(
    request: Request, grid: tuple[int, int], seeds: tuple[int, ...], sampling: Sampling, network: Tokenizer
) -> tuple[Start, ...]:
    """The start of each of a request's pictures; ``sampling`` says how many steps an empty one would take."""
    size, schedule, count = grid[0] * grid[1], _schedule(sampling), sampling.steps
    assert count is not None, "the number of steps is decided by now"
    if request.image is None:
        tokens, unknown = network.array(np.zeros(size, np.int64)), network.array(np.ones(size, np.bool_))
        return (Start(tokens, unknown, size, schedule(size, size, count)),) * len(seeds)
    # 49 * (1 / 49) is a little less than 1: what is meant is one step.
    first = count - math.floor(count * request.strength + 1e-9)
    if first == count:
        least = math.ceil(1000 / count) / 1000
        raise StylemuseError(f"strength {request.strength:g} redraws nothing in {count} steps; at least {least:g}")
    codes = network.codes(pictures.upright(request.image), grid).reshape(-1)
    if request.mask is None:
        lost = max(1, math.floor(size * math.cos(math.pi / 2 * first / count)))
        steps = schedule(size, lost, count, first=first)
        return tuple(Start(codes, network.array(_lost(size, lost, seed)), lost, steps) for seed in seeds)
    region = _region(request.mask, grid)
    inside = int(region.sum())
    if inside == 0:
        raise StylemuseError("the mask is black everywhere; white marks what is to be drawn anew")
    options: dict[str, Any] = {} if sampling.schedule == "maskgit" else {"starting_ratio": inside / size}
    if sampling.schedule == "amused":
        options["curve"] = "linear"
    steps = schedule(size, inside, count, first=first, **options)
    return (Start(codes, network.array(region), inside, steps),) * len(seeds)


def _schedule(sampling: Sampling) -> Callable[..., Steps]:
    if sampling.schedule not in SCHEDULES:
        raise StylemuseError(f"schedule {sampling.schedule!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    schedule = SCHEDULES[sampling.schedule]

    def numbers(*sizes: int, **options: Any) -> Steps:
        if sampling.temperature is not None:
            options["temperature"] = sampling.temperature
        return schedule(*sizes, **options)

    return numbers


def _region(mask: Image.Image, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """(N,) bool: tokens of whose area at least half is white."""
    small = pictures.mask(mask).resize((grid[1], grid[0]), Image.Resampling.BOX)
    return (np.asarray(small) >= 128).flatten()


def _lost(size: int, count: int, seed: int) -> NDArray[np.bool_]:
    """(N,) bool: the ``count`` positions with the smallest Philox words; ties by lowest index."""
    zeros = np.zeros(size, np.int64)
    words = philox4x32_words(zeros + START_STREAM, zeros, np.arange(size), zeros, *key_of(seed))[0]
    lost = np.zeros(size, np.bool_)
    lost[np.argsort(words, kind="stable")[:count]] = True
    return lost
