"""The laws of the runtime on whole pipelines, with a tiny random model.

Rows (1), seeds (2), base (3), swaps (5) and the process (7). That nothing is ignored (4) is in test_refusals, the one
loop (6) in test_loop, the exactness of what is left out in test_savings.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import process
import pytest
import torch
from drawing import draw, load, noise
from models import random_style, write_tiny_model

from stylemuse import (
    CFG,
    Adapter,
    ObjectInStyle,
    Pipeline,
    Preview,
    Request,
    Sampling,
    Style,
    StyleDrop,
    StylemuseError,
)
from stylemuse.adapters.versions import Version
from stylemuse.kernels.rows import BASE

STYLES = (None, "ink", "neon", {"ink": 0.5}, {"ink": 0.4, "neon": 0.6}, {"neon": Style(1.0, strength=0.5)})
RECIPES = (None, CFG(1.0), CFG(5.0), StyleDrop(0.0, 0.0), StyleDrop(2.0, 5.0), StyleDrop(3.0, 3.0))
UNGUIDED = (CFG(1.0), StyleDrop(0.0, 0.0))
"""Recipes a negative prompt or a ramp has no effect with, and is refused."""
SIZES = ((32, 32), (16, 32), (40, 24), (16, 16))


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    """Shared: a test that changes its styles loads one of its own."""
    return load(tiny_model)


def any_request(choice: random.Random) -> Request:
    """A request of any kind."""
    style, guidance = choice.choice(STYLES), choice.choice(RECIPES)
    if style and choice.random() < 0.2:
        guidance = ObjectInStyle("neon", "a cat")
    guided = guidance not in UNGUIDED
    return Request(
        prompt=choice.choice(("a fox", "a cat", "an owl in the castle")),
        style=style,
        negative_prompt=choice.choice(("", "a frog")) if guided else "",
        n=choice.choice((1, 1, 2)),
        seed=choice.getrandbits(60),
        sampling=Sampling(
            steps=choice.choice((1, 3, 5, 8)),
            schedule=choice.choice(("amused", "styledrop", "maskgit")),
            ramp=choice.choice(("constant", "linear", "after_first")) if guided else "constant",
        ),
        guidance=guidance,
        size=choice.choice(SIZES),
        image=noise(choice.getrandbits(8)) if choice.random() < 0.2 else None,
    )


# 1. Row isolation: a row's result does not depend on its neighbours.


@pytest.mark.parametrize("seed", range(2))
def test_a_request_draws_the_same_alone_and_among_sixteen(pipe: Pipeline, seed: int) -> None:
    choice = random.Random(seed)
    requests = [any_request(choice) for _ in range(16)]
    for request, result in zip(requests, pipe.run(requests), strict=True):
        assert np.array_equal(result.tokens, pipe.run([request])[0].tokens), request


def test_pictures_of_equal_area_keep_their_shapes(pipe: Pipeline) -> None:
    """Three shapes of 64 tokens in one batch."""
    requests = [Request("a fox", seed=7, size=size) for size in ((32, 32), (64, 16), (16, 64))]
    for request, result in zip(requests, pipe.run(requests), strict=True):
        assert np.array_equal(result.tokens, pipe.run([request])[0].tokens), request.size


# 2. Seed law: a picture depends on model, prompt, style, sampling and its seed, and on nothing else.


def test_a_reported_seed_draws_its_picture_again(pipe: Pipeline) -> None:
    for seed in (None, 0, 2**63 - 1):
        result = pipe.generate("a fox", style="ink", n=4, seed=seed)
        assert len(set(result.seeds)) == 4
        for own, tokens in zip(result.seeds, result.tokens, strict=True):
            assert np.array_equal(draw(pipe, style="ink", seed=own)[0], tokens)


def test_order_of_requests_does_not_matter(pipe: Pipeline) -> None:
    choice = random.Random(5)
    requests = [any_request(choice) for _ in range(6)]
    forward, backward = pipe.run(requests), pipe.run(requests[::-1])[::-1]
    assert all(np.array_equal(one.tokens, other.tokens) for one, other in zip(forward, backward, strict=True))


def test_generators_of_the_process_do_not_matter(pipe: Pipeline) -> None:
    expected = draw(pipe, n=2)
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert np.array_equal(draw(pipe, n=2), expected)
    assert not np.array_equal(draw(pipe, n=2, seed=8), expected)


def test_threads_do_not_matter(pipe: Pipeline) -> None:
    expected, before = draw(pipe, n=4, style="ink"), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert np.array_equal(draw(pipe, n=4, style="ink"), expected)
    finally:
        torch.set_num_threads(before)


# 3. Base is base: rows without adapter are bitwise what a runtime without adapters gives.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3, 7, 11])
def test_contexts_do_not_notice_what_is_made_beside_them(tiny_model: Path, count: int, dtype: str) -> None:
    pipe = load(tiny_model, dtype=dtype)
    network, slots = pipe.network, [BASE, *(pipe.adapters.version(name).slot for name in pipe.adapters.names)]
    rows = [
        (network.text(f"a fox {index}"), ((8, 8), (4, 8))[index % 2], slots[index % len(slots)], 0.5 + index % 3)
        for index in range(count)
    ]
    for row, found in zip(rows, network.contexts(rows), strict=True):
        alone = network.context(*row)
        assert (found.grid, found.slot, found.scale) == (alone.grid, alone.slot, alone.scale)
        assert found.conditioning.keys() == alone.conditioning.keys()
        for name, value in alone.conditioning.items():
            assert torch.equal(found.conditioning[name], value), name


def features(pipe: Pipeline, *styles: str | None) -> torch.Tensor:
    """What a step computes for rows of these styles before anything is drawn, (R, N, C)."""
    network, slots = pipe.network, [BASE if style is None else pipe.adapters.version(style).slot for style in styles]
    contexts = network.contexts([(network.text("a fox"), (8, 8), slot, 1.0) for slot in slots])
    return network.features(torch.arange(64).repeat(len(slots), 1), contexts)


def test_base_does_not_notice_adapters(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    for style in pipe.adapters.names:
        pipe.adapters.remove(style)
    config, expected, tokens = pipe.network.transformer.config, features(pipe, None), draw(pipe, n=2)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: pipe.adapters.add("look", random_style(config, "look", rank=3)),
        lambda: draw(pipe, style="look"),
        lambda: pipe.adapters.add("look", random_style(config, "look", seed=9), swap=True),
        lambda: pipe.adapters.remove("look"),
    )
    for change in changes:
        change()
        assert torch.equal(features(pipe, None), expected)
        assert np.array_equal(draw(pipe, n=2), tokens)


def test_base_rows_do_not_notice_styled_neighbours(pipe: Pipeline) -> None:
    mixed, plain = features(pipe, None, "ink", None, "neon"), features(pipe, None, None, None, None)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.equal(mixed[1], mixed[0])
    assert not torch.equal(mixed[1], mixed[3])


def test_rows_do_not_notice_their_order(pipe: Pipeline) -> None:
    styles = [None, "ink", "neon", "ink", None, "neon"]
    expected = features(pipe, *styles)
    for order in ([0, 4, 1, 3, 2, 5], [5, 1, 4, 2, 3, 0], [2, 0, 5, 4, 3, 1]):
        assert torch.equal(features(pipe, *(styles[row] for row in order)), expected[order])


def test_swapping_back_is_bitwise(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    looks = [random_style(pipe.network.transformer.config, "look", rank=rank, seed=rank) for rank in (2, 5)]
    seen = []
    for look in (looks[0], looks[1], looks[0]):
        pipe.adapters.add("look", look, swap="look" in pipe.adapters)
        seen.append((features(pipe, "look"), draw(pipe, style="look")))
    assert torch.equal(seen[0][0], seen[2][0])
    assert np.array_equal(seen[0][1], seen[2][1])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not np.array_equal(seen[0][1], seen[1][1])


def test_weights_are_never_written(pipe: Pipeline) -> None:
    before = {name: value.clone() for name, value in pipe.network.transformer.state_dict().items()}
    draw(pipe, style={"ink": 0.5, "neon": 0.5}, n=2)
    assert all(torch.equal(value, before[name]) for name, value in pipe.network.transformer.state_dict().items())


# 5. Swap is atomic: a running request keeps the adapter it started with, and addresses never change.


def addresses(pipe: Pipeline) -> list[tuple[int, int]]:
    return [(site.down.data_ptr(), site.up.data_ptr()) for site in pipe.adapters.bank.sites.values()]


def test_a_removed_style_lasts_until_its_requests_are_done(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    expected, before = draw(pipe, style="ink", n=2), addresses(pipe)

    def interfere(preview: Preview) -> None:
        if preview.step == 1:
            pipe.adapters.remove("ink")
            pipe.adapters.add("late", random_style(pipe.network.transformer.config, "late", seed=9))

    assert np.array_equal(draw(pipe, style="ink", n=2, on_step=interfere), expected)
    with pytest.raises(StylemuseError, match=r"^style 'ink' is unknown; allowed: late, neon$"):
        draw(pipe, style="ink")
    freed = pipe.adapters.add("next", random_style(pipe.network.transformer.config, "next"))
    assert pipe.adapters.bank.adapter(0) is freed
    assert addresses(pipe) == before


def test_a_swapped_style_is_for_requests_that_come_after(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    other = random_style(pipe.network.transformer.config, "ink", seed=9)
    expected, before = draw(pipe, style="ink", n=2), addresses(pipe)

    def interfere(preview: Preview) -> None:
        if preview.step == 1:
            pipe.adapters.add("ink", other, swap=True)

    assert np.array_equal(draw(pipe, style="ink", n=2, on_step=interfere), expected)
    assert not np.array_equal(draw(pipe, style="ink", n=2), expected)
    assert addresses(pipe) == before


def test_a_swap_while_a_request_is_prepared_is_before_it_or_after(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never in between: one version's words drawn with the other's weights."""
    pipe = load(tiny_model)
    look = random_style(pipe.network.transformer.config, "ink", seed=9)
    other = Adapter("ink", "lora", look.tensors, descriptor="in the red castle", recommended={"guidance": "CFG"})
    before, library = draw(pipe, style="ink", n=2), pipe.adapters
    pin = library.pin

    def swapped_first(name: str) -> Version:
        monkeypatch.undo()
        pipe.adapters.add("ink", other, swap=True)
        return pin(name)

    monkeypatch.setattr(library, "pin", swapped_first)
    meanwhile, after = draw(pipe, style="ink", n=2), draw(pipe, style="ink", n=2)
    assert not np.array_equal(before, after)
    assert any(np.array_equal(meanwhile, tokens) for tokens in (before, after))


