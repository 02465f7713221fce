"""Two documents side by side: which rows differ by more than the spread of their values.

A difference exceeds the spread where the ranges p20 to p80 of both do not touch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .measure import KINDS

_WHAT = ("dtype", "device", "backend", "group")


def compare(document: Mapping[str, Any], against: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each series that both have: the medians, their ratio (over 1: slower than ``against``), the verdict."""
    before = dict(_series(against))
    rows = []
    for key, now in _series(document):
        if key not in before:
            continue
        then = before[key]
        apart = now["p20"] > then["p80"] or now["p80"] < then["p20"]
        ratio = now["p50"] / then["p50"] if then["p50"] else float("inf")
        rows.append(
            {"kind": key[0], "name": key[1], "part": key[-1], "now": now["p50"], "then": then["p50"], "ratio": ratio}
            | {"verdict": ("slower" if ratio > 1 else "faster") if apart else "within the spread"}
        )
    return rows


def only_in_one(document: Mapping[str, Any], against: Mapping[str, Any]) -> list[str]:
    """Series that cannot be compared, by name."""
    one, other = (dict(_series(each)) for each in (document, against))
    return sorted(f"{key[0]}: {key[1]}, {key[-1]}" for key in one.keys() ^ other.keys())


def _series(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for kind in KINDS:
        for row in document.get(kind, ()):
            what = tuple(str(row.get(each, "")) for each in _WHAT)
            for part, value in row.items():
                if isinstance(value, dict) and "seconds" in value:
                    yield (kind, row["name"], *what, part), value
