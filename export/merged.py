"""One style merged into a model's weights: a folder that diffusers, and this runtime, load like any other model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from .. import weights
from ..adapters.merge import merged
from ..core import StylemuseError
from ..folder import read_model, write_model
from ..hub import resolve
from ..pipeline import Pipeline


def write_merged(pipe: Pipeline, style: str, folder: str | Path, *, strength: float = 1.0) -> Path:
    """Write ``pipe``'s model with ``style`` in its weights, merged in fp32 from the model's own files.

    The descriptor of the style stays part of the prompts; the other networks and the tokenizer are copied.

    Raises:
        StylemuseError: the folder is not empty, the style is unknown, or a bottleneck, which no weight can hold.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise StylemuseError(f"{folder} is not empty; give a folder that does not exist yet")
    adapter, source = pipe.adapters[style], resolve(pipe.name)
    # Read again: the running network may be in bf16, and a merge starts from pristine weights.
    networks = read_model(source)
    tensors = weights.to_checkpoint(networks.transformer, weights.AMUSED)
    weights.load_into(networks.transformer, merged(tensors, adapter, strength * adapter.scale), weights.AMUSED)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    extra = {"defaults": dict(pipe.defaults), "styles": []}
    write_model(folder, networks.transformer, networks.vq, networks.text, dtype=torch.float32, extra=extra)
    return folder
