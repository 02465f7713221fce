"""The public names: all there, and imported only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stylemuse as sm


def test_every_public_name_is_there() -> None:
    assert all(getattr(sm, name) is not None for name in sm.__all__)
    assert set(sm.__all__) <= set(dir(sm))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sm.nothing


def test_import_is_light() -> None:
    script = "import sys, stylemuse; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_loading_does_not_import_torchs_compiler(tiny_model: object) -> None:
    script = f"import sys, stylemuse; stylemuse.load({str(tiny_model)!r}); print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
