"""Guidance recipes: a request becomes branches whose weights sum to 1 at every step.

Write A(t) for the network with the style on prompt t, B(t) for the base, n for the negative prompt, f for the ramp:

    CFG            A(t) + f (s - 1) (A(t) - A(n))
    StyleDrop      A(t) + f [la (A(t) - B(t)) + lb (B(t) - B(n))]                         Eq. 4; la = style, lb = text
    ObjectInStyle  (1 - g) StyleDrop(style adapter, t) + g StyleDrop(object adapter, c)   Eq. 5-6; c = content prompt

At f = 1 these are the published formulas. Blended styles with weights wi: A(t) = sum_i wi Ai(t) + (1 - sum wi) B(t).
The heads are affine in the hidden state and the weights sum to 1, so the sum may be taken before the head.

Each formula is written once, as an unguided part plus f times a guidance part whose weights sum to 0. Equal rows are
then added up and rows whose weight is 0 at every step dropped: two forwards remain for la = lb, one for la = lb = 0.

Source: StyleDrop, arXiv 2306.00983; Muse, arXiv 2301.00704 (the linear ramp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from stylemuse.core import Branch, Guidance, Style, StylemuseError, is_number, own_numbers

# A weighted sum of rows: (prompt, style, strength) with its weight.
Row = tuple[str, str | None, float]
Terms = list[tuple[Row, float]]

# What rounding leaves of weights that cancel (la w1 + la w2 - la, say) must count as 0, or its row would be computed.
NEGLIGIBLE = 1e-9
# How far over 1 the weights of a blend written in decimals may sum.
BLEND_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance with the style in both branches; none at a scale of 1 or less, as in diffusers."""

    scale: float = 10.0

    def __post_init__(self) -> None:
        _check_numbers(self, scale=self.scale)

    def branches(
        self, prompt: str, negative_prompt: str, styles: Mapping[str, Style], steps: int, ramp: str = "constant"
    ) -> tuple[Branch, ...]:
        """A(t): s and A(n): 1 - s."""
        adapted = _adapted(prompt, styles)
        extra = max(self.scale - 1.0, 0.0)
        guidance = _times(extra, adapted) + _times(-extra, _adapted(negative_prompt, styles))
        return _branches(adapted, guidance, _ramp(ramp, steps))


@dataclass(frozen=True)
class StyleDrop:
    """StyleDrop's guidance (Eq. 4): ``style`` (la) pushes towards the style, ``text`` (lb) towards the prompt.

    la is 0 to 2 as a rule, 5 falls back on the reference's content; lb = 5 is the paper's constant. Without a style, la
    cancels and B(t) + lb (B(t) - B(n)) remains.
    """

    style: float = 2.0
    text: float = 5.0

    def __post_init__(self) -> None:
        _check_numbers(self, style=self.style, text=self.text)

    def branches(
        self, prompt: str, negative_prompt: str, styles: Mapping[str, Style], steps: int, ramp: str = "constant"
    ) -> tuple[Branch, ...]:
        """A(t): 1 + la, B(t): lb - la, B(n): -lb."""
        adapted = _adapted(prompt, styles)
        return _branches(adapted, _eq4(adapted, prompt, negative_prompt, self.style, self.text), _ramp(ramp, steps))


@dataclass(frozen=True)
class ObjectInStyle:
    """My object in my style (Eq. 5-6): a style adapter and an object's adapter, mixed by ``gamma``.

    Attributes:
        object: name of the object's adapter.
        content_prompt: the prompt of the object's branches, without the style's descriptor.
        gamma: the object's share g, 0 to 1; 0.5 to 0.7 in the paper.
        style, text: la and lb, as in ``StyleDrop``.
        strength: multiplies the object adapter's own scale.
    """

    object: str
    content_prompt: str
    gamma: float = 0.6
    style: float = 2.0
    text: float = 5.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self, gamma=self.gamma, style=self.style, text=self.text)
        if self.gamma > 1.0:
            raise StylemuseError(f"ObjectInStyle gamma {self.gamma} is not allowed: 0 to 1")

    def branches(
        self, prompt: str, negative_prompt: str, styles: Mapping[str, Style], steps: int, ramp: str = "constant"
    ) -> tuple[Branch, ...]:
        """As(t): (1-g)(1+la), B(t): (1-g)(lb-la), Ac(c): g(1+la), B(c): g(lb-la), B(n): -lb."""
        if not styles:
            raise StylemuseError("ObjectInStyle needs a style beside its object; without one use StyleDrop")
        adapted = _adapted(prompt, styles)
        subject = _adapted(self.content_prompt, {self.object: Style(strength=self.strength)})
        unguided = _times(1.0 - self.gamma, adapted) + _times(self.gamma, subject)
        guidance = _times(1.0 - self.gamma, _eq4(adapted, prompt, negative_prompt, self.style, self.text))
        guidance += _times(self.gamma, _eq4(subject, self.content_prompt, negative_prompt, self.style, self.text))
        return _branches(unguided, guidance, _ramp(ramp, steps))


