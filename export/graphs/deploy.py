"""Export: a pipeline's model and styles -> a folder of graphs that needs neither this runtime nor torch.

What is written is opened again and draws the same requests as the model: in fp32 the tokens must agree, and for fp16
and int8 the manifest tells how many do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...adapters.canonical import Adapter
from ...backend.network import TorchNetwork
from ...core import StylemuseError
from ...loading.assembly import in_torch
from ...pipeline import Pipeline
from ..run import manifest
from ..run.loading import open_folder
from ..run.manifest import File, GraphFile, Manifest
from ..run.spec import ACCURACY
from . import agreement, files, folder, generate, page, quantize
from .adapters import FORMS, pack


def export(
    pipe: Pipeline,
    out: Path,
    *,
    form: str = "bank",
    styles: Sequence[str] | None = None,
    strength: float = 1.0,
    precision: str = "float32",
    rows: Sequence[int] = (),
    runtime: Path | None = None,
) -> Manifest:
    """Write a folder; it is there whole, or not at all.

    Args:
        pipe: the model, by the reference in fp32 on the CPU.
        out: a folder that does not exist yet, or is empty.
        form: "bank" (each row its own style), "single" (one style at a time, from a file that ONNX Runtime reads) or
            "fused" (one style, or none, in the graphs).
        styles: names of the pipeline's styles; all of them if left out, and none for "fused".
        strength: multiplies the scale of a style that is fused.
        precision: "float32", "float16" (of the transformer, as in ``folder``; for GPUs: a CPU is slow in it) or "int8"
            (of the step's matrix products, as in ``quantize``).
        rows: counts of rows that the graphs are tried with, beside `folder.ROWS`: those that will be served, say.
        runtime: the folder of the npm package onnxruntime-web, for a page that draws in a browser; form "bank" has one.

    Raises:
        StylemuseError: what is asked for is impossible, or a graph does not give what it should.
    """
    model = in_torch(pipe)
    network = model.network
    if network.dtype != torch.float32 or network.device.type != "cpu" or network.name != "reference":
        raise StylemuseError(
            "an export starts from a model loaded with backend='reference', dtype='float32' on the CPU"
        )
    if network.quantization is not None:
        raise StylemuseError("an export starts from a model that is not quantized; precision='int8' quantizes graphs")
    if form not in FORMS:
        raise StylemuseError(f"form {form!r} is unknown; allowed: {', '.join(FORMS)}")
    if precision not in manifest.PRECISIONS:
        raise StylemuseError(f"precision {precision!r} is unknown; allowed: {', '.join(manifest.PRECISIONS)}")
    names = list(styles) if styles is not None else [] if form == "fused" else list(model.adapters.names)
    if odd := [count for count in rows if not 1 <= count <= manifest.MAX_ROWS]:
        raise StylemuseError(f"rows {odd[0]} is not allowed: 1 to {manifest.MAX_ROWS}")
    if form == "fused" and len(names) > 1:
        raise StylemuseError(f"form 'fused' takes one style, not {len(names)}: {', '.join(names)}")
    if form != "fused" and strength != 1.0:
        raise StylemuseError(f"strength has no effect on form {form!r}, whose rows have their own")
    if runtime is not None and form != "bank":
        raise StylemuseError(f"a page draws with form 'bank', not {form!r}")
    adapters = [model.adapters[name] for name in names]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StylemuseError(f"{out.name} exists already; choose another folder or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        made = _deploy(pipe, network, partial, form, adapters, strength, precision, rows)
        if runtime is not None:
            page.write(partial, made, model.adapters, runtime)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise StylemuseError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _deploy(
    pipe: Pipeline,
    network: TorchNetwork,
    path: Path,
    form: str,
    adapters: Sequence[Adapter],
    strength: float,
    precision: str,
    rows: Sequence[int],
) -> Manifest:
    """Write, quantize if asked for, compare, and tell the manifest."""
    base = "float32" if precision == "int8" else precision
    written = folder.write(pipe, network, path, form, adapters, strength, base, rows)
    made, pairs = written.manifest, agreement.requests(form, [adapter.name for adapter in adapters], strength)
    facts: dict[str, Any] = {}
    if precision == "int8":
        graph, facts = _quantized(written, path, [other for _, other in pairs])
        made = replace(made, precision=precision, graphs={**made.graphs, "step": graph})
    sites = network.transformer.config.sites()
    packed = {adapter.name: pack(adapter, sites) for adapter in adapters} if form == "bank" else {}
    whole = generate.write(path, written.built, written.styling, packed, network.sizes.factor)
    made = replace(made, graphs={**made.graphs, "generate": whole})
    made.write(path)
    measured = agreement.measure(pipe, path, pairs)
    for share in ("tokens", "tokens_of_generate"):
        if precision == "float32" and measured[share] < ACCURACY["float32"][1]:
            raise StylemuseError(f"the graphs agree with the model in {measured[share]:.2%} of {share} only")
    made = replace(made, agreement=measured | facts)
    made.write(path)
    return made


def _quantized(written: folder.Written, path: Path, requests: Sequence[Any]) -> tuple[GraphFile, dict[str, Any]]:
    """Replace the step's graph by its int8 form, chosen by what its products give on these requests."""
    (description, graph), step = written.built["step"], path / "step.onnx"
    seen = agreement.record(open_folder(path, known=written.manifest), requests)
    errors = quantize.sensitivity(description, graph, step, [seen[0], seen[len(seen) // 2]])
    quantize.quantize(graph, errors)
    # Removed first: what still maps the old file keeps it.
    for old in (step, files.sidecar(step)):
        old.unlink(missing_ok=True)
    files.write(graph, step)
    told = written.manifest.graphs["step"]
    data = File.of(path, "step.onnx.data") if files.sidecar(step).exists() else None
    left = sorted(name for name, error in errors.items() if error > quantize.LIMIT)
    facts = {"int8_products": len(errors) - len(left), "float32_products": left}
    worst = max((error for name, error in errors.items() if name not in left), default=0.0)
    return replace(told, file=File.of(path, "step.onnx"), data=data), facts | {"largest_product_error": round(worst, 5)}
