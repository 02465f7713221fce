"""Whole networks through the Triton kernels: the reference's tokens, the laws, and what the compilers see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparator import TRITON
from drawing import load
from interpreter import DEVICE
from models import random_style
from peers import text_inputs, transformers

from stylemuse import Adapter, Pipeline, Request, Sampling, StyleDrop
from stylemuse.adapters.bank import Bank
from stylemuse.kernels.dispatch import OPERATIONS
from stylemuse.kernels.rows import BASE, RowAdapters, RowSlots
from stylemuse.models.amused import Amused

LOADING: dict[str, Any] = {"device": str(DEVICE), "slots": 3, "rank": 4}


@pytest.fixture(scope="module")
def pipes(tiny_model: Path) -> tuple[Pipeline, Pipeline]:
    """The reference and Triton in one process; both with a bottleneck besides the two LoRAs."""
    made = tuple(load(tiny_model, backend=backend, **LOADING) for backend in ("reference", "triton"))
    for pipe in made:
        pipe.adapters.add("look", bottleneck_style(pipe))
    return made  # type: ignore[return-value]


def bottleneck_style(pipe: Pipeline) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    sites = pipe.network.transformer.config.bottleneck_sites()
    pairs = {
        site: (torch.randn(width, 3, generator=generator), torch.randn(3, width, generator=generator) * 0.5)
        for site, width in sites.items()
    }
    return Adapter("look", "bottleneck", pairs, recommended={"guidance": "CFG", "scale": 2.0})


@pytest.mark.slow
def test_tokens_are_the_references(pipes: tuple[Pipeline, Pipeline]) -> None:
    """A batch of base, LoRA and bottleneck, two schedules, three branches."""
    requests = [
        Request("a fox", seed=1, sampling=Sampling(steps=2)),
        Request("a cat", "ink", seed=2, sampling=Sampling(steps=2), guidance=StyleDrop(2.0, 5.0)),
        Request("an owl", "look", seed=3, sampling=Sampling(steps=2, schedule="styledrop")),
    ]
    expected, found = ([result.tokens for result in pipe.run(requests)] for pipe in pipes)
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))
    assert len({tokens.tobytes() for tokens in found}) == 3


def features(pipe: Pipeline, *styles: str | None) -> torch.Tensor:
    """What a step computes for rows of these styles before anything is drawn, (R, N, C), on a grid of 4 x 2."""
    network, slots = pipe.network, [BASE if style is None else pipe.adapters.version(style).slot for style in styles]
    text = network.text("a fox")
    contexts = network.contexts([(text, (4, 2), slot, 1.0) for slot in slots])
    return network.features(torch.arange(8, device=DEVICE).repeat(len(slots), 1), contexts)


def test_features_are_the_references_and_rows_are_alone(pipes: tuple[Pipeline, Pipeline]) -> None:
    styles = (None, "ink", "look")
    expected, found = (features(pipe, *styles) for pipe in pipes)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    for row, style in enumerate(styles):
        assert torch.equal(features(pipes[1], style)[0], found[row])


def test_explain_tells(pipes: tuple[Pipeline, Pipeline]) -> None:
    plain, triton = (pipe.explain() for pipe in pipes)
    assert plain["kernels"] == "plain torch: the definition"
    assert triton["backend"] == "triton: asked for"
    assert triton["kernels"].startswith(f"Triton for {', '.join(OPERATIONS)}: ")
    assert [pipe.network.name for pipe in pipes] == ["reference", "triton"]


class Step(torch.nn.Module):
    """One forward pass with adapters, all of it tensors: what a compiler is given."""

    def __init__(self, network: Amused, bank: Bank, groups: frozenset[str]) -> None:
        super().__init__()
        self.network, self.sites = network, {name: bank.sites[name] for name in groups}

    def forward(
        self, tokens: torch.Tensor, conditioning: dict[str, torch.Tensor], slots: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        return self.network.features(tokens, conditioning, RowAdapters(RowSlots(slots, scales), self.sites))


@pytest.fixture
def step() -> tuple[Step, tuple[Any, ...]]:
    """A tiny network on the kernels, with one style, and the inputs of a pass of two rows."""
    _, network = transformers(num_res_blocks=1, num_hidden_layers=1)
    network = network.to(DEVICE).rest(TRITON)
    bank = Bank(network.config.sites(), network.config.bottleneck_sites(), slots=1, rank=2, device=DEVICE)
    slot = bank.add(random_style(network.config, "ink"))
    inputs = {name: value.to(DEVICE) for name, value in text_inputs(network.config, 2, 5).items()}
    with torch.no_grad():
        conditioning = network.condition(**inputs)
    slots, scales = torch.tensor([slot, BASE], device=DEVICE), torch.tensor([1.0, 1.0], device=DEVICE)
    tokens = torch.arange(12, device=DEVICE).view(2, 2, 3)
    return Step(network, bank, frozenset(bank.touched([slot]))), (tokens, conditioning, slots, scales)


def test_torch_export_sees_the_kernels(step: tuple[Step, tuple[Any, ...]]) -> None:
    module, inputs = step
    with torch.no_grad():
        program = torch.export.export(module, inputs)
        called = {str(node.target).split(".")[1] for node in program.graph.nodes if "stylemuse" in str(node.target)}
        assert called == {"projection", "attention", "response_norm", "depthwise_norm"}
        assert torch.equal(program.module()(*inputs), module(*inputs))


def test_torch_compile_keeps_one_graph(step: tuple[Step, tuple[Any, ...]]) -> None:
    module, inputs = step
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), module(*inputs))
