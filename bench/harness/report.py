"""``stylemuse bench report FILE ...``: one HTML page and PNG plots of measured documents, readable without a network.

With ``--against OLD`` the page compares the first file with that one and says which differences exceed the spread.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import stylemuse as sm

from . import comparison, measure, plots
from .arguments import Arguments

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e2e8f0; vertical-align: top }
td.number { text-align: right } img { max-width: 100% } code { background: #edf2f7; padding: .1rem .3rem }
"""


def read(path: Path) -> dict[str, Any]:
    """A document from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        measure.check(value)
    except (OSError, ValueError) as error:
        raise sm.StylemuseError(f"{path}: not a document of a benchmark: {error}") from None
    return dict(value)


def page(documents: Mapping[str, Mapping[str, Any]], against: tuple[str, Mapping[str, Any]] | None = None) -> str:
    """The whole page; documents by the name of their file."""
    body = ["<h1>stylemuse, measured</h1>"]
    body += [_facts(name, document) for name, document in documents.items()]
    if against is not None:
        first = next(iter(documents))
        body.append(_compared(first, documents[first], *against))
    for _, title, figure in plots.drawn(list(documents.values())):
        data = base64.b64encode(png(figure)).decode("ascii")
        body.append(
            f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    body += [_measured(kind, plots.rows(list(documents.values()), kind)) for kind in measure.KINDS]
    body.append(_skipped(documents.values()))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}<title>stylemuse, measured</title></head>\n<body>\n" + (
        "\n".join(part for part in body if part) + "\n</body></html>\n"
    )


def png(figure: Any) -> bytes:
    """A figure's picture, the same bytes each time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _facts(name: str, document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    gpu = machine["gpu"]["name"] if machine["gpu"] else "no GPU"
    installed = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    roofs = {
        key.removesuffix("_flops"): value
        for key, value in document["roofs"].items()
        if key.endswith(("_flops", "bytes"))
    }
    rates = ", ".join(
        f"{value / 1e9:.1f} {'GB/s' if key == 'bytes' else f'GFLOP/s in {key}'}"
        for key, value in roofs.items()
        if key != "copied_bytes"
    )
    table = {
        "command": f"<code>{html.escape(document['command'])}</code>",
        "machine": html.escape(f"{machine['cpu']} ({machine['vectors']}), {machine['cores']} cores, {gpu}"),
        "roofs": html.escape(rates) or "not measured",
        "versions": html.escape(installed),
        "commit": html.escape(str(document["commit"])),
    }
    return f"<h2>{html.escape(name)}</h2>\n" + _table([], [[key, value] for key, value in table.items()])


def _compared(name: str, document: Mapping[str, Any], other: str, against: Mapping[str, Any]) -> str:
    found = comparison.compare(document, against)
    rows = []
    for row in found:
        what = html.escape(f"{row['kind']}: {row['name']}, {row['part']}")
        rows.append([what, _ms(row["then"]), _ms(row["now"]), f"{row['ratio']:.3f}", row["verdict"]])
    alone = comparison.only_in_one(document, against)
    note = f"<p>Only in one of them: {html.escape('; '.join(alone))}.</p>" if alone else ""
    title = html.escape(f"{name} against {other}")
    return f"<h2>{title}</h2>\n" + _table(["", "then, ms", "now, ms", "ratio", ""], rows) + note


def _measured(kind: str, found: plots.Rows) -> str:
    rows = []
    for row in found:
        for part, value in row.items():
            if isinstance(value, dict) and "seconds" in value:
                times = [_ms(value[each]) for each in ("p20", "p50", "p80")]
                rows.append([html.escape(str(row["name"])), str(row.get("dtype", "")), part, *times])
                rows[-1].append(str(len(value["seconds"])))
    columns = ["", "", "", "p20, ms", "p50, ms", "p80, ms", "values"]
    return f"<h2>{kind}</h2>\n" + _table(columns, rows) if rows else ""


def _skipped(documents: Iterable[Mapping[str, Any]]) -> str:
    rows = [row for document in documents for kind in measure.KINDS for row in document.get(kind, ())]
    why = [[html.escape(row["name"]), html.escape(row["skipped"])] for row in rows if "skipped" in row]
    return "<h2>Not measured</h2>\n" + _table(["", "why"], why) if why else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>\n" if columns else ""
    lines = ("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{head}" + "\n".join(lines) + "\n</table>"


def _cell(text: str) -> str:
    number = text.replace(".", "", 1).replace(",", "").isdigit()
    return f'<td class="number">{text}</td>' if number else f"<td>{text}</td>"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and the plots; the last line is a JSON object with their paths and the comparison."""
    parser = Arguments(prog="stylemuse bench report", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="documents that a benchmark wrote")
    parser.add_argument("--against", type=Path, metavar="OLD", help="compare the first file with this one")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder to write into")
    options = parser.parse_args(arguments)
    documents = {path.name: read(path) for path in options.files}
    if len(documents) != len(options.files):
        parser.error("files of one name are not allowed: the page tells them apart by it")
    against = None if options.against is None else (options.against.name, read(options.against))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise sm.StylemuseError("plots need matplotlib: pip install 'stylemuse[bench]'") from None
    options.out.mkdir(parents=True, exist_ok=True)
    written = [options.out / "index.html"]
    written[0].write_text(page(documents, against), encoding="utf-8")
    for name, _, figure in plots.drawn(list(documents.values())):
        written.append(options.out / f"{name}.png")
        written[-1].write_bytes(png(figure))
    compared = comparison.compare(next(iter(documents.values())), against[1]) if against else []
    for row in compared:
        print(f"{row['kind']}: {row['name']}, {row['part']:16}{row['ratio']:8.3f}  {row['verdict']}")
    print(json.dumps({"written": [str(path) for path in written], "compared": compared}))
