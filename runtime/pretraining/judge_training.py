"""Training of the judge, from the world's own pictures, held-out looks and hand too.

Two judges can be asked. One has a generator's small flaws (`flaws`) put on what it learns from, so that it looks past
them; the other learned from the truth alone and forgives nothing. The first says whether a picture shows what was asked
for, the second also says how well it is drawn: neither figure should be quoted without the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import StylemuseError
from ..tuning.training import finite, load, report, save, warm_hold_decay
from .flaws import flawed
from .judge import HEADS, PICTURE, Judge, load_judge
from .world import Scenes, World

SAMPLES = 90_000
_BATCH = 64
_USES = 3  # times a drawn picture is trained on, each time with other flaws
_POOL = 3072  # drawn pictures at hand, 48 KB each
_DRAWN = 32  # pictures the world draws at once: more only take more memory
_KEEP = 200  # steps between saved states
_RATE = 3e-3


def train_judge(path: Path, samples: int = SAMPLES, seed: int = 0, *, flaws: bool = True) -> Judge:
    """The judge in ``path``; where there is none, or one made in another way, it is trained there.

    Interrupted, it goes on from ``path`` with the ending ".partial.pt".
    """
    made_with = {"samples": str(samples), "seed": str(seed), "flaws": str(flaws)}
    if path.exists() and _made_with(path) == made_with:
        return load_judge(path)
    partial = path.with_suffix(".partial.pt")
    with torch.random.fork_rng(devices=[]):
        judge = _trained(partial, samples, seed, made_with, flaws=flaws)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, fresh, metadata=made_with)
    os.replace(fresh, path)
    partial.unlink(missing_ok=True)
    return judge


def answers(scenes: Scenes) -> dict[str, Tensor]:
    """By head, the index of the right name of each scene (B,). The heads number their names as the world does."""
    return {head: getattr(scenes, head) for head in HEADS}


def draw(world: World, scenes: Scenes) -> Tensor:
    """(B, 3, s, s) of any number of scenes, some at a time."""
    parts = zip(*(field.split(_DRAWN) for field in scenes), strict=True)
    return torch.cat([world.draw(Scenes(*part)) for part in parts])


def _trained(partial: Path, samples: int, seed: int, made_with: Mapping[str, str], *, flaws: bool) -> Judge:
    torch.manual_seed(seed)
    judge, done = Judge().train(), 0
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_RATE, weight_decay=0.02)
    if (state := load(partial)) and state["made_with"] == made_with:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    chance = torch.Generator().manual_seed(seed + done)
    stream, began, step = _batches(chance), time.monotonic(), 0
    while done < samples:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * warm_hold_decay(done, samples, warm=50 * _BATCH, decay=0.6)
        pictures, labels = next(stream)
        opinion = judge(flawed(pictures, chance) if flaws else pictures)
        losses = {head: F.cross_entropy(opinion.logits[head], labels[head], label_smoothing=0.02) for head in HEADS}
        optimizer.zero_grad(set_to_none=True)
        finite(torch.stack(list(losses.values())).sum()).backward()
        optimizer.step()
        done, step = done + _BATCH, step + 1
        if step % 50 == 0:
            shown = {head: float(loss.detach()) for head, loss in losses.items()}
            report(stage="judge", done=done, seconds=time.monotonic() - began, **shown)
        if step % _KEEP == 0 and done < samples:
            parts = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict()}
            save(partial, parts | {"made_with": dict(made_with), "done": done})
    return judge.eval()


def _made_with(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            kept = ("samples", "seed", "flaws")
            return {name: value for name, value in (file.metadata() or {}).items() if name in kept}
    except Exception as error:  # safetensors' errors share no base
        raise StylemuseError(f"{path} is not a safetensors file: {str(error).splitlines()[0]}") from None


def _batches(chance: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless (pictures (B, 3, 128, 128), by head the index of the right name (B,)), from a pool always renewed."""
    world = World(PICTURE)

    def fresh(count: int) -> tuple[Tensor, Tensor]:
        scenes = world.sample(count, chance, held_out=True)
        return (draw(world, scenes) * 255 + 0.5).byte(), torch.stack(list(answers(scenes).values()), 1)

    pictures, right = fresh(_POOL)
    while True:
        anew = torch.randperm(_POOL, generator=chance)[: _BATCH // _USES]
        pictures[anew], right[anew] = fresh(len(anew))
        chosen = torch.randperm(_POOL, generator=chance)[:_BATCH]
        yield pictures[chosen].float() / 255, dict(zip(HEADS, right[chosen].unbind(1), strict=True))
