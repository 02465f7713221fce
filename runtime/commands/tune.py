"""``stylemuse tune``: a style from one picture, written as a canonical adapter."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import STYLE_NAME, StylemuseError
from . import options, pictures
from .output import check_new_folder, document, progress, say, write_file

if TYPE_CHECKING:
    from ..tuning.style import Recipe

MAX_RANK = 32
"""What a pipeline makes room for unless it is asked for more."""


def tune(
    image: Annotated[Path, typer.Argument(help="The picture whose style it is.")],
    prompt: Annotated[str, typer.Option("--prompt", help='"CONTENT in STYLE", for example "a cat in ink style".')],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the adapter.")],
    name: Annotated[
        str | None, typer.Option("--name", help="How requests call it; the folder's name if left out.")
    ] = None,
    descriptor: Annotated[
        str | None, typer.Option("--descriptor", help="Words added to prompts; STYLE of --prompt if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the LoRA, 1 to 32.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Maskings of the picture per step.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="0 to 2^63 - 1.")] = 0,
    style_strength: Annotated[
        float | None, typer.Option("--style-strength", help="Recommended guidance: towards the style.")
    ] = None,
    text_strength: Annotated[
        float | None, typer.Option("--text-strength", help="Recommended guidance: towards the prompt.")
    ] = None,
    model: options.Model = "demo",
    as_json: options.Json = False,
) -> None:
    """Tune a style from one picture."""
    name = out.absolute().name if name is None else name
    _check(prompt, descriptor, name, rank, seed)
    check_new_folder(out)
    picture = pictures.read_picture(image)
    import stylemuse

    from ..adapters import canonical
    from ..tuning import style

    given: dict[str, Any] = {"rank": rank, "steps": steps, "rate": rate, "batch": batch}
    recipe = replace(_recipe(model), **{key: value for key, value in given.items() if value is not None})
    recommended = _recommended(style_strength, text_strength)
    words = style.descriptor_of(prompt) if descriptor is None else descriptor
    # Tuning is written for fp32 on the CPU.
    pipe = stylemuse.load(model, device="cpu", dtype="float32")
    began, losses = time.perf_counter(), list[float]()
    with progress("tuning") as update:

        def on_step(done: int, total: int, loss: float) -> None:
            losses.append(loss)
            update(done, total, f"loss {loss:.3f}")

        adapter = style.tune(
            pipe, picture, prompt, name=name, descriptor=words, recipe=recipe, recommended=recommended, seed=seed,
            on_step=on_step,
        )  # fmt: skip
    spent = time.perf_counter() - began
    canonical.save(adapter, out)
    write_file(out / "reference.png", pictures.encoded(picture))
    first, last = _mean(losses[:10]), _mean(losses[-10:])
    if as_json:
        facts = {
            "path": str(out),
            "name": name,
            "descriptor": words,
            "rank": adapter.rank,
            "sites": len(adapter.tensors),
        }
        facts |= {"recommended": dict(adapter.recommended), "sha256": adapter.sha256, "model": model, "seed": seed}
        document(facts | {"steps": recipe.steps, "loss": {"first": first, "last": last}, "seconds": spent})
        return
    say(f"{out}  {words!r}, rank {adapter.rank}, loss {first:.3f} -> {last:.3f}, {spent:.0f} s")
    elsewhere = "" if model == "demo" else f" --model {model}"
    say(f'draw with it: stylemuse generate "a fox" --adapter {name}={out} --style {name}{elsewhere}')


def _check(prompt: str, descriptor: str | None, name: str, rank: int | None, seed: int) -> None:
    """What would otherwise fail after the tuning."""

    if not options.text(prompt, "--prompt").strip():
        raise StylemuseError("--prompt is empty; write 'CONTENT in STYLE', for example 'a cat in ink style'")
    if descriptor is not None:
        options.text(descriptor, "--descriptor")
    if not STYLE_NAME.fullmatch(name):
        raise StylemuseError(f"--name {name[:80]!r} is not allowed: letters, digits, '.', '_' and '-', at most 64")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise StylemuseError(f"--rank {rank} is not allowed: 1 to {MAX_RANK}")
    if not 0 <= seed < 2**63:
        raise StylemuseError(f"--seed {seed} is not allowed: 0 to 2^63 - 1")


def _recipe(model: str) -> Recipe:
    """The recipe that suits the model."""
    from ..loading import hub
    from ..tuning.style import AMUSED, Recipe

    published = {Path(name).name for name in hub.PINNED}
    return AMUSED if Path(model).name in published else Recipe()


def _recommended(style: float | None, text: float | None) -> dict[str, str | int | float]:
    """StyleDrop's guidance as facts of the adapter; what is left out is the recipe's own."""
    if style is None and text is None:
        return {}
    from ..decoding.guidance import StyleDrop

    given = {"style": style, "text": text}
    made = StyleDrop(**{key: value for key, value in given.items() if value is not None})
    return {"guidance": "StyleDrop", "style": made.style, "text": made.text}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
