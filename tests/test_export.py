"""Exported folders draw what the model draws: every form, LoRA and bottleneck, mixed batches, any backend option."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exports import any_request, bottleneck, same, with_more_styles
from models import random_style

import stylemuse as sm
from stylemuse import Request, Sampling
from stylemuse.export.graphs.deploy import export
from stylemuse.export.run.manifest import read
from stylemuse.export.run.spec import GraphSpec

UNGUIDED = sm.CFG(1.0)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> sm.Pipeline:
    return with_more_styles(tiny_model)


@pytest.fixture(scope="module")
def bank(pipe: sm.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    export(pipe, out := tmp_path_factory.mktemp("exports") / "bank")
    return out


@pytest.fixture(scope="module")
def single(pipe: sm.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "single"
    export(pipe, out, form="single", styles=["ink", "drop"])
    return out


def test_a_bank_draws_any_mixed_batch(pipe: sm.Pipeline, bank: Path) -> None:
    choice = random.Random(0)
    requests = [any_request(choice) for _ in range(12)]
    exported = sm.load(str(bank))
    same(exported.run(requests), pipe.run(requests))
    assert exported.adapters.names == pipe.adapters.names


def test_an_engine_draws_with_graphs(bank: Path) -> None:
    graphs, choice = sm.load(str(bank)), random.Random(5)
    requests = [any_request(choice) for _ in range(6)]
    alone = [graphs.run([request])[0] for request in requests]
    with sm.Engine(graphs, max_rows=6) as engine:
        tickets = [engine.submit(request) for request in requests]
        same([ticket.result(120.0) for ticket in tickets], alone)
    with pytest.raises(sm.StylemuseError, match="give max_rows for backend 'onnx'"):
        sm.Engine(graphs, memory=1 << 30)


def test_rows_do_not_notice_their_neighbours(bank: Path) -> None:
    choice = random.Random(1)
    requests, exported = [any_request(choice) for _ in range(6)], sm.load(str(bank))
    for request, result in zip(requests, exported.run(requests), strict=True):
        same(exported.run([request]), [result])


@pytest.mark.parametrize("style", [None, "ink", "drop"])
def test_single(pipe: sm.Pipeline, single: Path, style: str | None) -> None:
    """One style, beside rows of the base, from the files that ONNX Runtime reads itself."""
    exported = sm.load(str(single))
    request = Request("a fox", style=style, seed=4, n=2)
    same(exported.run([request]), pipe.run([request]))
    with pytest.raises(sm.StylemuseError, match="one style at a time, not 2"):
        exported.generate("a fox", style={"ink": 0.5, "drop": 0.5})


@pytest.mark.parametrize("graph", ["condition", "step"])
def test_single_takes_its_style_as_an_adapter_of_onnx_runtime(single: Path, graph: str) -> None:
    """`RunOptions.add_active_adapter` gives what feeding the file's tensors gives."""
    made = read(single)
    inputs = [tensor for tensor in made.graphs[graph].inputs if not tensor.overridable]
    sizes = {"rows": 2, "pictures": 1, "branches": 2, "height": 4, "width": 4, "text": made.length}
    feeds = GraphSpec(graph, tuple(inputs), ()).dummies(sizes)
    if graph == "step":
        feeds["tokens"][:] = made.mask_id
        feeds["masked"][:] = 3
    session = onnxruntime.InferenceSession(single / f"{graph}.onnx", providers=["CPUExecutionProvider"])
    path = str(single / made.styles["ink"].files[graph].path)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(path)
    options.add_active_adapter(adapter)
    file = onnxruntime.AdapterFormat.read_adapter(path)
    fed = session.run(None, feeds | {name: value.numpy() for name, value in file.get_parameters().items()})
    styled, base = session.run(None, feeds, options), session.run(None, feeds)
    assert all(np.array_equal(one, other) for one, other in zip(fed, styled, strict=True))
    assert not all(np.array_equal(one, other) for one, other in zip(base, styled, strict=True))


@pytest.mark.parametrize("style", ["ink", "drop"])
def test_fused(pipe: sm.Pipeline, tmp_path: Path, style: str) -> None:
    export(pipe, tmp_path / "fused", form="fused", styles=[style], strength=0.5)
    exported = sm.load(str(tmp_path / "fused"))
    own = {style: sm.Style(strength=0.5)}
    request = Request("a fox", style=own, seed=4, n=2, guidance=sm.CFG(3.0))
    fused = Request("a fox", style=style, seed=4, n=2, guidance=sm.CFG(3.0))
    same(exported.run([fused]), pipe.run([request]))
    with pytest.raises(sm.StylemuseError, match="draws every branch in its style"):
        exported.generate("a fox", style=style, guidance=sm.StyleDrop(1.0, 2.0))
    with pytest.raises(sm.StylemuseError, match="fused at scale"):
        exported.generate("a fox", style={style: sm.Style(strength=0.7)}, guidance=UNGUIDED)


