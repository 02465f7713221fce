"""What was aimed at, and what was measured of it: a ratio or a time for each target, from documents.

C are those of a CPU, P those of a GPU (`bench gpu`), S those of an engine and a server. Values are medians unless a row
says otherwise; where several rows count, the worst does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Documents = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """``value`` gives None where its rows were not measured; ``at_least`` is false for what should be small."""

    name: str
    what: str
    bound: float
    unit: str
    at_least: bool
    value: Callable[[Documents], float | None]

    def met(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value >= self.bound if self.at_least else value <= self.bound

    def text(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "%":
            return f"{value * 100:.1f} %"
        if self.unit == "s":
            scales = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
            size, unit = next((scale for scale in scales if value >= scale[0]), scales[-1])
            return f"{value / size:.3g} {unit}"
        return f"{value:.2f}{self.unit}" if self.unit else f"{value:g}"


def rows(documents: Documents, kind: str, **facts: Any) -> list[Row]:
    """Measured rows of a kind that have these facts."""
    found = (row for document in documents for row in document.get(kind, ()) if "skipped" not in row)
    return [row for row in found if all(row.get(key) == value for key, value in facts.items())]


def _worst(values: Iterable[float], at_least: bool) -> float | None:
    found = list(values)
    return (min if at_least else max)(found) if found else None


def _times(who: str, other: str, **facts: Any) -> Callable[[Documents], float | None]:
    """How many times as long another takes for a step."""

    def value(documents: Documents) -> float | None:
        found = rows(documents, "step", who=who, **facts)
        return _worst((row["times_as_long"][other] for row in found if other in row["times_as_long"]), True)

    return value


def _to_fused(dtype: str) -> Callable[[Documents], float | None]:
    def value(documents: Documents) -> float | None:
        found = rows(documents, "step", model="amused-256", dtype=dtype)
        return _worst((row["to_fused"] for row in found if "to_fused" in row), False)

    return value


def _to_base(adapters: str, **facts: Any) -> Callable[[Documents], float | None]:
    def value(documents: Documents) -> float | None:
        found = rows(documents, "step", adapters=adapters, **facts)
        return _worst((row["to_base"] for row in found if "to_base" in row), False)

    return value


def _swap(where: str) -> Callable[[Documents], float | None]:
    def value(documents: Documents) -> float | None:
        return _worst((row["wall"]["p50"] for row in rows(documents, "adapter_swap", **{"from": where})), False)

    return value


def _sampling_share(documents: Documents) -> float | None:
    """Head, guidance, draw and re-masking of a step of one picture with two branches, on a CPU."""
    found = rows(documents, "step", model="amused-256", batch=1, branches=2, adapters="none")
    shares = [
        sum(row[part]["p50"] for part in ("head", "sampling", "remask")) / row["step"]["p50"]
        for row in found
        if "remask" in row and row["device"].startswith("cpu")
    ]
    return _worst(shares, False)


def _end_share(documents: Documents) -> float | None:
    """The same on a GPU, where a step is one launch: the operation timed alone, to the step."""
    end = rows(documents, "call", operation="head, draw and re-masking", implementation="triton", rows=2)
    step = _step(documents, 2, 1)
    return None if not end or step is None else end[0]["wall"]["p50"] / step["step"]["p50"]


def _step(documents: Documents, branches: int, batch: int) -> Row | None:
    found = rows(documents, "step", model="amused-256", branches=branches, batch=batch)
    mine = [row for row in found if "share_of_floor" in row and row["device"].startswith("cuda")]
    return mine[0] if mine else None


def _floor(branches: int, batch: int) -> Callable[[Documents], float | None]:
    def value(documents: Documents) -> float | None:
        row = _step(documents, branches, batch)
        return None if row is None else float(row["share_of_floor"])

    return value


def _three_to_one(documents: Documents) -> float | None:
    three, one = _step(documents, 3, 1), _step(documents, 1, 1)
    return None if three is None or one is None else three["step"]["p50"] / one["step"]["p50"]


def _flat(documents: Documents) -> float | None:
    """Of a swap from host memory with the most styles registered to one with the fewest."""
    found = sorted(rows(documents, "adapter_swap", **{"from": "host memory"}), key=lambda row: row["registered"])
    return found[-1]["wall"]["p50"] / found[0]["wall"]["p50"] if len(found) > 1 else None


def _launches(documents: Documents) -> float | None:
    return _worst((float(row["launches"]) for row in rows(documents, "step") if "launches" in row), False)


def _picture(documents: Documents) -> float | None:
    found = rows(documents, "call", model="amused-256", batch=1, branches=2, adapters="none", steps=12)
    return _worst((row["total"]["p50"] for row in found if row["device"].startswith("cuda")), False)


def _first_image(documents: Documents) -> float | None:
    return _worst((row["wall"]["p50"] for row in rows(documents, "first_image")), False)


def _astray(documents: Documents) -> float | None:
    found = rows(documents, "serve", scenario="soak")
    return _worst((float(row["lost"] + row["duplicated"] + row["hung"]) for row in found), False)


def _serve(field: str, at_least: bool, **facts: Any) -> Callable[[Documents], float | None]:
    """The worst of a field, or of a field of a field ("refusal_tail.p99")."""

    def value(documents: Documents) -> float | None:
        first, _, inner = field.partition(".")
        found = [row[first] for row in rows(documents, "serve", **facts) if row.get(first) is not None]
        return _worst((each[inner] if inner else each for each in found), at_least)

    return value


_MINE, _COMPILED = {"dtype": "bfloat16", "adapters": "none", "batch": 1}, "diffusers with torch.compile, bfloat16"

CPU = (
    Target(
        "C1", "bf16 step, to diffusers in fp32", 2.4, " x", True, _times("stylemuse", "diffusers, float32", **_MINE)
    ),
    Target(
        "C1", "bf16 step, to diffusers in bf16", 1.03, " x", True, _times("stylemuse", "diffusers, bfloat16", **_MINE)
    ),
    Target(
        "C2",
        "ONNX step in int8, to diffusers in fp32",
        3.5,
        " x",
        True,
        _times("stylemuse with ONNX Runtime", "diffusers, float32", dtype="int8", form="fused", model="amused-256"),
    ),
    Target(
        "C3",
        "ONNX step in fp32, to a plain export",
        1.1,
        " x",
        True,
        _times("stylemuse with ONNX Runtime", "ONNX Runtime, plain export, float32"),
    ),
    Target(
        "C4", "batch of 8 in 8 styles, to the base", 1.05, " x", False, _to_base("many", batch=8, model="amused-256")
    ),
    Target(
        "C4",
        "8 requests in 8 styles on a server, to the base",
        1.05,
        " x",
        False,
        _serve("to_base", False, scenario="round", where="server", requests=8, styles=8, model="amused-256"),
    ),
    Target("C5", "styles as inputs of ONNX graphs, to merged, fp32", 1.05, " x", False, _to_fused("float32")),
    Target("C5", "styles as inputs of ONNX graphs, to merged, int8", 1.05, " x", False, _to_fused("int8")),
    Target("C6", "change to a resident style", 1e-3, "s", False, _swap("resident")),
    Target("C6", "change to a resident style while an engine draws", 1e-3, "s", False, _swap("resident, under load")),
    Target("C7", "head, guidance, draw, re-masking in a step", 0.04, "%", False, _sampling_share),
    Target("C8", "prompt to picture, process start included", 8.0, "s", False, _first_image),
    Target(
        "S1",
        "goodput of a server at 10 times its capacity, to the peak",
        0.9,
        "%",
        True,
        _serve("to_peak", True, scenario="Server", where="server", load=10.0),
    ),
    Target(
        "S2",
        "a refusal then, 99th percentile",
        10e-3,
        "s",
        False,
        _serve("refusal_tail.p99", False, scenario="Server", where="server", load=10.0),
    ),
    Target(
        "S3",
        "what same request, same bytes costs",
        1.15,
        " x",
        False,
        _serve("to_free", False, scenario="law", part="whole"),
    ),
    Target("S4", "requests lost, duplicated or hung in a soak", 0.0, "", False, _astray),
    Target(
        "S5",
        "growth of a server's memory in a soak",
        0.01,
        "%",
        False,
        _serve("memory.grown", False, scenario="soak"),
    ),
)
GPU = (
    Target("P1", "step, to diffusers", 10.0, " x", True, _times("stylemuse", "diffusers, bfloat16", **_MINE)),
    Target("P2", "step, to diffusers compiled", 1.5, " x", True, _times("stylemuse", _COMPILED, **_MINE)),
    Target("P3", "share of the floor, 3 branches, 1 picture", 0.4, "%", True, _floor(3, 1)),
    Target("P3", "share of the floor, 3 branches, 8 pictures", 0.6, "%", True, _floor(3, 8)),
    Target("P4", "step of 3 branches, to 1 branch", 2.2, " x", False, _three_to_one),
    Target("P5", "batch of 16 in 16 styles, to the base", 1.05, " x", False, _to_base("many", batch=16)),
    Target("P6", "one adapter, to the base, 1 picture", 1.08, " x", False, _to_base("one", batch=1)),
    Target("P7", "change to a resident style", 50e-6, "s", False, _swap("resident")),
    Target("P7", "swap from host memory", 2e-3, "s", False, _swap("host memory")),
    Target("P8", "swap with the most registered, to the fewest", 1.1, " x", False, _flat),
    Target("P9", "head, guidance, draw, re-masking in a step", 0.06, "%", False, _end_share),
    Target("P10", "kernels launched per step", 270, "", False, _launches),
    Target("P11", "256 px picture in 12 steps", 20e-3, "s", False, _picture),
)


def reached(targets: Sequence[Target], documents: Documents) -> list[dict[str, Any]]:
    """What each target came to: its value, or None where it was not measured."""
    found = []
    for target in targets:
        value = target.value(documents)
        facts = {"name": target.name, "what": target.what, "bound": target.text(target.bound)}
        facts |= {"side": "at least" if target.at_least else "at most"}
        found.append(facts | {"value": value, "met": None if value is None else target.met(value)})
        found[-1]["text"] = "not measured" if value is None else target.text(value)
    return found
