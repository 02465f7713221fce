"""What all training here shares: masks, resumable state, learning rate, averaged weights, a log line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import StylemuseError

State = dict[str, Any]


def warm_hold_decay(done: int, total: int, *, warm: int, decay: float = 0.25) -> float:
    """Learning-rate factor after ``done`` of ``total`` samples: linear warm-up, a plateau, a linear decay at the end.

    The plateau makes ``total`` free to grow when a run is resumed; only the last ``decay`` part knows about the end.
    """
    fall = (total - done) / max(total * decay, 1.0)
    return max(min((done + 1) / warm, fall, 1.0), 0.01)


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
        for name, value in module.named_parameters():
            self.values[name].lerp_(value, 1 - decay)

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


def report(**values: float | int | str) -> None:
    """One JSON line of progress on standard error."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(rounded), file=sys.stderr, flush=True)


def batches(source: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Endless lists of ``size`` items."""
    while True:
        yield [next(source) for _ in range(size)]


def finite(loss: Tensor) -> Tensor:
    """The loss, or an error at the step where it stopped being a number."""
    if not torch.isfinite(loss):
        raise StylemuseError(f"the training loss became {float(loss.detach())}; a lower rate (--rate) may help")
    return loss


def mask_at_random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(R, h, w) bool: in each row a share cos(pi u / 2) of the positions, at least one, placed at random."""
    rows, positions = shape[0], math.prod(shape[1:])
    share = torch.cos(torch.rand(rows, 1, generator=generator) * torch.pi / 2)
    count = (share * positions).round().clamp(min=1)
    order = torch.rand(rows, positions, generator=generator).argsort(dim=1).argsort(dim=1)
    return (order < count).view(shape)
