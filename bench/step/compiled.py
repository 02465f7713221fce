"""``stylemuse bench compiled``: every kernel and every launch compiled ahead of time, and what it takes of each chip.

No GPU is needed. A launch must compile for its architecture, keep everything in registers, fit the shared memory, and
use the matrix units where it multiplies matrices in half precision: on sm_90 and sm_100 the newest, where the tile is
large enough. Otherwise the command ends with an error, and the table says where.

``--out FILE`` writes the document, and the same as a table beside it (``.txt``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stylemuse import StylemuseError
from stylemuse.kernels.tuning import FAMILIES

from ..harness import measure
from ..harness.arguments import Arguments, count

_PROGRAM = "import triton; from stylemuse.bench.step.resources import worker; worker()"


def rows(
    architectures: Sequence[str],
    *,
    match: str = "",
    defaults: bool = False,
    workers: int = 1,
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The figures of all launches, or of the default ones, of the specimens whose name matches; see `resources`.

    What is `known` without faults, and whose source is still the same, is not compiled again.
    """
    if importlib.util.find_spec("triton") is None:
        raise StylemuseError("the package triton is not installed; it compiles the kernels")
    fine = {row["key"]: row for row in known if not row["faults"]}
    return _all(
        {"architectures": architectures, "match": match, "defaults": defaults, "known": fine, "keys": False}, workers
    )


def keys(architectures: Sequence[str], *, workers: int = 1) -> list[str]:
    """Of every launch, in the order of `rows`: what its compiled code depends on."""
    order = {"architectures": architectures, "match": "", "defaults": False, "known": {}, "keys": True}
    return [row["key"] for row in _all(order, workers)]


def _all(order: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    orders = [order | {"worker": index, "workers": workers} for index in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = [row for part in pool.map(_run, orders) for row in part]
    return [{name: row[name] for name in row if name != "index"} for row in sorted(found, key=lambda row: row["index"])]


def _run(order: dict[str, Any]) -> list[dict[str, Any]]:
    """One worker, in an environment where kernels are made for GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, asked = [sys.executable, "-c", _PROGRAM], json.dumps(order)
    ended = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise StylemuseError(f"a kernel does not compile: {ended.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in ended.stdout.splitlines()]


def read(path: Path) -> dict[str, Any]:
    """A document that ``--out`` wrote; an error where the file is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all("key" in row and "faults" in row for row in document["launches"]):
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise StylemuseError(f"{path} is no document of `stylemuse bench compiled --out`")


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The figures, a line each."""
    width = max((len(row["name"]) for row in found), default=0)
    titles = f"{'registers':>10}{'spilled':>9}{'shared':>9}{'occupancy':>11}  matrix units"
    yield f"{'':8}{'':{width}}  {'launch':38}{titles}"
    for row in found:
        launch = row["launch"] + (" *" if row["default"] else "")
        units = ", ".join(f"{number} {name}" for name, number in row["matrix_instructions"].items())
        figures = f"{row['registers']:10}{row['spilled']:9}{row['shared']:9}{row['occupancy']:11.0%}"
        faults = "".join(f"  FAULT: {fault}" for fault in row["faults"])
        yield f"{row['architecture']:8}{row['name']:{width}}  {launch:38}{figures}  {units}{faults}".rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print the table, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench compiled", description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--match", default="", help="a regular expression that the names must contain")
    parser.add_argument("--defaults", action="store_true", help="only the launches chosen without measuring")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--known", type=Path, help="a former document: only what has changed since is compiled")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file, and a table beside it")
    options = parser.parse_args(arguments)
    try:
        re.compile(options.match)
    except re.error as error:
        parser.error(f"argument --match: {options.match!r} is not a regular expression: {error}")
    known = () if options.known is None else read(options.known)["launches"]
    found = rows(
        options.architectures, match=options.match, defaults=options.defaults, workers=options.workers, known=known
    )
    if not found:
        parser.error(f"argument --match: no kernel's name contains {options.match!r}")
    lines = list(table(found))
    print("\n".join(lines))
    print("* the default")
    head = {"command": parser.command, "versions": measure.versions(), "commit": measure.commit()}
    if options.out is not None:
        # A launch a line: the file is read by people and compared by git.
        body = ",\n".join(json.dumps(row) for row in found)
        options.out.write_text(f'{json.dumps(head)[:-1]},\n"launches": [\n{body}\n]}}\n', encoding="utf-8")
        options.out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({**head, "launches": found}))
    faulty = [row for row in found if row["faults"]]
    if faulty:
        first = f"{faulty[0]['architecture']} {faulty[0]['name']} ({faulty[0]['launch']}): {faulty[0]['faults'][0]}"
        raise StylemuseError(f"{len(faulty)} of {len(found)} launches have faults; the first: {first}")
