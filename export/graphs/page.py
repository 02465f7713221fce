"""The page of an exported folder: it draws in a browser, from plain files that any web server gives out.

index.html  web/  *.js  page.css  page.json  package.json  references/<style>.png  onnxruntime/

The modules are in ``export/web`` and mirror the runtime; onnxruntime-web comes from its npm package, which is pinned in
package.json there. Nothing else is needed beside the page, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from ...adapters.library import Library
from ...core import StylemuseError
from ..run.loading import open_folder
from ..run.manifest import Manifest
from . import agreement

PACKAGE = "onnxruntime-web"
WEB = Path(__file__).parent.with_name("web")
BUILDS = {"wasm": "ort-wasm-simd-threaded", "webgpu": "ort-wasm-simd-threaded.asyncify"}
"""The builds that the page chooses from, each with what it loads."""
NOTICES = ("LICENSE", "ThirdPartyNotices.txt")
"""Of ONNX Runtime; the npm package leaves them out, the Python package has them."""
SECONDS = 600.0


def version() -> str:
    """The version of onnxruntime-web that the page is made for."""
    return str(json.loads((WEB / "package.json").read_text(encoding="utf-8"))["dependencies"][PACKAGE])


def find_runtime(given: Path | None = None) -> Path:
    """The folder of the npm package onnxruntime-web.

    Args:
        given: that folder, or one that has it in node_modules; if left out, this one or one above it has.

    Raises:
        StylemuseError: it is not there, or another version is.
    """
    here = Path.cwd()
    places = [given] if given is not None else [here, *here.parents]
    for place in places:
        for folder in (place, place / "node_modules" / PACKAGE):
            if (facts := _package(folder)).get("name") == PACKAGE:
                return _checked(folder, facts)
    where = "here, or in a folder above" if given is None else f"in {given}"
    raise StylemuseError(
        f"{PACKAGE} is not {where}: run `npm install {PACKAGE}@{version()}`, or let npm do it with --fetch"
    )


def fetch_runtime(folder: Path) -> Path:
    """Let npm put the package into a folder: what package-lock.json names, by its hashes, without running scripts."""
    npm = shutil.which("npm")
    if npm is None:
        raise StylemuseError("npm is not installed; it comes with Node.js, or give the package with --runtime")
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(WEB / name, folder / name)
    command = [npm, "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise StylemuseError(f"npm has not fetched {PACKAGE} in {SECONDS:.0f} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise StylemuseError(f"npm cannot fetch {PACKAGE}: {lines[0] if lines else f'it ended with {done.returncode}'}")
    return find_runtime(folder)


def write(folder: Path, manifest: Manifest, library: Library, runtime: Path) -> None:
    """Write the page into a folder that was exported in form "bank"; ``runtime`` as `find_runtime` gave it."""
    web = folder / "web"
    (web / "references").mkdir(parents=True)
    for path in (*sorted(WEB.glob("*.js")), WEB / "package.json"):
        shutil.copyfile(path, web / path.name)
    shutil.copyfile(WEB / "page.html", folder / "index.html")
    (web / "page.css").write_text(_look() + (WEB / "page.css").read_text(encoding="utf-8"), encoding="utf-8")
    references = []
    for name in manifest.styles:
        if (picture := library.version(name).picture()) is not None:
            (web / "references" / f"{name}.png").write_bytes(picture)
            references.append(name)
    facts = {
        "bytes": _bytes(manifest),
        "references": references,
        "nodes": nodes(folder),
        "probe": _probe(folder, manifest),
    }
    (web / "page.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _copy_runtime(runtime, web / "onnxruntime")


def nodes(folder: Path) -> dict[str, list[str]]:
    """Nodes of step.onnx that a GPU may compute too inexactly, or wrong.

    noise      what turns Philox's words into Gumbel numbers: from the words' cast to floating point on, all that
               follows from no product of matrices
    attention  every attention
    """
    graph = onnx.load(folder / "step.onnx", load_external_data=False).graph
    words, floats, others, noise = set[str](), set[str](), set[str](), list[str]()
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulIntegerToFloat") or others.intersection(node.input):
            others.update(node.output)
        elif node.op_type == "BitwiseXor" or words.intersection(node.input):
            words.update(node.output)
            if node.op_type == "Cast" or floats.intersection(node.input):
                floats.update(node.output)
                noise.append(node.name)
    return {"noise": noise, "attention": [node.name for node in graph.node if node.op_type == "MultiHeadAttention"]}


def _probe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """A request of one step and its tokens here: what a device has to give before it is trusted."""
    style, seed = min(manifest.styles, default=None), 1
    drawn = open_folder(folder).generate(agreement.PROMPT, style=style, seed=seed, steps=1)
    request = {"prompt": agreement.PROMPT, "style": style, "seed": str(seed), "steps": 1}
    return {"request": request, "tokens": drawn.tokens.flatten().tolist()}


def _bytes(manifest: Manifest) -> int:
    """What the page loads before it can draw."""
    graphs = (manifest.graphs[name] for name in ("text", "condition", "step", "pixels"))
    tokenizer = (file.bytes for file in manifest.tokenizer if file.path.endswith("/tokenizer.json"))
    return sum(tokenizer) + sum(graph.file.bytes + (graph.data.bytes if graph.data else 0) for graph in graphs)


def _look() -> str:
    """The style of the server's own page."""
    page = (files("stylemuse.serving") / "page.html").read_text(encoding="utf-8")
    found = re.search(r"<style>\n(.*?)</style>", page, re.DOTALL)
    assert found is not None, "the server's page has its style inside"
    return found[1]


def _copy_runtime(package: Path, target: Path) -> None:
    target.mkdir()
    for build, stem in BUILDS.items():
        for name in (f"ort.{build}.min.mjs", f"{stem}.mjs", f"{stem}.wasm"):
            if not (package / "dist" / name).is_file():
                raise StylemuseError(f"{package}: dist/{name} is missing; install {PACKAGE}@{version()} again")
            shutil.copyfile(package / "dist" / name, target / name)
    for name in NOTICES:
        shutil.copyfile(Path(onnxruntime.__file__).with_name(name), target / name)


def _package(folder: Path) -> Mapping[str, Any]:
    """What package.json of a folder says; nothing where there is none."""
    try:
        facts = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _checked(folder: Path, facts: Mapping[str, Any]) -> Path:
    if facts.get("version") != version():
        raise StylemuseError(
            f"{folder} is {PACKAGE} {facts.get('version')}; the page is made for {version()}: "
            f"run `npm install {PACKAGE}@{version()}`"
        )
    return folder
