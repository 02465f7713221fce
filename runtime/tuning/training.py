"""What all training here shares: masks, a rate by the clock, averaged weights, checkpoints in small files, reports."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core import StylemuseError

State = dict[str, Any]

SHARD_BYTES = 15 << 20
"""No file of averaged weights is larger: they travel by ways that take no large files."""


def warm_hold_decay(done: float, total: float, *, warm: float, decay: float = 0.25) -> float:
    """Learning-rate factor after ``done`` of ``total``: linear warm-up, a plateau, a linear decay at the end.

    The plateau makes ``total`` free to grow when a run is resumed; only the last ``decay`` part knows about the end.
    """
    fall = (total - done) / max(total * decay, 1e-9)
    return max(min((done + 1e-3 * warm) / warm, fall, 1.0), 0.01)


class Clock:
    """Seconds of a run of ``minutes`` in all, with those of its former parts; `share` is how much of it is over."""

    def __init__(self, minutes: float, before: float = 0.0) -> None:
        self.total = minutes * 60
        self._before, self._began = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._began

    @property
    def share(self) -> float:
        """0 at the start, 1 at the end."""
        return min(self.seconds / self.total, 1.0)


class Average:
    """Exponential moving average of a module's parameters; what is shipped is the average."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module; early on faster, so that the random start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        given = [value.detach() for value in module.parameters()]
        torch._foreach_lerp_(list(self.values.values()), given, 1 - decay)

    def state(self) -> State:
        """For `save`."""
        return {"values": self.values, "updates": self.updates}

    def restore(self, state: State) -> None:
        """From a saved `state`, on whatever device it was saved."""
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def save(path: Path, state: State) -> None:
    """Write the state, then put it in place in one move: an interrupted run keeps the older checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path: Path) -> State | None:
    """The saved state, or None where there is none. Only tensors and plain values are read."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def save_weights(folder: Path, name: str, values: Mapping[str, Tensor], dtype: torch.dtype, facts: State) -> None:
    """Averaged weights as ``name-1.safetensors``, ... of at most `SHARD_BYTES` each; ``facts`` lie in their headers.

    Raises StylemuseError, and leaves the files as they were, where a weight is no finite number in ``dtype``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in values.items():
        stored = value.detach().to("cpu", dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise StylemuseError(f"{key} of the {name} has no finite number in {dtype}; files in {folder} are kept")
        if size + stored.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = stored
        size += stored.nbytes
    header = {key: str(value) for key, value in facts.items()} | {"shards": str(len(shards))}
    for index, shard in enumerate(shards, 1):
        temporary = folder / f"{name}-{index}.partial"
        save_file(shard, temporary, metadata=header)
        os.replace(temporary, folder / f"{name}-{index}.safetensors")


def load_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """What `save_weights` wrote, fp32."""
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    if not files:
        raise StylemuseError(f"{folder} has no {name}-1.safetensors; train that part first")
    return {key: value.float() for file in files for key, value in load_file(file).items()}


def report(**values: float | int | str) -> None:
    """One JSON line of progress on standard error."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(rounded), file=sys.stderr, flush=True)


def batches(source: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Endless lists of ``size`` items."""
    while True:
        yield [next(source) for _ in range(size)]


def finite(loss: Tensor) -> Tensor:
    """The loss, or an error at the step where it stopped being a number. It waits for the device."""
    if not torch.isfinite(loss):
        raise StylemuseError(f"the training loss became {float(loss.detach())}; a lower rate (--rate) may help")
    return loss


def mask_at_random(shape: tuple[int, ...], generator: torch.Generator, *, stratified: bool = False) -> Tensor:
    """(R, h, w) bool: in each row a share cos(pi u / 2) of the positions, at least one, placed at random.

    ``stratified``: the rows' u are spread evenly over 0..1, so that a batch masks nearly always as many.
    """
    rows, positions = shape[0], math.prod(shape[1:])
    device = generator.device
    u = torch.rand(rows, 1, generator=generator, device=device)
    if stratified:
        u = (torch.arange(rows, device=device)[:, None] + u) / rows
    count = (torch.cos(u * torch.pi / 2) * positions).round().clamp(min=1)
    order = torch.rand(rows, positions, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return (order < count).view(shape)
