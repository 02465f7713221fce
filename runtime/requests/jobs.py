"""A request on its way to pictures: what it decided, what it holds, its canvases. Pipeline and engine share this.

begin     the versions of its styles are pinned and everything is checked; nothing is computed
acquire   its styles have slots
canvases  text and conditioning are there: every picture can be decoded       of many requests together
pictures  tokens -> pictures                                                  of many requests together
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image

from ..backend import arrays
from ..core import Branch, Request
from ..decoding.canvas import Canvas
from ..kernels.rows import BASE
from ..protocols import Array, Backend, Opaque, Styles, StyleVersion
from .cache import Recent
from .planning import Plan, plan

_TEXTS_KEPT = 256
_CONTEXT_BYTES = 256 << 20


class Conditions(NamedTuple):
    """All that a row's step-constant conditioning depends on; the slot may hold another version tomorrow."""

    prompt: str
    grid: tuple[int, int]
    slot: int
    scale: float
    version: StyleVersion | None


class Jobs:
    """Begins jobs of one model; texts and step-constant conditioning are kept for those that come later, bounded."""

    def __init__(self, model: str, network: Backend, adapters: Styles, defaults: Mapping[str, Any]) -> None:
        self.model, self.network, self.adapters, self.defaults = model, network, adapters, defaults
        self._texts: Recent[str, Opaque] = Recent(_TEXTS_KEPT, lambda _: 1)
        self._contexts: Recent[Conditions, Opaque] = Recent(_CONTEXT_BYTES, lambda context: context.bytes)
        adapters.on_free = self._forget

    def begin(self, request: Request) -> Job:
        """Check the request as a whole and pin its styles; a StylemuseError says what is wrong with it."""
        return Job(request, self)

    @contextmanager
    def held(self, requests: Iterable[Request]) -> Iterator[list[Job]]:
        """A job of each request with its slots, all of them checked before one has any; released at the end."""
        with ExitStack() as stack:
            jobs: list[Job] = []
            for request in requests:
                jobs.append(self.begin(request))
                stack.callback(jobs[-1].release)
            for job in jobs:
                job.acquire()
            yield jobs

    def pictures(self, grids: Sequence[Array]) -> list[list[Image.Image]]:
        """The pictures of each request; all grids (n, h, w) of one size are decoded together."""
        drawn: list[list[Image.Image]] = [[] for _ in grids]
        for size in {grid.shape[1:] for grid in grids}:
            alike = [index for index, grid in enumerate(grids) if grid.shape[1:] == size]
            pictures = iter(self.network.pixels(arrays.concatenate([grids[index] for index in alike])))
            for index in alike:
                drawn[index] = list(islice(pictures, len(grids[index])))
        return drawn

    def canvases(self, jobs: Iterable[Job], timings: dict[str, Any]) -> list[list[Canvas]]:
        """Of each job a canvas per picture; seconds are added to ``timings`` "text" and "condition".

        A context is made once for all rows that share it, together with those that others need, and kept for later.
        """
        wanted = {job: job.conditions() for job in jobs}
        each = [one for own in wanted.values() for one in own]
        mark = time.perf_counter()
        prompts = dict.fromkeys(one.prompt for one in each)
        texts = {prompt: self._texts.get(prompt, partial(self.network.text, prompt)) for prompt in prompts}
        timings["text"] += time.perf_counter() - mark
        mark = time.perf_counter()

        def make(missing: list[Conditions]) -> Sequence[Opaque]:
            return self.network.contexts([(texts[one.prompt], one.grid, one.slot, one.scale) for one in missing])

        made = iter(self._contexts.get_all(each, make))
        timings["condition"] += time.perf_counter() - mark
        return [job.canvases(tuple(islice(made, len(own)))) for job, own in wanted.items()]

    def _forget(self, version: StyleVersion) -> None:
        self._contexts.forget(lambda key: key.version is version)


class Job:
    """One request's plan and what it holds of the library until `release`.

    Attributes:
        plan: everything the request left open, decided.
    """

    plan: Plan

    def __init__(self, request: Request, jobs: Jobs) -> None:
        self._jobs = jobs
        self._versions: dict[str, StyleVersion] = {}
        self._slots: dict[str, int] = {}
        try:
            # Pinned before anything of them is read: a swap from here on is for later requests.
            self._pin(request.styles())
            self.plan = plan(request, self._versions, jobs.defaults, jobs.network, jobs.model)
            self._pin(self.plan.styles)
        except BaseException:
            self.release()
            raise

    def acquire(self) -> None:
        """Slots for all the styles, read from where they came if need be, or an error and none."""
        try:
            for name in sorted(self.plan.styles):
                self._slots[name] = self._jobs.adapters.acquire(self._versions[name])
        except BaseException:
            self._release_slots()
            raise

    @property
    def resident(self) -> bool:
        """Whether `acquire` would have nothing to read now, as far as can be told before."""
        return all(self._jobs.adapters.is_resident(self._versions[name]) for name in self.plan.styles)

    def conditions(self) -> list[Conditions]:
        """Of each branch."""
        return [self._conditions(branch) for branch in self.plan.branches]

    def canvases(self, contexts: tuple[Opaque, ...]) -> list[Canvas]:
        """A canvas per picture, given the context of each branch."""
        chosen = self.plan
        weights = tuple(branch.weights for branch in chosen.branches)
        return [
            Canvas(known.tokens, known.unknown, seed, known.steps, contexts, weights, chosen.grid, masked=known.masked)
            for seed, known in zip(chosen.seeds, chosen.starts, strict=True)
        ]

    def release(self) -> None:
        """Give back all that is held; once is enough, more does nothing."""
        self._release_slots()
        while self._versions:
            self._jobs.adapters.unpin(self._versions.popitem()[1])

    def _release_slots(self) -> None:
        while self._slots:
            self._jobs.adapters.release(self._slots.popitem()[1])

    def _pin(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._versions:
                self._versions[name] = self._jobs.adapters.pin(name)

    def _conditions(self, branch: Branch) -> Conditions:
        if branch.style is None:
            return Conditions(branch.prompt, self.plan.grid, BASE, 1.0, None)
        slot, version = self._slots[branch.style], self._versions[branch.style]
        return Conditions(branch.prompt, self.plan.grid, slot, branch.strength * version.scale, version)
