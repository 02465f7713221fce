"""A request with everything it leaves open decided: branches, seeds, grid and start. All checks happen here."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core import MAX_STEPS, Branch, Guidance, Request, Sampling, Sizes, StylemuseError, is_whole
from ..decoding.guidance import CFG, StyleDrop, recommended
from ..decoding.rng import fresh_seed, image_seeds
from ..protocols import Backend, StyleVersion
from . import start

DEFAULT_STEPS = 12
"""Where neither a style nor the model recommends a number."""
MAX_TOKENS = 64 * 64
"""Bound on one picture's tokens."""


@dataclass(frozen=True)
class Plan:
    """A request with nothing left open; ``styles`` are the adapters its branches use, ``unread`` the words of its
    prompts that are over the length that the text encoder reads."""

    branches: tuple[Branch, ...]
    styles: frozenset[str]
    seeds: tuple[int, ...]
    grid: tuple[int, int]
    starts: tuple[start.Start, ...]
    unread: str = ""


def plan(
    request: Request, adapters: Mapping[str, StyleVersion], defaults: Mapping[str, Any], network: Backend, model: str
) -> Plan:
    """Decide and check.

    Args:
        adapters: the request's styles by name.
        defaults: the model's: "steps", "scale".
        model: its name, for errors.
    """
    sampling = request.sampling or Sampling()
    steps = sampling.steps or recommended_steps({name: each.recommended for name, each in adapters.items()}, defaults)
    guidance = request.guidance or _guidance(adapters, defaults)
    prompt, over = _fitted(request.prompt.strip(), " ".join(_descriptors(request.prompt, adapters)), network)
    negative, over_negative = _fitted(request.negative_prompt.strip(), "", network)
    styles, unread = request.styles(), " ".join(filter(None, (over, over_negative)))
    branches = guidance.branches(prompt, negative, styles, steps, sampling.ramp)
    _check_effects(guidance.branches(prompt, negative, styles, steps), branches, negative, sampling.ramp, guidance)
    grid = _grid(request.size, network.sizes, model)
    seeds = image_seeds(fresh_seed() if request.seed is None else request.seed, request.n)
    starts = start.prepare(request, grid, seeds, replace(sampling, steps=steps), network)
    skipped = steps - len(starts[0].steps)
    branches = tuple(replace(branch, weights=branch.weights[skipped:]) for branch in branches)
    used = frozenset(branch.style for branch in branches if branch.style is not None)
    return Plan(branches, used, seeds, grid, starts, unread)


def _check_effects(
    constant: tuple[Branch, ...], branches: tuple[Branch, ...], negative: str, ramp: str, guidance: Guidance
) -> None:
    """Refuse what would change nothing; ``constant`` is what the branches are without a ramp."""
    if negative and all(branch.prompt != negative for branch in constant):
        raise StylemuseError(f"the negative prompt has no effect with {guidance}; raise its guidance or leave it out")
    if ramp != "constant" and branches == constant:
        raise StylemuseError(f"the ramp {ramp!r} has no effect with {guidance}; raise its guidance or leave it out")


def recommended_steps(styles: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> int:
    """The most steps any of the styles recommends, else the model's; ``styles``: what each recommends, by its name."""
    found = {f"style {name!r}": facts["steps"] for name, facts in styles.items() if "steps" in facts}
    for who, steps in (found or {"the model": defaults.get("steps", DEFAULT_STEPS)}).items():
        if not (is_whole(steps) and 1 <= steps <= MAX_STEPS):
            raise StylemuseError(f"{who} recommends steps = {steps!r}; allowed: a whole number from 1 to {MAX_STEPS}")
    return int(max(found.values(), default=defaults.get("steps", DEFAULT_STEPS)))


def _guidance(adapters: Mapping[str, StyleVersion], defaults: Mapping[str, Any]) -> Guidance:
    """What the first style that recommends something recommends; StyleDrop for other styles, CFG for the base."""
    for adapter in adapters.values():
        if (recipe := recommended(adapter.recommended)) is not None:
            return recipe
    return StyleDrop() if adapters else CFG(float(defaults.get("scale", 10.0)))


def _descriptors(prompt: str, adapters: Mapping[str, StyleVersion]) -> list[str]:
    """The words that call the styles, unless the prompt has them already."""
    words = [adapter.descriptor for adapter in adapters.values()]
    return [descriptor for descriptor in words if descriptor and descriptor not in prompt]


def _fitted(content: str, descriptor: str, network: Backend) -> tuple[str, str]:
    """The prompt with the words that call the styles, of which none is cut; and the words of the content that are.

    A word is read whole or not at all.
    """

    def joined(count: int) -> str:
        return " ".join(filter(None, (content if count == len(words) else " ".join(words[:count]), descriptor)))

    words = content.split()
    if network.prompt_tokens(whole := joined(len(words))) <= network.text_length:
        return whole, ""
    fits = bisect.bisect_right(
        range(1, len(words)), network.text_length, key=lambda n: network.prompt_tokens(joined(n))
    )
    return joined(fits), " ".join(words[fits:])


def _grid(size: tuple[int, int] | None, sizes: Sizes, model: str) -> tuple[int, int]:
    """Pixels (width, height) -> tokens (h, w)."""
    side, factor, unit = sizes
    width, height = size or (side * factor,) * 2
    if width < unit or height < unit or width % unit or height % unit or width * height > MAX_TOKENS * factor**2:
        most = round(MAX_TOKENS**0.5) * factor
        raise StylemuseError(
            f"size {width} x {height} is impossible for {model}: both sides must be multiples of {unit}, "
            f"together at most {most} x {most} pixels"
        )
    return height // factor, width // factor
