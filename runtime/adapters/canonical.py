"""The canonical adapter: what every file format is turned into, and the folder it is kept in.

A folder holds `adapter.safetensors` (fp32, keys "<site>.down" and "<site>.up") and `adapter.json` (schema version 1,
every field of `Adapter` except the tensors, plus rank and the tensors' sha256). The file's bytes are hashed and parsed
from one read, so that what was checked is what is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..core import STYLE_NAME, StylemuseError, is_number
from .files import (
    MAX_JSON_BYTES,
    check_names,
    check_start,
    one_line,
    parse_json,
    quoted,
    read_bytes,
    some,
    write_folder,
)

SCHEMA_VERSION = 1
MAX_TENSOR_BYTES = 1 << 30
"""Bound on an adapter's tensors in fp32; rank 64 on every attention projection of aMUSEd takes 83 MB."""

Kind = Literal["lora", "bottleneck"]
Pair = tuple[Tensor, Tensor]

TEXTS = ("base_model", "descriptor", "caption", "licence")
FIELDS = frozenset(
    {"schema_version", "name", "kind", "base_sha256", "rank", "scale", "recommended", "sha256", *TEXTS},
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A style for one base model, valid by construction.

    Attributes:
        name: how requests choose it; letters, digits, ".", "_" and "-", at most 64.
        kind: "lora", y += scale up down x, or "bottleneck", y += scale gelu(y down) up.
        tensors: site (the checkpoint's module name) -> pair, fp32 and finite: of a lora (down (r, in), up (out, r))
            with alpha / r multiplied into up, of a bottleneck (down (D, H), up (H, D)).
        base_model: name of the model it was made for; base_sha256: hash of that model's weights, where known.
        scale: default strength; a request's strength multiplies it.
        descriptor: the words that call the style ("in neon style"), part of the prompt it was trained with.
        caption: the full prompt of the picture it was made from.
        recommended: sampling that suits it, say {"guidance": "StyleDrop", "style": 2.0, "steps": 36}.
        licence: SPDX identifier or a sentence; "" where unknown.
    """

    name: str
    kind: Kind
    tensors: Mapping[str, Pair]
    base_model: str = ""
    base_sha256: str | None = None
    scale: float = 1.0
    descriptor: str = ""
    caption: str = ""
    recommended: Mapping[str, str | int | float] = field(default_factory=dict)
    licence: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not STYLE_NAME.fullmatch(self.name):
            raise StylemuseError(
                f"adapter name {str(self.name)[:80]!r} is not allowed: letters, digits, '.', '_' and '-', at most 64"
            )
        if self.kind not in get_args(Kind):
            raise StylemuseError(f"adapter kind {self.kind!r} is unknown; allowed are {', '.join(get_args(Kind))}")
        if not is_number(self.scale):
            raise StylemuseError(f"adapter {self.name}: scale must be a finite number, not {self.scale!r}")
        if self.base_sha256 is not None and not _is_sha256(self.base_sha256):
            raise StylemuseError(f"adapter {self.name}: base_sha256 must be 64 hexadecimal digits or absent")
        for text in TEXTS:
            if not _is_text(getattr(self, text)):
                raise StylemuseError(f"adapter {self.name}: {text} must be a text")
        if not all(_is_text(key) and (_is_text(value) or is_number(value)) for key, value in self.recommended.items()):
            raise StylemuseError(f"adapter {self.name}: recommended must map texts to texts or finite numbers")
        if not self.tensors:
            raise StylemuseError(f"adapter {self.name} has no tensors")
        for site, (down, up) in self.tensors.items():
            _check_pair(f"adapter {self.name}: {site}", self.kind, down, up)
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "recommended", MappingProxyType(dict(self.recommended)))

    @cached_property
    def rank(self) -> int:
        """The largest rank (lora) or width (bottleneck) over the sites."""
        axis = 0 if self.kind == "lora" else 1
        return max(down.shape[axis] for down, _ in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of the tensors as `adapter.safetensors` holds them: the version of this adapter."""
        return hashlib.sha256(_pack(self.tensors)).hexdigest()


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Write the canonical folder, durable once this returns. The folder must not exist, or be empty."""
    folder = Path(folder)
    facts = {name: getattr(adapter, name) for name in ("name", "kind", *TEXTS, "base_sha256", "rank", "scale")}
    facts |= {"schema_version": SCHEMA_VERSION, "recommended": dict(adapter.recommended)}
    data = _pack(adapter.tensors)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_folder(folder, {"adapter.safetensors": data, "adapter.json": text.encode()})
    return folder


def load(folder: str | Path) -> Adapter:
    """Read a canonical folder; whatever is wrong with it is one StylemuseError."""
    folder = Path(folder)
    facts = parse_json(read_bytes(folder / "adapter.json", MAX_JSON_BYTES), "adapter.json")
    version = facts.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise StylemuseError(f"adapter.json: schema_version is {version!r}; this release reads {SCHEMA_VERSION}")
    if unknown := facts.keys() - FIELDS:
        raise StylemuseError(f"adapter.json: unknown fields {quoted(unknown)}")
    if missing := FIELDS - facts.keys():
        raise StylemuseError(f"adapter.json: missing fields {some(missing)}")
    if not isinstance(facts["recommended"], dict):
        raise StylemuseError("adapter.json: recommended must be an object")
    data = read_bytes(folder / "adapter.safetensors", MAX_TENSOR_BYTES)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise StylemuseError("adapter.safetensors does not match the sha256 in adapter.json; the copy is damaged")
    known: dict[str, Any] = {key: facts[key] for key in FIELDS - {"schema_version", "rank", "sha256"}}
    adapter = Adapter(tensors=_unpack(data), **known)
    if facts["rank"] != adapter.rank or isinstance(facts["rank"], bool):
        raise StylemuseError(f"adapter.json: rank is {facts['rank']!r} but the tensors have {adapter.rank}")
    vars(adapter)["sha256"] = facts["sha256"]  # just verified: not hashed a second time
    return adapter


def renamed(adapter: Adapter, name: str) -> Adapter:
    """The same adapter under another name; its hash, if known, stays."""
    made = replace(adapter, name=name)
    vars(made).update({key: value for key, value in vars(adapter).items() if key == "sha256"})
    return made


def _pack(tensors: Mapping[str, Pair]) -> bytes:
    flat: dict[str, Tensor] = {}
    for site, (down, up) in tensors.items():
        # Own storage: safetensors refuses tensors that share one.
        flat[f"{site}.down"], flat[f"{site}.up"] = (side.detach().cpu().contiguous().clone() for side in (down, up))
    return safetensors.torch.save(flat, metadata={"format": "pt"})


def _unpack(data: bytes) -> dict[str, Pair]:
    check_start("adapter.safetensors", data[:8], len(data))
    try:
        flat = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StylemuseError(f"adapter.safetensors is damaged: {one_line(error)}") from None
    check_names("adapter.safetensors", flat)
    sites = {key.removesuffix(".down") for key in flat if key.endswith(".down")}
    expected = {f"{site}.{side}" for site in sites for side in ("down", "up")}
    if odd := flat.keys() ^ expected:
        raise StylemuseError(f"adapter.safetensors: unpaired or unknown tensors {some(odd)}")
    return {site: (flat[f"{site}.down"], flat[f"{site}.up"]) for site in sorted(sites)}


def _check_pair(what: str, kind: Kind, down: Tensor, up: Tensor) -> None:
    if down.ndim != 2 or up.ndim != 2 or 0 in down.shape or 0 in up.shape:
        raise StylemuseError(f"{what} must be two matrices, not {tuple(down.shape)} and {tuple(up.shape)}")
    agree = down.shape[0] == up.shape[1] if kind == "lora" else down.shape == up.shape[::-1]
    if not agree:
        raise StylemuseError(f"{what}: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit as a {kind} pair")
    if down.dtype != torch.float32 or up.dtype != torch.float32:
        raise StylemuseError(f"{what} must be float32, not {down.dtype} and {up.dtype}")
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise StylemuseError(f"{what} holds NaN or infinity")


def _is_text(value: object) -> bool:
    """A string UTF-8 can hold; JSON can spell lone surrogates, which it cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
