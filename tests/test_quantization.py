"""``load(..., quantization=...)``: whole pipelines in 8 bits, what they save and lose, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run
from drawing import draw, load, noise
from interpreter import DEVICE

import stylemuse
from stylemuse import Pipeline, Request, Sampling, StyleDrop, StylemuseError
from stylemuse.backend.machine import choose_quantization
from stylemuse.export.graphs.deploy import export
from stylemuse.kernels import quantization
from stylemuse.kernels.dispatch import REFERENCE
from stylemuse.kernels.quantization import FORMATS
from stylemuse.models.layers import Linear
from stylemuse.tuning.style import tune

LOADING: dict[str, Any] = {"device": str(DEVICE), "slots": 3, "rank": 4}
AMPERE, ADA = (8, 6), (8, 9)


def formats() -> list[str]:
    return [name for name in FORMATS if quantization.obstacle(name, DEVICE) is None]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Pipeline:
    return load(tiny_model, backend="reference", **LOADING)


@pytest.fixture(scope="module", params=FORMATS)
def small(request: pytest.FixtureRequest, tiny_model: Path) -> Pipeline:
    return load(tiny_model, backend="reference", quantization=request.param, **LOADING)


def projections(pipe: Pipeline) -> dict[str, Linear]:
    return {module.name: module for module in pipe.network.transformer.modules() if isinstance(module, Linear)}


def test_the_layers_are_in_8_bits_and_nothing_else(small: Pipeline, plain: Pipeline) -> None:
    """Text, conditioning, conv stages and the head have the weights they had; what is quantized exists once."""
    number, before = small.network.quantization, projections(plain)
    chosen = {name for name, each in projections(small).items() if each.quantized is not None}
    places = ("attn1.qkv", "attn1.to_out", "attn2.to_q", "attn2.to_out", "ff.up", "ff.down")
    assert chosen == {f"transformer_layers.{index}.{place}" for index in range(2) for place in places}
    kept, had = (dict(pipe.network.transformer.named_parameters()) for pipe in (small, plain))
    assert had.keys() - kept.keys() == {f"{name}.weight" for name in chosen}
    assert all(torch.equal(kept[name], had[name]) for name in kept)
    for name in chosen:
        made = projections(small)[name].quantized
        assert made is not None
        assert (made.values.dtype, made.scales.dtype) == (number, torch.float32)
        error = (made.wide() - before[name].weight).norm() / before[name].weight.norm()
        assert 0 < error < (0.01 if number == torch.int8 else 0.04)


def test_explain_tells(small: Pipeline, plain: Pipeline) -> None:
    told = small.explain()["quantization"]
    assert told.startswith(f"{quantization.NAMES[small.network.quantization]}: asked for; ")
    assert "12 projections of the transformer layers" in told
    assert "quantization" not in plain.explain()


def test_pictures_change_a_little(small: Pipeline, plain: Pipeline) -> None:
    """And rows stay alone: alone and in a batch, base and styled, the same tokens."""
    requests = [Request("a fox", seed=1), Request("a cat", "ink", seed=2, guidance=StyleDrop(2.0, 5.0))]
    found, expected = (np.stack([result.tokens for result in pipe.run(requests)]) for pipe in (small, plain))
    assert 0.3 < (found == expected).mean() < 1
    for request, tokens in zip(requests, found, strict=True):
        assert np.array_equal(small.run([request])[0].tokens, tokens)
    before = draw(small)
    small.adapters.add("more", small.adapters["ink"])
    small.adapters.remove("more")
    assert np.array_equal(draw(small), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", formats())
def test_tokens_are_the_references(name: str, tiny_model: Path) -> None:
    requests = [
        Request("a fox", seed=1, sampling=Sampling(steps=2)),
        Request("a cat", "ink", seed=2, sampling=Sampling(steps=2), guidance=StyleDrop(2.0, 5.0)),
    ]
    pipes = [load(tiny_model, backend=backend, quantization=name, **LOADING) for backend in ("reference", "triton")]
    expected, found = ([result.tokens for result in pipe.run(requests)] for pipe in pipes)
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["int4", "bfloat16", "", "INT8"])
def test_unknown_formats(name: str, tiny_model: Path) -> None:
    with pytest.raises(StylemuseError, match=f"^quantization '{name}' is not there; allowed: int8, fp8$"):
        load(tiny_model, quantization=name)


def test_graphs_have_their_own(tiny_model: Path) -> None:
    with pytest.raises(StylemuseError, match=r"^quantization 'int8' is not for backend 'onnx'; export with --precis"):
        load(tiny_model, backend="onnx", quantization="int8")


@pytest.mark.parametrize(
    ("capability", "hip", "answer"),
    [
        (AMPERE, None, r"fp8 needs compute capability 8\.9, this GPU has 8\.6; allowed here: int8$"),
        (ADA, "6.4", r"AMD's GPUs have another fp8 than e4m3; allowed here: int8$"),
        (ADA, None, None),
    ],
    ids=["Ampere", "CDNA", "Ada"],
)
def test_fp8_needs_its_matrix_units(
    capability: tuple[int, int], hip: str | None, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton; the definition runs anywhere, and int8 everywhere."""
    from comparator import TRITON

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = torch.device("cuda", 0)
    assert choose_quantization("int8", TRITON, gpu) == torch.int8
    assert choose_quantization("fp8", REFERENCE, gpu) == torch.float8_e4m3fn
    if answer is None:
        assert choose_quantization("fp8", TRITON, gpu) == torch.float8_e4m3fn
        return
    with pytest.raises(StylemuseError, match=f"^quantization 'fp8' cannot run here: {answer}"):
        choose_quantization("fp8", TRITON, gpu)


def test_what_needs_the_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pipe = load(tiny_model, backend="reference", device="cpu", quantization="int8")
    with pytest.raises(StylemuseError, match=r"^tuning a quantized model is not supported; load it without"):
        tune(pipe, noise(), "a cat in ink style", name="ink")
    with pytest.raises(StylemuseError, match=r"^an export starts from a model that is not quantized"):
        export(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(run: Run, tiny_model: Path) -> None:
    ran = run("generate", "a fox", "--model", tiny_model, "--quantization", "int8", "--seed", 7, "--json")
    assert ran.code == 0, ran.error
    assert '"quantization": "int8: asked for' in ran.out
    refused = run("generate", "a fox", "--model", tiny_model, "--quantization", "int4")
    assert refused.code == 2
    assert "allowed: int8, fp8" in refused.error


def test_two_pipelines_of_one_process(tiny_model: Path, plain: Pipeline) -> None:
    before = draw(plain)
    assert stylemuse.load(str(tiny_model), quantization="int8").network.quantization == torch.int8
    assert np.array_equal(draw(plain), before)
