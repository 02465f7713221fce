"""More styles registered than there are slots: pinned, read again, evicted; a request keeps what it chose."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from drawing import draw, load
from models import random_style

from stylemuse import CFG, Engine, Pipeline, Request, Sampling, Style, StylemuseError
from stylemuse.adapters import canonical
from stylemuse.adapters.bank import SlotsInUse
from stylemuse.adapters.versions import Version
from stylemuse.kernels.rows import LowRank


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    """Two slots; ink and neon are in them."""
    return load(tiny_model, slots=2)


def save_style(pipe: Pipeline, folder: Path, name: str, seed: int) -> Path:
    return canonical.save(random_style(pipe.network.transformer.config, name, seed=seed), folder / name)


def test_many_more_styles_than_slots_draw_what_they_would_alone(
    tiny_model: Path, tmp_path: Path, pipe: Pipeline
) -> None:
    roomy, names = load(tiny_model), [f"s{index}" for index in range(6)]
    for index, name in enumerate(names):
        path = save_style(pipe, tmp_path, name, seed=index + 10)
        pipe.adapters.add(name, path)
        roomy.adapters.add(name, path)
    assert len(pipe.adapters) == 8
    assert len(pipe.adapters.resident) == 2
    for name in [*names, "ink", *names[::-1], "neon"]:
        assert np.array_equal(draw(pipe, style=name), draw(roomy, style=name)), name


def test_the_one_used_longest_ago_leaves(pipe: Pipeline, tmp_path: Path) -> None:
    draw(pipe, style="neon")
    draw(pipe, style="ink")
    pipe.adapters.add("late", save_style(pipe, tmp_path, "late", 5))
    assert pipe.adapters.resident == ("ink", "late")
    draw(pipe, style="ink")
    draw(pipe, style="neon")
    assert pipe.adapters.resident == ("ink", "neon")
    assert pipe.adapters.names == ("ink", "late", "neon")


def test_an_adapter_given_as_such_comes_back_too(pipe: Pipeline) -> None:
    look = random_style(pipe.network.transformer.config, "look", seed=3)
    pipe.adapters.add("look", look)
    expected = draw(pipe, style="look")
    draw(pipe, style={"ink": 0.5, "neon": 0.5}, guidance=CFG(3.0))
    assert "look" not in pipe.adapters.resident
    assert np.array_equal(draw(pipe, style="look"), expected)
    assert pipe.adapters["look"].sha256 == look.sha256


def test_slots_that_requests_use_are_not_taken(pipe: Pipeline, tmp_path: Path) -> None:
    library = pipe.adapters
    versions = [library.pin(name) for name in ("ink", "neon")]
    slots = [library.acquire(version) for version in versions]
    library.add("late", save_style(pipe, tmp_path, "late", 5))
    assert library.resident == ("ink", "neon")
    late = library.pin("late")
    with pytest.raises(SlotsInUse, match=r"^requests use all 2 slots; style 'late' needs one$"):
        library.acquire(late)
    library.release(slots[0])
    assert library.acquire(late) == slots[0]
    assert library.resident == ("late", "neon")


def test_a_blend_of_more_styles_than_slots_is_refused(tiny_model: Path) -> None:
    pipe = load(tiny_model, slots=1)
    with pytest.raises(StylemuseError, match=r"^requests use all 1 slots; style 'neon' needs one$"):
        draw(pipe, style={"ink": Style(0.5), "neon": Style(0.5)})
    assert not any(held.users for held in pipe.adapters._held.values())


def test_a_pinned_version_without_a_slot_survives_a_swap_and_a_removal(pipe: Pipeline, tmp_path: Path) -> None:
    library = pipe.adapters
    library.add("look", save_style(pipe, tmp_path, "look", 5))
    first = library.pin("look")
    draw(pipe, style={"ink": 0.5, "neon": 0.5}, guidance=CFG(3.0))
    library.add("look", save_style(pipe, tmp_path / "other", "look", 6), swap=True)
    library.remove("look")
    slot = library.acquire(first)
    assert library.bank.adapter(slot).sha256 == first.sha256
    assert "look" not in library.resident
    library.release(slot)
    library.unpin(first)
    assert not any(held.users for held in library._held.values())


def test_a_source_is_free_when_nobody_needs_it(pipe: Pipeline, tmp_path: Path) -> None:
    freed: list[str] = []
    path = save_style(pipe, tmp_path, "look", 5)
    pipe.adapters.add("look", path, on_free=lambda: freed.append("one"))
    version = pipe.adapters.pin("look")
    pipe.adapters.add("look", path, swap=True, on_free=lambda: freed.append("two"))
    assert freed == []
    pipe.adapters.unpin(version)
    assert freed == ["one"]
    pipe.adapters.remove("look")
    assert freed == ["one", "two"]


def test_conditioning_goes_with_the_version_it_was_made_for(pipe: Pipeline, tmp_path: Path) -> None:
    kept = pipe.jobs._contexts

    def versions() -> set[Version]:
        return {key.version for key in kept._values if key.version is not None}

    for seed in (5, 6):
        pipe.adapters.add("look", save_style(pipe, tmp_path / str(seed), "look", seed), swap=True)
        draw(pipe, style="look")
        assert versions() == {pipe.adapters.version("look")}
    pipe.adapters.remove("look")
    assert not versions()
    assert kept._used == sum(context.bytes for context in kept._values.values())


def test_a_file_that_changed_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    path = save_style(pipe, tmp_path, "look", 5)
    pipe.adapters.add("look", path)
    draw(pipe, style={"ink": 0.5, "neon": 0.5}, guidance=CFG(3.0))
    shutil.rmtree(path)
    save_style(pipe, tmp_path, "look", 6)
    with pytest.raises(StylemuseError, match=r"^the file of style 'look' is another than when it was registered"):
        draw(pipe, style="look")
    shutil.rmtree(path)
    with pytest.raises(StylemuseError, match=r"^look is missing"):
        draw(pipe, style="look")


@pytest.mark.slow
def test_a_thousand_styles_in_sixty_four_slots(tiny_model: Path) -> None:
    """Two hundred requests for any of them through an engine draw what a pipeline with that one alone draws."""
    pipe, alone = load(tiny_model, slots=64, rank=2), load(tiny_model, slots=3, rank=2)
    config = pipe.network.transformer.config
    for index in range(1000):
        pipe.adapters.add(f"s{index}", random_style(config, f"s{index}", seed=index))
    assert (len(pipe.adapters), len(pipe.adapters.resident)) == (1002, 64)
    chosen = [int(index) for index in np.random.default_rng(0).integers(0, 1000, 200)]
    requests = [Request("a fox", style=f"s{index}", seed=index, sampling=Sampling(2)) for index in chosen]
    with Engine(pipe) as engine:
        tickets = [engine.submit(request) for request in requests]
        results = [ticket.result(60) for ticket in tickets]
    for index, request, result in list(zip(chosen, requests, results, strict=True))[::10]:
        alone.adapters.add(f"s{index}", random_style(config, f"s{index}", seed=index), swap=True)
        assert np.array_equal(alone.run([request])[0].tokens, result.tokens)
    assert len(pipe.adapters.resident) == 64


def test_threads_share_few_slots(pipe: Pipeline, tmp_path: Path) -> None:
    """Four threads, five styles, two slots: whoever finds no slot is told so, and no slot holds another's tensors."""
    library, wrong = pipe.adapters, list[str]()
    for index in range(3):
        library.add(f"s{index}", save_style(pipe, tmp_path, f"s{index}", index + 5))

    def work(seed: int) -> None:
        names = np.random.default_rng(seed).choice(library.names, 30)
        for name in names:
            version = library.pin(str(name))
            try:
                slot = library.acquire(version)
                if library.bank.adapter(slot).sha256 != version.sha256:
                    wrong.append(str(name))
                library.release(slot)
            except SlotsInUse:
                pass
            finally:
                library.unpin(version)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(held.users for held in library._held.values())


def test_a_swap_takes_its_own_slot_and_no_other_styles(pipe: Pipeline) -> None:
    """With all slots taken and none in use, the version that is replaced makes room."""
    library, config = pipe.adapters, pipe.network.transformer.config
    library.add("neon", random_style(config, "neon", seed=99), swap=True)
    assert library.resident == library.names
    library.add("ink", random_style(config, "ink", seed=98), swap=True)
    assert library.resident == library.names


def test_threads_add_and_remove(tiny_model: Path) -> None:
    library = load(tiny_model, slots=8).adapters
    config = load(tiny_model).network.transformer.config
    looks = {name: random_style(config, name, seed=index) for index, name in enumerate("abcd")}

    def work(name: str) -> None:
        for _ in range(20):
            library.add(name, looks[name])
            version = library.pin(name)
            slot = library.acquire(version)
            library.remove(name)
            assert library.bank.adapter(slot).sha256 == looks[name].sha256
            library.release(slot)
            library.unpin(version)

    threads = [threading.Thread(target=work, args=(name,)) for name in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.names == ("ink", "neon")
    assert len(library._unused) == 6
    assert all(stack.ranks.count_nonzero() <= 2 for stack in library.bank.sites.values() if isinstance(stack, LowRank))
