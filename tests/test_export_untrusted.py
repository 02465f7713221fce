"""Exported folders whose maker lies: any bytes, with hashes that are right, are refused in one line or harmless."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stylemuse as sm
from stylemuse.export.graphs.deploy import export
from stylemuse.export.run import manifest, ort, styles
from stylemuse.export.run.shelf import Shelf
from stylemuse.export.run.spec import GraphSpec
from stylemuse.models.tokenizer import ClipTokenizer

SIZES = {"rows": 2, "pictures": 1, "branches": 2, "height": 4, "width": 4, "text": 16, "slots": 3}
SIZES |= {"pixel_height": 16, "pixel_width": 16} | {f"lanes_{parts}": 2 * parts for parts in (1, 2, 3)}
ANYTIME = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    export(pipe, out := tmp_path_factory.mktemp("exports") / "bank", styles=["ink"])
    return out


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file: bits turned over, bytes replaced, taken out or put in, or its end cut off."""
    kind = draw(st.sampled_from(("turn", "replace", "insert", "remove", "cut")))
    # Structure lies in front of the weights: most changes fall there.
    place = draw(st.floats(0, 1)) ** draw(st.sampled_from((1, 4)))
    given_bytes = draw(st.binary(min_size=1, max_size=8))

    def change(content: bytes) -> bytes:
        start = int(place * (len(content) - 1))
        end = start + len(given_bytes)
        match kind:
            case "turn":
                return content[:start] + bytes([content[start] ^ (1 << given_bytes[0] % 8)]) + content[start + 1 :]
            case "replace":
                return content[:start] + given_bytes + content[end:]
            case "insert":
                return content[:start] + given_bytes + content[start:]
            case "remove":
                return content[:start] + content[end:]
        return content[:start]

    return change


def refused_or(run: Callable[[], Any]) -> Any:
    """What it gives, or None where it is refused, in one line."""
    said = ""
    try:
        return run()
    except sm.StylemuseError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert len(said) < 500
    return None


@settings(max_examples=50, **ANYTIME)
@given(name=st.sampled_from([name for name in manifest.GRAPHS if name != "generate"]), change=changes())
def test_any_graph(exported: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """All that a pipeline opens; generate.onnx is for those who open it themselves."""
    graph = manifest.read(exported).graphs[name]
    (tmp_path / graph.file.path).write_bytes(change((exported / graph.file.path).read_bytes()))

    def run() -> set[str]:
        manifest._check_references(tmp_path / graph.file.path, "")
        session = ort.Session(tmp_path, graph, ort.choose_provider("cpu"), 1)
        return set(session.run(GraphSpec(name, graph.inputs, ()).dummies(SIZES)))

    assert refused_or(run) in (None, {tensor.name for tensor in graph.outputs})


@settings(max_examples=60, **ANYTIME)
@given(graph=st.sampled_from(("condition", "step")), change=changes())
def test_any_style(exported: Path, tmp_path: Path, graph: str, change: Callable[[bytes], bytes]) -> None:
    """What is read of a style has the sizes and the type that the graphs take, and is finite, or it is refused."""
    told = manifest.read(exported)
    copy = tmp_path / "folder"
    shutil.copytree(exported / "adapters", copy / "adapters", dirs_exist_ok=True)
    path = copy / told.styles["ink"].files[graph].path
    path.write_bytes(change(path.read_bytes()))
    inputs = [*told.graphs["condition"].inputs, *told.graphs["step"].inputs]
    bank = styles.make("bank", inputs, 1, None)

    def run() -> dict[str, Any]:
        bank.write(0, "ink", Shelf(copy, told).tensors(0))
        return bank.feeds(frozenset(tensor.name for tensor in inputs), [0], [1.0])

    fed = refused_or(run)
    assert fed is None or all(np.isfinite(array).all() for array in fed.values())


@settings(max_examples=60, **ANYTIME)
@given(change=changes())
def test_any_tokenizer(exported: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    shutil.copytree(exported / "tokenizer", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(change(path.read_bytes()))
    ids = refused_or(lambda: ClipTokenizer.from_folder(tmp_path, 16).ids(["a fox"]))
    assert ids is None or ids.shape == (1, 16)


@pytest.mark.parametrize("dtype", ["float16", "int64"])
def test_a_style_in_another_type_is_refused(exported: Path, dtype: str) -> None:
    told = manifest.read(exported)
    inputs = [*told.graphs["condition"].inputs, *told.graphs["step"].inputs]
    packed = {name: each.astype(dtype) for name, each in Shelf(exported, told).tensors(0).items()}
    with pytest.raises(sm.StylemuseError, match=rf"is {dtype}, this export takes float32"):
        styles.make("bank", inputs, 1, None).write(0, "ink", packed)
