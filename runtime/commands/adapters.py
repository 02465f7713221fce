"""``stylemuse adapters``: list, inspect, import, export and verify style adapters."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import StylemuseError
from . import options
from .output import check_file, check_new_folder, document, say, table, write_file
from .target import Target, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.canonical import Adapter

app = typer.Typer(help="List, inspect, import, export and verify style adapters.")
Source = Annotated[Path, typer.Argument(help="A canonical folder, or a published LoRA's file or folder.")]
Folder = Annotated[Path, typer.Argument(help="A canonical folder.")]
OfModel = Annotated[
    str | None, typer.Option("--model", help="The model it is for; the one it was made for if left out.")
]


@app.command("list")
def listed(model: options.Model = "demo", as_json: options.Json = False) -> None:
    """List the styles a model comes with."""
    from ..adapters import canonical
    from ..loading.folder import EXTRA, read_json

    folder = Target(model).folder
    names = read_json(folder / EXTRA).get("styles", []) if (folder / EXTRA).is_file() else []
    found = [replace(canonical.load(folder / "styles" / name), name=name) for name in names]
    if as_json:
        document({"model": model, "adapters": [_facts(adapter) for adapter in found]})
        return
    columns = ("name", "kind", "rank", "sites", "descriptor", "licence")
    rows = [(a.name, a.kind, str(a.rank), str(len(a.tensors)), a.descriptor, a.licence) for a in found]
    table(columns, rows, numbers=("rank", "sites")) if rows else say(f"{model} comes with no styles")


@app.command()
def inspect(
    path: Source,
    alpha: options.Alpha = None,
    recipe: options.Recipe = None,
    model: OfModel = None,
    as_json: options.Json = False,
) -> None:
    """Show what is in an adapter: facts, sites, ranks, sizes."""
    adapter = _read(path, alpha, recipe, model)
    share, why = _share(adapter, model)
    tensors = adapter.tensors.items()
    sites = {site: {"rank": _rank(adapter, down), "shape": _shape(adapter, down, up)} for site, (down, up) in tensors}
    facts = _facts(adapter) | {"share": share, "share_of": why if share is not None else None, "modules": sites}
    if as_json:
        document(facts)
        return
    ranks = Counter(site["rank"] for site in sites.values())
    leaves = Counter(re.split(r"\.\d+\.", site, maxsplit=1)[-1] for site in sites)
    shown = {
        name: str(facts[name])
        for name in ("name", "kind", "descriptor", "caption", "licence", "base_model", "base_sha256", "scale")
    }
    shown |= {
        "recommended": ", ".join(f"{key} {value}" for key, value in adapter.recommended.items()),
        "ranks": ", ".join(f"{rank} on {count} sites" for rank, count in sorted(ranks.items())),
        "sites": ", ".join(f"{leaf} x {count}" for leaf, count in sorted(leaves.items())),
        "parameters": f"{facts['parameters']:,} ({facts['bytes']:,} bytes in fp32)",
        "share": f"{share:.3%} of {why}" if share is not None else f"unknown: {why}",
        "sha256": adapter.sha256,
    }
    table(("", ""), [(name, value if value not in ("", "None") else "-") for name, value in shown.items()])


@app.command("import")
def imported(
    source: Annotated[Path, typer.Argument(help="A LoRA's .safetensors file, or its folder.")],
    name: Annotated[str, typer.Option("--name", help="How requests call it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the adapter.")],
    alpha: options.Alpha = None,
    recipe: options.Recipe = None,
    descriptor: Annotated[str, typer.Option("--descriptor", help='Words added to prompts, "in ink style".')] = "",
    licence: Annotated[str, typer.Option("--licence", help="SPDX identifier or a sentence.")] = "",
    model: options.Model = "demo",
    as_json: options.Json = False,
) -> None:
    """Turn a published LoRA into a canonical adapter."""
    from ..adapters import canonical, lora
    from ..loading.folder import weights_sha256

    options.text(descriptor, "--descriptor")
    options.text(licence, "--licence")
    check_new_folder(out)
    target = Target(model)
    weights = Weights(target.folder / "transformer")
    sites = target.config.sites()
    adapter = lora.read(
        source, name=name, sites=sites, alpha=alpha, recipe=recipe, base_model=model, base_weights=weights
    )
    # Only a file that holds the base weights too, and the same, says for which weights it was made.
    base = weights_sha256(target.folder / "transformer") if weights.read else None
    adapter = replace(adapter, descriptor=descriptor, licence=licence, base_sha256=base)
    canonical.save(adapter, out)
    if as_json:
        document({"path": str(out)} | _facts(adapter))
        return
    say(f"{out}  rank {adapter.rank} on {len(adapter.tensors)} sites, sha256 {adapter.sha256[:12]}")


@app.command("export")
def exported(
    folder: Folder,
    form: Annotated[str, typer.Option("--format", help="diffusers, peft or kohya.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new .safetensors file; for peft a new folder.")],
    as_json: options.Json = False,
) -> None:
    """Write a canonical LoRA as a file other programs read, at the right strength."""
    from ..adapters import canonical
    from ..adapters.files import write_folder
    from ..adapters.formats import pack

    files = pack(canonical.load(folder), form)
    if form == "peft":
        check_new_folder(out)
        write_folder(out, files)
    else:
        (data,) = files.values()
        if out.suffix != ".safetensors":
            raise StylemuseError(f"{out}: a {form} file ends in .safetensors")
        check_file(out)
        if out.exists():
            raise StylemuseError(f"{out} exists already; choose another name or remove it first")
        write_file(out, data)
    written = sum(len(data) for data in files.values())
    if as_json:
        document({"path": str(out), "format": form, "bytes": written})
        return
    say(f"{out}  {form}, {written:,} bytes")


@app.command()
def verify(folder: Folder, model: OfModel = None, as_json: options.Json = False) -> None:
    """Check an adapter: hash, finite numbers, fits its model."""
    from ..adapters import canonical

    adapter = canonical.load(folder)
    target = _target(adapter, model)
    target.check(adapter)
    if as_json:
        document({"path": str(folder), "ok": True, "fits": target.name, "same_weights": bool(adapter.base_sha256)})
        return
    weights = "made for exactly its weights" if adapter.base_sha256 else "for which weights it was made is not known"
    say(f"{folder}  sound: the hash agrees, all numbers are finite, it fits {target.name} ({weights})")


def _read(path: Path, alpha: float | None, recipe: str | None, model: str | None) -> Adapter:
    from ..adapters import canonical, lora

    if (path / "adapter.json").is_file():
        if alpha is not None or recipe is not None:
            raise StylemuseError(f"{path} is a canonical adapter, which has its scale; drop --alpha and --recipe")
        return canonical.load(path)
    if not path.exists():
        raise StylemuseError(f"{path} is not there; a canonical folder, a LoRA file or its folder is needed")
    target = Target(model or "demo")
    weights, sites = Weights(target.folder / "transformer"), target.config.sites()
    return lora.read(path, name="file", sites=sites, alpha=alpha, recipe=recipe, base_weights=weights)


def _target(adapter: Adapter, model: str | None) -> Target:
    """The asked model, else the one the adapter names."""
    if model is not None or not adapter.base_model:
        return Target(model or "demo")
    try:
        return Target(adapter.base_model)
    except StylemuseError as error:
        raise StylemuseError(f"the model the adapter names is not here; give --model ({error})") from None


def _share(adapter: Adapter, model: str | None) -> tuple[float | None, str]:
    """The adapter's numbers as a fraction of the model's, with the model's name; or None, with the reason."""
    name = model or adapter.base_model or "demo"
    if model is None and name != "demo" and not Path(name).is_dir():
        return None, f"{name} is not here; give --model"
    try:
        target = Target(name)
        own = target.config.sites().keys() if adapter.kind == "lora" else target.config.bottleneck_sites().keys()
    except StylemuseError as error:
        if model is not None:
            raise
        return None, str(error)
    if adapter.tensors.keys() - own:
        return None, f"it doesn't fit {name}; give --model"
    return _parameters(adapter) / target.parameters, name


def _facts(adapter: Adapter) -> dict[str, Any]:
    names = ("name", "kind", "descriptor", "caption", "licence", "base_model", "base_sha256", "scale", "rank", "sha256")
    facts = {name: getattr(adapter, name) for name in names} | {"recommended": dict(adapter.recommended)}
    count = _parameters(adapter)
    return facts | {"sites": len(adapter.tensors), "parameters": count, "bytes": 4 * count}


def _parameters(adapter: Adapter) -> int:
    return sum(down.numel() + up.numel() for down, up in adapter.tensors.values())


def _rank(adapter: Adapter, down: Tensor) -> int:
    return int(down.shape[0 if adapter.kind == "lora" else 1])


def _shape(adapter: Adapter, down: Tensor, up: Tensor) -> list[int]:
    """[inputs, outputs] of the site."""
    inputs, outputs = (1, 0) if adapter.kind == "lora" else (0, 1)
    return [int(down.shape[inputs]), int(up.shape[outputs])]
