"""The exported page in a browser, from a plain file server: it draws what the pipeline draws, step by step."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENS, element, needs_browser, opened, until
from drawing import noise
from node import PACKAGES, needs_node

import stylemuse as sm
from stylemuse.export.graphs.deploy import export
from stylemuse.export.graphs.page import find_runtime

pytestmark = [pytest.mark.slow, needs_browser, needs_node]
STATUS = "document.getElementById('status').textContent"
WRONG = "document.querySelector('#status.wrong')?.textContent"
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
)


class Files(SimpleHTTPRequestHandler):
    """A folder's files; requests are not logged."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its two styles has a reference picture."""
    model = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model, model)
    noise().save(model / "styles" / "ink" / "reference.png")
    pipe = sm.load(str(model), backend="reference", device="cpu", dtype="float32")
    export(pipe, out := tmp_path_factory.mktemp("exports") / "web", runtime=find_runtime(PACKAGES.parent))
    return out


def drawn(folder: Path, **options: Any) -> str:
    """The pipeline's tokens, as the page shows them."""
    tokens = sm.load(str(folder)).generate("a fox", seed=7, **options).tokens
    return " ".join(map(str, tokens.flatten()))


def ready(browser: Any) -> None:
    until(browser, "document.getElementById('draw').disabled", False, 120)


def finish(browser: Any, pictures: int) -> str:
    """Wait for that many pictures; the tokens of the last."""
    until(browser, "document.querySelectorAll('#recent img').length", pictures, 120)
    return str(browser.execute_script("return document.getElementById('picture').dataset.tokens"))


def complaints(browser: Any) -> list[str]:
    """What the browser complains about; that it has no GPU is none of the page's faults."""
    return [each["message"] for each in browser.get_log("browser") if "No available adapters" not in each["message"]]


@pytest.mark.parametrize("screen", SCREENS)
def test_a_picture_is_drawn(folder: Path, screen: str) -> None:
    with served(folder) as url, opened(url, screen) as browser:
        ready(browser)
        assert "wasm, 1 thread" in element(browser, "runtime").text
        until(browser, "[...document.querySelectorAll('#styles img')].map(each => each.naturalWidth).join()", "32")
        assert browser.execute_script("return document.querySelectorAll('#styles input').length") == 3
        assert not element(browser, "strengths").is_displayed()
        browser.execute_script("document.querySelector('#styles input[value=ink]').click()")
        assert element(browser, "strengths").is_displayed()
        assert element(browser, "text-guidance-value").text == "2, as recommended"
        assert element(browser, "steps-value").text == "4, as recommended"
        browser.execute_script(
            "window.seen = new Set(); const picture = document.getElementById('picture');"
            "new MutationObserver(() => window.seen.add(picture.src)).observe(picture, {attributeFilter: ['src']})"
        )
        element(browser, "seed").send_keys("7")
        element(browser, "draw").click()
        assert finish(browser, 1) == drawn(folder, style="ink")
        assert element(browser, "status").text.startswith("a fox, ink, seed 7; ")
        assert browser.execute_script("return window.seen.size") >= 2, "a step before the end was shown"
        until(browser, "document.getElementById('picture').naturalWidth", 32)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert complaints(browser) == []


def test_every_control_has_its_effect(folder: Path) -> None:
    move = "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];" + (
        "slider.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    with served(folder) as url, opened(f"{url}?device=wasm") as browser:
        ready(browser)
        element(browser, "seed").send_keys("7")
        element(browser, "draw").click()
        assert finish(browser, 1) == drawn(folder)
        browser.execute_script("document.querySelector('#styles input[value=neon]').click()")
        for name, value in (("adapter", 0.5), ("style-guidance", 0.75), ("text-guidance", 1.5), ("steps", 3)):
            browser.execute_script(move, name, value)
            assert element(browser, f"{name}-value").text == str(value)
        element(browser, "draw").click()
        asked = {"style": {"neon": sm.Style(strength=0.5)}, "steps": 3, "guidance": sm.StyleDrop(0.75, 1.5)}
        assert finish(browser, 2) == drawn(folder, **asked)
        browser.execute_script("document.querySelector('#recent button:last-child').click()")
        assert element(browser, "status").text == "a fox, seed 7"


def test_errors_are_shown_and_a_picture_is_stopped(folder: Path) -> None:
    with served(folder) as url, opened(url) as browser:
        ready(browser)
        element(browser, "prompt").clear()
        element(browser, "prompt").send_keys(" ")
        element(browser, "draw").click()
        until(browser, WRONG, "the prompt is empty; say what to draw, for example 'a fox'")
        element(browser, "prompt").send_keys("an owl")
        for seed, words in (("x", "seed 'x' is not allowed: a whole number, or nothing"), ("9" * 19, "2^63 - 1")):
            element(browser, "seed").clear()
            element(browser, "seed").send_keys(seed)
            element(browser, "draw").click()
            until(browser, f"({WRONG} ?? '').includes({words!r})", True)
        element(browser, "seed").clear()
        slow = "const steps = document.getElementById('steps'); steps.max = 1000; steps.value = 1000"
        browser.execute_script(slow)
        element(browser, "draw").click()
        until(browser, f"{STATUS}.startsWith('step ')", True)
        assert element(browser, "draw").text == "Stop"
        element(browser, "draw").click()
        until(browser, STATUS, "stopped")
        assert element(browser, "draw").text == "Draw"
        assert browser.execute_script("return document.querySelectorAll('#recent img').length") == 0


def test_a_folder_that_is_not_whole_says_so(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "web"))
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes()[:-1])
    with served(copy) as url, opened(url) as browser:
        until(browser, f"({WRONG} ?? '').includes('step.onnx has ')", True)
        assert not element(browser, "draw").is_enabled()
    (copy / "step.onnx").unlink()
    with served(copy) as url, opened(url) as browser:
        until(browser, WRONG, "step.onnx: the server answers 404")
    with served(copy) as url, opened(f"{url}?device=gpu") as browser:
        until(browser, WRONG, "device 'gpu' is unknown; allowed are auto, webgpu, wasm")


def test_webgpu_draws_the_same_or_is_refused(folder: Path) -> None:
    """On a GPU made of software: there attention is wrong, the check finds it, and the rest stays on the GPU."""
    with served(folder) as url, opened(f"{url}?device=webgpu", "desk", *SOFTWARE_GPU) as browser:
        until(browser, f"document.getElementById('draw').disabled && !{WRONG}", False, 400)
        if wrong := browser.execute_script(f"return {WRONG}"):
            pytest.skip(f"no WebGPU for the test: {wrong}")
        assert "WebGPU" in element(browser, "runtime").text
        element(browser, "seed").send_keys("7")
        element(browser, "draw").click()
        assert finish(browser, 1) == drawn(folder)
