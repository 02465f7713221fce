"""Where a command's results and progress go, and files that are never half written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import StylemuseError


def one_line(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))


def say(text: str) -> None:
    """Print a result; letters that standard output can't hold are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def note(text: str) -> None:
    """Tell something beside the result, on standard error."""
    if sys.stderr is not None:
        print(f"stylemuse: {one_line(text)}", file=sys.stderr, flush=True)


def document(value: Any) -> None:
    """Print a result as one JSON document."""
    print(json.dumps(value, indent=2, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table; the columns named in ``numbers`` are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE, show_header=any(columns), pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(one_line(cell)) for cell in row))
    Console(highlight=False).print(made)


Update = Callable[[int, int, str], None]


@contextmanager
def progress(what: str) -> Iterator[Update]:
    """A bar on standard error where that is a terminal; call what it gives with (done, of how many, note)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total, note: bars.update(
            bar, completed=done, total=total, description=f"{what} {note}".strip()
        )


def check_file(path: Path) -> None:
    """Raise unless a file can be put there. Its folder is made."""
    if path.is_dir():
        raise StylemuseError(f"{path} is a folder; give a file")
    _put(path, None)


def write_file(path: Path, data: bytes) -> None:
    """Put a file in place in one move, its folder made if need be: nobody sees half of it."""
    _put(path, data)


def check_new_folder(path: Path) -> None:
    """Raise unless the folder can be written and there is nothing yet in it."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StylemuseError(f"{path} exists already; choose another folder or remove it first")
    except OSError as error:
        raise StylemuseError(f"{path} cannot be written: {error.strerror}") from None
    _put(path.absolute(), None)


def _put(path: Path, data: bytes | None) -> None:
    """Write beside the path and move; without data, only find out whether that would go well."""
    temporary = path.with_name(f".stylemuse-{os.getpid()}.partial")
    try:
        try:
            path.lstat()
        except FileNotFoundError:  # any other refusal, say of a name that is too long, is one of the path itself
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data or b"")
        if data is not None:
            os.replace(temporary, path)
    except OSError as error:
        raise StylemuseError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if temporary.exists():
            temporary.unlink()