def test_a_request_that_fails_gives_its_slots_back(tiny_model: Path) -> None:
    pipe = load(tiny_model)

    def interrupt(preview: Preview) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, style="ink", on_step=interrupt)
    pipe.adapters.remove("ink")
    freed = pipe.adapters.add("next", random_style(pipe.network.transformer.config, "next"))
    assert pipe.adapters.bank.adapter(0) is freed


# 7. No process-wide state: two pipelines live in one process, and nothing of the process is changed.


def test_loading_and_drawing_leave_the_process_as_it_was(tiny_model: Path) -> None:
    before = process.state()
    draw(load(tiny_model), style="ink", n=2, seed=None)
    assert process.state() == before


def test_importing_leaves_the_process_as_it_was(tiny_model: Path) -> None:
    """Nor does it start a GPU, or import what only some need."""
    command = [sys.executable, process.__file__, str(tiny_model)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["import"] == found["use"] == []
    assert not found["cuda"]
    heavy = {"onnx", "onnxruntime", "fastapi", "starlette", "uvicorn", "typer", "rich", "matplotlib"}
    assert not (heavy | {"diffusers", "transformers", "peft", "scipy", "pytest"}) & set(found["packages"])


@pytest.fixture(scope="module")
def other_pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Other weights, and other styles under the same names."""
    return load(write_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=5))


def test_two_models_step_by_step_in_turn(pipe: Pipeline, other_pipe: Pipeline) -> None:
    one, other = draw(pipe, style="ink"), draw(other_pipe, style="ink")
    between: list[np.ndarray] = []
    nested = draw(pipe, style="ink", on_step=lambda _: between.append(draw(other_pipe, style="ink")))
    assert not np.array_equal(one, other)
    assert np.array_equal(nested, one)
    assert len(between) == 4
    assert all(np.array_equal(tokens, other) for tokens in between)


def test_two_models_in_two_threads(pipe: Pipeline, other_pipe: Pipeline) -> None:
    expected = [draw(each, style="ink", n=2, steps=12) for each in (pipe, other_pipe)]
    found: dict[int, np.ndarray] = {}

    def work(index: int, each: Pipeline) -> None:
        found[index] = draw(each, style="ink", n=2, steps=12)

    threads = [Thread(target=work, args=pair) for pair in enumerate((pipe, other_pipe))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[index], tokens) for index, tokens in enumerate(expected))
