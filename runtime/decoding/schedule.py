"""How many positions stay masked after each decoding step, and how random each step is.

A grid of N tokens, n0 of them unknown at the start, is decoded in T steps. With r = (k + 1) / T after step k:

                       aMUSEd                   StyleDrop-PyTorch     MaskGIT
    token temperature  1                        4.5 (1 - r)           1
    choice temperature linspace(2, 0, T)[k]     4.5 (1 - r)           4.5 (1 - r)
    score              log-probability          raw logit             log-probability
    aim                floor(N s cos(pi r / 2)) as aMUSEd, float64    floor(n0 cos(pi r / 2))
    still masked       max(1, min(n - 1, aim)) with n masked before the step; 0 after the last

All of it is known before the loop starts, so ``Steps`` is plain numbers. What is rounded down is computed in the peers'
precision (fp32 for aMUSEd and MaskGIT, float64 for StyleDrop-PyTorch): at r = 2/3 the cosine is 1/2, and the last bit
decides one token.

Source: AmusedScheduler of diffusers; ``libs/muse.py`` of StyleDrop-PyTorch; ``parallel_decode.py`` of MaskGIT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stylemuse.core import StylemuseError

Score = Literal["log_probability", "logit"]
Curve = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Steps:
    """The numbers of every decoding step; the tuples have one entry per step.

    Attributes:
        masked_after: positions still masked after the step; the last is 0.
        token_temperature: multiplies the Gumbel noise of the token draw; 0 is greedy.
        choice_temperature: multiplies the Gumbel noise of the confidence.
        score: what a drawn token's confidence starts from.
    """

    masked_after: tuple[int, ...]
    token_temperature: tuple[float, ...]
    choice_temperature: tuple[float, ...]
    score: Score

    def __post_init__(self) -> None:
        assert len(self.masked_after) == len(self.token_temperature) == len(self.choice_temperature) >= 1
        assert self.masked_after[-1] == 0

    def __len__(self) -> int:
        return len(self.masked_after)


def amused(
    tokens: int,
    unknown: int,
    steps: int,
    *,
    temperature: float | tuple[float, float] = (2.0, 0.0),
    starting_ratio: float = 1.0,
    first: int = 0,
    curve: Curve = "cosine",
) -> Steps:
    """The schedule of aMUSEd and Meissonic.

    Args:
        tokens: N, the size of the grid.
        unknown: n0, positions masked at the start, 1 to N.
        steps: T.
        temperature: choice temperature at the first and at the last step; a single number runs down to 0.01.
        starting_ratio: s, the share of the grid that the curve starts from (inpainting: the masked share).
        first: steps left out at the beginning (image to image: T - floor(T * strength)).
        curve: "cosine", or "linear" with 1 - r in place of the cosine (aMUSEd's inpainting).

    Raises:
        StylemuseError: a number is out of its range.
    """
    _check(tokens, unknown, steps, first, starting_ratio)
    start, end = temperature if isinstance(temperature, tuple) else (temperature, 0.01)
    _check_temperature(start, end)
    ratio = _ratios(steps)
    if curve == "cosine":
        share = _quarter_cosine(ratio)
    elif curve == "linear":
        share = 1 - ratio
    else:
        raise StylemuseError(f"masking curve {curve!r} is unknown: 'cosine' or 'linear'")
    aims = np.floor(tokens * (starting_ratio * share))
    return Steps(
        masked_after=_masked_after(unknown, aims.tolist()[first:]),
        token_temperature=(1.0,) * (steps - first),
        choice_temperature=tuple(_line(start, end, steps).tolist()[first:]),
        score="log_probability",
    )


def styledrop(
    tokens: int, unknown: int, steps: int, *, temperature: float = 4.5, starting_ratio: float = 1.0, first: int = 0
) -> Steps:
    """The schedule of StyleDrop-PyTorch; both temperatures anneal to 0: the last step is greedy. Else as ``amused``."""
    _check(tokens, unknown, steps, first, starting_ratio)
    _check_temperature(temperature)
    ratios = [(step + 1) / steps for step in range(steps)]
    annealed = tuple(temperature * (1 - ratio) for ratio in ratios[first:])
    aims = [math.floor(tokens * starting_ratio * math.cos(ratio * math.pi * 0.5)) for ratio in ratios[first:]]
    return Steps(_masked_after(unknown, aims), annealed, annealed, "logit")


def maskgit(tokens: int, unknown: int, steps: int, *, temperature: float = 4.5, first: int = 0) -> Steps:
    """The schedule of MaskGIT: the cosine counts from the initially unknown positions. Else as ``amused``."""
    _check(tokens, unknown, steps, first)
    _check_temperature(temperature)
    ratio = _ratios(steps)
    aims = np.floor(unknown * _quarter_cosine(ratio).clip(1e-6, 1.0))
    return Steps(
        masked_after=_masked_after(unknown, aims.tolist()[first:]),
        token_temperature=(1.0,) * (steps - first),
        choice_temperature=tuple((temperature * (1 - ratio)).tolist()[first:]),
        score="log_probability",
    )


SCHEDULES: Mapping[str, Callable[..., Steps]] = MappingProxyType(
    {"amused": amused, "styledrop": styledrop, "maskgit": maskgit}
)


def _ratios(steps: int) -> NDArray[np.float32]:
    return np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps)


def _quarter_cosine(ratio: NDArray[np.float32]) -> NDArray[np.float32]:
    # Rounded once, from float64: fp32 cosines differ by a bit between maths libraries, and a schedule must not.
    return np.cos((ratio * np.float32(math.pi) / np.float32(2)).astype(np.float64)).astype(np.float32)


def _line(start: float, end: float, steps: int) -> NDArray[np.float32]:
    """Evenly spaced numbers as torch's fp32 linspace: from the nearer end, each rounded once (a fused multiply-add)."""
    first, last, index = np.float32(start), np.float32(end), np.arange(steps)
    stride = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    rising, falling = np.float64(first) + stride * index, np.float64(last) - stride * (steps - 1 - index)
    return np.where(index < max(steps // 2, 1), rising, falling).astype(np.float32)


def _masked_after(unknown: int, aims: Sequence[float]) -> tuple[int, ...]:
    """Reveal at least one per step and keep at least one masked until the last step, which masks nothing."""
    masked, counts = unknown, []
    for aim in aims[:-1]:
        masked = max(1, min(masked - 1, int(aim)))
        counts.append(masked)
    return (*counts, 0)


def _check(tokens: int, unknown: int, steps: int, first: int, starting_ratio: float = 1.0) -> None:
    if steps < 1:
        raise StylemuseError(f"{steps} decoding steps are not allowed: at least 1")
    if not 1 <= unknown <= tokens:
        raise StylemuseError(f"{unknown} masked positions of {tokens} are not allowed: 1 to {tokens}")
    if not 0 <= first < steps:
        raise StylemuseError(f"leaving out the first {first} of {steps} steps is not allowed: 0 to {steps - 1}")
    if not 0.0 < starting_ratio <= 1.0:
        raise StylemuseError(f"starting ratio {starting_ratio} is not allowed: above 0, at most 1")


def _check_temperature(*temperatures: float) -> None:
    for temperature in temperatures:
        if not (math.isfinite(temperature) and temperature >= 0.0):
            raise StylemuseError(f"temperature {temperature} is not allowed: a finite number, at least 0")
