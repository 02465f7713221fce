"""`stylemuse export --web`: where onnxruntime-web comes from, and what the page's folder holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import Run, refused
from drawing import noise

from stylemuse.export.graphs import page


def package(folder: Path, version: str | None = None) -> Path:
    """An npm package of that version with files of the right names."""
    (folder / "dist").mkdir(parents=True)
    facts = {"name": page.PACKAGE, "version": version or page.version()}
    (folder / "package.json").write_text(json.dumps(facts))
    for build, stem in page.BUILDS.items():
        for name in (f"ort.{build}.min.mjs", f"{stem}.mjs", f"{stem}.wasm"):
            (folder / "dist" / name).write_text(name)
    return folder


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    noise().save(copy / "styles" / "ink" / "reference.png")
    return copy


def test_a_page_lies_in_the_folder(run: Run, model: Path, tmp_path: Path) -> None:
    package(tmp_path / "node_modules" / page.PACKAGE)
    done = run("export", "--web", "out", "--model", model, "--json").document
    assert done["page"] == "index.html"
    out, web = Path("out"), Path("out/web")
    modules = {"adapter", "device", "draw", "guidance", "model", "page", "schedule", "tokenizer", "worker"}
    builds = {path.name for path in (tmp_path / "node_modules" / page.PACKAGE / "dist").iterdir()}
    assert {path.name for path in web.iterdir() if path.is_file()} == {
        *(f"{name}.js" for name in modules), "page.css", "page.json", "package.json"
    }  # fmt: skip
    assert {path.name for path in (web / "onnxruntime").iterdir()} == {*builds, *page.NOTICES}
    assert "MIT License" in (web / "onnxruntime" / "LICENSE").read_text(encoding="utf-8")
    assert (web / "references" / "ink.png").read_bytes() == (model / "styles" / "ink" / "reference.png").read_bytes()
    facts = json.loads((web / "page.json").read_text())
    assert facts["references"] == ["ink"]
    loaded = ("text.onnx", "condition.onnx", "step.onnx", "pixels.onnx", "tokenizer/tokenizer.json")
    assert facts["bytes"] == sum((out / name).stat().st_size for name in loaded)
    assert len(facts["probe"]["tokens"]) == 64
    drawn = run("generate", "a fox", "--model", "out", "--seed", 3, "--json").document
    assert drawn["explain"]["backend"] == "onnx: an exported folder"


def test_nothing_of_the_page_is_elsewhere() -> None:
    for path in page.WEB.glob("*.*"):
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search("https?:|//[a-z]+[.]", path.read_text(encoding="utf-8")), path.name


def test_the_noise_is_found_in_the_graph(run: Run, model: Path, tmp_path: Path) -> None:
    run("export", "out", "--model", model, "--styles", "ink")
    found = page.nodes(tmp_path / "out")
    assert {"Log", "Log_1", "Log_2", "Log_3"} <= set(found["noise"]), "both Gumbel numbers"
    assert "LogSoftmax" not in found["noise"]
    assert all(".attention" in name for name in found["attention"])
    run("export", "small", "--model", model, "--styles", "ink", "--precision", "int8")
    assert page.nodes(tmp_path / "small") == found, "products in int8 are products, too"


def test_a_package_that_is_not_there(run: Run, no_model: None, tmp_path: Path) -> None:
    install = f"run `npm install {page.PACKAGE}@{page.version()}`"
    refused(run("export", "--web", "out"), f"{page.PACKAGE} is not here, or in a folder above: {install}", "--fetch")
    (tmp_path / "empty").mkdir()
    refused(run("export", "--web", "out", "--runtime", "empty"), f"is not in empty: {install}")
    package(tmp_path / "old", "1.2.3")
    refused(run("export", "--web", "out", "--runtime", "old"), "1.2.3", f"made for {page.version()}", install)
    refused(run("export", "out", "--fetch"), "--web, which is not asked for")
    refused(run("export", "--web", "out", "--runtime", "old", "--fetch"), "give one of them")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_whole_leaves_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    given = package(tmp_path / "package")
    (given / "dist" / "ort.webgpu.min.mjs").unlink()
    refused(run("export", "--web", "out", "--model", model, "--runtime", given), "dist/ort.webgpu.min.mjs is missing")
    refused(run("export", "--web", "out", "--model", model, "--runtime", given, "--form", "single"), "form 'bank'")
    assert not (tmp_path / "out").exists()


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of npm."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_npm_fetches_what_the_lock_says(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = package(tmp_path / "ready")
    script = (
        f'[ "$1" = ci ] && [ -f package-lock.json ] && mkdir node_modules && cp -r {ready} node_modules/{page.PACKAGE}'
    )
    npm(tmp_path / "bin", script, monkeypatch)
    done = run("export", "--web", "--fetch", "out", "--model", model, "--json")
    assert done.code == 0
    assert done.error == f"npm fetches {page.PACKAGE} {page.version()} into a temporary folder\n"
    assert (tmp_path / "out" / "index.html").is_file()


def test_npm_that_fails_or_is_missing(
    run: Run, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(tmp_path / "bin", "echo 'npm error network is down' >&2; exit 1", monkeypatch)
    done = run("export", "--web", "--fetch", "out")
    assert done.code == 2
    assert done.error.endswith(f"stylemuse: npm cannot fetch {page.PACKAGE}: npm error network is down\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("export", "--web", "--fetch", "out")
    assert (done.code, "npm is not installed" in done.error) == (2, True)
