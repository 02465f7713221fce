"""A tiny model's folder with random weights and two random styles: what the tests of whole pipelines load."""

from __future__ import annotations

from pathlib import Path

import torch

from stylemuse.adapters import canonical
from stylemuse.adapters.canonical import Adapter
from stylemuse.loading.folder import weights_sha256, write_model
from stylemuse.models.amused import Amused, AmusedConfig
from stylemuse.models.text import ClipText, ClipTextConfig
from stylemuse.models.tokenizer import build_word_tokenizer
from stylemuse.models.vq import VQ, VQConfig

STYLES = ("ink", "neon")
SIDE = 32
"""Width and height of its pictures; sides may be any multiple of 8, an 8 x 8 grid of tokens being its own."""

WORDS = ("a", "an", "the", "in", "on", "of", "style", *STYLES, "fox", "cat", "owl", "frog", "castle", "red", "blue")
PROJECTIONS = ("to_q", "to_k", "to_v")


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the folder, about 0.7 MB in fp32, and return it. A seed gives other weights, the same sizes."""
    tokenizer = build_word_tokenizer(WORDS, folder / "tokenizer", 16)
    end = int(tokenizer([""])[0, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Amused(
            AmusedConfig(
                hidden_size=32, cond_embed_dim=20, micro_cond_encode_dim=6, micro_cond_embed_dim=30,
                encoder_hidden_size=24, vocab_size=70, codebook_size=64, in_channels=24, block_out_channels=24,
                num_res_blocks=1, downsample=True, upsample=True, block_num_heads=3, num_hidden_layers=2,
                num_attention_heads=4, intermediate_size=40, sample_size=8,
            )
        )  # fmt: skip
        vq = VQ(VQConfig((8, 12, 16), layers_per_block=1, latent_channels=6, num_vq_embeddings=64, norm_num_groups=4))
        text = ClipText(
            ClipTextConfig(
                vocab_size=end + 1, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
                projection_dim=20, max_position_embeddings=16, eos_token_id=end,
            )
        )  # fmt: skip
        with torch.no_grad():
            # Away from the zeros that training starts at, so that text, size and every block matter.
            for network in (transformer, vq, text):
                for parameter in network.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    extra = {"defaults": {"steps": 4, "scale": 3.0}, "styles": list(STYLES)}
    write_model(folder, transformer, vq, text, dtype=torch.float32, extra=extra)
    sha256 = weights_sha256(folder / "transformer")
    for index, name in enumerate(STYLES):
        canonical.save(
            random_style(transformer.config, name, seed=index + 1, base_sha256=sha256), folder / "styles" / name
        )
    return folder


def random_style(
    config: AmusedConfig, name: str, *, rank: int = 2, seed: int = 1, base_sha256: str | None = None
) -> Adapter:
    """A LoRA on every attention projection, strong enough to change the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def pair(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        return down, torch.randn(outputs, rank, generator=generator) * 0.5

    sites = {site: place for site, place in config.sites().items() if site.endswith(PROJECTIONS)}
    return Adapter(
        name=name,
        kind="lora",
        tensors={site: pair(place.inputs, place.outputs) for site, place in sites.items()},
        base_model="tiny",
        base_sha256=base_sha256,
        descriptor=f"in {name} style",
        caption=f"a cat in {name} style",
        recommended={"guidance": "StyleDrop", "style": 1.0, "text": 2.0},
        licence="CC0-1.0",
    )
