"""``stylemuse bench start``: from nothing to a picture, each time in a new process.

load         the model into memory, imports included: what a server waits for before it is ready
first image  a prompt to a picture's file with ``stylemuse generate``, from process start to process end
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stylemuse.backend.machine import choose

from ..harness import measure
from ..harness.arguments import Arguments, count

PROMPT, STYLE = "a fox", "neon"


def runs(folder: Path) -> dict[str, list[str]]:
    """What is measured, as the arguments of an interpreter."""
    draw = ["-m", "stylemuse", "generate", PROMPT, "--out", str(folder / "fox.png")]
    return {
        "interpreter": ["-c", "pass"],
        "load": ["-c", "import stylemuse; stylemuse.load('demo')"],
        "first image": draw,
        "first image, styled": [*draw, "--style", STYLE],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the medians, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench start", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=count, default=20, help="processes of each kind")
    parser.common(device=False)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as folder:
        chosen = {name: partial(_run, command) for name, command in runs(Path(folder)).items()}
        clock = measure.interleaved(chosen, repeats=options.repeats, on_run=measure.progress)
    machine = choose()
    facts = {"model": "demo", "device": str(machine.device), "dtype": measure.short(machine.dtype)}
    rows: dict[str, dict[str, Any]] = {
        name: {"name": f"demo, {name}", **facts, "wall": measure.series(clock[name]["wall"])} for name in clock
    }
    for row in rows.values():
        print(f"{row['name']:32}{row['wall']['p50']:8.2f} s, {row['wall']['p20']:.2f} to {row['wall']['p80']:.2f}")
    document: dict[str, Any] = measure.document(
        parser.command,
        options.seed,
        machine.device,
        {},
        load=[rows["interpreter"], rows["load"]],
        first_image=[rows["first image"], rows["first image, styled"]],
    )
    measure.publish(document, options.out)


def _run(arguments: Sequence[str]) -> None:
    # Not from the checkout's root, where the folder `kernels` would be importable.
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as empty:
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=empty, env=dict(os.environ), check=True, stdout=subprocess.DEVNULL)
