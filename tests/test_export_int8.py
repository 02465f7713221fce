"""int8 in the step's graph: the kernel computes what the definition says, harm is measured, agreement is told."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from command_line import Run

import stylemuse as sm
from stylemuse.backend import cpu
from stylemuse.export.graphs import files, quantize
from stylemuse.export.graphs.deploy import export
from stylemuse.export.graphs.graph import MICROSOFT, Graph
from stylemuse.export.run.spec import Array, GraphSpec, Tensor


def one_product(weight: Array) -> Graph:
    graph = Graph("product")
    x = graph.input(Tensor("x", "float32", ("rows", "places", len(weight))))
    made = graph.op("MatMul", x, graph.weight("w", weight), name="product")
    graph.output(Tensor("y", "float32", ("rows", "places", weight.shape[1])), made)
    return graph


SHAPES = [(7, 5), (64, 33), (130, 96)]


def quantized(folder: Path, inside: int, outside: int) -> tuple[Path, Array, Array]:
    """A written product in int8, an input whose numbers use the whole range, and what the definition gives for it."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((inside, outside)) * random.uniform(0.1, 9, outside)
    weight = (weight * 0.1 + np.sign(weight)).astype(np.float32)  # near the largest, all of them
    weight[:, 2] = 0
    x = (random.standard_normal((2, 6, inside)) * 0.1 + 1).astype(np.float32)
    x[1] *= -1000
    x[0, 3] = 0
    graph = one_product(weight)
    quantize.quantize(graph, {"product": 0.0})
    files.write(graph, path := folder / "product.onnx")
    small, scale = quantize.weights_of(weight)
    assert small.dtype == np.int8
    assert np.abs(small).max(axis=0).tolist() == [63, 63, 0] + [63] * (outside - 3)
    return path, x, quantize.activations_of(x) @ (small * scale)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_the_definition(tmp_path: Path, shape: tuple[int, int]) -> None:
    path, x, expected = quantized(tmp_path, *shape)
    got = session(path).run(None, {"x": x})[0]
    for row in range(2):
        np.testing.assert_allclose(got[row], expected[row], rtol=0, atol=1e-5 * np.abs(expected[row]).max())


def test_rows_are_alone(tmp_path: Path) -> None:
    """A row's range is its own: whatever stands beside it changes no bit."""
    path, x, _ = quantized(tmp_path, 130, 96)
    together = session(path).run(None, {"x": x})[0]
    for row in range(2):
        assert np.array_equal(session(path).run(None, {"x": x[row : row + 1]})[0][0], together[row])


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64 (package qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an older CPU of the same kind")
def test_an_older_cpu_computes_the_same(tmp_path: Path) -> None:
    """With AVX2 and without VNNI it gives the bits that this CPU gives. Weights of eight bits are off by 10 % there."""
    path, x, _ = quantized(tmp_path, 130, 96)
    expected = session(path).run(None, {"x": x})[0]
    np.save(tmp_path / "x.npy", x)
    program = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1] + '/product.onnx', providers=['CPUExecutionProvider'])\n"
        "y = session.run(None, {'x': numpy.load(sys.argv[1] + '/x.npy')})[0]\n"
        "numpy.save(sys.argv[1] + '/y.npy', y)\n"
    )
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


def test_products_that_suffer_stay(tmp_path: Path) -> None:
    """A huge activation in a row leaves no steps for the others: the product's error tells."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 32)).astype(np.float32)
    graph, path = one_product(weight), tmp_path / "product.onnx"
    files.write(graph, path)
    description = GraphSpec("product", (), (Tensor("y", "float32", ()),))
    x = random.standard_normal((2, 6, 64)).astype(np.float32)
    (calm,) = quantize.sensitivity(description, graph, path, [{"x": x}]).values()
    x[..., 0] = 1e4
    weight[0] = 0
    (wild,) = quantize.sensitivity(description, graph, path, [{"x": x}]).values()
    assert calm < quantize.LIMIT < wild
    before = list(graph.nodes)
    quantize.quantize(graph, {"product": wild})
    assert graph.nodes == before
    quantize.quantize(graph, {"product": calm})
    assert MICROSOFT in {node.domain for node in graph.nodes}


@pytest.mark.parametrize("form", ["bank", "single"])
def test_an_int8_export(run: Run, tiny_model: Path, form: str) -> None:
    done = run("export", "out", "--model", tiny_model, "--form", form, "--precision", "int8", "--json").document
    told = done["agreement"]
    assert told["requests"] == (3 if form == "bank" else 2)
    assert told["int8_products"] >= 20
    assert 0.5 < told["tokens"] <= 1
    assert told["picture_error"] < 40
    assert 0 < told["largest_product_error"] <= quantize.LIMIT
    exported = sm.load("out")
    assert exported.explain()["dtype"] == "int8: what it was exported in"
    mixed = exported.run([sm.Request("a fox", style="ink", seed=1), sm.Request("a cat", seed=2)])
    base = exported.generate("a fox", seed=1)
    assert not np.array_equal(mixed[0].tokens, base.tokens)
    assert [result.tokens.shape for result in mixed] == [(1, 8, 8)] * 2


def test_a_folder_whose_weights_have_eight_bits_needs_vnni(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exported before weights had seven; a manifest that says nothing is one of those."""
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    made = export(pipe, folder := tmp_path / "out", form="fused", styles=[], precision="int8")
    assert made.instructions == ()
    facts = json.loads((folder / "manifest.json").read_text())
    del facts["instructions"]
    (folder / "manifest.json").write_text(json.dumps(facts))
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"AVX2", "VNNI"}))
    assert sm.load(str(folder)).generate("a fox", seed=1).tokens.shape == (1, 8, 8)
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"AVX2", "AVX-512"}))
    with pytest.raises(sm.StylemuseError, match=r"need VNNI instructions; .* stylemuse export FOLDER --model MODEL"):
        sm.load(str(folder))
    (folder / "manifest.json").write_text(json.dumps(facts | {"instructions": ["MMX"]}))
    with pytest.raises(sm.StylemuseError, match=r"instructions are of AVX2, AVX-512, VNNI"):
        sm.load(str(folder))


def test_fp32_that_does_not_agree_fails(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    monkeypatch.setattr("stylemuse.export.graphs.agreement.measure", lambda *_: {"tokens": 0.99})
    with pytest.raises(sm.StylemuseError, match=r"agree with the model in 99\.00% of tokens only"):
        export(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
