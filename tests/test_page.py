"""The page in a browser: styles with their pictures, a picture that appears step by step; on a phone too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENS, element, needs_browser, opened, until
from live_server import SIZES, Live, serving

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Its styles have reference pictures."""
    from drawing import noise

    model = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model, model)
    noise().save(model / "styles" / "ink" / "reference.png")
    with serving(model, {"token": "a secret token"}) as made:
        yield made


@pytest.fixture(params=SCREENS)
def browser(request: pytest.FixtureRequest, live: Live) -> Iterator[Any]:
    with opened(live.url, request.param) as made:
        yield made


def test_a_picture_is_drawn(browser: Any) -> None:
    until(browser, "document.getElementById('status').textContent", "This server needs a token.")
    element(browser, "token").send_keys("a secret token\t")
    until(browser, "document.querySelectorAll('#styles input').length", 3)
    until(browser, "document.querySelectorAll('#styles img').length", 1)
    assert not element(browser, "strengths").is_displayed()
    browser.execute_script("document.querySelector('#styles input[value=ink]').click()")
    assert element(browser, "strengths").is_displayed()
    browser.execute_script(
        "window.seen = 0; const picture = document.getElementById('picture');"
        "new MutationObserver(() => window.seen++).observe(picture, {attributeFilter: ['src']})"
    )
    element(browser, "seed").send_keys("7")
    element(browser, "draw").click()
    until(browser, "document.querySelectorAll('#recent img').length", 1)
    assert element(browser, "status").text == "a fox, ink, seed 7"
    assert browser.execute_script("return window.seen") >= 4, "three steps and the end"
    shown = "[document.getElementById('picture').naturalWidth, document.getElementById('picture').naturalHeight]"
    until(browser, shown, list(SIZES[0]))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    element(browser, "prompt").clear()
    element(browser, "prompt").send_keys(" ")
    element(browser, "draw").click()
    until(browser, "document.getElementById('status').textContent.startsWith('the prompt is empty')", True)
    statuses = [entry["message"] for entry in browser.get_log("browser") if "40" not in entry["message"]]
    assert statuses == [], "nothing but the refusals that were asked for"
