"""The mark of tests that draw the world's pictures."""

from __future__ import annotations

import pytest

from stylemuse import StylemuseError
from stylemuse.tuning.looks import SUBJECTS, Look
from stylemuse.tuning.world import World


def installed() -> bool:
    """Whether the world can draw here."""
    try:
        World().array(next(iter(SUBJECTS)), Look("flat", None, "white", "plain"))
    except StylemuseError:
        return False
    return True


needs_font = pytest.mark.skipif(
    not installed(),
    reason="the font Noto Color Emoji is not installed (Debian: fonts-noto-color-emoji); the world is drawn with it",
)
