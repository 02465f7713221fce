"""What the tests of whole pipelines do again and again: load a model, draw, and count what the network is asked for."""

from __future__ import annotations

from collections.abc import Sized
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import stylemuse
from stylemuse import Pipeline, Request
from stylemuse.backend.static import StaticRows
from stylemuse.decoding.buckets import Buckets

FOX = Request("a fox", seed=7)
"""What `draw` draws."""


def load(folder: Path, **options: Any) -> Pipeline:
    """A pipeline in fp32, whatever the machine has."""
    return stylemuse.load(str(folder), **{"dtype": "float32"} | options)


def draw(pipe: Pipeline, prompt: str = "a fox", **options: Any) -> NDArray[np.int64]:
    """The tokens (n, h, w) of a request, of seed 7 unless it says otherwise."""
    return pipe.generate(prompt, **{"seed": 7} | options).tokens


def noise(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of random pixels; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def watch(monkeypatch: pytest.MonkeyPatch, owner: object, method: str) -> list[int]:
    """The length of the first argument of every call from now on: the rows of ``features``, positions of ``logits``."""
    lengths: list[int] = []
    original = getattr(owner, method)

    def watched(first: Sized, *rest: Any) -> Any:
        lengths.append(len(first))
        return original(first, *rest)

    monkeypatch.setattr(owner, method, watched)
    return lengths


def bucketed(pipe: Pipeline) -> Pipeline:
    """The pipeline, decoding in buckets from here on whatever its kernels are: what backend triton does."""
    rows = partial(StaticRows, pipe.network)
    pipe._make_decoder = lambda most: Buckets(rows, pipe.network.device, rows=most)
    pipe._decoder = pipe._make_decoder(None)
    return pipe
