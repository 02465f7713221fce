"""generate.onnx, the whole job in one call, draws what the model draws: every form, mixed batches, any start."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from drawing import noise
from exports import any_request, same, with_more_styles
from PIL import Image
from test_export_folder import told

import stylemuse as sm
from stylemuse import Request, Sampling
from stylemuse.export.graphs import convert, files, generate
from stylemuse.export.graphs.agreement import feeds
from stylemuse.export.graphs.deploy import export
from stylemuse.export.run import manifest
from stylemuse.export.run.spec import Array


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> sm.Pipeline:
    return with_more_styles(tiny_model)


@pytest.fixture(scope="module")
def bank(pipe: sm.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    export(pipe, out := tmp_path_factory.mktemp("exports") / "bank")
    return out


def opened(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "generate.onnx", providers=["CPUExecutionProvider"])


def results(images: Array, tokens: Array, requests: Sequence[Request], like: Sequence[sm.Result]) -> list[sm.Result]:
    """What one call gave, request by request; the seeds are those of the results it is compared with."""
    ends = np.cumsum([request.n for request in requests])[:-1]
    split = zip(np.split(images, ends), np.split(tokens, ends), like, strict=True)
    return [sm.Result([Image.fromarray(each) for each in drawn], codes, one.seeds) for drawn, codes, one in split]


def drawn(folder: Path, requests: Sequence[Request], like: Sequence[sm.Result]) -> list[sm.Result]:
    """The requests, of one size, in one call."""
    return results(*opened(folder).run(None, feeds(sm.load(str(folder)), requests)), requests, like)


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (40, 24)])
def test_any_mixed_batch(pipe: sm.Pipeline, bank: Path, size: tuple[int, int]) -> None:
    """Styles, blends, schedules and numbers of steps that differ, several pictures each, in one call."""
    choice = random.Random(size[1])
    requests: list[Request] = []
    while len(requests) < 6:
        if (request := any_request(choice)).size == size:
            requests.append(request)
    expected = pipe.run(requests)
    same(drawn(bank, requests, expected), expected)


def test_any_start_and_any_ramp(pipe: sm.Pipeline, bank: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 4, 28, 20))
    requests = [
        Request("a fox", style="ink", image=noise(1), strength=0.6, seed=1, n=2, sampling=Sampling(5)),
        Request("a cat", style="drop", image=noise(2), mask=mask, seed=2, sampling=Sampling(4)),
        Request("an owl", negative_prompt="a fox", seed=3, sampling=Sampling(3, ramp="linear")),
        Request("a frog", style={"neon": 0.4}, seed=4, sampling=Sampling(6, "maskgit", ramp="after_first")),
    ]
    expected = pipe.run(requests)
    same(drawn(bank, requests, expected), expected)


def test_a_single_style_comes_from_the_files_of_onnx_runtime(pipe: sm.Pipeline, tmp_path: Path) -> None:
    """Both adapter files of a style are active in one call; without them rows of every scale are the base's."""
    made = export(pipe, folder := tmp_path / "single", form="single", styles=["ink", "drop"])
    session, exported = opened(folder), sm.load(str(folder))
    for style in ("ink", "drop"):
        request = Request("a fox", style=style, seed=4, n=2)
        given = feeds(exported, [request])
        plain = {name: each for name, each in given.items() if not name.endswith((".down", ".up"))}
        assert plain.keys() < given.keys()
        options, adapters = onnxruntime.RunOptions(), []
        for file in made.styles[style].files.values():
            adapters.append(onnxruntime.LoraAdapter())
            adapters[-1].Load(str(folder / file.path))
            options.add_active_adapter(adapters[-1])
        expected = pipe.run([request])
        same(results(*session.run(None, plain, options), [request], expected), expected)
        same(results(*session.run(None, given), [request], expected), expected)
        base = session.run(None, plain)
        zero = session.run(None, given | {"scales": np.zeros_like(given["scales"])})
        assert np.array_equal(base[1], zero[1])
        assert not np.array_equal(base[1], expected[0].tokens)


@pytest.mark.parametrize("style", ["ink", "drop"])
def test_fused(pipe: sm.Pipeline, tmp_path: Path, style: str) -> None:
    export(pipe, folder := tmp_path / "fused", form="fused", styles=[style])
    request = Request("a fox", style=style, seed=4, n=2, guidance=sm.CFG(3.0))
    expected = pipe.run([request])
    same(drawn(folder, [request], expected), expected)


