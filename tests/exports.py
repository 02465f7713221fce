"""What the tests of exports share: a model with styles of both kinds, requests of every kind, and what is the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from drawing import noise
from models import random_style

import stylemuse as sm
from stylemuse import Adapter, Request, Sampling


def with_more_styles(model: Path) -> sm.Pipeline:
    """The tiny model by the reference, with a style of bottlenecks and one of a higher rank beside its own."""
    made = sm.load(str(model), backend="reference", device="cpu", dtype="float32")
    made.adapters.add("drop", bottleneck(made))
    made.adapters.add("wide", random_style(made.network.transformer.config, "wide", rank=5, seed=4))
    return made


def bottleneck(pipe: sm.Pipeline) -> Adapter:
    """A style of bottlenecks after some of the layers' parts, strong enough to change tokens."""
    generator = torch.Generator().manual_seed(9)
    places = list(pipe.network.transformer.config.bottleneck_sites().items())[:3]
    pairs = {
        name: (torch.randn(width, 3, generator=generator) * 0.3, torch.randn(3, width, generator=generator) * 0.3)
        for name, width in places
    }
    return Adapter("drop", "bottleneck", pairs, base_model="tiny", scale=0.8, descriptor="in drop style")


def any_request(choice: random.Random) -> Request:
    """A prompt in any style, schedule and size."""
    style = choice.choice(
        (None, "ink", "wide", "drop", {"ink": 0.4, "drop": 0.6}, {"neon": sm.Style(1.0, strength=0.5)})
    )
    return Request(
        prompt=choice.choice(("a fox", "a cat", "an owl in the castle")),
        style=style,
        n=choice.choice((1, 2)),
        seed=choice.getrandbits(60),
        sampling=Sampling(steps=choice.choice((1, 3, 5)), schedule=choice.choice(("amused", "styledrop", "maskgit"))),
        size=choice.choice(((32, 32), (16, 32), (40, 24))),
        image=noise(choice.getrandbits(8)) if choice.random() < 0.2 else None,
        strength=1.0,
    )


def same(ours: Sequence[sm.Result], theirs: Sequence[sm.Result]) -> None:
    """Equal tokens and seeds; a byte of a picture may be rounded either way."""
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert one.seeds == other.seeds
        for picture, wanted in zip(one.images, other.images, strict=True):
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(wanted)).max() <= 1
