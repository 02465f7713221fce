"""``stylemuse generate``: a prompt, in any styles, to picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import StylemuseError
from . import options, pictures
from .output import document, note, progress, say
from .subjects import hint


def generate(
    prompt: Annotated[str, typer.Argument(help='What to draw, for example "a fox".')],
    style: Annotated[
        list[str] | None, typer.Option("--style", help="NAME, or NAME=WEIGHT to blend; may be repeated.")
    ] = None,
    negative: Annotated[str, typer.Option("--negative", help="What to steer away from.")] = "",
    n: Annotated[int, typer.Option("--n", "-n", help="How many pictures.")] = 1,
    seed: options.Seed = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Decoding steps.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="amused, styledrop or maskgit.")] = None,
    guidance: Annotated[
        str | None, typer.Option("--guidance", help="cfg:SCALE or styledrop:STYLE,TEXT; the style's own if left out.")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="A picture to start from.")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much of --image is drawn anew: above 0, at most 1.")
    ] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="White where --image is drawn anew.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=PATH: a style to register first; may be repeated.")
    ] = None,
    alpha: options.Alpha = None,
    recipe: options.Recipe = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file; with --n 2 and up, -0, -1, ... go before its ending.")
    ] = Path("out/picture.png"),
    model: options.Model = "demo",
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Draw a prompt."""
    styles, registered = options.styles(style or ()), options.named_paths(adapter or ())
    if (alpha is not None or recipe is not None) and not registered:
        raise StylemuseError("--alpha and --recipe are about the file of an --adapter; none is given")
    if unused := sorted(registered.keys() - (styles or {}).keys()):
        raise StylemuseError(f"--adapter {unused[0]} is registered but not used; add --style {unused[0]}")
    request: dict[str, Any] = {
        "prompt": options.text(prompt, "the prompt"),
        "negative_prompt": options.text(negative, "--negative"),
        "style": styles,
        "n": n,
        "seed": seed,
        "guidance": options.guidance(guidance),
        "size": options.size(size),
        "image": None if image is None else pictures.read_picture(image),
        "mask": None if mask is None else pictures.read_picture(mask, mask=True),
        "strength": 1.0 if strength is None else strength,
    }
    if strength is not None and image is None:
        raise StylemuseError("--strength has no effect without an --image to start from")
    if image is not None and mask is not None and request["image"].size != request["mask"].size:
        raise StylemuseError(
            f"--mask must have the size of --image: {_by(request['image'])}, not {_by(request['mask'])}"
        )
    _check(request)
    paths = pictures.targets(out, n, force=force)
    pipe = options.load(model, backend, device, dtype, quantization)
    for name, path in registered.items():
        pipe.adapters.add(name, path, alpha=alpha, recipe=recipe)
    if (told := hint(prompt, model)) is not None:
        note(told)
    with progress("drawing") as update:
        result = pipe.generate(
            **request, steps=steps, schedule=schedule, on_step=lambda done: update(done.step, done.steps, "")
        )
    for picture, path in zip(result.images, paths, strict=True):
        pictures.save(picture, path)
    if as_json:
        files = [{"path": str(path), "seed": own} for path, own in zip(paths, result.seeds, strict=True)]
        facts = {"prompt": prompt, "style": styles, "model": model, "size": list(result.images[0].size)}
        document(facts | {"pictures": files, "timings": result.timings, "explain": pipe.explain()})
        return
    for path, own in zip(paths, result.seeds, strict=True):
        say(f"{path}  seed {own}")


def _check(request: dict[str, Any]) -> None:
    """What can be known without the model is refused before it is loaded."""
    from ..core import Request

    Request(**request)


def _by(picture: Any) -> str:
    return f"{picture.width} x {picture.height}"
