"""Schemathesis against what the server says of itself: no 5xx, no hang, every answer is one that is described.

Both applications: values that the description allows and that it does not, every boundary, methods that are
not there, requests without the token.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import ADMIN_TOKEN, Live, serving
from models import random_style

from stylemuse.adapters import canonical
from stylemuse.serving.settings import Limits

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = pytest.mark.slow

TOKEN = "a secret token"
SOON = 20
"""Seconds that no answer takes: a request that is not answered by then hangs."""


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With a folder of adapters and one for what is registered; pictures are few and quick."""
    folder = tmp_path_factory.mktemp("server")
    options = {"token": TOKEN, "adapters": folder / "adapters", "state": folder / "state"}
    with serving(tiny_model, options | {"limits": Limits(pictures=2, steps=3)}) as made:
        look = random_style(made.pipe.network.transformer.config, "look", seed=5)
        canonical.save(look, folder / "adapters" / "look")
        yield made


@pytest.mark.parametrize("app", ["public", "administration"])
def test_answers_are_those_that_are_described(live: Live, app: str, tmp_path: Path) -> None:
    """All its checks but one: a request that fits the description may be refused.

    A style nobody knows, a size or a number above this server's limits, two fields that exclude each other: no
    description says that. A request that asks for a deadline may come to it, which is a 504; there is no other 5xx.
    """
    url, token = (live.url, TOKEN) if app == "public" else (live.admin, ADMIN_TOKEN)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {token}", "--exclude-checks", "positive_data_acceptance"]
    command += [
        "--phases",
        "coverage,fuzzing",
        "--max-examples",
        "8",
        "--request-timeout",
        str(SOON),
        "--continue-on-failure",
        "--no-color",
    ]
    # One worker: hypothesis parses sources, and CPython 3.11 counts the depth of two threads' parsing as one.
    command += ["--generation-deterministic", "--no-shrink", "--warnings", "off", "--workers", "1"]
    allowed = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "504"]\n'
    (tmp_path / "schemathesis.toml").write_text(allowed)
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {record["status"] for record in live.records if record["status"] >= 500} <= {504}
