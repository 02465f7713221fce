"""Random batches of half-decoded pictures, as the decoding step's kernels take them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stylemuse.kernels.canvases import Canvases, Schedules
from stylemuse.kernels.decoding_step import decoding_step
from stylemuse.kernels.dispatch import REFERENCE, Kernels

UNREAD = 10**6
"""A place far outside of every grid: it stands where nothing may be read."""


class Batch(NamedTuple):
    """The arguments of a decoding step; the mask token is the number of codes."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    canvases: Canvases
    schedules: Schedules

    def step(self, kernels: Kernels = REFERENCE) -> None:
        """Run it, in place."""
        decoding_step(*self, len(self.weight), kernels=kernels)

    def copy(self) -> Batch:
        """Another of the same numbers, to be changed on its own."""
        return self._replace(canvases=Canvases(*(value.clone() for value in values(self.canvases))))

    def to(self, device: torch.device) -> Batch:
        """A copy elsewhere; strides stay."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        canvases = Canvases(*(value.to(device, copy=True) for value in values(self.canvases)))
        schedules = Schedules(*(value.to(device, copy=True) for value in values(self.schedules)))
        return Batch(_moved(self.hidden, device), _moved(self.weight, device), bias, canvases, schedules)

    def pick(self, pictures: list[int], branches: int | None = None) -> Batch:
        """Some of the pictures, in this order, with their rows; ``branches`` leaves out what comes after."""
        chosen = {field.name: getattr(self.canvases, field.name) for field in fields(Canvases)}
        chosen = {name: value.clone() if name == "inputs" else value[pictures] for name, value in chosen.items()}
        schedules = Schedules(*(value[pictures] for value in values(self.schedules)))
        return self._replace(
            canvases=Canvases(**chosen | {"rows": chosen["rows"][:, :branches].contiguous()}),
            schedules=replace(schedules, weights=schedules.weights[..., :branches].contiguous()),
        )

    def state(self) -> dict[str, Tensor]:
        """What a step changes; places that are never read are left out."""
        changed = {field.name: getattr(self.canvases, field.name) for field in fields(Canvases)}
        entries = torch.arange(changed["places"].shape[1], device=changed["places"].device)
        return changed | {"places": changed["places"].where(entries < changed["counts"][:, None], -1)}


def values(record: Canvases | Schedules) -> list[Tensor]:
    """Its tensors in order."""
    return [getattr(record, field.name) for field in fields(record)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    room = torch.full((*tensor.shape[:-1], tensor.stride(-2)), torch.nan, dtype=tensor.dtype, device=device)
    room[..., : tensor.shape[-1]] = tensor
    return room[..., : tensor.shape[-1]]


def random_batch(
    counts: list[int],
    *,
    positions: int,
    codes: int,
    inputs: int,
    branches: int = 2,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
) -> Batch:
    """A picture for each count of masked positions, all different in step, temperatures, score and branches.

    Hidden states and the head lie in larger tensors full of NaN; so are the hidden states of known positions, the rows
    of nobody, and those of branches without weight.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = len(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def padded(values: Tensor) -> Tensor:
        room = torch.full((*values.shape[:-1], values.shape[-1] + 3), torch.nan, dtype=dtype)
        room[..., : values.shape[-1]] = values
        return room[..., : values.shape[-1]]

    rows = (torch.randperm(pictures * branches, generator=generator) + 1).view(pictures, branches).int()
    weights = normal(pictures, steps, branches)
    for picture in range(pictures):
        absent = picture % branches
        if absent:
            weights[picture, :, -absent:], rows[picture, -absent:] = 0.0, -1
    now = torch.arange(pictures) % steps
    hidden = torch.full((pictures * branches + 2, positions, inputs), torch.nan)
    places = torch.full((pictures, positions), UNREAD, dtype=torch.int32)
    tokens = torch.randint(codes, (pictures, positions), generator=generator)
    seen = torch.full((len(hidden), positions), -1)
    masked_after = torch.full((pictures, steps), UNREAD, dtype=torch.int32)
    for picture, count in enumerate(counts):
        masked = torch.randperm(positions, generator=generator)[:count].sort().values
        places[picture, :count] = masked.int()
        masked_after[picture, now[picture]] = (count * (picture + 1)) // (picture + 2)
        for row, weight in zip(rows[picture].tolist(), weights[picture, now[picture]].tolist(), strict=True):
            if row >= 0:
                seen[row] = tokens[picture].index_fill(0, masked, codes)
            if weight != 0.0:
                hidden[row, masked] = normal(count, inputs)
    canvases = Canvases(
        seeds=torch.randint(2**62, (pictures,), generator=generator) * 2 + 1,
        rows=rows,
        steps=now.int(),
        counts=torch.tensor(counts, dtype=torch.int32),
        places=places,
        tokens=tokens,
        inputs=seen,
    )
    schedules = Schedules(
        masked_after=masked_after,
        token_temperature=torch.rand(pictures, steps, generator=generator) * 2,
        choice_temperature=torch.rand(pictures, steps, generator=generator) * 2,
        weights=weights,
        raw_logit=torch.arange(pictures) % 2 == 0,
    )
    weight = padded(normal(codes, inputs) * 2 * inputs**-0.5)
    return Batch(padded(hidden), weight, normal(codes).to(dtype) if bias else None, canvases, schedules)
