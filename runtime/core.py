"""The nouns of the runtime: frozen and validated, and the one error a user can cause."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURES = 256
MAX_STEPS = 1000
MAX_PROMPT = 10_000
"""Bounds of one request: pictures, decoding steps, characters of a prompt."""
STYLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a style may be called: a name that is a file's name everywhere."""
MAX_NUMBER = 1e30
"""Bound on any number that is given; the largest of fp32 is 3e38."""
AESTHETIC_SCORE = 6.0
"""The micro-condition that aMUSEd's pipelines give beside a picture's size."""


class StylemuseError(ValueError):
    """Anything a user can get wrong (an input, an option, a file): one line, what was given and what is allowed."""


class UnreadWarning(UserWarning):
    """A prompt is longer than the text encoder reads; ``words`` are those that it does not."""

    def __init__(self, words: str, length: int) -> None:
        shown = words if len(words) <= 200 else f"{words[:200]}..."
        super().__init__(f"the prompt is over {length} tokens; not read: {shown}")
        self.words = words


class Sizes(NamedTuple):
    """What pictures a model draws: its own grid's side in tokens, pixels per token, and what sides are multiples of."""

    side: int
    factor: int
    unit: int


@dataclass(frozen=True)
class Branch:
    """One row of a picture's guidance: the network seen through one prompt and one adapter (or none).

    Guidance is a weighted sum of branches: the hidden state at step k is ``sum_b weights_b[k] * hidden_b``, and the
    weights of a picture's branches sum to 1 at every step.

    Attributes:
        prompt: the full text this row is conditioned on.
        style: name of an adapter, or None for the base model.
        strength: multiplies the adapter's own scale; without effect when ``style`` is None.
        weights: one per decoding step. At a step where the weight is 0 the branch is not computed.
    """

    prompt: str
    style: str | None
    strength: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Style:
    """How a style is used: its weight in a blend (what is left of 1 goes to the base), and its adapter's strength."""

    weight: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        own_numbers(self)
        if not (is_number(self.weight) and self.weight > 0):
            raise StylemuseError(f"style weight {self.weight!r} is not allowed: above 0, at most 1 in all")
        if not is_number(self.strength):
            raise StylemuseError(f"style strength {self.strength!r} is not allowed: a finite number")


class Guidance(Protocol):
    """A recipe that turns a request into branches; see ``decoding.guidance``."""

    def branches(
        self, prompt: str, negative_prompt: str, styles: Mapping[str, Style], steps: int, ramp: str = "constant"
    ) -> tuple[Branch, ...]:
        """The rows of a request's pictures; their weights sum to 1 at every step."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        steps: decoding steps T; None takes the style's recommendation, else the model's.
        schedule: "amused", "styledrop" or "maskgit".
        temperature: of the choice which tokens to keep; None is the schedule's own, aMUSEd also takes (first, last).
        ramp: how guidance grows over the steps: "constant", "linear" (Muse), "after_first" (StyleDrop-PyTorch).
    """

    steps: int | None = None
    schedule: str = "amused"
    temperature: float | tuple[float, float] | None = None
    ramp: str = "constant"

    def __post_init__(self) -> None:
        own_numbers(self)
        if self.steps is not None:
            _check_count("steps", self.steps, MAX_STEPS)
        for name in ("schedule", "ramp"):
            if not isinstance(getattr(self, name), str):
                raise StylemuseError(f"{name} {getattr(self, name)!r} is not allowed: a name")
        if self.temperature is not None:
            self._check_temperature(self.temperature)

    def _check_temperature(self, given: float | tuple[float, float]) -> None:
        values = given if isinstance(given, tuple) else (given,)
        if len(values) > 2 or not all(is_number(value) and value >= 0 for value in values):
            raise StylemuseError(f"temperature {given!r} is not allowed: a number of at least 0, or (first, last)")
        if isinstance(given, tuple) and (self.schedule != "amused" or len(given) != 2):
            raise StylemuseError(f"temperatures {given!r} are not allowed: (first, last), for schedule 'amused'")


