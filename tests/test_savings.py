"""What a pipeline does not compute. Work left out is exact, so it is counted here and seen nowhere in the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import draw, load, noise, watch
from PIL import Image

from stylemuse import CFG, ObjectInStyle, Pipeline, Request, Sampling, StyleDrop
from stylemuse.core import Guidance
from stylemuse.decoding.schedule import amused

TOKENS = 64
BLEND = {"ink": 0.5, "neon": 0.3}

ROWS: list[tuple[Any, Guidance, str, int, int]] = [
    (None, CFG(1.0), "constant", 1, 1),
    (None, CFG(3.0), "constant", 2, 2),
    (None, CFG(3.0), "linear", 1, 2),
    (None, StyleDrop(2.0, 5.0), "constant", 2, 2),
    ("ink", CFG(3.0), "constant", 2, 2),
    ("ink", StyleDrop(2.0, 5.0), "constant", 3, 3),
    ("ink", StyleDrop(2.0, 5.0), "after_first", 1, 3),
    ("ink", StyleDrop(2.0, 5.0), "linear", 1, 3),
    ("ink", StyleDrop(3.0, 3.0), "constant", 2, 2),
    ("ink", StyleDrop(2.0, 0.0), "constant", 2, 2),
    ("ink", StyleDrop(0.0, 0.0), "constant", 1, 1),
    (BLEND, StyleDrop(2.0, 5.0), "constant", 4, 4),
    ("ink", ObjectInStyle("neon", "a cat", style=2.0, text=5.0), "constant", 5, 5),
    ("ink", ObjectInStyle("neon", "a cat", style=3.0, text=3.0), "constant", 3, 3),
    ("ink", ObjectInStyle("neon", "a cat", style=2.0, text=5.0), "after_first", 2, 5),
]
"""Style, guidance and ramp, then the forwards of a picture at the first step and at every later one."""


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


@pytest.mark.parametrize(("style", "guidance", "ramp", "first", "later"), ROWS)
def test_only_branches_with_a_weight_are_run(
    pipe: Pipeline, style: Any, guidance: Guidance, ramp: str, first: int, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And three pictures of a request share the first step, where all of them are blank."""
    rows = watch(monkeypatch, pipe.network, "features")
    draw(pipe, style=style, guidance=guidance, n=3, sampling=Sampling(steps=4, ramp=ramp))
    assert rows == [first, 3 * later, 3 * later, 3 * later]


def test_only_masked_positions_reach_the_logits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    read, scored = (watch(monkeypatch, pipe.network, method) for method in ("readout", "logits"))
    draw(pipe, style="ink", guidance=StyleDrop(2.0, 5.0), n=2, steps=5)
    masked = (TOKENS, *amused(TOKENS, TOKENS, 5).masked_after[:-1])
    assert scored == [2 * count for count in masked]
    assert read == [3 * 2 * count for count in masked]


def test_only_the_masked_region_reaches_the_logits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = watch(monkeypatch, pipe.network, "logits")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    draw(pipe, image=noise(), mask=mask, steps=5)
    assert scored[0] == TOKENS // 2
    assert sorted(scored, reverse=True) == scored


def test_one_forward_serves_every_request(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different styles, recipes and lengths; equal branches are shared at the first step."""
    requests = [
        Request("a fox", seed=1, sampling=Sampling(4), guidance=CFG(3.0)),
        Request("a fox", seed=2, sampling=Sampling(3), guidance=CFG(5.0), n=2),
        Request("a cat in ink style", "ink", seed=3, sampling=Sampling(2), guidance=StyleDrop(2.0, 5.0)),
        Request("a cat in ink style", "neon", seed=4, sampling=Sampling(4), guidance=StyleDrop(0.0, 0.0)),
    ]
    rows = watch(monkeypatch, pipe.network, "features")
    pipe.run(requests)
    # At first: a fox, nothing, the cat in ink and in base, and the other prompt in neon.
    assert rows == [5, 2 + 4 + 3 + 1, 2 + 4 + 1, 2 + 1]


def test_texts_and_conditions_are_made_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_model)
    texts, contexts = (watch(monkeypatch, pipe.network, method) for method in ("text", "contexts"))
    first = draw(pipe, guidance=CFG(3.0), n=3)
    assert (len(texts), sum(contexts)) == (2, 2)
    again = draw(pipe, guidance=CFG(3.0), n=3)
    assert np.array_equal(first, again)
    assert (len(texts), sum(contexts)) == (2, 2)
    draw(pipe, "a cat", guidance=CFG(3.0))
    assert (len(texts), sum(contexts)) == (3, 3), "the negative branch is kept"
    draw(pipe, guidance=CFG(3.0), size=(16, 32))
    assert (len(texts), sum(contexts)) == (3, 5), "a size is part of the condition, not of the text"
    assert contexts == [2, 1, 2], "those of a request are made together"


def test_a_later_start_leaves_out_the_steps_before_it(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = watch(monkeypatch, pipe.network, "features")
    draw(pipe, image=noise(), strength=0.25, steps=8, guidance=CFG(3.0))
    assert rows == [2, 2]


def test_positions_are_read_out_in_few_shapes(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step masks another number of them, and every shape costs a compiled product."""
    masked, computed = (watch(monkeypatch, owner, "logits") for owner in (pipe.network, pipe.network.transformer))
    read = watch(monkeypatch, pipe.network.transformer, "readout")
    draw(pipe, n=2, steps=12, guidance=CFG(3.0))
    assert len(set(masked)) == 12
    assert set(computed) == {64, 128}
    assert set(read) == {64, 128, 192, 256}
