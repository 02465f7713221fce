"""The graphs give what the networks they were made from give; a rewrite that changes numbers fails the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import stylemuse as sm
from stylemuse.export.graphs import check, convert, files, fuse
from stylemuse.export.graphs.folder import write
from stylemuse.export.graphs.graph import Graph
from stylemuse.export.run.spec import GraphSpec
from stylemuse.loading.assembly import TorchPipeline

PROMPTS = ("a fox in the red castle", "", "an owl")


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> sm.Pipeline:
    return sm.load(str(tiny_model), backend="reference", dtype="float32")


def sizes(pipe: sm.Pipeline) -> list[dict[str, int]]:
    common = {"text": pipe.network.tokenizer.length}
    return [
        {"rows": 1, "pictures": 1, "branches": 1, "height": 2, "width": 4} | common,
        {"rows": 3, "pictures": 2, "branches": 2, "height": 6, "width": 4} | common,
    ]


def session(built: tuple[GraphSpec, Graph], path: Path, at: list[dict[str, int]]) -> onnxruntime.InferenceSession:
    fuse.rewrite(*built, path, at)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(got: Any, expected: torch.Tensor) -> None:
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_text(pipe: sm.Pipeline, tmp_path: Path) -> None:
    network = pipe.network
    ids = network.tokenizer(PROMPTS)
    ran = session(convert.text(network.text_encoder, ids.shape[1]), tmp_path / "text.onnx", sizes(pipe))
    with torch.no_grad():
        expected = network.text_encoder(ids)
    for got, wanted in zip(ran.run(None, {"ids": ids.numpy()}), expected, strict=True):
        close(got, wanted)


def test_condition(pipe: sm.Pipeline, tmp_path: Path) -> None:
    network, grid = pipe.network, (6, 10)
    built = convert.condition(network.transformer, network.tokenizer.length)
    ran = session(built, tmp_path / "condition.onnx", sizes(pipe))
    texts = [network.text(prompt) for prompt in PROMPTS]
    inputs = {
        "text": torch.cat([text.penultimate for text in texts]).numpy(),
        "pooled": torch.cat([text.pooled for text in texts]).numpy(),
        "micro": np.array([[40, 24, 0, 0, 6]] * len(texts), np.float32),
    }
    made = dict(zip([each.name for each in built[0].outputs], ran.run(None, inputs), strict=True))
    for row, text in enumerate(texts):
        for name, expected in network.context(text, grid).conditioning.items():
            if expected.ndim == 3:
                close(made[name][row], expected[0])
                continue
            for index, part in enumerate(("keys", "values")):
                close(made[f"{name}.{part}"][row], expected[0, index].transpose(0, 1).flatten(1))
    assert len(made) == len(built[0].outputs)


@pytest.mark.parametrize("grid", [(2, 2), (6, 10), (8, 8)])
def test_pixels(pipe: sm.Pipeline, tmp_path: Path, grid: tuple[int, int]) -> None:
    ran = session(convert.pixels(pipe.network.vq), tmp_path / "pixels.onnx", sizes(pipe))
    tokens = torch.randint(0, 64, (3, *grid), generator=torch.Generator().manual_seed(0))
    got = ran.run(None, {"tokens": tokens.numpy()})[0].astype(int)
    expected = np.stack([np.asarray(picture) for picture in pipe.network.pixels(tokens)])
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1


def test_weights_of_a_large_graph_lie_in_one_sidecar(
    pipe: sm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    given = None
    for folder, limit in ((inside, files.INSIDE), (outside, 0)):
        monkeypatch.setattr(files, "INSIDE", limit)
        folder.mkdir()
        built = convert.text(pipe.network.text_encoder, 16)
        ran = session(built, folder / "text.onnx", sizes(pipe))
        got = ran.run(None, {"ids": pipe.network.tokenizer(PROMPTS).numpy()})
        given = given or got
        assert all(np.array_equal(one, other) for one, other in zip(given, got, strict=True))
    assert [path.name for path in sorted(inside.iterdir())] == ["text.onnx"]
    assert [path.name for path in sorted(outside.iterdir())] == ["text.onnx", "text.onnx.data"]
    model = onnx.load(outside / "text.onnx", load_external_data=False)
    places = {
        entry.value for each in model.graph.initializer for entry in each.external_data if entry.key == "location"
    }
    assert places == {"text.onnx.data"}


@pytest.mark.parametrize(
    ("built", "slow", "fast"),
    [
        (lambda network: convert.step(network.transformer), "Attention", "MultiHeadAttention"),
        (lambda network: convert.pixels(network.vq), "GroupNormalization", "InstanceNormalization"),
    ],
)
def test_the_plain_graph_is_standard_and_the_fused_one_has_its_kernels(
    pipe: sm.Pipeline, tmp_path: Path, built: Callable[..., Any], slow: str, fast: str
) -> None:
    _, graph = built(pipe.network)
    files.write(graph, tmp_path / "graph.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "graph.onnx"), full_check=True)
    assert all(node.domain == "" for node in graph.nodes)
    before = sum(node.op_type == slow for node in graph.nodes)
    for function in fuse.REWRITES.values():
        graph.nodes = function(graph)
    kinds = [node.op_type for node in graph.nodes]
    assert kinds.count(slow) == 0 < before == kinds.count(fast)


def test_weights_do_not_grow_with_the_steps(pipe: sm.Pipeline, tmp_path: Path) -> None:
    """Nor does a rewrite leave one that no node reads."""
    sizes = []
    for steps in (3, 30):
        longer = TorchPipeline(
            pipe.name, pipe.network, pipe.adapters, {"defaults": {"steps": steps}}, pipe._why, pipe.decoder
        )
        (made := tmp_path / str(steps)).mkdir()
        write(longer, pipe.network, made, "bank", [])
        sizes.append({path.name: path.stat().st_size for path in sorted(made.glob("*.onnx"))})
        for path in made.glob("*.onnx"):
            graph = onnx.load(path).graph
            read = {name for node in graph.node for name in node.input}
            assert not [each.name for each in graph.initializer if each.name not in read]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 5


def _without_bias(graph: Graph) -> list[onnx.NodeProto]:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.nodes]
    for node in nodes:
        if node.op_type == "LayerNormalization":
            del node.input[2:]
    return nodes


def _unconnected(graph: Graph) -> list[onnx.NodeProto]:
    return graph.nodes[1:]


@pytest.mark.parametrize(("rewrite", "words"), [(_without_bias, "is off by"), (_unconnected, "does not run")])
def test_a_rewrite_that_changes_numbers_fails(
    pipe: sm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewrite: Callable[..., Any], words: str
) -> None:
    monkeypatch.setattr(fuse, "REWRITES", {"broken": rewrite})
    with pytest.raises(sm.StylemuseError, match=words):
        fuse.rewrite(*convert.text(pipe.network.text_encoder, 16), tmp_path / "text.onnx", sizes(pipe))


def test_whole_numbers_must_agree() -> None:
    expected, got = np.arange(2000), np.arange(2000)
    got[:2] += 1
    description = GraphSpec("x", (), ())
    assert check.compare(description, "x", {"tokens": expected}, {"tokens": got}) == 0.0
    got[2] += 1
    with pytest.raises(sm.StylemuseError, match=r"99\.85% of tokens agree"):
        check.compare(description, "x", {"tokens": expected}, {"tokens": got})