RECIPES: Mapping[str, type[CFG] | type[StyleDrop]] = MappingProxyType({"CFG": CFG, "StyleDrop": StyleDrop})
"""Recipes an adapter may recommend by name."""


def recommended(facts: Mapping[str, Any]) -> Guidance | None:
    """The recipe an adapter or a model recommends, say {"guidance": "StyleDrop", "style": 2.0, "text": 5.0}."""
    name = facts.get("guidance")
    if name is None:
        return None
    if name not in RECIPES:
        raise StylemuseError(f"guidance {name!r} is unknown; allowed are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    return recipe(**{field: facts[field] for field in recipe.__dataclass_fields__ if field in facts})


def _constant(step: int, steps: int) -> float:
    return 1.0


def _linear(step: int, steps: int) -> float:
    return step / steps


def _after_first(step: int, steps: int) -> float:
    return float(step > 0)


# How much of the guidance applies at a step: all; Muse's, growing from 0 (k / T as in StyleDrop-PyTorch's plain pass);
# or all except at the first step, where StyleDrop-PyTorch's adapter pass is conditional only.
RAMPS: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {"constant": _constant, "linear": _linear, "after_first": _after_first}
)


def _ramp(name: str, steps: int) -> list[float]:
    if name not in RAMPS:
        raise StylemuseError(f"guidance ramp {name!r} is unknown: {', '.join(map(repr, RAMPS))}")
    return [RAMPS[name](step, steps) for step in range(steps)]


def _base(prompt: str) -> Row:
    return (prompt, None, 1.0)


def _adapted(prompt: str, styles: Mapping[str, Style]) -> Terms:
    """A(prompt): the blend of the styles, the base for what is left of 1."""
    rest = 1.0 - math.fsum(use.weight for use in styles.values())
    if rest < -BLEND_TOLERANCE:
        raise StylemuseError(f"style weights sum to {1.0 - rest:g}: at most 1 is allowed")
    terms: Terms = [((prompt, name, use.strength), use.weight) for name, use in styles.items()]
    if abs(rest) > BLEND_TOLERANCE:
        return [*terms, (_base(prompt), rest)]
    # A blend that sums to 1 but for its decimals is scaled to sum to 1 exactly, so that la and lb still cancel.
    return [(row, weight / (1.0 - rest)) for row, weight in terms]


def _eq4(adapted: Terms, prompt: str, negative_prompt: str, style: float, text: float) -> Terms:
    """The guidance of Eq. 4: la (A(t) - B(t)) + lb (B(t) - B(n)). Its weights sum to 0."""
    return [*_times(style, adapted), (_base(prompt), text - style), (_base(negative_prompt), -text)]


def _times(factor: float, terms: Iterable[tuple[Row, float]]) -> Terms:
    return [(row, factor * weight) for row, weight in terms]


def _sums(terms: Terms) -> dict[Row, float]:
    """Equal rows added up, in order of first appearance."""
    parts: dict[Row, list[float]] = {}
    for row, weight in terms:
        parts.setdefault(row, []).append(weight)
    return {row: math.fsum(weights) for row, weights in parts.items()}


def _branches(unguided: Terms, guidance: Terms, ramp: list[float]) -> tuple[Branch, ...]:
    """unguided + ramp * guidance, one branch per row that ever has a weight."""
    start, slope = _sums(unguided), _sums(guidance)
    branches = []
    for row in start | slope:
        weights = [start.get(row, 0.0) + fraction * slope.get(row, 0.0) for fraction in ramp]
        weights = [weight if abs(weight) > NEGLIGIBLE else 0.0 for weight in weights]
        if any(weights):
            branches.append(Branch(*row, weights=tuple(weights)))
    for step in range(len(ramp)):
        total = math.fsum(branch.weights[step] for branch in branches)
        assert abs(total - 1.0) < 1e-6, f"guidance weights of step {step} sum to {total}"
    return tuple(branches)


def _check_numbers(recipe: object, **numbers: float) -> None:
    own_numbers(recipe)
    for name in numbers:
        number = getattr(recipe, name)
        if not (is_number(number) and number >= 0.0):
            raise StylemuseError(
                f"{type(recipe).__name__} {name} {number!r} is not allowed: a finite number, at least 0"
            )
