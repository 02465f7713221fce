"""Nothing is silently ignored (law 4): one line says what was given and what is allowed, before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawing import draw, load, noise, watch
from models import random_style
from PIL import Image

import stylemuse
from stylemuse import CFG, ObjectInStyle, Pipeline, Sampling, StyleDrop, StylemuseError

BLACK = Image.new("L", (32, 32))

OPTIONS: dict[str, dict[str, Any]] = {
    r"style 'nope' is unknown; allowed: ink, neon$": {"style": {"ink": 0.5, "nope": 0.2}},
    r"style 'gone' is unknown; allowed: ink, neon$": {"style": "ink", "guidance": ObjectInStyle("gone", "a cat")},
    r"ObjectInStyle needs a style beside its object": {"guidance": ObjectInStyle("ink", "a cat")},
    r"style weights sum to 1\.2: at most 1 is allowed$": {"style": {"ink": 0.6, "neon": 0.6}},
    r"style weight 0 is not allowed: above 0": {"style": {"ink": 0}},
    r"unknown option colour; allowed: prompt, style, .*steps, schedule$": {"colour": "red"},
    r"schedule 'cosine' is unknown; allowed: amused, styledrop, maskgit$": {"schedule": "cosine"},
    r"guidance ramp 'up' is unknown: 'constant', 'linear', 'after_first'$": {"sampling": Sampling(ramp="up")},
    r"steps = 0 is not allowed: a whole number from 1 to 1000$": {"steps": 0},
    r"n = 0 is not allowed: a whole number from 1 to 256$": {"n": 0},
    r"seed -1 is not allowed: a whole number from 0 to 2\^63 - 1$": {"seed": -1},
    r"size 20 x 32 is impossible for .*: both sides must be multiples of 8": {"size": (20, 32)},
    r"size 1024 x 1024 is impossible for .* at most 256 x 256 pixels$": {"size": (1024, 1024)},
    r"strength has no effect without an image": {"strength": 0.5},
    r"a mask needs the image it masks$": {"mask": BLACK},
    r"strength 0\.2 redraws nothing in 4 steps; at least 0\.25$": {"image": noise(), "strength": 0.2},
    r"strength 0 is not allowed: above 0, at most 1$": {"image": noise(), "strength": 0},
    r"the mask is black everywhere": {"image": noise(), "mask": BLACK},
    r"negative_prompt must be a text": {"negative_prompt": 5},
}
"""Options that a model with the styles ink and neon refuses, by the start of its answer."""

LOADING: dict[str, dict[str, Any]] = {
    r"backend 'tpu' is not there; allowed: auto, reference, triton, onnx$": {"backend": "tpu"},
    r"device 'tpu' is unknown; allowed: cpu, cuda": {"device": "tpu"},
    r"dtype 'float16' is not supported; allowed: float32, bfloat16$": {"dtype": "float16"},
    r"adapter ink has rank 2; this bank allows at most 1, the rank it was loaded with$": {"rank": 1},
    r".*: no diffusion_pytorch_model\.fp16\.safetensors": {"variant": "fp16"},
    r"model .*: revision 'main' given; it is allowed for a Hub id only$": {"revision": "main"},
}

OF_A_WRONG_KIND: dict[str, Callable[[], dict[str, Any]]] = {
    "guidance": lambda: {"guidance": "cfg"},
    "sampling": lambda: {"sampling": "amused"},
    "style": lambda: {"style": ["ink"]},
    "size": lambda: {"size": 32},
    "image": lambda: {"image": "fox.png"},
    "schedule": lambda: {"schedule": ["amused"]},
    "ramp": lambda: {"sampling": Sampling(ramp=["linear"])},  # type: ignore[arg-type]
    "temperature": lambda: {"sampling": Sampling(temperature="hot")},  # type: ignore[arg-type]
    r"temperature -1\.0 is not allowed": lambda: {"sampling": Sampling(temperature=-1.0)},
    r"temperature \(1\.0, 2\.0, 3\.0\)": lambda: {"sampling": Sampling(temperature=(1.0, 2.0, 3.0))},  # type: ignore[arg-type]
    "negative prompt has no effect": lambda: {"guidance": CFG(1.0), "negative_prompt": "a cat"},
    "ramp 'linear' has no effect": lambda: {"guidance": CFG(1.0), "sampling": Sampling(ramp="linear")},
    "CFG scale": lambda: {"guidance": CFG("3")},  # type: ignore[arg-type]
    "StyleDrop style": lambda: {"guidance": StyleDrop(style=None)},  # type: ignore[arg-type]
}
"""Values that are no such thing at all, by the words the answer must have."""


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    """Shared: what is refused changes nothing."""
    return load(tiny_model)


def refused(action: Callable[[], Any], answer: str) -> None:
    """The action is refused in one line that matches."""
    with pytest.raises(StylemuseError, match=answer) as error:
        action()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", OPTIONS)
def test_options(pipe: Pipeline, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = watch(monkeypatch, pipe.network, "features")
    refused(lambda: draw(pipe, **OPTIONS[answer]), f"^{answer}")
    assert not forwards


@pytest.mark.parametrize("words", OF_A_WRONG_KIND)
def test_values_of_a_wrong_kind(pipe: Pipeline, words: str) -> None:
    refused(lambda: draw(pipe, **OF_A_WRONG_KIND[words]()), words)


@pytest.mark.parametrize("prompts", [["a fox", 3], ["a fox", ""], "", " \n", 3])
def test_prompts(pipe: Pipeline, prompts: Any) -> None:
    refused(lambda: pipe.generate(prompts), "prompt")


@pytest.mark.parametrize("schedule", ["styledrop", "maskgit"])
def test_a_pair_of_temperatures_is_for_amused(pipe: Pipeline, schedule: str) -> None:
    refused(lambda: draw(pipe, sampling=Sampling(schedule=schedule, temperature=(2.0, 0.0))), "temperature")


@pytest.mark.parametrize("steps", [3, 7, 12, 49, 1000])
def test_the_least_strength_is_one_that_works(pipe: Pipeline, steps: int) -> None:
    """What the refusal of a strength recommends is accepted."""
    with pytest.raises(StylemuseError, match="redraws nothing") as error:
        draw(pipe, image=noise(), strength=0.0001, steps=steps)
    draw(pipe, image=noise(), strength=float(str(error.value).rpartition(" ")[2]), steps=steps)


@pytest.mark.parametrize("answer", LOADING)
def test_loading(tiny_model: Path, answer: str) -> None:
    refused(lambda: stylemuse.load(str(tiny_model), **LOADING[answer]), f"^{answer}")


def test_adapters(pipe: Pipeline, tiny_model: Path) -> None:
    config, ink, adapters = pipe.network.transformer.config, tiny_model / "styles/ink", pipe.adapters
    refused(
        lambda: adapters.add("big", random_style(config, "big", rank=33)),
        r"^adapter big has rank 33; this bank allows at most 32, ",
    )
    other = random_style(config, "other", base_sha256="0" * 64)
    refused(lambda: adapters.add("other", other), r"^adapter other is made for another base model \(tiny\)")
    refused(lambda: adapters.add("ink", ink), r"^adapter 'ink' exists already")
    refused(lambda: adapters.add("more", ink, alpha=1.0), r"drop alpha and recipe$")
    refused(lambda: adapters.add("no name", ink), r"^adapter name 'no name' is not allowed")
    refused(lambda: adapters.add("more", tiny_model / "styles/more"), r"^more is missing")
    refused(lambda: adapters.remove("more"), r"^style 'more' is unknown; allowed: ink, neon$")
    assert adapters.names == ("ink", "neon")
