"""Pipeline: prompt and style to picture in one call."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from PIL import Image

from .backend import arrays
from .core import Request, Result, Sampling, StylemuseError, UnreadWarning
from .decoding.canvas import Canvas, Network, Timings, WholeSteps
from .decoding.loop import decode
from .protocols import Array, Backend, Styles
from .requests.jobs import Job, Jobs
from .requests.planning import Plan


@dataclass(frozen=True)
class Preview:
    """A step that was just done, for a progress callback.

    Attributes:
        step, steps: steps done, and of how many, of the request that is furthest behind.
        requests: which of the requests took part.
        tokens: by request, (n, h, w), of torch or of numpy as the backend's; masked positions hold the mask token.
        images: by request, its n pictures as they stand; decoded only when called.
    """

    step: int
    steps: int
    requests: tuple[int, ...]
    tokens: Callable[[int], Array]
    images: Callable[[int], list[Image.Image]]


OnStep = Callable[[Preview], None]


class Pipeline:
    """A model, its styles, and how to draw with them. Nothing of it is shared with another pipeline."""

    def __init__(
        self,
        name: str,
        network: Backend,
        adapters: Styles,
        extra: Mapping[str, Any],
        why: Mapping[str, str],
        decoder: Callable[[int | None], Network | WholeSteps],
    ) -> None:
        """``decoder`` makes what `decoding.loop` is given, for so many rows of a forward pass at most."""
        self.name, self.network, self.adapters = name, network, adapters
        self.defaults: Mapping[str, Any] = extra.get("defaults", {})
        self.jobs = Jobs(name, network, adapters, self.defaults)
        self._why = dict(why)
        self._make_decoder, self._decoder = decoder, decoder(None)
        self._process = os.getpid()

    def decoder(self, rows: int | None = None) -> Network | WholeSteps:
        """What `decoding.loop` is given, for one caller's own use; ``rows`` is the most of a forward pass, if known."""
        return self._make_decoder(rows)

    def check_process(self) -> None:
        """Raise in a forked child: torch's threads do not survive a fork, and the child would wait for them."""
        if os.getpid() != self._process:
            raise StylemuseError(
                "this pipeline was loaded before the process forked; start processes by 'spawn' "
                "(multiprocessing.get_context) and load the model in each"
            )

    def explain(self) -> dict[str, str]:
        """What runs where, and why."""
        network, styles = self.network, self.adapters
        return {
            "model": self.name,
            "backend": f"{network.name}: {self._why['backend']}",
            "device": f"{network.device}: {self._why['device']}",
            "dtype": f"{str(network.dtype).removeprefix('torch.')}: {self._why['dtype']}",
            **network.explain(),
            "adapters": f"{len(styles)} in {styles.slots} slots, rank up to {styles.rank}, "
            f"{styles.reserved / 1e6:.0f} MB",
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
        self.check_process()
        with self.jobs.held(requests) as jobs:
            for job in jobs:
                if job.plan.unread:
                    warnings.warn(UnreadWarning(job.plan.unread, self.network.text_length), stacklevel=3)
            return self._draw(jobs, on_step, began)

    def _draw(self, jobs: Sequence[Job], on_step: OnStep | None, began: float) -> list[Result]:
        timings: dict[str, Any] = {"text": 0.0, "condition": 0.0}
        plans, canvases = [job.plan for job in jobs], self.jobs.canvases(jobs, timings)
        per_step: Timings = {}
        flat = [canvas for group in canvases for canvas in group]
        decode(self._decoder, flat, self._reporter(plans, canvases, on_step), per_step)
        mark = time.perf_counter()
        grids = [
            arrays.stack([canvas.tokens for canvas in group]).reshape(-1, *plan.grid)
            for plan, group in zip(plans, canvases, strict=True)
        ]
        images = self.jobs.pictures(grids)
        timings |= per_step | {"pixels": time.perf_counter() - mark, "total": time.perf_counter() - began}
        return [
            Result(pictures, arrays.numpy(tokens).astype(np.int64), plan.seeds, timings)
            for pictures, tokens, plan in zip(images, grids, plans, strict=True)
        ]

    def _reporter(
        self, plans: Sequence[Plan], canvases: Sequence[list[Canvas]], on_step: OnStep | None
    ) -> Callable[[Sequence[Canvas]], None] | None:
        if on_step is None:
            return None

        def grids(index: int, rows: list[Array]) -> Array:
            return arrays.stack(rows).reshape(-1, *plans[index].grid)

        def tokens(index: int) -> Array:
            mask_id = self.network.mask_id
            return grids(index, [arrays.masked(each.tokens, each.unknown, mask_id) for each in canvases[index]])

        def images(index: int) -> list[Image.Image]:
            return self.network.pixels(grids(index, [canvas.tokens for canvas in canvases[index]]))

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
