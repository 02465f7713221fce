"""Pipelines from a model's folder, or from networks that are there already: what `load` does when torch computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..adapters.bank import Bank
from ..adapters.library import Library
from ..backend.machine import Machine, choose, choose_kernels, choose_quantization
from ..backend.network import TorchNetwork
from ..backend.static import StaticRows
from ..core import STYLE_NAME, StylemuseError
from ..decoding.buckets import Buckets
from ..decoding.canvas import Network, WholeSteps
from ..kernels.dispatch import REFERENCE, STEP, Kernels
from ..models.networks import Networks
from ..pipeline import Pipeline
from . import hub
from .folder import read_model, weights_sha256


class TorchPipeline(Pipeline):
    """A pipeline whose networks are torch's: they can be trained, exported, measured part by part."""

    network: TorchNetwork
    adapters: Library


def in_torch(pipe: Pipeline) -> TorchPipeline:
    """The pipeline as one in torch, or an error: an exported folder has graphs, into which nobody can reach."""
    if isinstance(pipe, TorchPipeline):
        return pipe
    raise StylemuseError(f"{pipe.name} is an exported folder, which can only be drawn with; this needs its model")


def load_model(
    name: str,
    *,
    backend: str,
    device: str | None,
    dtype: str | None,
    quantization: str | None,
    variant: str | None,
    revision: str | None,
    slots: int,
    rank: int,
) -> TorchPipeline:
    """A pipeline for a model, with the styles that come with it; see ``stylemuse.load``."""
    machine = choose(device, dtype)
    kernels, why = choose_kernels(backend, machine.device)
    number = choose_quantization(quantization, kernels, machine.device)
    folder = hub.resolve(name, revision=revision, variant=variant)
    networks = read_model(folder, variant)
    fingerprint = partial(weights_sha256, folder / "transformer", variant)
    pipeline = assemble(
        name, networks, machine, fingerprint, kernels, why=why, slots=slots, rank=rank, quantization=number
    )
    library = pipeline.adapters
    for style in networks.extra.get("styles", ()):
        if not STYLE_NAME.fullmatch(str(style)):
            raise StylemuseError(f"model {name!r}: its style {str(style)[:80]!r} is not a name")
        library.add(style, folder / "styles" / style)
    return pipeline


def assemble(
    name: str,
    networks: Networks,
    machine: Machine,
    fingerprint: Callable[[], str],
    kernels: Kernels = REFERENCE,
    *,
    why: str = "asked for",
    slots: int = 64,
    rank: int = 32,
    quantization: torch.dtype | None = None,
) -> TorchPipeline:
    """A pipeline, without styles, of networks that are there already; ``fingerprint`` hashes the transformer."""
    config = networks.transformer.config
    sites = config.sites()
    bank = Bank(sites, config.bottleneck_sites(), slots=slots, rank=rank, device=machine.device, dtype=machine.dtype)
    library = Library(bank, sites, name, fingerprint)
    network = TorchNetwork(networks, machine, bank, kernels, quantization)

    def decoder(rows: int | None) -> Network | WholeSteps:
        # Where launches are calls of functions, the plain loop computes less: what has a weight, or is masked.
        if STEP not in kernels.triton:
            return network
        return Buckets(partial(StaticRows, network), machine.device, rows=rows)

    return TorchPipeline(name, network, library, networks.extra, {"backend": why, **machine.why}, decoder)
