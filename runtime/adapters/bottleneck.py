"""Read StyleDrop-PyTorch's adapter into a canonical one.

The file holds `WD.weight` and `WU.weight`, each (L, D H), one row per layer; or, shared between layers, one row of each
and `DD.weight` (L, H), `DU.weight` (L, D): Wd_l = WD + DD_l, the same for every input, and Wu_l = WU + DU_l, the same
for every lane. It is published as a pickle (`adapter.pth`), which has to be converted to safetensors offline.

Source: class Adapter of `libs/uvit_t2i_vq.py`, zideliu/StyleDrop-PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..core import StylemuseError
from .canonical import MAX_TENSOR_BYTES, Adapter, Pair
from .files import TensorFile, open_tensors, some

OWN = ("WD.weight", "WU.weight")
SHARED = ("DD.weight", "DU.weight", *OWN)


def published_rows(layers: int) -> dict[str, int]:
    """Site -> row of the file for a network of `layers` in- and out-blocks, as the published adapters were trained.

    In-blocks use their own rows, the middle block has none, and every out-block uses the row after the last in-block's:
    the public code does not advance its counter there. The rows after that are trained by nothing and read by nothing.
    """
    half = layers // 2
    return {f"in_blocks.{i}.attn": i for i in range(half)} | {f"out_blocks.{i}.attn": half for i in range(half)}


def read(
    path: str | Path,
    *,
    name: str,
    sites: Mapping[str, int],
    rows: Mapping[str, int] | None = None,
    base_model: str = "",
    base_sha256: str | None = None,
) -> Adapter:
    """Read a StyleDrop-PyTorch adapter for a model with these bottleneck sites (site -> width D).

    `rows` says which row of the file each site uses; left out, it is `published_rows` of the file's number of layers.

    Raises:
        StylemuseError: other tensors than the above, sizes that do not fit the model, NaN, a pickle, a damaged file.
    """
    with open_tensors(Path(path)) as file:
        keys = {key.removeprefix("adapter."): key for key in file.names}
        if len(keys) != len(file.names) or set(keys) not in (set(OWN), set(SHARED)):
            raise StylemuseError(
                f"{file.name} holds {some(file.names)}; a StyleDrop adapter has {', '.join(OWN)} or {', '.join(SHARED)}"
            )
        shared = len(keys) == len(SHARED)
        layers = _layers(file, keys, shared)
        rows = published_rows(layers) if rows is None else rows
        if rows.keys() - sites.keys() or max(rows.values(), default=layers) >= layers:
            raise StylemuseError(
                f"{file.name} is made for {layers} layers of another model; this one has {some(sites)}"
            )
        widths = {sites[site] for site in rows}
        if len(widths) != 1:
            raise StylemuseError(f"{file.name} has one width for all layers; this model's differ: {sorted(widths)}")
        width = widths.pop()
        lanes = _lanes(file, keys, width, shared)
        tables = {short: file.read(key).float() for short, key in keys.items()}
    pairs = {site: _layer(tables, row, width, lanes, shared) for site, row in rows.items()}
    return Adapter(name=name, kind="bottleneck", tensors=pairs, base_model=base_model, base_sha256=base_sha256)


def _layers(file: TensorFile, keys: Mapping[str, str], shared: bool) -> int:
    shapes = {short: file.shape(key) for short, key in keys.items()}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise StylemuseError(f"{file.name}: every tensor must be a matrix, not {shapes}")
    layers = shapes["DD.weight" if shared else "WD.weight"][0]
    expected = {"WD.weight": 1, "WU.weight": 1} if shared else {}
    if odd := {short for short, shape in shapes.items() if shape[0] != expected.get(short, layers)}:
        raise StylemuseError(f"{file.name}: {some(odd)} have another number of layers than the rest")
    if 4 * sum(rows * columns for rows, columns in shapes.values()) > MAX_TENSOR_BYTES:
        raise StylemuseError(f"{file.name} takes more than the {MAX_TENSOR_BYTES} bytes allowed")
    return layers


def _lanes(file: TensorFile, keys: Mapping[str, str], width: int, shared: bool) -> int:
    """H, from the length of a row, which is D H."""
    length = file.shape(keys["WD.weight"])[1]
    lanes = length // width
    fits = lanes > 0 and lanes * width == length == file.shape(keys["WU.weight"])[1]
    if shared:
        fits = fits and file.shape(keys["DD.weight"])[1] == lanes and file.shape(keys["DU.weight"])[1] == width
    if not fits:
        raise StylemuseError(f"{file.name} is made for another model: rows of {length} do not fit a width of {width}")
    return lanes


def _layer(tables: Mapping[str, Tensor], row: int, width: int, lanes: int, shared: bool) -> Pair:
    """(Wd (D, H), Wu (H, D)) of one layer, with tensors of its own."""
    own = 0 if shared else row
    down = tables["WD.weight"][own].view(width, lanes).clone()
    up = tables["WU.weight"][own].view(lanes, width).clone()
    if shared:
        down, up = down + tables["DD.weight"][row], up + tables["DU.weight"][row]
    return down, up
