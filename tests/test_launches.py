"""What a step launches: known by part, within what was aimed at, and counted without a GPU or an interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE

from stylemuse.bench.step import launches
from stylemuse.kernels import tuning
from stylemuse.kernels.dispatch import triton_kernels
from stylemuse.kernels.response_norm import response_norm
from stylemuse.models.amused import AmusedConfig

AIM = 332
LAYERS = 22
AMUSED = {
    "embedding": 1,
    "conv blocks": 6 * 5,
    "text blocks": 6 * 2 * 4,
    "in and out": 2 * 2,
    "self-attention": LAYERS * 4,
    "text attention": LAYERS * 4,
    "MLP": LAYERS * 3,
    "head": 2 + 3 + 2,
}
"""Of amused-256; a norm before a projection is a launch of its own.

The head: projection and norm, the step's end in three, and the copies of tokens and masks."""


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_step_of_the_published_depth(adapter: str) -> None:
    """A LoRA launches nothing of its own, whatever it is at."""
    found = launches.count(AmusedConfig(), adapter=adapter)
    assert found == AMUSED
    assert sum(found.values()) <= AIM


def test_what_bottlenecks_and_other_sizes_add() -> None:
    """A launch where a bottleneck is; norm, patches and product, then norm, product, patches, of a halved grid."""
    config = AmusedConfig(num_hidden_layers=2, num_res_blocks=1)
    plain, necks = (launches.count(config, adapter=each) for each in ("none", "bottleneck"))
    assert necks == plain | {"text attention": 2 * 5, "MLP": 2 * 4}
    halved = launches.count(replace(config, downsample=True, upsample=True), branches=3)
    assert halved == plain | {"resample": 4 + 2}


def test_noted_launches_are_those_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation of several launches, noted and not run, then run."""
    kernels, x, scale = triton_kernels(DEVICE), torch.ones(1, 3, 5, device=DEVICE), torch.ones(5, device=DEVICE)
    with tuning.noted() as calls:
        untouched = response_norm(x, scale, scale, kernels=kernels)
    made: list[str] = []
    run = tuning.Call.run
    monkeypatch.setattr(tuning.Call, "run", lambda call, launch: (made.append(call.kernel.__name__), run(call, launch)))
    y = response_norm(x, scale, scale, kernels=kernels)
    assert made == [call.kernel.__name__ for call in calls]
    assert y.shape == untouched.shape
    torch.testing.assert_close(y, torch.full_like(y, 3.0))