@dataclass(frozen=True)
class Request:
    """A job: one prompt, one way of drawing, n pictures.

    Attributes:
        prompt: what to draw; the style's descriptor is added by the runtime.
        style: name of an adapter, ``{name: weight or Style}``, or None for the base model.
        negative_prompt: what to steer away from; empty is the unconditional branch.
        n: pictures. Picture i has its own seed, derived from ``seed`` and reported back.
        seed: 0 to 2^63 - 1; None draws one and reports it.
        sampling, guidance: None takes the style's recommendation, else the model's.
        size: (width, height) in pixels; None is the model's own.
        image: a picture to start from; ``strength`` is how much of it is drawn anew, 1.0 masking everything.
        mask: white where ``image`` is to be drawn anew, black where it stays.
    """

    prompt: str
    style: str | Mapping[str, float | Style] | None = None
    negative_prompt: str = ""
    n: int = 1
    seed: int | None = None
    sampling: Sampling | None = None
    guidance: Guidance | None = None
    size: tuple[int, int] | None = None
    image: Image | None = None
    strength: float = 1.0
    mask: Image | None = None

    def __post_init__(self) -> None:
        own_numbers(self)
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > MAX_PROMPT:
                raise StylemuseError(f"{name} must be a text of at most {MAX_PROMPT} characters")
        if not self.prompt.strip():
            raise StylemuseError("the prompt is empty; say what to draw, for example 'a fox'")
        _check_count("n", self.n, MAX_PICTURES)
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise StylemuseError(f"seed {_told(self.seed)} is not allowed: a whole number from 0 to 2^63 - 1")
        if not (is_number(self.strength) and 0 < self.strength <= 1):
            raise StylemuseError(f"strength {self.strength!r} is not allowed: above 0, at most 1")
        if self.image is None and self.mask is not None:
            raise StylemuseError("a mask needs the image it masks")
        if self.image is None and self.strength != 1:
            raise StylemuseError("strength has no effect without an image to start from")
        if self.size is not None and not (_is_pair(self.size) and all(is_whole(side) for side in self.size)):
            raise StylemuseError(f"size {self.size!r} is not allowed: (width, height) in pixels")
        if not (self.style is None or isinstance(self.style, (str, Mapping))):
            raise StylemuseError(f"style {self.style!r} is not allowed: a name, {{name: weight}} or None")
        if not (self.sampling is None or isinstance(self.sampling, Sampling)):
            raise StylemuseError(f"sampling {self.sampling!r} is not allowed: a Sampling or None")
        if not (self.guidance is None or callable(getattr(self.guidance, "branches", None))):
            raise StylemuseError(f"guidance {self.guidance!r} is not allowed: CFG, StyleDrop or ObjectInStyle, or None")
        for name in ("image", "mask"):
            picture = getattr(self, name)
            if not (picture is None or hasattr(picture, "convert")):
                raise StylemuseError(f"{name} {picture!r} is not allowed: a PIL image")
        self.styles()

    def styles(self) -> dict[str, Style]:
        """The styles by name, a bare name or number written out."""
        if self.style is None:
            return {}
        if isinstance(self.style, str):
            return {self.style: Style()}
        return {name: use if isinstance(use, Style) else Style(use) for name, use in self.style.items()}


@dataclass(frozen=True)
class Result:
    """What a request became.

    Attributes:
        images: n pictures (PIL, RGB).
        tokens: (n, h, w) int64, the codes they were decoded from.
        seeds: the seed of each picture; a request with it and n = 1 draws that picture again.
        timings: seconds: "text", "condition", "pixels", "total", and per decoding step lists "step", "transformer",
            "head", "sampling", "remask". Requests that ran together share them. An engine's have "queue" (seconds until
            it was ready to run) and, per step, "step" alone.
    """

    images: list[Image]
    tokens: NDArray[np.int64]
    seeds: tuple[int, ...]
    timings: dict[str, Any] = field(repr=False, default_factory=dict)


def unknown(what: str, given: str, allowed: Iterable[str], shown: int = 20) -> str:
    """ "style 'nien' is unknown; did you mean 'neon'? Allowed: ..."; the nearest name where one is near."""
    names = list(allowed)
    near = difflib.get_close_matches(given, names, 1, 0.6)
    listed = ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
    hint = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
    return f"{what} {given[:80]!r} is unknown; {hint}: {listed or 'none'}"


def own_numbers(record: Any) -> None:
    """Python's numbers in the place of numpy's, in the fields of a frozen record and in tuples that they hold."""
    for name in record.__dataclass_fields__:
        value = getattr(record, name)
        if isinstance(value, np.generic):
            object.__setattr__(record, name, value.item())
        elif isinstance(value, tuple) and any(isinstance(each, np.generic) for each in value):
            plain = tuple(each.item() if isinstance(each, np.generic) else each for each in value)
            object.__setattr__(record, name, plain)


def _told(value: object) -> str:
    """A number as it is, anything else with its type: "3" is no 3."""
    return repr(value) if is_whole(value) else f"{value!r} ({type(value).__name__})"


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, and no true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def is_number(value: object) -> bool:
    """Whether it is a finite number. JSON knows whole ones too long for a float, and Python a true that is 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _check_count(name: str, value: object, most: int) -> None:
    if not (is_whole(value) and 1 <= value <= most):
        raise StylemuseError(f"{name} = {_told(value)} is not allowed: a whole number from 1 to {most}")
