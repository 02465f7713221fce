"""Tiny diffusers networks with random weights, and our networks filled from them: what the parity tests compare."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UVit2DModel, VQModel

from stylemuse.loading import weights
from stylemuse.models.amused import Amused, AmusedConfig
from stylemuse.models.vq import VQ, VQConfig

TINY: dict[str, Any] = {
    "hidden_size": 48, "cond_embed_dim": 20, "micro_cond_encode_dim": 6, "micro_cond_embed_dim": 30,
    "encoder_hidden_size": 28, "vocab_size": 70, "codebook_size": 67, "in_channels": 36, "block_out_channels": 36,
    "num_res_blocks": 2, "block_num_heads": 3, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 52, "sample_size": 5,
}  # fmt: skip


def random_weights(module: torch.nn.Module, seed: int) -> None:
    """Every parameter random and of a size that lets every path matter, the ones that start at 0 or 1 too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            if parameter.ndim > 1 and fan > 1 and parameter.shape[:3] != (1, 1, 1):
                parameter.copy_(noise / fan**0.5)
            else:
                parameter.copy_(parameter + 0.3 * noise)


def transformers(seed: int = 0, **changes: Any) -> tuple[UVit2DModel, Amused]:
    """diffusers' transformer and ours with the same random weights."""
    config = TINY | changes
    peer = UVit2DModel(**config).eval()
    random_weights(peer, seed)
    ours = Amused(AmusedConfig.from_dict(peer.config))
    weights.load_into(ours, peer.state_dict(), weights.AMUSED)
    return peer, ours.rest()


def tokenizers(seed: int = 0, **changes: Any) -> tuple[VQModel, VQ]:
    """diffusers' VQ model and ours with the same random weights."""
    widths = changes.pop("block_out_channels", (8, 12, 20))
    config = {
        "block_out_channels": widths, "layers_per_block": 2, "latent_channels": 6, "num_vq_embeddings": 37,
        "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths), "mid_block_add_attention": False,
        "lookup_from_codebook": True,
    } | changes  # fmt: skip
    peer = VQModel(**config).eval()
    random_weights(peer, seed)
    ours = VQ(VQConfig.from_dict(peer.config))
    weights.load_into(ours, peer.state_dict(), weights.VQ)
    return peer, ours.eval()


def text_inputs(config: Any, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random text features, pooled vectors and micro-conditions for ``rows`` rows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randn(rows, length, config.encoder_hidden_size, generator=generator),
        "pooled": torch.randn(rows, config.cond_embed_dim, generator=generator),
        "micro": torch.tensor([[512.0, 384.0, 0.0, 3.0, 6.0]]).repeat(rows, 1),
    }
