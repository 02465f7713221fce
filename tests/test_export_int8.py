"""int8 in the step's graph: the kernel computes what the definition says, harm is measured, agreement is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from command_line import Run

import stylemuse as sm
from stylemuse.export import files, quantize
from stylemuse.export.deploy import export
from stylemuse.export.graph import MICROSOFT, Graph
from stylemuse.export.spec import Array, GraphSpec, Tensor


def one_product(weight: Array) -> Graph:
    graph = Graph("product")
    x = graph.input(Tensor("x", "float32", ("rows", "places", len(weight))))
    made = graph.op("MatMul", x, graph.weight("w", weight), name="product")
    graph.output(Tensor("y", "float32", ("rows", "places", weight.shape[1])), made)
    return graph


@pytest.mark.parametrize("shape", [(7, 5), (64, 33), (130, 96)])
def test_the_kernel_computes_the_definition(tmp_path: Path, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape).astype(np.float32) * random.uniform(0.1, 9, shape[1]).astype(np.float32)
    weight[:, 2] = 0
    x = random.standard_normal((2, 6, shape[0])).astype(np.float32) + 0.5
    graph = one_product(weight)
    graph.nodes = quantize.quantize(graph, {"product": 0.0})
    files.write(graph, tmp_path / "product.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    small, scale = quantize.weights_of(weight)
    expected = quantize.activations_of(x) @ (small * scale)
    got = session.run(None, {"x": x})[0]
    # A number that lies between two steps may be rounded either way.
    assert np.abs(got - expected).max() <= 2e-2 * np.abs(expected).max()
    assert np.linalg.norm(got - expected) <= 3e-3 * np.linalg.norm(expected)
    assert small.dtype == np.int8
    assert np.abs(small[:, [0, 1, 3, 4]]).max(axis=0).tolist() == [127] * 4


def test_products_that_suffer_stay(tmp_path: Path) -> None:
    """A few huge activations leave no steps for the others: the product's error tells."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 32)).astype(np.float32)
    graph, path = one_product(weight), tmp_path / "product.onnx"
    files.write(graph, path)
    description = GraphSpec("product", (), (Tensor("y", "float32", ()),))
    x = random.standard_normal((2, 6, 64)).astype(np.float32)
    (calm,) = quantize.sensitivity(description, graph, path, [{"x": x}]).values()
    x[0, 0] *= 1e4
    x[0, 0, 0] = 0
    weight[1:] = 0
    (wild,) = quantize.sensitivity(description, graph, path, [{"x": x}]).values()
    assert calm < quantize.LIMIT < wild
    assert quantize.quantize(graph, {"product": wild}) == graph.nodes
    assert quantize.quantize(graph, {"product": calm})[0].domain == MICROSOFT


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


def test_fp32_that_does_not_agree_fails(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    monkeypatch.setattr("stylemuse.export.agreement.measure", lambda *_: {"tokens": 0.99})
    with pytest.raises(sm.StylemuseError, match=r"agree with the model in 99\.00% of tokens only"):
        export(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
