"""A model's folder in diffusers layout: read into networks, and written.

model_index.json  transformer/  vqvae/  text_encoder/  tokenizer/  scheduler/       (each with its config.json)
stylemuse.json    optional: defaults and the styles that come with the model
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..core import StylemuseError
from ..models.amused import Amused, AmusedConfig
from ..models.networks import Networks
from ..models.text import ClipText, ClipTextConfig
from ..models.tokenizer import ClipTokenizer
from ..models.vq import VQ, VQConfig
from . import weights

_PARTS = {
    "transformer": ("diffusers", "UVit2DModel"),
    "vqvae": ("diffusers", "VQModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "AmusedScheduler"),
}
EXTRA = "stylemuse.json"


def read_model(folder: Path, variant: str | None = None) -> Networks:
    """Load every network of a folder; complete, or an error that names what is wrong with it."""
    index = read_json(folder / "model_index.json")
    for part, (_, kind) in _PARTS.items():
        found = (index.get(part) or [None, None])[1]
        if found != kind:
            raise StylemuseError(f"{folder}: {part} is {found}; supported: {kind}")
    configs = {part: read_json(folder / part / "config.json") for part in _TABLES}
    # Without storage: the tensors of the file become the parameters, so no weight exists twice.
    with torch.device("meta"):
        transformer = Amused(AmusedConfig.from_dict(configs["transformer"]))
        vq = VQ(VQConfig.from_dict(configs["vqvae"]))
        text = ClipText(ClipTextConfig.from_dict(configs["text_encoder"]))
    for part, network in (("transformer", transformer), ("vqvae", vq), ("text_encoder", text)):
        tensors = {name: value.float() for name, value in weights.read(folder / part, variant).items()}
        weights.load_into(network, tensors, _TABLES[part], folder / part)
    extra = read_json(folder / EXTRA) if (folder / EXTRA).exists() else {}
    return Networks(transformer.rest(), vq.eval(), text.eval(), ClipTokenizer.from_folder(folder / "tokenizer"), extra)


def write_model(
    folder: Path,
    transformer: Amused,
    vq: VQ,
    text: ClipText,
    *,
    dtype: torch.dtype = torch.float16,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write networks as a folder that diffusers' ``AmusedPipeline`` loads; the tokenizer's files must be there."""
    blocks = len(vq.config.block_out_channels)
    networks: dict[str, tuple[nn.Module, str, dict[str, Any]]] = {
        "transformer": (transformer, "diffusion_pytorch_model", asdict(transformer.config)),
        "vqvae": (
            vq,
            "diffusion_pytorch_model",
            asdict(vq.config)
            | {
                "down_block_types": ["DownEncoderBlock2D"] * blocks,
                "up_block_types": ["UpDecoderBlock2D"] * blocks,
                "mid_block_add_attention": False,
                "lookup_from_codebook": True,
            },
        ),
        "text_encoder": (text, "model", text.config.to_dict()),
    }
    for part, (network, stem, config) in networks.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        tensors = {name: value.to(dtype) for name, value in weights.to_checkpoint(network, _TABLES[part]).items()}
        if part == "vqvae":
            tensors |= _wide_codes(tensors, vq.config)
            config["vq_embed_dim"] = None
        save_file(tensors, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
        _write_json(folder / part / "config.json", {"_class_name": _PARTS[part][1]} | config)
    schedule = {"mask_token_id": transformer.config.mask_id, "masking_schedule": "cosine"}
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "AmusedScheduler"} | schedule)
    index = {part: list(kind) for part, kind in _PARTS.items()}
    _write_json(folder / "model_index.json", {"_class_name": "AmusedPipeline"} | index)
    if extra is not None:
        write_extra(folder, extra)


def _wide_codes(tensors: Mapping[str, torch.Tensor], config: VQConfig) -> dict[str, torch.Tensor]:
    """Codes as wide as the latent, by zeros that change nothing: `AmusedPipeline` reads them at that width only."""
    assert config.embed_dim <= config.latent_channels, "codes wider than the latent"
    axes = {"quantize.embedding.weight": 1, "quant_conv.weight": 0, "quant_conv.bias": 0, "post_quant_conv.weight": 1}
    wide = {}
    for name, axis in axes.items():
        shape = list(tensors[name].shape)
        shape[axis] = config.latent_channels
        wide[name] = tensors[name].new_zeros(shape)
        wide[name].narrow(axis, 0, config.embed_dim).copy_(tensors[name])
    return wide


def write_extra(folder: Path, extra: Mapping[str, Any]) -> None:
    """Write what only this runtime reads: {"defaults": {"steps", "scale"}, "styles": [names]}."""
    _write_json(folder / EXTRA, extra)


def weights_sha256(folder: Path, variant: str | None = None) -> str:
    """Hash of a network's weights, the same for one file, shards and any number format that holds the same values."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.read(folder, variant).items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an error names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StylemuseError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise StylemuseError(f"{path}: a JSON object is needed")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_TABLES = {"transformer": weights.AMUSED, "vqvae": weights.VQ, "text_encoder": weights.CLIP_TEXT}
