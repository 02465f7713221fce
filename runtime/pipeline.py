"""load() and Pipeline: prompt and style to picture in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from . import hub
from .adapters.bank import Bank
from .adapters.canonical import NAME
from .adapters.library import Library
from .cache import Recent
from .core import Branch, Request, Result, Sampling, StylemuseError
from .decoding.loop import Canvas, Timings, decode
from .folder import Networks, read_model, weights_sha256
from .kernels.rows import BASE
from .machine import Machine, choose
from .models.text import TextOutput
from .planning import Plan, plan
from .reference import Context, Reference

BACKENDS = ("reference",)
_TEXTS_KEPT = 256
_CONTEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class Preview:
    """A step that was just done, for a progress callback.

    Attributes:
        step, steps: steps done, and of how many, of the request that is furthest behind.
        requests: which of the requests took part.
        tokens: by request, (n, h, w); masked positions hold the mask token.
        images: by request, its n pictures as they stand; decoded only when called.
    """

    step: int
    steps: int
    requests: tuple[int, ...]
    tokens: Callable[[int], torch.Tensor]
    images: Callable[[int], list[Image.Image]]


OnStep = Callable[[Preview], None]


def load(
    name: str = "demo",
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    slots: int = 64,
    rank: int = 64,
) -> Pipeline:
    """A pipeline for a model, with the styles that come with it.

    Args:
        name: "demo" (embedded), a folder in diffusers layout, or a hub id.
        backend: "auto" or "reference".
        device, dtype: None chooses by what the machine has; ``explain()`` tells why.
        variant, revision: of a hub id's files, say "fp16"; the commit is pinned for the published aMUSEd models.
        slots, rank: how many adapters can be resident at once, and their largest rank.

    Raises:
        StylemuseError: an unknown model, backend, device or dtype, or a folder that is not complete.
    """
    if backend not in ("auto", *BACKENDS):
        raise StylemuseError(f"backend {backend!r} is not there; allowed: auto, {', '.join(BACKENDS)}")
    machine = choose(device, dtype)
    folder = hub.resolve(name, revision=revision, variant=variant)
    networks = read_model(folder, variant)
    fingerprint = partial(weights_sha256, folder / "transformer", variant)
    why = "the only one of this release" if backend == "auto" else "asked for"
    pipeline = assemble(name, networks, machine, fingerprint, why=why, slots=slots, rank=rank)
    library = pipeline.adapters
    for style in networks.extra.get("styles", ()):
        if not NAME.fullmatch(str(style)):
            raise StylemuseError(f"model {name!r}: its style {str(style)[:80]!r} is not a name")
        library.add(style, folder / "styles" / style)
    return pipeline


def assemble(
    name: str,
    networks: Networks,
    machine: Machine,
    fingerprint: Callable[[], str],
    *,
    why: str = "asked for",
    slots: int = 64,
    rank: int = 64,
) -> Pipeline:
    """A pipeline, without styles, of networks that are there already; ``fingerprint`` hashes the transformer."""
    config = networks.transformer.config
    sites = config.sites()
    bank = Bank(sites, config.bottleneck_sites(), slots=slots, rank=rank, device=machine.device, dtype=machine.dtype)
    library = Library(bank, sites, name, fingerprint)
    return Pipeline(name, Reference(networks, machine, bank), library, networks.extra, {"backend": why, **machine.why})


class Pipeline:
    """A model, its styles, and how to draw with them. Nothing of it is shared with another pipeline."""

    def __init__(
        self, name: str, network: Reference, adapters: Library, extra: Mapping[str, Any], why: Mapping[str, str]
    ) -> None:
        self.name, self.network, self.adapters = name, network, adapters
        self.defaults: Mapping[str, Any] = extra.get("defaults", {})
        self._why = dict(why)
        self._texts: Recent[TextOutput] = Recent(_TEXTS_KEPT, lambda _: 1)
        self._contexts: Recent[Context] = Recent(_CONTEXT_BYTES, lambda context: context.bytes)

    def explain(self) -> dict[str, str]:
        """What runs where, and why."""
        network, bank = self.network, self.adapters.bank
        return {
            "model": self.name,
            "backend": f"{network.name}: {self._why['backend']}",
            "device": f"{network.device}: {self._why['device']}",
            "dtype": f"{str(network.dtype).removeprefix('torch.')}: {self._why['dtype']}",
            "threads": f"{torch.get_num_threads()}: torch's own choice",
            "kernels": "plain torch",
            "adapters": f"{len(self.adapters)} in {bank.slots} slots, rank up to {bank.rank}",
        }

    @overload
    def generate(self, prompt: str, *, on_step: OnStep | None = ..., **options: Any) -> Result: ...
    @overload
    def generate(self, prompt: Sequence[str], *, on_step: OnStep | None = ..., **options: Any) -> list[Result]: ...

    def generate(
        self, prompt: str | Sequence[str], *, on_step: OnStep | None = None, **options: Any
    ) -> Result | list[Result]:
        """Draw a prompt, or a list of prompts in one batch.

        Args:
            prompt: one prompt gives one `Result`, a list gives a list.
            on_step: called after each decoding step with a `Preview`.
            options: the fields of `Request`; also ``steps`` and ``schedule``, short for a `Sampling`.
                ``negative_prompt`` may be a list as long as the prompts.
        """
        options = _with_sampling(options)
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            return self.run([_request(prompt, options)], on_step=on_step)[0]
        prompts, negative = list(prompt), options.pop("negative_prompt", "")
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise StylemuseError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one each")
        pairs = zip(prompts, negatives, strict=True)
        requests = [_request(text, options | {"negative_prompt": negation}) for text, negation in pairs]
        return self.run(requests, on_step=on_step)

    def run(self, requests: Sequence[Request], *, on_step: OnStep | None = None) -> list[Result]:
        """Draw many requests in one batch: different prompts, styles, steps and schedules in the same forward passes.

        Everything is checked before anything is computed.
        """
        began = time.perf_counter()
        bank, held = self.adapters.bank, dict[str, int]()

        def hold(names: Iterable[str]) -> None:
            for name in names:
                if name not in held:
                    held[name] = bank.acquire(name)

        try:
            # Held before anything of them is read: a swap from here on is for later requests.
            hold(name for request in requests for name in request.styles())
            plans = [self._plan(request, held) for request in requests]
            hold(name for plan in plans for name in plan.styles)
            return self._draw(plans, held, on_step, began)
        finally:
            for slot in held.values():
                bank.release(slot)

    def _draw(
        self, plans: Sequence[Plan], slots: Mapping[str, int], on_step: OnStep | None, began: float
    ) -> list[Result]:
        timings: dict[str, Any] = {"text": 0.0, "condition": 0.0}
        canvases = [self._canvases(plan, slots, timings) for plan in plans]
        per_step: Timings = {}
        flat = [canvas for group in canvases for canvas in group]
        decode(self.network, flat, self._reporter(plans, canvases, on_step), per_step)
        mark = time.perf_counter()
        grids = [
            torch.stack([canvas.tokens for canvas in group]).view(-1, *plan.grid)
            for plan, group in zip(plans, canvases, strict=True)
        ]
        images = self._pixels(grids)
        timings |= per_step | {"pixels": time.perf_counter() - mark, "total": time.perf_counter() - began}
        return [
            Result(pictures, tokens.cpu().numpy().astype(np.int64), plan.seeds, timings)
            for pictures, tokens, plan in zip(images, grids, plans, strict=True)
        ]

    def _pixels(self, grids: Sequence[torch.Tensor]) -> list[list[Image.Image]]:
        """The pictures of each request; all grids (n, h, w) of one size are decoded together."""
        drawn: list[list[Image.Image]] = [[] for _ in grids]
        for size in {grid.shape[1:] for grid in grids}:
            alike = [index for index, grid in enumerate(grids) if grid.shape[1:] == size]
            pictures = iter(self.network.pixels(torch.cat([grids[index] for index in alike])))
            for index in alike:
                drawn[index] = list(islice(pictures, len(grids[index])))
        return drawn

    def _plan(self, request: Request, slots: Mapping[str, int]) -> Plan:
        adapters = {name: self.adapters.bank.resident(slots[name]) for name in request.styles()}
        return plan(request, adapters, self.defaults, self.network, self.name)

    def _canvases(self, plan: Plan, slots: Mapping[str, int], timings: dict[str, Any]) -> list[Canvas]:
        contexts = tuple(self._context(branch, plan.grid, slots, timings) for branch in plan.branches)
        weights = tuple(branch.weights for branch in plan.branches)
        device = self.network.device
        return [
            Canvas(known.tokens.to(device), known.unknown.to(device), seed, known.steps, contexts, weights, plan.grid)
            for seed, known in zip(plan.seeds, plan.starts, strict=True)
        ]

    def _context(
        self, branch: Branch, grid: tuple[int, int], slots: Mapping[str, int], timings: dict[str, Any]
    ) -> Context:
        """The branch's context, made once for all rows that share it and kept for later requests."""
        mark = time.perf_counter()
        text = self._texts.get(branch.prompt, lambda: self.network.text(branch.prompt))
        timings["text"] += time.perf_counter() - mark
        mark = time.perf_counter()
        slot, scale, adapter = BASE, 1.0, None
        if branch.style is not None:
            slot = slots[branch.style]
            adapter = self.adapters.bank.resident(slot)
            scale = branch.strength * adapter.scale
        # The adapter itself is part of the key: the slot may hold another one tomorrow.
        key = (branch.prompt, grid, slot, scale, adapter)
        made = self._contexts.get(key, lambda: self.network.context(text, grid, slot, scale))
        timings["condition"] += time.perf_counter() - mark
        return made

    def _reporter(
        self, plans: Sequence[Plan], canvases: Sequence[list[Canvas]], on_step: OnStep | None
    ) -> Callable[[Sequence[Canvas]], None] | None:
        if on_step is None:
            return None

        def tokens(index: int) -> torch.Tensor:
            drawn = [canvas.tokens.masked_fill(canvas.unknown, self.network.mask_id) for canvas in canvases[index]]
            return torch.stack(drawn).view(-1, *plans[index].grid)

        def images(index: int) -> list[Image.Image]:
            return self.network.pixels(torch.stack([c.tokens for c in canvases[index]]).view(-1, *plans[index].grid))

        def report(running: Sequence[Canvas]) -> None:
            ids = {id(canvas) for canvas in running}
            requests = tuple(i for i, group in enumerate(canvases) if any(id(canvas) in ids for canvas in group))
            behind = min(running, key=lambda canvas: canvas.step - len(canvas.steps))
            on_step(Preview(behind.step, len(behind.steps), requests, tokens, images))

        return report


def _with_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``steps`` and ``schedule`` by a `Sampling`."""
    rest = dict(options)
    short = {name: rest.pop(name, None) for name in ("steps", "schedule")}
    if given := {name: value for name, value in short.items() if value is not None}:
        rest["sampling"] = replace(rest.get("sampling") or Sampling(), **given)
    return rest


def _request(prompt: str, options: Mapping[str, Any]) -> Request:
    if unknown := sorted(set(options) - set(Request.__dataclass_fields__)):
        allowed = [*Request.__dataclass_fields__, "steps", "schedule"]
        raise StylemuseError(f"unknown option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return Request(prompt=prompt, **options)
