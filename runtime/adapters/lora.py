"""Read a LoRA as it is published, in any of its forms, into a canonical adapter.

| form | keys | alpha |
|---|---|---|
| diffusers `pytorch_lora_weights.safetensors` | `transformer.<module>.lora_A.weight` | not stored |
| diffusers `save_lora_adapter` | `<module>.lora_A.weight` | in the header, `lora_adapter_metadata` |
| PEFT folder | `base_model.model.<module>.lora_A.weight` | `adapter_config.json` |
| `save_pretrained` with an adapter injected | `<module>.lora_A.default.weight`, and the base model's | not stored |
| kohya | `lora_unet_<module with underscores>.lora_down.weight` | a tensor per module |
| older diffusers | `<module>.lora.down.weight`, with or without `unet.` | not stored |

Names and shapes are checked from the file's header before any tensor is read; every tensor is used or the import fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core import StylemuseError
from ..kernels.rows import Site
from .canonical import MAX_TENSOR_BYTES, Adapter, Pair
from .files import MAX_JSON_BYTES, TensorFile, open_tensors, parse_json, read_bytes, refuse_pickle, some
from .lora_config import Scaling, scaling
from .lora_names import Names, sort_names

RECIPES: Mapping[str, float] = {"amused-256": 2.0, "amused-512": 1 / 16, "alpha-is-rank": 1.0}
"""alpha / r of diffusers' published training commands for aMUSEd, which write files without alpha; and of diffusers and
PEFT where a file has none: alpha is each module's own rank."""

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")


