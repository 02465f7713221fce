"""Exported folders from anyone: whatever is changed in one is one clear error; and the command that writes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import Run, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stylemuse as sm
from stylemuse.export.graphs.deploy import export
from stylemuse.export.run import manifest


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    export(pipe, out := tmp_path_factory.mktemp("exports") / "bank", styles=["ink"])
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    change(facts)
    (folder / "manifest.json").write_text(json.dumps(facts))


def told(folder: Path, path: str) -> None:
    """Let the manifest tell a file's hash and size as they are now."""
    file = vars(manifest.File.of(folder, path))

    def correct(value: Any) -> None:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(each, dict) and each.get("path") == path:
                each.update(file)
            correct(each)

    rewritten(folder, correct)


@pytest.mark.parametrize("path", ["step.onnx", "adapters/ink.step.onnx_adapter", "tokenizer/tokenizer.json"])
def test_a_changed_or_missing_file_is_named(copy: Path, path: str) -> None:
    data = bytearray((copy / path).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / path).write_bytes(data)
    with pytest.raises(sm.StylemuseError, match=f"^{path} was changed"):
        sm.load(str(copy))
    (copy / path).write_bytes(data + b" ")
    with pytest.raises(sm.StylemuseError, match=f"^{path} has .* bytes, not"):
        sm.load(str(copy))
    (copy / path).unlink()
    with pytest.raises(sm.StylemuseError, match=f"^{path} is missing"):
        sm.load(str(copy))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(copy: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (copy / "step.onnx").rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", copy / "step.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^step\.onnx is a link"):
        sm.load(str(copy))


def test_a_folder_of_links_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "adapters").rename(tmp_path / "elsewhere")
    (copy / "adapters").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(sm.StylemuseError, match=r"ink\.\w+\.onnx_adapter is a link"):
        sm.load(str(copy))


def test_weights_outside_the_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    """Even where all hashes are right: whoever makes a folder makes its hashes."""
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    model = onnx.load(copy / "text.onnx")
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (copy / "text.onnx").write_bytes(model.SerializeToString())
    told(copy, "text.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^text\.onnx points to a file that is not its sidecar"):
        sm.load(str(copy))


def test_a_graph_that_is_not_what_the_manifest_says(copy: Path) -> None:
    shutil.copyfile(copy / "text.onnx", copy / "step.onnx")
    told(copy, "step.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^step\.onnx: .* is not as the manifest says"):
        sm.load(str(copy))


def test_a_damaged_graph_or_style_whose_hash_is_right(copy: Path) -> None:
    path = "adapters/ink.step.onnx_adapter"
    (copy / path).write_bytes((copy / path).read_bytes()[:100])
    told(copy, path)
    with pytest.raises(sm.StylemuseError, match=f"^{path} cannot be read"):
        sm.load(str(copy)).generate("a fox", style="ink")
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes()[:1000])
    told(copy, "step.onnx")
    with pytest.raises(sm.StylemuseError, match=r"^step\.onnx cannot be loaded"):
        sm.load(str(copy))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_is_read_or_refused(exported: Path, data: st.DataObject) -> None:
    """A value anywhere in it is replaced, or removed: what is read then is valid, all else one line."""
    text = (exported / "manifest.json").read_text()
    facts = json.loads(text)
    where = data.draw(st.sampled_from([place for place in places(facts) if place]))
    inner = facts
    for key in where[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[where[-1]]
    else:
        inner[where[-1]] = data.draw(ANY)
    try:
        (exported / "manifest.json").write_text(json.dumps(facts))
        said = list(manifest.read(exported).graphs)
    except sm.StylemuseError as error:
        said = str(error).splitlines()
    finally:
        (exported / "manifest.json").write_text(text)
    assert sorted(said) == sorted(manifest.GRAPHS) or (len(said) == 1 and len(said[0]) < 400)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"schema": 2}', "{" * 100_000, '{"schema": NaN}'])
def test_what_is_no_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(sm.StylemuseError, match=r"^manifest\.json"):
        sm.load(str(copy))


def test_the_command(run: Run, tiny_model: Path) -> None:
    done = run(
        "export", "out", "--model", tiny_model, "--form", "single", "--styles", "ink", "--rows", "2,5", "--json"
    ).document
    assert (done["form"], done["styles"], done["rows"]) == ("single", ["ink"], [1, 2, 3, 5, 8])
    assert done["bytes"].keys() == set(manifest.GRAPHS)
    drawn = run("generate", "a fox", "--model", "out", "--style", "ink", "--seed", 3, "--json").document
    assert drawn["explain"]["backend"] == "onnx: an exported folder"
    refused(run("export", "out", "--model", tiny_model), "exists already")
    refused(run("export", "more", "--model", tiny_model, "--rows", "2,x"), "'x'", "whole numbers")
    refused(run("export", "more", "--model", tiny_model, "--rows", "0"), "rows 0", "1 to 4096")
    refused(run("export", "more", "--model", tiny_model, "--form", "merged"), "bank, single, fused")
    refused(run("generate", "a fox", "--model", "out", "--backend", "reference"), "needs backend 'onnx'")
    refused(run("generate", "a fox", "--model", "out", "--dtype", "bfloat16"), "exported in float32")
