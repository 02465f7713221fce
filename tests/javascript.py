"""Node.js with the packages that export/web pins."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parent.parent / "export" / "web"

needs_node = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Node.js is not installed")


def packages() -> Path:
    """The folder of the pinned packages, fetched where they are missing or older than the pins, or an error."""
    made, pins = WEB / "node_modules" / ".package-lock.json", WEB / "package-lock.json"
    with pins.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Tests may run side by side.
        if not made.exists() or made.stat().st_mtime < pins.stat().st_mtime:
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=WEB, check=True)
    return made.parent
