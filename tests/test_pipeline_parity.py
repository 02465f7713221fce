"""Whole pipelines against those of diffusers, on one folder and with one noise: equal tokens after every step."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline
from diffusers.schedulers import scheduling_amused
from drawing import load, noise
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from stylemuse import CFG, Pipeline, Request, Result, Sampling
from stylemuse.kernels import sampling
from stylemuse.requests import start

SEED, STEPS, CODES = 11, 4, 64
Tokens = list[Tensor]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


@pytest.fixture
def peer(tiny_model: Path) -> Any:
    """diffusers' pipeline; a new one for each test, for some change it."""
    made = AmusedPipeline.from_pretrained(tiny_model)
    made.set_progress_bar_config(disable=True)
    return made


def ours(pipe: Pipeline, prompt: str, **options: Any) -> tuple[Result, Tokens]:
    """Our result, and the tokens (1, h, w) after every step."""
    seen: Tokens = []
    settings = {"seed": SEED, "steps": STEPS, "guidance": CFG(3.0)} | options
    return pipe.generate(prompt, on_step=lambda preview: seen.append(preview.tokens(0)), **settings), seen


def theirs(peer: Any, patch: pytest.MonkeyPatch, prompt: str, *images: Any, **options: Any) -> tuple[Any, Tokens]:
    """diffusers' picture (h, w, 3) in 0..1, and its tokens, with both sources of noise of its scheduler made ours."""
    steps, original, seen = count(), peer.scheduler.step, []

    def step(*, sample: Tensor, **inputs: Any) -> Any:
        size = sample[0].numel()
        places = torch.full((size,), SEED), torch.full((size,), next(steps)), torch.arange(size)
        token_noise, choice_noise = sampling.token_gumbel(CODES, *places), sampling.position_gumbel(*places)
        patch.setattr(torch, "multinomial", lambda probs, *_, **__: (probs.log() + token_noise).argmax(-1, True))
        patch.setattr(scheduling_amused, "gumbel_noise", lambda *_, **__: choice_noise[None])
        return original(sample=sample, **inputs)

    patch.setattr(peer.scheduler, "step", step)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"} | options
    drawn = peer(prompt, *images, callback=lambda *state: seen.append(state[-1].clone()), **settings).images
    return drawn[0], seen


def same(one: tuple[Result, Tokens], other: tuple[Any, Tokens]) -> None:
    """Equal tokens after every step, and pictures that differ by at most one level of 255."""
    (result, seen), (picture, expected) = one, other
    assert [tokens.tolist() for tokens in seen] == [tokens.tolist() for tokens in expected]
    assert torch.equal(torch.from_numpy(result.tokens), expected[-1])
    assert np.abs(np.asarray(result.images[0]) / 255 - picture).max() <= 1 / 255


@pytest.mark.parametrize(
    ("mine", "peers"),
    [
        ({}, {}),
        ({"negative_prompt": "a frog"}, {"negative_prompt": "a frog"}),
        ({"guidance": CFG(1.0)}, {"guidance_scale": 1.0}),
        ({"size": (48, 24)}, {"width": 48, "height": 24}),
        ({"sampling": Sampling(7, temperature=(4.0, 0.5))}, {"num_inference_steps": 7, "temperature": (4.0, 0.5)}),
    ],
    ids=["plain", "negative prompt", "no guidance", "size", "sampling"],
)
def test_text_to_image(
    pipe: Pipeline, peer: Any, mine: dict[str, Any], peers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sampling" in mine:
        mine = mine | {"steps": None}
    same(ours(pipe, "a fox", **mine), theirs(peer, monkeypatch, "a fox", **peers))


def test_a_style_is_a_lora_in_both_branches(pipe: Pipeline, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CFG with a style is what diffusers does with a LoRA in its transformer."""
    adapter, prompt = pipe.adapters["ink"], "a fox in ink style"
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=["to_q", "to_k", "to_v"])
    peer.transformer.add_adapter(config)
    sides = {"lora_A": 0, "lora_B": 1}
    tensors = {
        f"{site}.{side}.default.weight": pair[index]
        for site, pair in adapter.tensors.items()
        for side, index in sides.items()
    }
    assert not peer.transformer.load_state_dict(tensors, strict=False).unexpected_keys
    styled = ours(pipe, "a fox", style="ink")
    same(styled, theirs(peer, monkeypatch, prompt))
    assert not np.array_equal(styled[0].tokens, ours(pipe, prompt)[0].tokens), "the style must matter"


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9])
def test_image_to_image(pipe: Pipeline, peer: Any, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tokens are lost at the start is ours; diffusers loses each by chance."""
    picture, size = noise(), 64
    request = Request("a fox", image=picture, strength=strength)
    begin = start.prepare(request, (8, 8), (SEED,), Sampling(8), pipe.network)[0]
    image_peer = AmusedImg2ImgPipeline(**peer.components)
    image_peer.set_progress_bar_config(disable=True)

    def add_noise(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        assert torch.equal(tokens.flatten(), begin.tokens)
        return begin.tokens.masked_fill(begin.unknown, pipe.network.mask_id).view(1, 8, 8)

    monkeypatch.setattr(image_peer.scheduler, "add_noise", add_noise)
    assert 0 < int(begin.unknown.sum()) < size
    expected = theirs(image_peer, monkeypatch, "a fox", picture, strength=strength, num_inference_steps=8)
    same(ours(pipe, "a fox", image=picture, strength=strength, steps=8), expected)


def test_inpainting(pipe: Pipeline, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, mask = noise(), Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 32, 20))
    mask_peer = AmusedInpaintPipeline(**peer.components)
    mask_peer.set_progress_bar_config(disable=True)
    expected = theirs(mask_peer, monkeypatch, "a fox", picture, mask, strength=1.0)
    same(ours(pipe, "a fox", image=picture, mask=mask), expected)
