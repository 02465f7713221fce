"""The embedded model: complete, small, the same network for diffusers and for us, and able to draw its styles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AmusedPipeline, UVit2DModel, VQModel
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import stylemuse as sm
from stylemuse.loading.hub import resolve
from stylemuse.tuning.style import Recipe, tune

FOLDER = resolve("demo")
STYLES = ("arcade", "blueprint", "ember", "neon", "retro", "riso")


@pytest.fixture(scope="module")
def pipe() -> sm.Pipeline:
    return sm.load("demo", dtype="float32")  # what the peers compute in


@torch.no_grad()
def test_diffusers_computes_the_same(pipe: sm.Pipeline) -> None:
    text = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    peer = UVit2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32).eval()
    prompt, network = "a fox, outline in cyan on navy with grid", pipe.network
    ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoded = text(ids, output_hidden_states=True)
    ours = network.text(prompt)
    assert (ours.penultimate - encoded.hidden_states[-2]).abs().max() <= 1e-4
    assert (ours.pooled - encoded.text_embeds).abs().max() <= 1e-4

    tokens = torch.randint(0, network.mask_id + 1, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    micro = torch.tensor([[128.0, 128.0, 0.0, 0.0, 6.0]])
    expected = peer(tokens, encoded.hidden_states[-2], encoded.text_embeds, micro)[0].flatten(1).T
    context = network.context(ours, (16, 16))
    logits = network.logits(network.readout(network.features(tokens.flatten(1), [context])[0]))
    assert (logits - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_diffusers_draws_the_same_pixels(pipe: sm.Pipeline) -> None:
    peer = VQModel.from_pretrained(FOLDER / "vqvae", torch_dtype=torch.float32).eval()
    tokens = torch.randint(0, pipe.network.mask_id, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    width = pipe.network.vq.config.embed_dim
    expected = peer.decode(tokens, force_not_quantize=True, shape=(1, 16, 16, width)).sample.clip(0, 1)
    assert (pipe.network.vq.decode(tokens) - expected).abs().max() <= 1e-4


def test_the_pipeline_of_diffusers_draws_with_it() -> None:
    peer = AmusedPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    pictures = peer(["a fox", "an owl"], num_inference_steps=2, guidance_scale=2.0).images
    assert [picture.size for picture in pictures] == [(128, 128), (128, 128)]


def test_styles_are_there_with_their_reference_pictures(pipe: sm.Pipeline) -> None:
    assert pipe.adapters.names == STYLES
    parameters = sum(value.numel() for value in pipe.network.transformer.parameters())
    for name in STYLES:
        adapter = pipe.adapters[name]
        assert adapter.descriptor
        assert adapter.base_sha256 == pipe.adapters.base_sha256()
        assert sum(a.numel() + b.numel() for a, b in adapter.tensors.values()) < 0.01 * parameters
        with Image.open(FOLDER / "styles" / name / "reference.png") as picture:
            assert picture.size == (128, 128)


def test_a_mixed_batch_draws_what_each_style_draws_alone(pipe: sm.Pipeline) -> None:
    requests = [sm.Request("a fox", style=style, seed=7) for style in (None, *STYLES)]
    mixed = pipe.run(requests)
    pictures = [np.asarray(result.images[0], dtype=np.float32) for result in mixed]
    for request, result in zip(requests, mixed, strict=True):
        assert np.array_equal(pipe.run([request])[0].tokens, result.tokens)
    for index, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 4 for other in pictures[:index])


@pytest.mark.slow
def test_a_style_can_be_tuned_from_its_picture(pipe: sm.Pipeline) -> None:
    """Real activations: some channels are zero everywhere, which random weights have none of."""
    losses: list[float] = []
    with Image.open(FOLDER / "styles" / "neon" / "reference.png") as picture:
        recipe = Recipe(steps=40)
        tune(
            pipe,
            picture,
            "a fox in neon style",
            name="again",
            recipe=recipe,
            on_step=lambda *step: losses.append(step[2]),
        )
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_size_of_the_package() -> None:
    files = [path for path in Path(FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
