"""The examples that use nothing of ours draw the runtime's pictures, from an exported folder of the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from javascript import needs_node, packages
from PIL import Image

import stylemuse as sm
from stylemuse.export.graphs.agreement import feeds
from stylemuse.export.graphs.deploy import export

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parent.parent / "export" / "examples"
PICTURES = (("a fox", "neon", 7), ("an owl, outline in cyan", "-", 2**62 + 3))
"""Prompt, style ("-" is none) and seed."""


@pytest.fixture(scope="module")
def pipe() -> sm.Pipeline:
    return sm.load("demo", backend="reference", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def exported(pipe: sm.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    export(pipe, out := tmp_path_factory.mktemp("exports") / "demo")
    return out


def python(folder: Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / "draw.py")]


def node(folder: Path) -> list[str]:
    """The example in a folder where npm has installed what it names."""
    (folder / "node_modules").symlink_to(packages())
    return ["node", str(shutil.copy(EXAMPLES / "draw.mjs", folder))]


@pytest.mark.parametrize("example", [python, pytest.param(node, marks=needs_node)])
def test_the_same_pictures(
    pipe: sm.Pipeline, exported: Path, tmp_path: Path, example: Callable[[Path], list[str]]
) -> None:
    command = example(tmp_path)
    for prompt, style, seed in PICTURES:
        arguments = [str(exported), prompt, style, str(seed), str(tmp_path / "out.png")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        expected = pipe.generate(prompt, style=None if style == "-" else style, seed=seed)
        assert np.ravel(json.loads(done.stdout)).tolist() == expected.tokens.ravel().tolist()
        with Image.open(tmp_path / "out.png") as picture:
            assert picture.mode == "RGB"
            difference = np.asarray(picture).astype(int) - np.asarray(expected.images[0])
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("name", ["draw.py", "draw.mjs"])
def test_they_are_short_and_use_nothing_of_ours(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    lines = [line for line in text.partition("import ")[2].splitlines() if line and not line.startswith(("#", "//"))]
    assert len(lines) <= 45
    assert not [line for line in lines if "stylemuse" in line]


def test_the_embedded_model_in_one_call(pipe: sm.Pipeline, exported: Path) -> None:
    """Six pictures of five requests: styles, a blend, recipes of guidance, schedules, negative prompts."""
    ramped = sm.StyleDrop(1.0, 1.0)
    requests = [
        sm.Request("a fox", style="neon", seed=1, n=2),
        sm.Request("a cat", style={"retro": 0.5, "riso": 0.5}, seed=2, guidance=sm.StyleDrop(0.5, 2.0)),
        sm.Request("a castle", seed=3, negative_prompt="on black", guidance=sm.CFG(3.0)),
        sm.Request(
            "a frog",
            style="ember",
            seed=4,
            guidance=ramped,
            sampling=sm.Sampling(6, schedule="styledrop", ramp="linear"),
        ),
        sm.Request("an owl", style="arcade", seed=5, guidance=sm.ObjectInStyle("blueprint", "an owl", style=0.5)),
    ]
    session = onnxruntime.InferenceSession(exported / "generate.onnx", providers=["CPUExecutionProvider"])
    images, tokens = session.run(None, feeds(sm.load(str(exported)), requests))
    results = pipe.run(requests)
    assert np.array_equal(tokens, np.concatenate([result.tokens for result in results]))
    expected = np.stack([np.asarray(image) for result in results for image in result.images])
    assert np.abs(images.astype(int) - expected).max() <= 1
