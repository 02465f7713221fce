"""Safetensors files -> named tensors -> a module's parameters, completely or with an error that names the tensors.

A table says, for each of our parameter names, which tensors of the checkpoint it is made of: several of them lie one
below the other in a fused weight, e.g. qkv (3 D, D) = [q; k; v]. One direction is written down, both are derived:
loading concatenates, saving splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core import StylemuseError

STEMS = ("diffusion_pytorch_model", "model")
SUFFIX = ".safetensors"
NAMED_AT_MOST = 4


@dataclass(frozen=True)
class Table:
    """How a checkpoint names what a module holds.

    Attributes:
        rules: our name -> the checkpoint's names of its equal parts, in order along the first dimension. A ``*`` is any
            run of characters without a dot; the stars of a rule carry over in order. A name without a rule is the same
            on both sides.
        prefix: the start of checkpoint names that some files leave out.
        ignored: checkpoint names that hold no weights and may be there.
    """

    rules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: str = ""
    ignored: frozenset[str] = frozenset()

    def names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of the parts of our tensor ``name``."""
        for ours, parts in self.rules.items():
            match = re.fullmatch(re.escape(ours).replace(r"\*", "([^.]+)"), name)
            if match:
                return tuple(_fill(part, match.groups()) for part in parts)
        return (name,)


def _fill(template: str, pieces: Iterable[str]) -> str:
    for piece in pieces:
        template = template.replace("*", piece, 1)
    return template


