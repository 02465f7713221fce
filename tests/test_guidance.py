"""Guidance recipes: the published formulas on random vectors, and which rows are left to compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylemuse.core import Branch, Guidance, Style, StylemuseError
from stylemuse.decoding.guidance import CFG, RAMPS, ObjectInStyle, StyleDrop, recommended

T, N, C = "a fox in ink style", "blurry", "a fox"
INK = {"ink": Style()}


def weights_of(recipe: Guidance, styles: Mapping[str, Style]) -> dict[tuple[str, str | None], float]:
    branches = recipe.branches(T, N, styles, steps=1)
    return {(branch.prompt, branch.style): branch.weights[0] for branch in branches}


class Network:
    """A stand-in: a random vector for every (prompt, adapter, strength)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str | None, float], np.ndarray] = {}
        self.random = np.random.default_rng(7)

    def row(self, prompt: str, style: str | None = None, strength: float = 1.0) -> np.ndarray:
        return self.rows.setdefault((prompt, style, strength), self.random.standard_normal(5))

    def adapted(self, prompt: str, styles: Mapping[str, Style]) -> np.ndarray:
        rest = 1 - sum(use.weight for use in styles.values())
        blend = sum((use.weight * self.row(prompt, name, use.strength) for name, use in styles.items()), np.zeros(5))
        return blend + rest * self.row(prompt)

    def guided(self, branches: Iterable[Branch], step: int) -> np.ndarray:
        parts = (b.weights[step] * self.row(b.prompt, b.style, b.strength) for b in branches)
        return sum(parts, np.zeros(5))


def test_cfg_carries_the_style_in_both_branches() -> None:
    assert weights_of(CFG(10.0), INK) == {(T, "ink"): 10.0, (N, "ink"): -9.0}
    assert weights_of(CFG(10.0), {}) == {(T, None): 10.0, (N, None): -9.0}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_cfg_is_off_at_one_and_below(scale: float) -> None:
    assert weights_of(CFG(scale), INK) == {(T, "ink"): 1.0}


def test_styledrop_weights() -> None:
    assert weights_of(StyleDrop(2.0, 5.0), INK) == {(T, "ink"): 3.0, (T, None): 3.0, (N, None): -5.0}
    assert weights_of(StyleDrop(5.0, 5.0), INK) == {(T, "ink"): 6.0, (N, None): -5.0}
    assert weights_of(StyleDrop(1.0, 0.0), INK) == {(T, "ink"): 2.0, (T, None): -1.0}
    assert weights_of(StyleDrop(0.0, 0.0), INK) == {(T, "ink"): 1.0}
    assert weights_of(StyleDrop(2.0, 5.0), {}) == {(T, None): 6.0, (N, None): -5.0}


def test_object_in_style_weights() -> None:
    weights = weights_of(ObjectInStyle("dog", C, gamma=0.6, style=2.0, text=5.0), INK)
    expected = {(T, "ink"): 1.2, (T, None): 1.2, (C, "dog"): 1.8, (C, None): 1.8, (N, None): -5.0}
    assert weights == pytest.approx(expected)
    assert set(weights_of(ObjectInStyle("dog", C, style=5.0), INK)) == {(T, "ink"), (C, "dog"), (N, None)}


def test_blend_fills_up_with_the_base() -> None:
    blend = {"a": Style(0.6), "b": Style(0.3)}
    assert weights_of(CFG(1.0), blend) == pytest.approx({(T, "a"): 0.6, (T, "b"): 0.3, (T, None): 0.1})
    thirds = {name: Style(0.333333) for name in "abc"} | {"d": Style(0.000001)}
    assert (T, None) not in weights_of(CFG(1.0), thirds)


def test_equal_rows_are_one_branch_and_strengths_keep_rows_apart() -> None:
    branches = StyleDrop(2.0, 5.0).branches(T, T, INK, steps=3)
    assert [(b.prompt, b.style, b.weights) for b in branches] == [(T, "ink", (3.0,) * 3), (T, None, (-2.0,) * 3)]
    strong = CFG(3.0).branches(T, N, {"ink": Style(1.0, strength=1.5)}, steps=1)
    assert {branch.strength for branch in strong} == {1.5}


