"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its styles "ink" and "neon"; read it, never write into it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
