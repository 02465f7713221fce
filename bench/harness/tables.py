"""``stylemuse bench tables``: the tables of the README, made from the files in ``bench/results``.

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import stylemuse as sm

from . import networks, targets
from .arguments import Arguments
from .report import read

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MACHINE = "epyc-2-bf16"
"""Whose results the README shows; `bench/NOTES.md` says what it is."""

_PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def parity(results: Path) -> str:
    """Errors against the peers at full size."""
    found = json.loads((results / "parity.json").read_text(encoding="utf-8"))["results"]
    text, picture = found["text"], found["tokenizer"]
    worst = max(text["penultimate"]["relative"], text["pooled"]["relative"])
    rows = [
        ["text, CLIP ViT-L", f"{text['parameters']:,}", "transformers", _error(worst)],
        ["VQ, 256 px picture", f"{picture['parameters']:,}", "diffusers", _error(picture["picture"]["relative"])],
    ]
    for size in ("amused-256", "amused-512"):
        one = found[size]
        lora = one["lora"]
        rows.append([f"{size}, logits", f"{one['parameters']:,}", "diffusers", _error(one["logits"]["relative"])])
        rows.append(
            [f"{size}, LoRA of rank 16", f"{lora['parameters']:,}", "peft", _error(lora["at_its_place"]["relative"])]
        )
        rows.append([f"{size}, the same merged", "", "peft", _error(lora["merged"]["relative"])])
    return table(["network", "parameters", "peer", "error"], rows)


def peers(results: Path) -> str:
    """A decoding step beside those of the peers, as ratios in one run."""
    rows = []
    for name in ("diffusers", "compiled", "peft", "onnx"):
        path = results / f"peers-{name}-amused-256-{MACHINE}.json"
        if not path.exists():
            continue
        found = read(path)["step"]
        ours = [row for row in found if row["who"].startswith("stylemuse")]
        for row in found:
            if row not in ours:
                # Each is beside the row of ours with as many adapters, whose name goes on with how many.
                beside = [(own["name"], own["times_as_long"].get(row["name"])) for own in ours]
                ratios = [next((r for name, r in beside if r and name.startswith(each)), None) for each in _OURS]
                rows.append([row["name"], *map(_times, ratios)])
    return table(["peer", *_OURS.values()], rows)


def aims(results: Path) -> str:
    """What was aimed at on a CPU, and what came of it."""
    documents = [read(path) for path in sorted(results.glob(f"*-{MACHINE}.json"))]
    rows = [
        [row["what"], f"{row['side']} {row['bound']}", row["text"] + ("" if row["met"] is not False else " (missed)")]
        for row in targets.reached(targets.CPU, documents)
    ]
    return table(["", "aim", "measured"], rows)


def adapters(results: Path) -> str:
    """What mixing and changing styles costs."""
    document = read(results / f"adapters-amused-256-{MACHINE}.json")
    rows = [[row["name"], f"{row['to_base']:.3f} of the base's step"] for row in document["step"]]
    rows += [[row["name"], _span(row["wall"]["p50"])] for row in document["adapter_swap"] if "wall" in row]
    return table(["", ""], rows)


def onnx(results: Path) -> str:
    """Exported folders: how they agree with the model they were made from, what they take, how fast they step."""
    rows = []
    for model in networks.MODELS:
        path = results / f"onnx-{model}-{MACHINE}.json"
        if not path.exists():
            continue
        document = read(path)
        steps = {(row.get("form"), row["dtype"]): row for row in document["step"]}
        for row in document["load"]:
            step, agreement = steps[row["form"], row["dtype"]], row["agreement"]
            rows.append([model, row["form"], row["dtype"], f"{row['bytes'] / 1e6:,.0f} MB", _span(row["wall"]["p50"])])
            rows[-1] += [f"{agreement['tokens']:.2%}", f"{agreement['picture_error']:.2f}"]
            rows[-1] += [_times(step.get("to_fused")), _times(step["times_as_long"].get("diffusers, float32"))]
    columns = ["model", "form", "precision", "on disk", "load", "tokens alike", "picture error, of 255"]
    return table([*columns, "step, to fused", "diffusers in fp32, to it"], rows)


_OURS = {
    "stylemuse, float32": "to ours in fp32",
    "stylemuse, bfloat16": "to ours in bf16",
    "stylemuse with ONNX Runtime, float32": "to ours in ONNX Runtime, fp32",
}
TABLES: Mapping[str, Callable[[Path], str]] = {
    "parity": parity,
    "aims": aims,
    "peers": peers,
    "adapters": adapters,
    "onnx": onnx,
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """The text with every table made anew."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise sm.StylemuseError(f"table {match[2]} is unknown; allowed: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return _PLACE.sub(made, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the README's tables; the last line says whether anything changed."""
    parser = Arguments(prog="stylemuse bench tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise sm.StylemuseError(f"{options.readme}: {error.strerror}; give the checkout's with --readme") from None
    after = rendered(before)
    if after != before:
        options.readme.write_text(after, encoding="utf-8")
    print(json.dumps({"readme": str(options.readme), "changed": after != before}))


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _times(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


def _span(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} us"