def test_a_bank_brings_its_styles(pipe: sm.Pipeline, bank: Path) -> None:
    """Their slots are those of the manifest."""
    session, made = opened(bank), manifest.read(bank)
    assert [each.name for each in session.get_inputs()] == [each.name for each in made.graphs["generate"].inputs]
    assert not session.get_overridable_initializers()
    assert {name: style.slot for name, style in made.styles.items()} == {"drop": 1, "ink": 2, "neon": 3, "wide": 4}
    request = Request("a fox", style="drop", seed=4)
    given = feeds(sm.load(str(bank)), [request])
    assert set(given["slots"].tolist()) == {0, made.styles["drop"].slot}
    assert set(given["scales"].tolist()) == {1.0, np.float32(made.styles["drop"].scale)}


def test_large_weights_are_on_disk_once(pipe: sm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate.onnx reads what lies in its parts' sidecars from there; its own has the tables of the styles alone."""
    monkeypatch.setattr(files, "INSIDE", 40_000)
    monkeypatch.setattr(files, "SMALL", 1000)
    made = export(pipe, folder := tmp_path / "bank")
    own = made.graphs["generate"].data
    assert own is not None
    places: dict[str, set[str]] = {}
    for tensor in onnx.load(folder / "generate.onnx", load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                places.setdefault(entry.value, set()).add(tensor.name.partition("/")[0])
    assert places.pop(own.path) == {"styles"}
    assert places == {f"{name}.onnx.data": {name} for name in generate.PARTS}
    request = Request("a fox", style="wide", seed=4)
    expected = pipe.run([request])
    same(drawn(folder, [request], expected), expected)


def test_only_the_sidecars_of_its_parts_are_read(
    pipe: sm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "INSIDE", 1000)
    export(pipe, folder := tmp_path / "bank", styles=["ink"])
    sm.load(str(folder))
    model = onnx.load(folder / "generate.onnx", load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.external_data)
    shutil.copyfile(folder / tensor.external_data[0].value, folder / "other.data")
    tensor.external_data[0].value = "other.data"
    (folder / "generate.onnx").write_bytes(model.SerializeToString())
    told(folder, "generate.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^generate\.onnx points to a file that is not its sidecar"):
        sm.load(str(folder))
    # A part may not read another's.
    shutil.copyfile(folder / "generate.onnx", folder / "step.onnx")
    told(folder, "step.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^step\.onnx points to a file that is not its sidecar"):
        sm.load(str(folder))


def test_int8(tiny_model: Path, tmp_path: Path) -> None:
    """The loop runs the step that was quantized, so that one call gives what its steps give."""
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    made = export(pipe, folder := tmp_path / "int8", precision="int8", styles=["ink"])
    kinds = [node.op_type for node in onnx.load(folder / "generate.onnx").graph.node]
    assert made.agreement["int8_products"] > 0
    assert kinds.count("Loop") == 2
    request = Request("a fox", style="ink", seed=4)
    expected = sm.load(str(folder)).run([request])
    same(drawn(folder, [request], expected), expected)


def test_parts_of_standard_operators_make_a_standard_graph(pipe: sm.Pipeline, tmp_path: Path) -> None:
    network = pipe.network
    built = {
        "text": convert.text(network.text_encoder, network.tokenizer.length),
        "condition": convert.condition(network.transformer, network.tokenizer.length),
        "step": convert.step(network.transformer),
        "pixels": convert.pixels(network.vq),
    }
    _, graph = generate.compose(built, convert.BASE, {}, network.sizes.factor)
    files.write(graph, tmp_path / "generate.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "generate.onnx"), full_check=True)


def test_one_call_that_does_not_agree_fails(pipe: sm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the loop to run one step less, the export would not be written."""
    whole = generate.Graph.repeat

    def short(self: generate.Graph, count: generate.Value, *rest: object) -> generate.Value:
        return whole(self, self.op("Sub", count, self.constant(1, np.int64)), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generate.Graph, "repeat", short)
    with pytest.raises(sm.StylemuseError, match=r"generate\.onnx|tokens_of_generate"):
        export(pipe, tmp_path / "out", form="fused")
    assert list(tmp_path.iterdir()) == []
