"""A headless Chromium for the tests of pages, as wide as a desk or a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SOON = 60
SCREENS = {"desk": (1100, 900, False), "phone": (390, 844, True)}

needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")


@contextmanager
def opened(url: str, screen: str = "desk", *arguments: str) -> Iterator[Any]:
    """The page, and what it writes into the browser's log."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    width, height, mobile = SCREENS[screen]
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *(arguments or ("--disable-gpu",))):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    try:
        made.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        made.get(url)
        yield made
    finally:
        made.quit()


def until(browser: Any, script: str, value: object, seconds: float = SOON) -> None:
    """Wait until the script gives the value."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda _: browser.execute_script(f"return {script}") == value)


def element(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)
