"""Node, and the npm packages of export/web: what the tests of the page's modules run on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "export" / "web" / "node_modules"
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(
    NODE is None or not PACKAGES.is_dir(), reason="node is not installed, or npm ci was not run in export/web"
)


def ask(**job: Any) -> Any:
    """What ``web.mjs`` answers to a job."""
    assert NODE is not None
    command = [NODE, str(Path(__file__).with_name("web.mjs"))]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