def _fused(module: str, ours: str, parts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The rule for projections of one module that lie in one weight."""
    return {f"{module}.{ours}.*": tuple(f"{module}.{part}.*" for part in parts)}


_CLIP_LAYER = "text_model.encoder.layers.*"

CLIP_TEXT = Table(
    rules={
        "token.weight": ("text_model.embeddings.token_embedding.weight",),
        "position.weight": ("text_model.embeddings.position_embedding.weight",),
        "layers.*.norm1.*": (f"{_CLIP_LAYER}.layer_norm1.*",),
        "layers.*.attention.qkv.*": tuple(f"{_CLIP_LAYER}.self_attn.{part}_proj.*" for part in "qkv"),
        "layers.*.attention.out.*": (f"{_CLIP_LAYER}.self_attn.out_proj.*",),
        "layers.*.norm2.*": (f"{_CLIP_LAYER}.layer_norm2.*",),
        "layers.*.widen.*": (f"{_CLIP_LAYER}.mlp.fc1.*",),
        "layers.*.narrow.*": (f"{_CLIP_LAYER}.mlp.fc2.*",),
        "norm.*": ("text_model.final_layer_norm.*",),
        "projection.*": ("text_projection.*",),
    },
    prefix="text_model.",
    # A buffer 0, 1, 2, ... that transformers wrote into its files before 4.31.
    ignored=frozenset({"text_model.embeddings.position_ids"}),
)
"""transformers' CLIPTextModelWithProjection -> models.text.ClipText."""

AMUSED = Table(
    rules={
        **_fused("transformer_layers.*.attn1", "qkv", ("to_q", "to_k", "to_v")),
        **_fused("transformer_layers.*.attn2", "kv", ("to_k", "to_v")),
        # Both attentions of these blocks read the text, so the query, made from the image, stays apart.
        **_fused("*_block.attention_blocks.*.attn*", "kv", ("to_k", "to_v")),
        "transformer_layers.*.attn*.to_out.weight": ("transformer_layers.*.attn*.to_out.0.weight",),
        "*_block.attention_blocks.*.attn*.to_out.weight": ("*_block.attention_blocks.*.attn*.to_out.0.weight",),
        "transformer_layers.*.ff.up.weight": ("transformer_layers.*.ff.net.0.proj.weight",),
        "transformer_layers.*.ff.down.weight": ("transformer_layers.*.ff.net.2.weight",),
        "down_block.resample.*.weight": ("down_block.downsample.*.weight",),
        "up_block.resample.*.weight": ("up_block.upsample.*.weight",),
    }
)
"""diffusers' UVit2DModel -> models.amused.Amused."""

VQ = Table()
"""diffusers' VQModel -> models.vq: the same names."""


def read(source: str | Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a sharded one, or of a model's folder, on the CPU as stored.

    Args:
        source: ``*.safetensors``, ``*.safetensors.index.json``, or a folder with ``diffusion_pytorch_model`` or
            ``model`` under either ending.
        variant: e.g. "fp16" for ``model.fp16.safetensors``; only for a folder.

    Raises StylemuseError for a missing or damaged file, another format (pickles are never opened), an index that does
    not agree with its shards, or a NaN or an infinity, naming the tensor.
    """
    path = Path(source)
    if path.is_dir():
        path = _find(path, variant)
    elif variant is not None:
        raise StylemuseError(f"{path}: variant {variant!r} given for a file; it is allowed for a folder only")
    tensors = _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise StylemuseError(f"{path}: tensor {name} holds NaN or infinity")
    return tensors


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], table: Table, source: str | Path = "weights") -> None:
    """Fills every parameter and buffer of ``module``; on the meta device they are replaced, elsewhere copied into.

    Args:
        tensors: by checkpoint name.
        source: what the error calls the tensors, e.g. their folder.

    Raises StylemuseError, before anything is changed, when a tensor is missing, left over or of the wrong shape.
    """
    state = module.state_dict()
    parts = {name: table.names(name) for name in state}
    expected = {part for names in parts.values() for part in names}
    given = {_full_name(name, expected | table.ignored, table.prefix): tensor for name, tensor in tensors.items()}
    faults = []
    if missing := sorted(expected - given.keys()):
        faults.append(f"missing {_some(missing)}")
    if unused := sorted(given.keys() - expected - table.ignored):
        faults.append(f"not used {_some(unused)}")
    if len(given) < len(tensors):
        faults.append(f"{len(tensors) - len(given)} tensors are there twice, with and without {table.prefix!r}")
    if faults:
        raise StylemuseError(f"{source}: {'; '.join(faults)}")
    for name, names in parts.items():
        needed = _part_shape(state[name], len(names))
        for part in names:
            if given[part].shape != needed:
                raise StylemuseError(
                    f"{source}: tensor {part} has shape {tuple(given[part].shape)}; {tuple(needed)} is needed"
                )
    filled = {
        name: given[names[0]] if len(names) == 1 else torch.cat([given[part] for part in names])
        for name, names in parts.items()
    }
    module.load_state_dict(filled, assign=any(tensor.is_meta for tensor in state.values()))


def to_checkpoint(module: nn.Module, table: Table) -> dict[str, Tensor]:
    """The inverse of load_into: copies of the module's tensors under the checkpoint's names, fused ones split."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        names = table.names(name)
        pieces = (tensor,) if len(names) == 1 else tensor.split(_part_shape(tensor, len(names))[0])
        for part, piece in zip(names, pieces, strict=True):
            tensors[part] = piece.clone(memory_format=torch.contiguous_format)
    return tensors


def _find(folder: Path, variant: str | None) -> Path:
    """The one file, or the index of the shards, that holds a folder's weights."""
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        # Two spellings of a variant's index are about: the first is today's, the second that of older saves.
        index = (f"{stem}{SUFFIX}.index{middle}.json", f"{stem}{middle}{SUFFIX}.index.json")
        for name in (f"{stem}{middle}{SUFFIX}", *index):
            if (folder / name).is_file():
                return folder / name
    present = sorted(path.name for path in folder.iterdir() if SUFFIX in path.name)
    wanted = " or ".join(f"{stem}{middle}{SUFFIX}" for stem in STEMS)
    raise StylemuseError(f"{folder}: no {wanted}; it holds {_some(present) if present else 'no safetensors file'}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != SUFFIX:
        raise StylemuseError(f"{path}: not supported; allowed: *{SUFFIX}, *{SUFFIX}.index.json, or a folder")
    if not path.is_file():
        raise StylemuseError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StylemuseError(f"{path}: cannot be read as safetensors: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all the files that an index names; the index and the files must list the same tensors."""
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StylemuseError(f"{index}: not an index of safetensors shards: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise StylemuseError(f"{index}: shard {shard!r} is not a plain file name")
        found = _read_file(index.parent / shard)
        declared = {name for name, file in listed.items() if file == shard}
        if disagreeing := sorted(declared ^ found.keys()):
            raise StylemuseError(f"{index}: it and {shard} do not agree about {_some(disagreeing)}")
        tensors |= found
    return tensors


def _part_shape(tensor: Tensor, parts: int) -> torch.Size:
    """The shape of each of the equal parts of a fused tensor."""
    return tensor.shape if parts == 1 else torch.Size([tensor.shape[0] // parts, *tensor.shape[1:]])


def _full_name(name: str, known: set[str] | frozenset[str], prefix: str) -> str:
    return prefix + name if name not in known and prefix + name in known else name


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; the smallest and the largest element tell, without a mask."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: list[str]) -> str:
    """A few of many names."""
    rest = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
