"""``stylemuse export``: a model and its styles as ONNX graphs, for a process without torch, in any language."""

from __future__ import annotations

from pathlib import Path
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
    precision: Annotated[str, typer.Option("--precision", help="Of the transformer: float32 or int8.")] = "float32",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=PATH: a style to register first; may be repeated.")
    ] = None,
    alpha: options.Alpha = None,
    recipe: options.Recipe = None,
    as_json: options.Json = False,
) -> None:
    """Write a model and its styles as ONNX graphs."""
    registered = options.named_paths(adapter or ())
    if (alpha is not None or recipe is not None) and not registered:
        raise StylemuseError("--alpha and --recipe are about the file of an --adapter; none is given")
    names = None if styles is None else [name.strip() for name in styles.split(",") if name.strip()]
    check_new_folder(out)
    pipe = options.load(model, "reference", "cpu", "float32")
    for name, path in registered.items():
        pipe.adapters.add(name, path, alpha=alpha, recipe=recipe)
    from ..export.deploy import export as write

    made = write(pipe, out, form=form, styles=names, strength=strength, precision=precision)
    size = {name: graph.file.bytes + (graph.data.bytes if graph.data else 0) for name, graph in made.graphs.items()}
    if as_json:
        facts = {"path": str(out), "form": form, "precision": precision, "styles": sorted(made.styles), "bytes": size}
        document(facts | {"agreement": dict(made.agreement)})
        return
    table(("graph", "MB"), [(name, f"{count / 1e6:.1f}") for name, count in size.items()], numbers=("MB",))
    for key, value in made.agreement.items():
        say(f"{key}: {value}")
    say(f"{out}  form {form}, {precision}, styles: {', '.join(sorted(made.styles)) or 'none'}")
