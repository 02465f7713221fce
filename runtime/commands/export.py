"""``stylemuse export``: a model and its styles as ONNX graphs, for a process without torch, in any language."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..core import StylemuseError
from . import options
from .output import check_new_folder, document, say, table

FORMS = "bank (each row its own style), single (one at a time, from a file) or fused (one, in the graphs)"


def export(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")],
    model: options.Model = "demo",
    form: Annotated[str, typer.Option("--form", help=f"{FORMS}.")] = "bank",
    styles: Annotated[
        str | None, typer.Option("--styles", help="Names, with commas between; all if left out, none for fused.")
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="Strength of the style that is fused.")] = 1.0,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the transformer: float32, float16 (slow on a CPU) or int8.")
    ] = "float32",
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="Counts of rows to try the graphs with too, say 2,16; others run as well."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=PATH: a style to register first; may be repeated.")
    ] = None,
    alpha: options.Alpha = None,
    recipe: options.Recipe = None,
    web: Annotated[bool, typer.Option("--web", help="Add a page that draws in a browser, for any web server.")] = False,
    runtime: Annotated[
        Path | None, typer.Option("--runtime", help="The npm package onnxruntime-web; ./node_modules if left out.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Let npm fetch that package, for this export alone.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model and its styles as ONNX graphs."""
    registered = options.named_paths(adapter or ())
    if (alpha is not None or recipe is not None) and not registered:
        raise StylemuseError("--alpha and --recipe are about the file of an --adapter; none is given")
    names = None if styles is None else [name.strip() for name in styles.split(",") if name.strip()]
    if (runtime is not None or fetch) and not web:
        raise StylemuseError("--runtime and --fetch are about the page of --web, which is not asked for")
    if runtime is not None and fetch:
        raise StylemuseError("--runtime and --fetch both say where the package is; give one of them")
    counts = [] if rows is None else [_count(part) for part in rows.split(",")]
    check_new_folder(out)
    with ExitStack() as held:
        package = _package(runtime, fetch, held) if web else None
        pipe = options.load(model, "reference", "cpu", "float32")
        for name, path in registered.items():
            pipe.adapters.add(name, path, alpha=alpha, recipe=recipe)
        from ..export.graphs.deploy import export as write

        made = write(
            pipe, out, form=form, styles=names, strength=strength, precision=precision, rows=counts, runtime=package
        )
    size = {name: graph.file.bytes + (graph.data.bytes if graph.data else 0) for name, graph in made.graphs.items()}
    if as_json:
        facts = {"path": str(out), "form": form, "precision": precision, "styles": sorted(made.styles), "bytes": size}
        measured = {"rows": list(made.rows), "agreement": dict(made.agreement)}
        document(facts | measured | {"page": "index.html" if web else None})
        return
    table(("graph", "MB"), [(name, f"{count / 1e6:.1f}") for name, count in size.items()], numbers=("MB",))
    for key, value in made.agreement.items():
        say(f"{key}: {value}")
    say(f"{out}  form {form}, {precision}, styles: {', '.join(sorted(made.styles)) or 'none'}")
    if web:
        say(f"a page that draws: python3 -m http.server --directory {out} 8080, then open http://localhost:8080")


def _package(given: Path | None, fetch: bool, held: ExitStack) -> Path:
    """Where onnxruntime-web is; what npm fetches is gone when `held` ends."""
    from ..export.graphs import page

    if not fetch:
        return page.find_runtime(given)
    print(f"npm fetches {page.PACKAGE} {page.version()} into a temporary folder", file=sys.stderr, flush=True)
    return page.fetch_runtime(Path(held.enter_context(TemporaryDirectory(prefix="stylemuse-"))))


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise StylemuseError(f"--rows {text.strip()!r} is not allowed: whole numbers with commas between")
    return int(text)
