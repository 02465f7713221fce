"""What a decoding step launches on a GPU, by part of the network: counted without one, for nothing is launched.

A network of a model's depth, with tiny widths, decodes a picture in a bucket (`decoding.buckets`). Every Triton launch
is noted in place of being made, and so is every operation of torch that a GPU would run: all but those that only look
at memory in another way or reserve it. The step that counts is the second, in which nobody enters. All of it is one
captured graph but two launches, the copies of tokens and masks that a preview may be made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stylemuse.adapters.canonical import Adapter
from stylemuse.backend.machine import choose
from stylemuse.decoding.canvas import Canvas
from stylemuse.decoding.loop import advance
from stylemuse.decoding.schedule import amused
from stylemuse.kernels import tuning
from stylemuse.kernels.dispatch import OPERATIONS, STEP, Kernels
from stylemuse.kernels.rows import BASE
from stylemuse.loading.assembly import TorchPipeline, assemble
from stylemuse.models.amused import AmusedConfig

from ..harness.networks import TINY, random_adapter, tiny_networks

KERNELS = Kernels("triton", frozenset((*OPERATIONS, STEP)), "counted, not run")
PARTS = {
    "embed": "embedding",
    "resample": "resample",
    "res_blocks": "conv blocks",
    "attention_blocks": "text blocks",
    "project_to_hidden": "in and out",
    "project_from_hidden": "in and out",
    "attn1": "self-attention",
    "attn2": "text attention",
    "ff": "MLP",
}
"""The part of the network a module belongs to, by the first of these in its path; the rest of a step is "head"."""
ADAPTERS = ("none", "lora", "bottleneck")
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")
"""Operations that run nothing on a device, beside those that torch calls views."""


def count(config: AmusedConfig, *, branches: int = 2, adapter: str = "none") -> dict[str, int]:
    """Launches of a step by part, in bf16; one of the branches has an adapter of that kind, of `ADAPTERS`."""
    depth = {name: getattr(config, name) for name in ("num_res_blocks", "num_hidden_layers", "downsample", "upsample")}
    machine = choose("cpu", "bfloat16")
    with torch.no_grad(), tuning.noted() as calls:
        pipe = assemble("tiny", tiny_networks(replace(TINY, **depth)), machine, lambda: "tiny", KERNELS, slots=1)
        canvas, decoder = _canvas(pipe, branches, adapter), pipe.decoder()
        advance(decoder, [canvas])
        with _Counter(pipe.network.transformer, calls) as counter:
            advance(decoder, [canvas])
    return dict(counter.found)


def _canvas(pipe: TorchPipeline, branches: int, adapter: str) -> Canvas:
    network, steps = pipe.network, amused(TINY.sample_size**2, TINY.sample_size**2, 3)
    slots = [BASE] * branches
    if adapter != "none":
        look = random_adapter(pipe, "look", rank=2) if adapter == "lora" else _bottleneck(pipe)
        slots[0] = pipe.adapters.bank.add(look)
    text, grid = network.text("a fox"), (TINY.sample_size, TINY.sample_size)
    contexts = tuple(network.context(text, grid, slot) for slot in slots)
    weights = ((float(branches),) * len(steps), *[(-1.0,) * len(steps)] * (branches - 1))
    return replace(
        Canvas.blank(TINY.sample_size**2, seed=1, steps=steps, contexts=contexts, weights=weights), shape=grid
    )


def _bottleneck(pipe: TorchPipeline) -> Adapter:
    sites = pipe.network.transformer.config.bottleneck_sites()
    return Adapter("look", "bottleneck", {site: (torch.ones(w, 2), torch.ones(2, w)) for site, w in sites.items()})


class _Counter(TorchDispatchMode):
    """Counts launches by the part of the network that runs."""

    def __init__(self, network: nn.Module, calls: list[tuning.Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self._calls, self._parts = calls, ["head"]
        self._hooks = list(self._watch(network))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self._calls)
        made = func(*args, **(kwargs or {}))
        launched = len(self._calls) - before
        looks = func.is_view or func.overloadpacket.__name__ in _FREE
        self.found[self._parts[-1]] += launched if func.namespace == "stylemuse" else int(not looks)
        return made

    def _watch(self, network: nn.Module) -> Iterator[Any]:
        for path, module in network.named_modules():
            part = next((PARTS[step] for step in path.split(".") if step in PARTS), None)
            if part is not None:
                yield module.register_forward_pre_hook(lambda *_, part=part: self._parts.append(part))
                yield module.register_forward_hook(lambda *_: self._left())

    def _left(self) -> None:
        self._parts.pop()
