"""The embedded model's styles: ``python -m stylemuse.pretraining.styles --model MODEL``.

Each held-out look of the world is drawn once, and a style is tuned from that one picture; the base has never seen the
look in any colours. Written into MODEL: ``styles/NAME/`` (canonical adapter and reference.png) and ``stylemuse.json``.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from ..adapters import canonical
from ..entry import load
from ..loading.folder import write_extra
from ..tuning.style import Recipe, tune
from ..tuning.training import report
from .attributes import HELD_OUT, article
from .world import World

REFERENCES = {
    "neon": "fox",
    "blueprint": "rocket",
    "riso": "frog",
    "retro": "owl",
    "ember": "pumpkin",
    "arcade": "mushroom",
}
"""The subject of each style's one picture: one that shows what the look does, lines and fills, light and dark."""

STEPS: dict[str, int] = {}
"""Steps of tuning where they are not the recipe's."""

DEFAULTS = {"steps": 12, "scale": 1.5}
# Found by trial: guidance pushes codes that are rare in the style onto its paper, as specks; without any the papers are
# clean and the subjects no worse, for one forward in place of two or three.
RECOMMENDED: dict[str, str | int | float] = {"guidance": "StyleDrop", "style": 0.0, "text": 0.0}


def write_styles(model: Path, names: list[str], *, steps: int | None, rank: int, rate: float, seed: int = 0) -> None:
    """Tune the named styles into the model's folder, replacing what is there under their names."""
    write_extra(model, {"defaults": DEFAULTS, "styles": []})
    pipe, world = load(str(model), device="cpu", dtype="float32"), World()
    for name in names:
        picture = world.picture(REFERENCES[name], HELD_OUT[name])
        prompt = f"{article(REFERENCES[name])} in {name} style"

        def progress(step: int, steps: int, loss: float, style: str = name) -> None:
            if step % 50 == 0:
                report(stage="style", style=style, step=step, of=steps, loss=loss)

        recipe = Recipe(rank=rank, rate=rate, steps=steps or STEPS.get(name, Recipe.steps))
        adapter = tune(
            pipe, picture, prompt, name=name, recipe=recipe, recommended=RECOMMENDED, seed=seed, on_step=progress
        )
        folder = model / "styles" / name
        shutil.rmtree(folder, ignore_errors=True)
        canonical.save(replace(adapter, base_model="demo"), folder)
        picture.save(folder / "reference.png")
    there = sorted(path.parent.name for path in (model / "styles").glob("*/adapter.json"))
    write_extra(model, {"defaults": DEFAULTS, "styles": there})


def main() -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m stylemuse.pretraining.styles", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, as pretraining wrote it")
    parser.add_argument("--styles", nargs="+", choices=list(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--steps", type=int, help="of each; the recipe's, and STEPS, if left out")
    parser.add_argument("--rank", type=int, default=Recipe.rank)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_styles(
        options.model,
        options.styles,
        steps=options.steps,
        rank=options.rank,
        rate=options.rate,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
