"""What a request leaves open is decided within bounds, or refused before anything is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import random_style

from stylemuse import Adapter, Pipeline, Request, StylemuseError
from stylemuse.decoding.canvas import Canvas
from stylemuse.requests.planning import recommended_steps


@pytest.mark.parametrize("steps", [0, -3, 1_000_000, 7.9, "many", True, float("nan"), 10**40])
def test_steps_that_nobody_can_take_are_refused(steps: Any) -> None:
    told = r"^style 'ink' recommends steps = .*; allowed: a whole number from 1 to 1000$"
    with pytest.raises(StylemuseError, match=told):
        recommended_steps({"neon": {"steps": 4}, "ink": {"steps": steps}}, {})
    with pytest.raises(StylemuseError, match=r"^the model recommends steps = "):
        recommended_steps({"ink": {}}, {"steps": steps})


def test_the_most_of_the_styles_comes_before_the_models() -> None:
    assert recommended_steps({"ink": {"steps": 4}, "neon": {"steps": 9}, "other": {}}, {"steps": 30}) == 9
    assert recommended_steps({"other": {}}, {"steps": 30}) == 30
    assert recommended_steps({}, {}) == 12


@pytest.mark.parametrize("steps", [7.9, "many"])
def test_a_style_with_such_steps_draws_where_the_request_says_how_many(pipe: Pipeline, steps: Any) -> None:
    given = random_style(pipe.network.transformer.config, "odd", seed=1)
    pipe.adapters.add("odd", Adapter("odd", "lora", given.tensors, recommended={"steps": steps}))
    with pytest.raises(StylemuseError, match=r"^style 'odd' recommends steps = "):
        pipe.generate("a fox", style="odd", seed=1)
    assert pipe.generate("a fox", style="odd", seed=1, steps=2).tokens.shape == (1, 8, 8)


def test_a_canvas_is_made_without_waiting_for_the_device(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many positions are masked is known from the plan."""

    def wait(*_: object) -> None:
        raise AssertionError("the host reads a number from the device")

    job = pipe.jobs.begin(Request("a fox", seed=1, n=3))
    try:
        contexts = tuple(pipe.network.contexts([(pipe.network.text("a fox"), (8, 8), -1, 1.0)] * len(job.conditions())))
        monkeypatch.setattr(torch.Tensor, "__int__", wait)
        monkeypatch.setattr(torch.Tensor, "item", wait)
        canvases: list[Canvas] = job.canvases(contexts)
    finally:
        job.release()
    assert [canvas.masked for canvas in canvases] == [64] * 3
