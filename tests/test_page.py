"""The page in a browser: styles with their pictures, a picture that appears step by step; on a phone too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import SIZES, Live, serving

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
SOON = 60


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Its styles have reference pictures."""
    from drawing import noise

    model = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model, model)
    noise().save(model / "styles" / "ink" / "reference.png")
    with serving(model, {"token": "a secret token"}) as made:
        yield made


@pytest.fixture(params=[(1100, 900, False), (390, 844, True)], ids=["desk", "phone"])
def browser(request: pytest.FixtureRequest, live: Live) -> Iterator[Any]:
    width, height, mobile = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    made.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    made.get(live.url)
    try:
        yield made
    finally:
        made.quit()


def until(browser: Any, script: str, value: object) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, SOON).until(lambda _: browser.execute_script(f"return {script}") == value)


def element(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)


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
