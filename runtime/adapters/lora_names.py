"""The names of LoRA tensors in published files: key -> (module, role).

Every form names a module of the checkpoint and one side of its pair; they differ in the prefix, in what they call the
sides, and kohya's in writing underscores for the dots, which only the model's own table of modules can undo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core import StylemuseError
from ..kernels.rows import Site
from .files import some

PREFIXES = ("base_model.model.", "transformer.", "unet.")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder(_2)?\.|lora_te\d?_)")

PAIRS = (
    # PEFT, and diffusers since 0.22; an injected save keeps the adapter's name: to_q.lora_A.default.weight
    re.compile(r"(?P<module>.+)\.lora_(?P<role>A|B)(\.(?P<adapter>[^.]+))?\.weight"),
    # diffusers before: to_q.lora.down.weight
    re.compile(r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<role>down|up)\.weight"),
    # diffusers' attention processors: attn1.processor.to_q_lora.down.weight
    re.compile(r"(?P<module>.+)\.processor\.(?P<leaf>to_q|to_k|to_v|to_out)_lora\.(?P<role>down|up)\.weight"),
)
KOHYA = re.compile(r"lora_(unet|transformer)_(?P<module>[^.]+)\.(?P<role>lora_down\.weight|lora_up\.weight|alpha)")
ALPHA = re.compile(r"(?P<module>.+)\.(?P<role>alpha)")
BASE_LAYER = ".base_layer."
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what it wraps, anywhere in them."""

ROLES = {"A": "down", "B": "up", "lora_down.weight": "down", "lora_up.weight": "up"}

UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "Tucker LoCon",
    ".oft_": "OFT",
    "lora_embedding": "LoRA on embeddings",
    "modules_to_save": "fully trained modules",
}


@dataclass
class Names:
    """A file's keys: `pairs` site -> role ("down", "up", "alpha") -> key; `base` key -> the checkpoint's parameter."""

    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)


def sort_names(file: str, keys: Iterable[str], sites: Mapping[str, Site]) -> Names:
    """Assign every key of a file; an error names those that belong nowhere.

    Keys that are no adapter's are taken for the base model's parameters only where an injected save's `base_layer`
    shows that the file holds them.
    """
    keys = sorted(keys)
    for mark, method in UNSUPPORTED.items():
        if found := [key for key in keys if mark in key]:
            raise StylemuseError(f"{file} is {method} ({some(found)}); only plain LoRA on linear layers is supported")
    if found := [key for key in keys if TEXT_ENCODER.match(key)]:
        raise StylemuseError(f"{file} adapts the text encoder ({some(found)}); only the transformer can be adapted")
    injected = any(BASE_LAYER in key for key in keys)
    underscored = _underscored(sites)
    names, adapters, unknown, elsewhere = Names(), set[str](), [], []
    for key in keys:
        match, module = _match(key)
        if match is None:
            if injected:
                names.base[key] = _strip(key).replace(BASE_LAYER, ".")
            else:
                unknown.append(key)
            continue
        if match.re is KOHYA:
            module = underscored.get(module, module)
        if module not in sites:
            elsewhere.append(module)
            continue
        role = ROLES.get(match["role"], match["role"])
        if role != "alpha":
            adapters.add(match.groupdict().get("adapter") or "unnamed")
        if (other := names.pairs.setdefault(module, {}).setdefault(role, key)) != key:
            raise StylemuseError(f"{file} holds {module} twice, as {other} and as {key}")
    if unknown:
        raise StylemuseError(f"{file}: tensors of no known LoRA form: {some(unknown)}")
    if elsewhere:
        leaves = sorted({_leaf(site) for site in sites})
        raise StylemuseError(
            f"{file} adapts {some(set(elsewhere))}, which this model cannot adapt; allowed are {', '.join(leaves)}"
        )
    if len(adapters) > 1:
        raise StylemuseError(f"{file} holds several adapters ({some(adapters)}); one per file is allowed")
    for module, roles in names.pairs.items():
        if absent := {"down", "up"} - roles.keys():
            raise StylemuseError(f"{file}: {module} has no {' and no '.join(sorted(absent))} tensor")
    if not names.pairs:
        raise StylemuseError(f"{file} holds no LoRA tensors")
    return names


def _match(key: str) -> tuple[re.Match[str] | None, str]:
    if match := KOHYA.fullmatch(key):
        return match, match["module"]
    key = _strip(key)
    for pattern in (*PAIRS, ALPHA):
        if match := pattern.fullmatch(key):
            leaf = match.groupdict().get("leaf")
            module = match["module"] + (f".{'to_out.0' if leaf == 'to_out' else leaf}" if leaf else "")
            return match, module
    return None, ""


def _strip(key: str) -> str:
    key = key.replace(COMPILED, "")
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _underscored(sites: Mapping[str, Site]) -> dict[str, str]:
    table: dict[str, str] = {}
    for site in sites:
        other = table.setdefault(site.replace(".", "_"), site)
        assert other == site, f"kohya's names cannot tell {other} from {site}"
    return table


def _leaf(site: str) -> str:
    """A site's name without its block: transformer_layers.3.attn1.to_out.0 -> attn1.to_out.0."""
    return re.split(r"\.\d+\.", site, maxsplit=1)[-1]
