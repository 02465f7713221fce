"""A request with everything it leaves open decided: branches, seeds, grid and start. All checks happen here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .adapters.canonical import Adapter
from .core import Branch, Guidance, Request, Sampling, StylemuseError
from .decoding import start
from .decoding.guidance import CFG, StyleDrop, recommended
from .decoding.rng import fresh_seed, image_seeds
from .models.amused import AmusedConfig
from .reference import Reference

MAX_TOKENS = 64 * 64
"""Bound on one picture's tokens."""


@dataclass(frozen=True)
class Plan:
    """A request with nothing left open; ``styles`` are the adapters its branches use."""

    branches: tuple[Branch, ...]
    styles: frozenset[str]
    seeds: tuple[int, ...]
    grid: tuple[int, int]
    starts: tuple[start.Start, ...]


def plan(
    request: Request, adapters: Mapping[str, Adapter], defaults: Mapping[str, Any], network: Reference, model: str
) -> Plan:
    """Decide and check.

    Args:
        adapters: the request's styles by name.
        defaults: the model's: "steps", "scale".
        model: its name, for errors.
    """
    sampling = request.sampling or default_sampling(adapters, defaults)
    guidance = request.guidance or _guidance(adapters, defaults)
    prompt = " ".join([request.prompt.strip(), *_descriptors(request.prompt, adapters)])
    negative, styles = request.negative_prompt.strip(), request.styles()
    branches = guidance.branches(prompt, negative, styles, sampling.steps, sampling.ramp)
    grid = _grid(request.size, network.transformer.config, network.vq.config.factor, model)
    seeds = image_seeds(fresh_seed() if request.seed is None else request.seed, request.n)
    starts = start.prepare(request, grid, seeds, sampling, network)
    skipped = sampling.steps - len(starts[0].steps)
    branches = tuple(replace(branch, weights=branch.weights[skipped:]) for branch in branches)
    used = frozenset(branch.style for branch in branches if branch.style is not None)
    return Plan(branches, used, seeds, grid, starts)


def default_sampling(adapters: Mapping[str, Adapter], defaults: Mapping[str, Any]) -> Sampling:
    """The most steps any of the styles recommends, else the model's."""
    steps = [adapter.recommended["steps"] for adapter in adapters.values() if "steps" in adapter.recommended]
    return Sampling(steps=int(max(steps, default=defaults.get("steps", 12))))


def _guidance(adapters: Mapping[str, Adapter], defaults: Mapping[str, Any]) -> Guidance:
    """What the first style that recommends something recommends; StyleDrop for other styles, CFG for the base."""
    for adapter in adapters.values():
        if (recipe := recommended(adapter.recommended)) is not None:
            return recipe
    return StyleDrop() if adapters else CFG(float(defaults.get("scale", 10.0)))


def _descriptors(prompt: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """The words that call the styles, unless the prompt has them already."""
    words = [adapter.descriptor for adapter in adapters.values()]
    return [descriptor for descriptor in words if descriptor and descriptor not in prompt]


def _grid(size: tuple[int, int] | None, config: AmusedConfig, factor: int, model: str) -> tuple[int, int]:
    """Pixels (width, height) -> tokens (h, w)."""
    width, height = size or (config.sample_size * factor,) * 2
    unit = factor * (2 if config.downsample else 1)
    if width < unit or height < unit or width % unit or height % unit or width * height > MAX_TOKENS * factor**2:
        most = round(MAX_TOKENS**0.5) * factor
        raise StylemuseError(
            f"size {width} x {height} is impossible for {model}: both sides must be multiples of {unit}, "
            f"together at most {most} x {most} pixels"
        )
    return height // factor, width // factor
