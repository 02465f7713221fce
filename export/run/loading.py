"""``stylemuse.load(..., backend="onnx")``: a pipeline over graphs, of a model or of an exported folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ...backend import cpu
from ...core import StylemuseError
from ...pipeline import Pipeline
from . import manifest
from .ort import OnnxNetwork
from .shelf import Shelf
from .spec import Array


class ExportedPipeline(Pipeline):
    """A pipeline over an exported folder: its graphs, and the styles that it was exported with."""

    network: OnnxNetwork
    adapters: Shelf


def load_onnx(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    slots: int = 64,
    rank: int = 32,
    threads: int | None = None,
) -> Pipeline:
    """A pipeline over ONNX graphs; see ``stylemuse.load``. A model is exported first, into a temporary folder.

    Raises:
        StylemuseError: as ``stylemuse.load``; an exported folder that was changed; another dtype than the graphs'.
    """
    path = Path(name).expanduser()
    if (path / manifest.NAME).is_file():
        return open_folder(path, device=device, dtype=dtype, threads=threads)
    if dtype not in (None, "float32"):
        raise StylemuseError(f"dtype {dtype!r} is not there; allowed: float32. For others, export with --precision")
    from ...loading.assembly import load_model
    from ..graphs import folder
    from ..graphs.adapters import pack

    given = {"variant": variant, "revision": revision}
    pipeline = load_model(
        name, backend="reference", device="cpu", dtype="float32", quantization=None, slots=slots, rank=rank, **given
    )
    library, reference = pipeline.adapters, pipeline.network
    sites = reference.transformer.config.sites()

    def style(slot: int) -> tuple[object, str, Callable[[], Mapping[str, Array]]]:
        adapter = library.bank.adapter(slot)
        return adapter, adapter.name, lambda: pack(adapter, sites)

    # Where ONNX Runtime maps the weights, so it stays as long as the network does.
    place = tempfile.TemporaryDirectory(prefix="stylemuse-", ignore_cleanup_errors=True)
    made = folder.write(
        pipeline, reference, Path(place.name), "bank", [library[name] for name in library.names]
    ).manifest
    network = OnnxNetwork(
        Path(place.name), made, device=device, slots=slots, threads=threads, style=style,
        files=place,
    )  # fmt: skip
    why = {"backend": "asked for", "device": network.provider.why, "dtype": "what a model is exported in here"}
    return Pipeline(name, network, library, {"defaults": pipeline.defaults}, why, lambda _: network)


def open_folder(
    path: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    known: manifest.Manifest | None = None,
) -> ExportedPipeline:
    """A pipeline over an exported folder, which is checked unless its manifest is `known`."""
    made = manifest.read(path) if known is None else known
    if dtype not in (None, made.precision):
        raise StylemuseError(f"dtype {dtype!r} is not there; this folder was exported in {made.precision}")
    if missing := [name for name in made.instructions if name not in cpu.features()]:
        raise StylemuseError(
            f"the {made.precision} graphs of {path} need {' and '.join(missing)} instructions; without them this CPU "
            f"draws other pictures. Export again: stylemuse export FOLDER --model MODEL --precision {made.precision}"
        )
    shelf = Shelf(path, made)

    def style(slot: int) -> tuple[object, str, Callable[[], Mapping[str, Array]]]:
        return shelf.holder(slot), shelf.holder(slot).name, lambda: shelf.tensors(slot)

    network = OnnxNetwork(path, made, device=device, slots=shelf.slots, threads=threads, style=style)
    why = {"backend": "an exported folder", "device": network.provider.why, "dtype": "what it was exported in"}
    return ExportedPipeline(made.model, network, shelf, {"defaults": made.defaults}, why, lambda _: network)
