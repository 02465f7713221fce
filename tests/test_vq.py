"""The VQ tokenizer against diffusers VQModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import tokenizers

from stylemuse.core import StylemuseError
from stylemuse.models.vq import VQ, VQConfig

SHAPES = [{}, {"block_out_channels": (8, 12)}, {"layers_per_block": 1, "vq_embed_dim": 5}]


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_encode_and_decode_are_diffusers(changes: dict[str, Any]) -> None:
    peer, ours = tokenizers(**changes)
    pictures = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    latent = peer.encode(pictures).latents
    assert (ours.latent(pictures) - latent).abs().max() <= 1e-4
    _, _, (_, _, ids) = peer.quantize(latent)
    assert torch.equal(ours.encode(pictures).flatten(), ids.flatten())
    grid = ours.encode(pictures)
    shape = (*grid.shape, ours.config.embed_dim)
    expected = peer.decode(grid, force_not_quantize=True, shape=shape).sample.clip(0, 1)
    assert (ours.decode(grid) - expected).abs().max() <= 1e-4


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        model = VQ(VQConfig())
    assert sum(p.numel() for p in model.parameters()) == 146_244_675


@pytest.mark.parametrize(
    "config", [{"act_fn": "relu"}, {"mid_block_add_attention": True}, {"down_block_types": ["AttnDownEncoderBlock2D"]}]
)
def test_unsupported_configs_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(StylemuseError, match=next(iter(config))):
        VQConfig.from_dict(config)
