"""Pictures of documents, by matplotlib: each takes documents and gives a figure, or None where it has nothing to show.

Bars are medians, whiskers the range p20 to p80.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Documents = Sequence[Mapping[str, Any]]
Rows = list[Mapping[str, Any]]

PARTS = ("transformer", "head", "sampling", "remask")
COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#718096")


def rows(documents: Documents, kind: str, *needed: str) -> Rows:
    """The measured rows of a kind that have all the fields needed."""
    found = (row for document in documents for row in document.get(kind, ()))
    return [row for row in found if "skipped" not in row and all(field in row for field in needed)]


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(found: Rows, label: str, part: Callable[[Mapping[str, Any]], Mapping[str, float]], *, log: bool) -> Any:
    """Horizontal bars in milliseconds, the first row on top."""
    figure, axes = _figure(0.9 + 0.3 * len(found))
    series = [part(row) for row in found]
    middles = [each["p50"] * 1e3 for each in series]
    below, above = ([abs(each["p50"] - each[end]) * 1e3 for each in series] for end in ("p20", "p80"))
    colours = [COLOURS[0] if _ours(row) else COLOURS[5] for row in found]
    axes.barh(range(len(found)), middles, xerr=[below, above], color=colours, capsize=3)
    _name_rows(axes, found, label)
    if log:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
        for place, middle in enumerate(middles):
            axes.annotate(
                f" {middle:,.0f}" if middle >= 100 else f" {middle:.3g}",
                (middle + above[place], place),
                va="center",
                fontsize=8,
            )
    return figure


def steps(documents: Documents) -> Any:
    """Latency of a decoding step by batch and branches."""
    found = [row for row in rows(documents, "step", "step", "share_of_floor") if "to_base" not in row]
    return _bars(found, "a decoding step, ms", lambda row: row["step"], log=False) if found else None


def breakdown(documents: Documents) -> Any:
    """Where a step's time goes."""
    found = rows(documents, "step", "step", *PARTS)
    if not found:
        return None
    figure, axes = _figure(1.2 + 0.3 * len(found))
    left = [0.0] * len(found)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        shares = [row[part]["p50"] / row["step"]["p50"] for row in found]
        axes.barh(range(len(found)), shares, left=left, label=part, color=colour)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _name_rows(axes, found, "share of a step")
    axes.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def floor(documents: Documents) -> Any:
    """How near a step comes to what the machine's rates allow."""
    return _ratios(documents, "share_of_floor", "floor / measured step (1 is the roof of this machine)", COLOURS[2])


def overhead(documents: Documents) -> Any:
    """What adapters cost in a batch."""
    return _ratios(documents, "to_base", "step / step of the same batch on the base", COLOURS[1])


def _ratios(documents: Documents, field: str, label: str, colour: str) -> Any:
    """A ratio of each step, and a line at 1."""
    found = rows(documents, "step", field)
    if not found:
        return None
    figure, axes = _figure(0.9 + 0.3 * len(found))
    axes.barh(range(len(found)), [row[field] for row in found], color=colour)
    axes.axvline(1, color="black", linewidth=1)
    _name_rows(axes, found, label)
    return figure


def swaps(documents: Documents) -> Any:
    """How long a change of style takes."""
    found = rows(documents, "adapter_swap", "wall")
    return _bars(found, "a swap, ms (logarithmic)", lambda row: row["wall"], log=True) if found else None


def peers(documents: Documents) -> Any:
    """The same pictures, drawn by others."""
    found = rows(documents, "step", "step", "who")
    return _bars(found, "a decoding step, ms", lambda row: row["step"], log=False) if found else None


PLOTS: Mapping[str, Callable[[Documents], Any]] = {
    "steps": steps, "breakdown": breakdown, "floor": floor, "overhead": overhead, "swaps": swaps, "peers": peers,
}  # fmt: skip


def drawn(documents: Documents) -> Iterator[tuple[str, str, Any]]:
    """Name, title and figure of every plot that has something to show."""
    for name, plot in PLOTS.items():
        figure = plot(documents)
        if figure is not None:
            yield name, (plot.__doc__ or name).rstrip("."), figure


def _name_rows(axes: Any, found: Rows, label: str) -> None:
    """The first row on top. By place, not by name: rows of two runs may have one name."""
    axes.set_yticks(range(len(found)), [_label(row) for row in found])
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _ours(row: Mapping[str, Any]) -> bool:
    return str(row.get("who", "stylemuse")).startswith("stylemuse")


def _label(row: Mapping[str, Any]) -> str:
    dtype, group = row.get("dtype", ""), row.get("group")
    name = f"{row['name']}, {dtype}" if dtype and dtype not in row["name"] else str(row["name"])
    return f"{name} [{group}]" if group else name