@pytest.mark.parametrize("form", ["bank", "single", "fused"])
def test_float16(pipe: sm.Pipeline, tmp_path: Path, form: str) -> None:
    """The transformer in fp16: nearly the model's tokens in the first step, and types are told."""
    styles = ["ink"] if form == "fused" else ["ink", "drop"]
    made = export(pipe, tmp_path / "half", form=form, styles=styles, precision="float16")
    assert 0.7 < made.agreement["tokens"] <= 1
    types = {tensor.name: tensor.dtype for tensor in made.graphs["step"].inputs}
    assert types["transformer_layers.0.attn2.keys"] == "float16"
    assert types["weights"] == "float32"
    weights = onnx.load(tmp_path / "half" / "step.onnx").graph.initializer
    wide = {each.name for each in weights if each.data_type == onnx.TensorProto.FLOAT and np.prod(each.dims) > 64}
    assert not wide
    exported = sm.load(str(tmp_path / "half"))
    assert exported.explain()["dtype"] == "float16: what it was exported in"
    request = Request("a fox", style="ink", seed=3, n=2, sampling=Sampling(1), guidance=sm.CFG(2.0))
    got, expected = exported.run([request])[0].tokens, pipe.run([request])[0].tokens
    assert np.mean(got == expected) > 0.9


def test_base_without_adapters(pipe: sm.Pipeline, tmp_path: Path) -> None:
    made = export(pipe, tmp_path / "base", form="fused")
    assert not made.styles
    exported = sm.load(str(tmp_path / "base"))
    same([exported.generate("a fox", seed=1)], [pipe.generate("a fox", seed=1)])
    with pytest.raises(sm.StylemuseError, match="allowed: none"):
        exported.generate("a fox", style="ink")


def test_a_model_is_loaded_as_graphs(tiny_model: Path) -> None:
    """Styles come and go while the graphs stay."""
    graphs = sm.load(str(tiny_model), backend="onnx")
    plain = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    assert graphs.explain()["backend"] == "onnx: asked for"
    config = plain.network.transformer.config
    for seed in (1, 2, 1):
        for pipe in (graphs, plain):
            pipe.adapters.add("new", random_style(config, "new", rank=3 + seed, seed=seed), swap=True)
        requests = [Request("a fox", style="new", seed=5), Request("a cat", style="ink", seed=6)]
        same(graphs.run(requests), plain.run(requests))
    graphs.adapters.add("drop", bottleneck(plain))
    with pytest.raises(sm.StylemuseError, match="this export has places for"):
        graphs.generate("a fox", style="drop")


def test_previews(bank: Path) -> None:
    exported, counts = sm.load(str(bank)), []
    exported.generate("a fox", on_step=lambda preview: counts.append(int((preview.tokens(0) == 69).sum())), steps=4)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0 < counts[0]


def test_the_manifest_tells_what_is_there(pipe: sm.Pipeline, bank: Path) -> None:
    made = read(bank)
    assert (made.form, made.precision, made.mask_id, made.side, made.factor) == ("bank", "float32", 69, 8, 4)
    assert set(made.styles) == {"ink", "neon", "drop", "wide"}
    assert made.styles["drop"].scale == 0.8
    assert made.schedule["masked_after"][-1] == 0
    assert {path.name for path in bank.iterdir()} == {
        "adapters", "tokenizer", "manifest.json", *(f"{name}.onnx" for name in made.graphs)
    }  # fmt: skip
    rewrites = {"text": {"attention"}, "step": {"attention"}, "pixels": {"group_norm"}, "codes": {"group_norm"}}
    assert {name: set(graph.errors) for name, graph in made.graphs.items()} == {
        "condition": set[str](),
        "generate": set(),
    } | rewrites


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "merged"}, "allowed: bank, single, fused"),
        ({"form": "fused", "styles": ["ink", "neon"]}, "takes one style, not 2"),
        ({"styles": ["oil"]}, "allowed: drop, ink, neon, wide"),
        ({"precision": "int4"}, "allowed: float32, float16, int8"),
        ({"strength": 2.0}, "strength has no effect"),
    ],
)
def test_what_is_impossible_leaves_nothing(pipe: sm.Pipeline, tmp_path: Path, options: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(sm.StylemuseError, match=words):
        export(pipe, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_refused(pipe: sm.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(sm.StylemuseError, match="exists already"):
        export(pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_draws_where_torch_is_not_installed(pipe: sm.Pipeline, bank: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "without_torch.py"), str(bank)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    results = pipe.run(
        [
            Request("a fox", style="ink", seed=5, n=2),
            Request("a cat", style={"ink": 0.5, "neon": 0.5}, seed=6, sampling=Sampling(schedule="styledrop")),
        ]
    )
    results.append(pipe.generate("a fox", image=results[0].images[0], strength=0.5, seed=7))
    assert found["tokens"] == [result.tokens.tolist() for result in results]
    assert found["seeds"] == [list(result.seeds) for result in results[:2]]
    assert found["masked"][-1] == 0 < found["masked"][0]
    assert found["packages"] == ["PIL", "numpy", "onnxruntime", "tokenizers"]