def test_ramps() -> None:
    def of(ramp: str) -> dict[str, tuple[float, ...]]:
        return {b.prompt: b.weights for b in CFG(5.0).branches(T, N, {}, steps=4, ramp=ramp)}

    assert of("constant") == {T: (5.0,) * 4, N: (-4.0,) * 4}
    assert of("linear") == {T: (1.0, 2.0, 3.0, 4.0), N: (0.0, -1.0, -2.0, -3.0)}
    assert of("after_first") == {T: (1.0, 5.0, 5.0, 5.0), N: (0.0, -4.0, -4.0, -4.0)}


number = st.floats(0.0, 12.0).map(lambda value: round(value, 3))
uses = st.builds(Style, weight=st.integers(1, 33).map(lambda w: w / 100), strength=st.sampled_from([0.5, 1.0, 2.0]))


@given(
    la=number,
    lb=number,
    scale=number,
    gamma=st.floats(0.0, 1.0),
    styles=st.dictionaries(st.sampled_from("abc"), uses, min_size=1),
    ramp=st.sampled_from(sorted(RAMPS)),
    steps=st.integers(1, 6),
)
def test_branches_are_the_formulas(
    la: float, lb: float, scale: float, gamma: float, styles: dict[str, Style], ramp: str, steps: int
) -> None:
    network = Network()
    at, bt, an, bn = network.adapted(T, styles), network.row(T), network.adapted(N, styles), network.row(N)
    ac, bc = network.row(C, "dog", 1.5), network.row(C)
    dog = ObjectInStyle("dog", C, gamma, la, lb, strength=1.5)
    for recipe in (CFG(scale), StyleDrop(la, lb), dog):
        branches = recipe.branches(T, N, styles, steps, ramp)
        assert len({(b.prompt, b.style, b.strength) for b in branches}) == len(branches)
        assert all(any(b.weights) and len(b.weights) == steps for b in branches)
        for step in range(steps):
            f = {"constant": 1.0, "linear": step / steps, "after_first": float(step > 0)}[ramp]
            in_style = at + f * (la * (at - bt) + lb * (bt - bn))
            subject = ac + f * (la * (ac - bc) + lb * (bc - bn))
            formula = {
                CFG: at + f * max(scale - 1, 0) * (at - an),
                StyleDrop: in_style,
                ObjectInStyle: (1 - gamma) * in_style + gamma * subject,
            }[type(recipe)]
            assert math.isclose(math.fsum(b.weights[step] for b in branches), 1.0, abs_tol=1e-6)
            np.testing.assert_allclose(network.guided(branches, step), formula, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "styles", "message"),
    [
        (CFG(2.0), {"a": Style(0.7), "b": Style(0.4)}, r"^style weights sum to 1\.1: at most 1 is allowed$"),
        (ObjectInStyle("dog", C), {}, r"^ObjectInStyle needs a style"),
    ],
)
def test_errors_of_styles(recipe: Guidance, styles: dict[str, Style], message: str) -> None:
    with pytest.raises(StylemuseError, match=message):
        recipe.branches(T, N, styles, steps=2)


def test_errors_of_numbers_and_ramps() -> None:
    with pytest.raises(StylemuseError, match=r"^CFG scale -1\.0 is not allowed: a finite number, at least 0$"):
        CFG(-1.0)
    with pytest.raises(StylemuseError, match=r"^StyleDrop text nan is not allowed"):
        StyleDrop(text=math.nan)
    with pytest.raises(StylemuseError, match=r"^ObjectInStyle gamma 1\.5 is not allowed: 0 to 1$"):
        ObjectInStyle("dog", C, gamma=1.5)
    with pytest.raises(StylemuseError, match=r"^guidance ramp 'cubic' is unknown: 'constant', 'linear', 'after_first'"):
        CFG().branches(T, N, {}, steps=2, ramp="cubic")


def test_errors_of_a_style_use() -> None:
    for weight in (0.0, -0.5, math.nan):
        with pytest.raises(StylemuseError, match=rf"^style weight {weight} is not allowed: above 0, at most 1 in all$"):
            Style(weight)
    with pytest.raises(StylemuseError, match=r"^style strength inf is not allowed: a finite number$"):
        Style(strength=math.inf)


def test_recommended_recipe() -> None:
    assert recommended({}) is None
    assert recommended({"guidance": "CFG", "scale": 7.0, "steps": 12}) == CFG(7.0)
    assert recommended({"guidance": "StyleDrop", "style": 1.0, "text": 4.0}) == StyleDrop(1.0, 4.0)
    with pytest.raises(StylemuseError, match=r"^guidance 'none' is unknown; allowed are CFG, StyleDrop$"):
        recommended({"guidance": "none"})
