"""Arguments of the benchmarks' commands, with the command line's manners: one line that names what is allowed."""

from __future__ import annotations

import argparse
from typing import NoReturn

from stylemuse import StylemuseError


class Arguments(argparse.ArgumentParser):
    """argparse, whose errors are `StylemuseError`."""

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
