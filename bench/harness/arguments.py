"""Arguments of the benchmarks' commands, with the command line's manners: one line that names what is allowed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from stylemuse import StylemuseError


class Arguments(argparse.ArgumentParser):
    """argparse, whose errors are `StylemuseError`; `command` is what was typed."""

    command = ""

    def common(self, *, device: bool = True) -> None:
        """What most of them take."""
        if device:
            self.add_argument("--device", help="cpu, cuda, ...; chosen by the machine if left out")
        self.add_argument("--seed", type=int, default=0, help="of the random weights")
        self.add_argument("--out", type=Path, help="write the JSON document to this file too")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        self.command = " ".join([self.prog, *given])
        return super().parse_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        raise StylemuseError(f"{message}; see {self.prog} --help")


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number of at least 1")
    return value
