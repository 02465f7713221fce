"""What the tests of the command line share: what a command left, and how a refusal looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import SIDE
from PIL import Image


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    error: str

    @property
    def document(self) -> Any:
        """The output as JSON, which is all there may be."""
        assert (self.code, self.error) == (0, "")
        return json.loads(self.out)


Run = Callable[..., Ran]


def refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.error.startswith("stylemuse: ")
    assert ran.error.count("\n") == 1
    assert ran.error.endswith("\n")
    for word in words:
        assert word in ran.error


def picture(path: Path = Path("reference.png"), size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path