def read(
    path: str | Path,
    *,
    name: str,
    sites: Mapping[str, Site],
    alpha: float | None = None,
    recipe: str | None = None,
    base_model: str = "",
    base_sha256: str | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Read a LoRA file, or a folder with one, for a model with these sites.

    Args:
        alpha: LoRA's alpha, only for files that store none; the factor is alpha / r.
        recipe: instead of alpha, the training recipe ("amused-256": alpha / r = 2, "amused-512": 1/16).
        base_model: name of the model the sites belong to; compared with the file's where that has one.
        base_sha256: hash of that model's weights, kept with the adapter.
        base_weights: that model's weights by checkpoint name; needed where the file holds a copy of the base model,
            which must be the same.

    Raises:
        StylemuseError: unknown or unused tensors, wrong shapes, missing or doubled alpha, NaN, DoRA, a text encoder's
            LoRA, another base model, a pickle, a damaged file.
    """
    file = _locate(Path(path))
    with open_tensors(file) as tensors:
        config = _config(file, tensors)
        names = sort_names(file.name, tensors.names, sites)
        ranks = _ranks(tensors, names, sites)
        _check_base(tensors, names, base_weights)
        if config and config.base_model and base_model and not _same_model(config.base_model, base_model):
            raise StylemuseError(f"{file.name} was trained on {config.base_model}; this model is {base_model}")
        factor = _factor(tensors, names, config, alpha, recipe)
        pairs: dict[str, Pair] = {}
        for site, roles in names.pairs.items():
            down, up = tensors.read(roles["down"]).float(), tensors.read(roles["up"]).float()
            pairs[site] = down, up * factor(site, ranks[site])
    return Adapter(name=name, kind="lora", tensors=pairs, base_model=base_model, base_sha256=base_sha256)


def _locate(path: Path) -> Path:
    if not path.is_dir():
        refuse_pickle(path)
        return path
    if (path / "adapter.json").exists():
        raise StylemuseError(f"{path.name} is a canonical adapter already; load it as one")
    found = [name for name in FILES if (path / name).is_file()]
    found = found or sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return path / found[0]
    for file in () if found else sorted(path.iterdir()):
        refuse_pickle(file)
    raise StylemuseError(f"{path.name} holds {some(found) if found else 'no .safetensors file'}; one LoRA is allowed")


def _config(file: Path, tensors: TensorFile) -> Scaling | None:
    """The PEFT config from the header or from beside the file, or None."""
    header = tensors.metadata.get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    if header is not None:
        return scaling(parse_json(header, f"{file.name}: lora_adapter_metadata"), file.name)
    if file.name == FILES[0] and not beside.is_file():
        raise StylemuseError(f"{file.name} needs the adapter_config.json that PEFT writes beside it")
    if file.name == FILES[0]:
        return scaling(parse_json(read_bytes(beside, MAX_JSON_BYTES), beside.name), beside.name)
    return None


def _ranks(tensors: TensorFile, names: Names, sites: Mapping[str, Site]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for name, roles in names.pairs.items():
        site, down, up = sites[name], tensors.shape(roles["down"]), tensors.shape(roles["up"])
        rank = down[0] if down else 0
        if rank < 1 or down != (rank, site.inputs) or up != (site.outputs, rank):
            raise StylemuseError(
                f"{tensors.name}: {name} has pairs {down} and {up}; this model needs (r, {site.inputs}) and "
                f"({site.outputs}, r)"
            )
        ranks[name] = rank
    total = sum(4 * rank * (sites[name].inputs + sites[name].outputs) for name, rank in ranks.items())
    if total > MAX_TENSOR_BYTES:
        raise StylemuseError(f"{tensors.name} takes {total} bytes in float32; at most {MAX_TENSOR_BYTES} are allowed")
    return ranks


def _check_base(tensors: TensorFile, names: Names, base_weights: Mapping[str, Tensor] | None) -> None:
    """The base model's own parameters in the file must be this model's, up to the rounding of the coarser type."""
    if names.base and base_weights is None:
        raise StylemuseError(
            f"{tensors.name} holds base weights too ({some(names.base)}); they can be checked only with the base model"
        )
    for key, parameter in names.base.items():
        mine = (base_weights or {}).get(parameter)
        if mine is None:
            raise StylemuseError(f"{tensors.name}: {key} is neither a LoRA tensor nor a weight of the base model")
        theirs = tensors.read(key) if tensors.shape(key) == tuple(mine.shape) else None
        if theirs is None or not _rounded_equal(theirs, mine.detach().cpu()):
            raise StylemuseError(f"{tensors.name}: {key} differs from this base model; the adapter is another model's")


def _rounded_equal(theirs: Tensor, mine: Tensor) -> bool:
    limits = [torch.finfo(kind) for kind in (theirs.dtype, mine.dtype) if kind.is_floating_point]
    relative = max((limit.eps for limit in limits), default=0.0)
    absolute = max((limit.smallest_normal for limit in limits), default=0.0)
    return torch.allclose(theirs.double(), mine.double(), rtol=relative, atol=absolute)


def _factor(
    tensors: TensorFile, names: Names, config: Scaling | None, alpha: float | None, recipe: str | None
) -> Callable[[str, int], float]:
    """(site, rank) -> what the product is multiplied by, from exactly one source."""
    stored = {site: roles["alpha"] for site, roles in names.pairs.items() if "alpha" in roles}
    sources = [
        source
        for source, given in (("its PEFT config", config), ("its alpha tensors", stored or None))
        if given is not None
    ]
    asked = [option for option, given in (("alpha", alpha), ("recipe", recipe)) if given is not None]
    if len(sources) + len(asked) > 1:
        raise StylemuseError(
            f"{tensors.name}: alpha is given by {' and '.join(sources + asked)}; one source is allowed"
        )
    if config is not None:
        return config.factor
    if stored:
        if lacking := names.pairs.keys() - stored.keys():
            raise StylemuseError(f"{tensors.name}: {some(lacking)} have no alpha although other modules do")
        alphas = {site: _scalar(tensors, key) for site, key in stored.items()}
        return lambda site, rank: alphas[site] / rank
    if recipe is not None:
        if recipe not in RECIPES:
            raise StylemuseError(f"recipe {recipe!r} is unknown; allowed are {', '.join(RECIPES)}")
        ratio = RECIPES[recipe]
        return lambda site, rank: ratio
    if alpha is None:
        raise StylemuseError(
            f"{tensors.name} does not store alpha; give alpha=..., or recipe= one of {', '.join(RECIPES)}"
        )
    if not 0 < alpha < 1e6:
        raise StylemuseError(f"alpha must be a number above 0, not {alpha!r}")
    given = alpha
    return lambda site, rank: given / rank


def _scalar(tensors: TensorFile, key: str) -> float:
    if tensors.shape(key) not in ((), (1,)):
        raise StylemuseError(f"{tensors.name}: {key} must be one number, not of shape {tensors.shape(key)}")
    return float(tensors.read(key))


def _same_model(one: str, other: str) -> bool:
    """Compare by last component, since the same model is "amused/amused-256" on the hub and a folder on a disk."""
    return Path(one).name.lower() == Path(other).name.lower()
