"""A model and styles -> a folder of graphs, and what its manifest tells; ``deploy`` is what a user calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch

from ...adapters.canonical import Adapter
from ...adapters.merge import merged
from ...backend.network import TorchNetwork
from ...decoding import schedule
from ...loading import weights
from ...models.amused import Amused
from ...pipeline import Pipeline
from ..run.manifest import File, GraphFile, Manifest, StyleFile
from ..run.spec import Array, GraphSpec
from . import convert, fuse
from .adapters import Styling, is_constant, pack, places
from .graph import Graph

ROWS = (1, 3, 8)
"""Counts of rows that every graph is tried with; their axis is open, so that others run too."""
TUNED = ("to_q", "to_k", "to_v")
"""The projections that published LoRAs change: what a graph has places for where no style says more."""


class Written(NamedTuple):
    """A folder's manifest, its graphs as they were written, and what they have of adapters."""

    manifest: Manifest
    built: dict[str, tuple[GraphSpec, Graph]]
    styling: Styling


def write(
    pipe: Pipeline,
    network: TorchNetwork,
    folder: Path,
    form: str,
    adapters: Sequence[Adapter],
    strength: float = 1.0,
    precision: str = "float32",
    rows: Sequence[int] = (),
) -> Written:
    """Write everything into a folder that is there and empty; ``strength`` is of a style that is fused.

    ``precision`` is the number format of the transformer, condition and step: "float32", or "float16", in which norms,
    the softmax of attention, the weighted sum and all from the logits on are computed in fp32 all the same. What goes
    in and comes out is as in fp32, but for the conditioning, which one graph gives and the other takes.

    ``rows`` are counts of rows that the graphs are tried with, beside `ROWS`; the manifest names them all.
    """
    transformer, length = network.transformer, network.tokenizer.length
    config, sites = transformer.config, transformer.config.sites()
    if form == "fused":
        transformer, styling = _fused(transformer, adapters, strength)
    else:
        used = {site for adapter in adapters for site in adapter.tensors}
        used = used or {site for site in sites if site.endswith(TUNED)}
        styling = Styling(form, places(sites, config.bottleneck_sites(), used))
    built = {
        "text": convert.text(network.text_encoder, length),
        "condition": convert.condition(transformer, length, styling, precision),
        "step": convert.step(transformer, styling, precision),
        "pixels": convert.pixels(network.vq),
        "codes": convert.codes(network.vq),
    }
    tried = sorted({*ROWS, *rows})
    sizes = [_sizes(network, index, count) for index, count in enumerate(tried)]
    graphs = {name: _graph(folder, name, *each, sizes) for name, each in built.items()}
    network.tokenizer.save(folder / "tokenizer")
    tokenizer = tuple(File.of(folder, f"tokenizer/{path.name}") for path in sorted((folder / "tokenizer").iterdir()))
    described = {}
    for slot, adapter in enumerate(adapters, 1):
        files = {} if form == "fused" else _style_files(folder, adapter.name, pack(adapter, sites))
        described[adapter.name] = _describe(adapter, files, strength, slot if form == "bank" else 0)
    side, count = network.sizes.side**2, int(pipe.defaults.get("steps", 12))
    made = Manifest(
        pipe.name, form, precision, network.mask_id, config.codebook_size, *network.sizes, length, dict(pipe.defaults),
        graphs, tokenizer, described, tuple(tried), schedule=asdict(schedule.amused(side, side, count)),
    )  # fmt: skip
    return Written(made, built, styling)


def _fused(transformer: Amused, adapters: Sequence[Adapter], strength: float) -> tuple[Amused, Styling]:
    """The network with the style in its weights, or the nodes that a bottleneck adds."""
    if not adapters:
        return transformer, convert.BASE
    (adapter,) = adapters
    scale = strength * adapter.scale
    if adapter.kind == "bottleneck":
        return transformer, Styling(fused=(adapter, scale))
    tensors = merged(weights.to_checkpoint(transformer, weights.AMUSED), adapter, scale)
    with torch.device("meta"):
        styled = Amused(transformer.config)
    weights.load_into(styled, tensors, weights.AMUSED)
    return styled.rest(), convert.BASE


def _graph(
    folder: Path, name: str, description: GraphSpec, graph: Graph, sizes: Sequence[Mapping[str, int]]
) -> GraphFile:
    path = f"{name}.onnx"
    errors = fuse.rewrite(description, graph, folder / path, sizes)
    data = File.of(folder, f"{path}.data") if (folder / f"{path}.data").exists() else None
    return GraphFile(File.of(folder, path), data, description.inputs, description.outputs, errors)


def _sizes(network: TorchNetwork, index: int, rows: int) -> dict[str, int]:
    """What the graphs are tried with: so many rows, of pictures that add up two of them, on grids of several shapes."""
    lanes = {f"lanes_{parts}": 2 * parts for parts in (1, 2, 3)} | {"slots": 3, "text": network.tokenizer.length}
    height, width = ((2, 4), (6, 4), (2, 2))[index % 3]
    pixels = {"pixel_height": height * network.sizes.factor, "pixel_width": width * network.sizes.factor}
    counts = {"rows": rows, "pictures": (rows + 1) // 2, "branches": min(rows, 2), "height": height, "width": width}
    return counts | pixels | lanes


def _style_files(folder: Path, name: str, packed: Mapping[str, Array]) -> dict[str, File]:
    """Write adapters/<style>.<graph>.onnx_adapter for the graphs the style changes, as ONNX Runtime reads them."""
    (folder / "adapters").mkdir(exist_ok=True)
    written = {}
    for graph in ("condition", "step"):
        own = {
            key: each for key, each in packed.items() if is_constant(key.rpartition(".")[0]) is (graph == "condition")
        }
        if own:
            path = f"adapters/{name}.{graph}.onnx_adapter"
            file = onnxruntime.AdapterFormat()
            file.set_adapter_version(1)
            file.set_model_version(1)
            file.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(each) for key, each in own.items()})
            file.export_adapter(str(folder / path))
            written[graph] = File.of(folder, path)
    return written


def _describe(adapter: Adapter, files: Mapping[str, File], strength: float, slot: int) -> StyleFile:
    return StyleFile(
        adapter.name, files, slot, adapter.kind, adapter.rank, strength * adapter.scale, adapter.descriptor,
        adapter.caption, dict(adapter.recommended), adapter.licence,
    )  # fmt: skip
