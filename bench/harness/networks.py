"""Models to measure: the embedded one, and the published sizes with random weights, made in place of a download.

A step costs the same at any weights. The random models read prompts with the embedded model's words, 77 ids long.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stylemuse import Pipeline, load
from stylemuse.adapters.canonical import Adapter
from stylemuse.backend.machine import choose, choose_kernels
from stylemuse.kernels.quantization import FORMATS
from stylemuse.loading.assembly import TorchPipeline, assemble
from stylemuse.loading.folder import read_model, write_model
from stylemuse.loading.hub import resolve
from stylemuse.models.amused import Amused, AmusedConfig
from stylemuse.models.networks import Networks
from stylemuse.models.text import ClipText, ClipTextConfig
from stylemuse.models.tokenizer import build_word_tokenizer
from stylemuse.models.vq import VQ, VQConfig
from stylemuse.pretraining.attributes import vocabulary
from stylemuse.tuning.style import PROJECTIONS

SIZES: Mapping[str, Mapping[str, Any]] = {
    "amused-256": {"sample_size": 16},
    "amused-512": {"sample_size": 32, "downsample": True, "upsample": True},
}
"""What the published transformers change in the defaults of `AmusedConfig` and of diffusers' UVit2DModel."""

TEXT: Mapping[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}  # fmt: skip
"""CLIP ViT-L/14's text tower."""

TINY = AmusedConfig(
    hidden_size=64, cond_embed_dim=32, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=32,
    vocab_size=70, codebook_size=64, in_channels=32, block_out_channels=32, num_res_blocks=1, block_num_heads=2,
    num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, sample_size=4,
)  # fmt: skip

MODELS = ("demo", *SIZES)
BACKENDS = ("auto", "reference", "triton", "onnx")


def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter random, so large that no path vanishes: matrices keep the variance, the rest moves by 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            if fan > 1 and parameter.shape[:3] != (1, 1, 1):
                parameter.normal_(std=fan**-0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def pipeline(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    slots: int = 64,
    rank: int = 32,
    backend: str = "auto",
    quantization: str | None = None,
) -> Pipeline:
    """A pipeline without styles: "demo", or a published size with random weights."""
    if backend == "onnx":
        return _exported(model, device, dtype, seed, slots, rank)
    machine = choose(device, dtype)
    kernels, why = choose_kernels(backend, machine.device)
    made = read_model(resolve(model)) if model == "demo" else _random(model, seed)
    number = None if quantization is None else FORMATS[quantization]
    return assemble(model, made, machine, lambda: model, kernels, why=why, slots=slots, rank=rank, quantization=number)


def _exported(model: str, device: str | None, dtype: str | None, seed: int, slots: int, rank: int) -> Pipeline:
    """The same over its graphs in ONNX Runtime."""
    with write_folder(model, seed=seed) as folder:
        pipe = load(str(folder), backend="onnx", device=device, dtype=dtype, slots=slots, rank=rank)
    for name in pipe.adapters.names:
        pipe.adapters.remove(name)
    pipe.name = model
    return pipe


def architecture(pipe: Pipeline) -> AmusedConfig:
    """The numbers of its transformer; graphs have none, so they are those of the model that was exported."""
    if isinstance(pipe, TorchPipeline):
        return pipe.network.transformer.config
    if pipe.name == "demo":
        return AmusedConfig.from_dict(json.loads((resolve("demo") / "transformer" / "config.json").read_text("utf-8")))
    return TINY if pipe.name == "tiny" else AmusedConfig(**SIZES[pipe.name])


def _random(model: str, seed: int) -> Networks:
    """A published size, or "tiny", which is for showing that something runs."""
    return tiny_networks(TINY, seed) if model == "tiny" else random_networks(AmusedConfig(**SIZES[model]), seed=seed)


def tiny_networks(config: AmusedConfig, seed: int = 0) -> Networks:
    """Networks around a transformer with the widths of `TINY`."""
    vq = VQConfig((8, 12), 1, latent_channels=6, num_vq_embeddings=TINY.codebook_size, norm_num_groups=4)
    text = {**TEXT, "vocab_size": 2048, "hidden_size": TINY.encoder_hidden_size, "intermediate_size": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": TINY.cond_embed_dim}
    return random_networks(config, vq=vq, text=text, seed=seed)


def random_networks(
    config: AmusedConfig, *, vq: VQConfig | None = None, text: Mapping[str, Any] = TEXT, seed: int = 0
) -> Networks:
    """Networks of these sizes, fp32 on the CPU; ``text`` must take ids of the embedded model's words."""
    transformer, drawer, encoder = Amused(config), VQ(vq or VQConfig()), ClipText(ClipTextConfig.from_dict(text))
    for index, network in enumerate((transformer, drawer, encoder)):
        randomize(network, seed + index)
    with tempfile.TemporaryDirectory() as folder:
        words = build_word_tokenizer(vocabulary(), folder, text["max_position_embeddings"])
    return Networks(
        transformer.rest(), drawer.eval(), encoder.eval(), words, {"defaults": {"steps": 12, "scale": 10.0}}
    )


@contextmanager
def write_folder(model: str, *, seed: int = 0) -> Iterator[Path]:
    """A folder in diffusers' layout with the weights of `pipeline`, fp32; of a published size it is a temporary one."""
    if model == "demo":
        yield resolve(model)
        return
    made = _random(model, seed)
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as name:
        folder = Path(name)
        build_word_tokenizer(vocabulary(), folder / "tokenizer", made.text.config.max_position_embeddings)
        write_model(folder, made.transformer, made.vq, made.text, dtype=torch.float32, extra=made.extra)
        del made
        yield folder


def style_name(index: int) -> str:
    """The name of a random style."""
    return f"random-{index}"


def change_to(pipe: Pipeline, name: str) -> None:
    """What it costs a request to name another resident style: its version pinned, its slot taken, both given back."""
    version = pipe.adapters.pin(name)
    pipe.adapters.release(pipe.adapters.acquire(version))
    pipe.adapters.unpin(version)


def random_adapter(pipe: Pipeline, name: str, *, rank: int = 16, seed: int = 0) -> Adapter:
    """A LoRA on the attention projections, as aMUSEd's are, with an effect too small to matter to a step's numbers."""
    generator = torch.Generator().manual_seed(seed)

    def pair(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        return down, torch.randn(outputs, rank, generator=generator) * 1e-2

    sites = {site: at for site, at in architecture(pipe).sites().items() if site.endswith(PROJECTIONS)}
    tensors = {site: pair(at.inputs, at.outputs) for site, at in sites.items()}
    return Adapter(name=name, kind="lora", tensors=tensors, base_model=pipe.name, descriptor=f"in {name} style")
