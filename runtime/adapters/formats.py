"""Write a canonical LoRA as other programs read it.

| format | file | keys | alpha |
|---|---|---|---|
| diffusers | `pytorch_lora_weights.safetensors` | `transformer.<module>.lora_A.weight` | `lora_adapter_metadata` |
| peft | `adapter_model.safetensors` | `base_model.model.<module>.lora_A.weight` | `adapter_config.json` |
| kohya | `<name>.safetensors` | `lora_unet_<module_>.lora_down.weight` | a tensor per module |

`lora_adapter_metadata` is a field of the file's header. The canonical pair has alpha / r in it already, and the
adapter's default strength is multiplied into ``up`` here. So alpha = r is what every format stores: a reader that knows
the field and one that doesn't both take the product as it is.

Sources: `LoraConfig` of peft, `save_lora_weights` and `convert_state_dict_to_kohya` of diffusers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core import StylemuseError
from .canonical import Adapter, Pair

Files = dict[str, bytes]


def pack(adapter: Adapter, form: str) -> Files:
    """File name -> content; one file, or for peft the two of its folder. Ranks, names and strength are kept.

    Raises:
        StylemuseError: an unknown format; a bottleneck adapter, which is no LoRA.
    """
    if form not in FORMATS:
        raise StylemuseError(f"format {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    if adapter.kind != "lora":
        raise StylemuseError(f"adapter {adapter.name} is a {adapter.kind}; {form} files hold LoRA only")
    pairs = {site: (down.cpu(), _scaled(up.cpu(), adapter.scale)) for site, (down, up) in adapter.tensors.items()}
    return FORMATS[form](adapter, pairs)


def _diffusers(adapter: Adapter, pairs: Mapping[str, Pair]) -> Files:
    config = {f"transformer.{field}": value for field, value in _config(adapter).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
    tensors = _keyed(pairs, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")
    return {"pytorch_lora_weights.safetensors": safetensors.torch.save(tensors, header)}


def _peft(adapter: Adapter, pairs: Mapping[str, Pair]) -> Files:
    config = {"peft_type": "LORA", "base_model_name_or_path": adapter.base_model or None, "inference_mode": True}
    text = json.dumps(config | _config(adapter), indent=2, sort_keys=True) + "\n"
    tensors = _keyed(pairs, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
    data = safetensors.torch.save(tensors, {"format": "pt"})
    return {"adapter_model.safetensors": data, "adapter_config.json": text.encode()}


def _kohya(adapter: Adapter, pairs: Mapping[str, Pair]) -> Files:
    renamed = {site.replace(".", "_"): pair for site, pair in pairs.items()}
    tensors = _keyed(renamed, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight")
    for module, (down, _) in renamed.items():
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(float(down.shape[0]))
    return {f"{adapter.name}.safetensors": safetensors.torch.save(tensors, {"format": "pt"})}


FORMATS: Mapping[str, Callable[[Adapter, Mapping[str, Pair]], Files]] = MappingProxyType(
    {"diffusers": _diffusers, "peft": _peft, "kohya": _kohya}
)


def _config(adapter: Adapter) -> dict[str, Any]:
    """The fields of a `LoraConfig` that say what the tensors are: the usual rank, and which modules have another."""
    ranks = {site: down.shape[0] for site, (down, _) in sorted(adapter.tensors.items())}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {site: rank for site, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def _keyed(pairs: Mapping[str, Pair], down: str, up: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        for pattern, side in zip((down, up), pair, strict=True):
            # Own storage: safetensors refuses tensors that share one.
            tensors[pattern.format(module)] = side.contiguous().clone()
    return tensors


def _scaled(up: Tensor, scale: float) -> Tensor:
    return up if scale == 1 else up * scale
