"""What people give that is meant well: photos, masks with transparency, numbers of numpy's, long prompts, forks."""

from __future__ import annotations

import io
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run
from drawing import load, noise
from live_server import serving
from models import random_style
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from stylemuse import CFG, Adapter, Engine, Pipeline, Request, Sampling, Style, StyleDrop, StylemuseError
from stylemuse.core import UnreadWarning
from stylemuse.requests import pictures
from stylemuse.tuning.style import Recipe, tune

LONG = "a fox " * 40


def photo() -> Image.Image:
    """White and blue, turned by its EXIF."""
    picture = Image.new("RGB", (96, 48), "white")
    picture.paste("blue", (0, 0, 48, 48))
    turned, data = Image.Exif(), io.BytesIO()
    turned[0x112] = 6
    picture.save(data, "JPEG", exif=turned, quality=95)
    return Image.open(io.BytesIO(data.getvalue()))


def test_a_photo_is_used_as_viewers_show_it(pipe: Pipeline) -> None:
    shown = ImageOps.exif_transpose(photo())
    assert pictures.upright(photo()).tobytes() == shown.tobytes()
    options: dict[str, Any] = {"seed": 3, "strength": 0.5}
    one, other = (pipe.generate("a fox", image=each, **options).tokens for each in (photo(), shown))
    assert np.array_equal(one, other)
    masks = photo(), ImageOps.exif_transpose(photo())
    one, other = (pipe.generate("a fox", image=noise(), mask=each, **options).tokens for each in masks)
    assert np.array_equal(one, other)
    recipe = Recipe(rank=2, steps=1, batch=1)
    styles = [tune(pipe, each, "a cat in ink style", name="x", recipe=recipe) for each in (photo(), shown)]
    assert styles[0].sha256 == styles[1].sha256


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (2, 2, 6, 6))
    given = picture.convert(mode) if mode in ("RGBA", "LA") else picture.quantize(8)
    shown = pictures.upright(given)
    assert shown.mode == "RGB"
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((4, 4)) != (255, 255, 255)


def test_more_than_eight_bits_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(StylemuseError, match=r"^the picture has more than 8 bits per channel; convert it to 8 first$"):
        pipe.generate("a fox", image=Image.new("I;16", (32, 32)), strength=0.5)


def test_a_mask_says_one_thing(pipe: Pipeline, run: Run, tmp_path: Path) -> None:
    """White is drawn anew; transparency may say the same, or nothing."""
    white = Image.new("L", (32, 32), 0)
    white.paste(255, (8, 8, 24, 24))
    same = Image.merge("RGBA", (*[white] * 3, ImageOps.invert(white)))
    opaque = Image.merge("RGBA", (*[white] * 3, Image.new("L", (32, 32), 255)))
    options: dict[str, Any] = {"image": noise(), "seed": 5}
    expected = pipe.generate("a cat", mask=white, **options).tokens
    for mask in (same, opaque):
        assert np.array_equal(pipe.generate("a cat", mask=mask, **options).tokens, expected)
    other = Image.merge("RGBA", (*[white] * 3, white))
    with pytest.raises(StylemuseError, match=r"^the mask has transparent parts that are not its white ones"):
        pipe.generate("a cat", mask=other, **options)
    noise().save("picture.png")
    other.save("mask.png")
    said = run("generate", "a cat", "--image", "picture.png", "--mask", "mask.png")
    assert (said.code, said.error[:60]) == (2, "stylemuse: mask.png: the mask has transparent parts that are")


def test_numbers_of_numpy_are_numbers(pipe: Pipeline) -> None:
    plain = Request(
        "a fox", {"ink": Style(0.5, 0.75)}, n=2, seed=3, sampling=Sampling(3, temperature=(2.0, 0.5)),
        guidance=StyleDrop(1.0, 2.0), size=(32, 16),
    )  # fmt: skip
    given = Request(
        "a fox",
        {"ink": Style(np.float32(0.5), np.float64(0.75))},
        n=np.int32(2),
        seed=np.int64(3),
        sampling=Sampling(np.int16(3), temperature=(np.float32(2), np.float64(0.5))),
        guidance=StyleDrop(np.float32(1), np.int8(2)),
        size=(np.int64(32), np.uint8(16)),
    )  # fmt: skip
    assert given == plain
    assert type(given.seed) is type(given.n) is int
    assert given.size is not None
    assert all(type(side) is int for side in given.size)
    assert np.array_equal(pipe.run([given])[0].tokens, pipe.run([plain])[0].tokens)
    assert CFG(np.float32(3.0)) == CFG(3.0)
    assert Request("a fox", image=noise(), strength=np.float32(0.5)).strength == 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": "3"}, r"seed '3' \(str\) is not allowed: a whole number from 0 to 2\^63 - 1"),
        ({"seed": 3.0}, r"seed 3\.0 \(float\) is not allowed: a whole number from 0"),
        ({"seed": np.float64(3)}, r"seed 3\.0 \(float\) is not allowed"),
        ({"seed": -1}, r"seed -1 is not allowed: a whole number from 0"),
        ({"n": True}, r"n = True \(bool\) is not allowed: a whole number from 1 to 256"),
        ({"n": np.bool_(True)}, r"n = True \(bool\) is not allowed"),
        ({"n": 2.5}, r"n = 2\.5 \(float\) is not allowed: a whole number"),
    ],
)
def test_what_is_no_number_is_told_by_its_type(options: dict[str, Any], told: str) -> None:
    with pytest.raises(StylemuseError, match=f"^{told}"):
        Request("a fox", **options)


def test_a_long_prompt_says_what_is_not_read_and_keeps_the_styles_words(pipe: Pipeline) -> None:
    """The tiny model reads 16 tokens: 14 words, or 11 and the three of "in ink style"."""
    with pytest.warns(UnreadWarning, match=r"^the prompt is over 16 tokens; not read: fox a fox") as caught:
        styled = pipe.generate(LONG, style="ink", seed=3)
    assert len(caught) == 1
    unread = str(caught[0].message.words)  # type: ignore[union-attr]
    read = LONG.split()[: 80 - len(unread.split())]
    assert len(read) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = pipe.generate(f"{' '.join(read)} in ink style", style="ink", seed=3)
        fits = pipe.generate("a fox " * 7, seed=3)
    assert np.array_equal(short.tokens, styled.tokens)
    with pytest.warns(UnreadWarning):
        assert np.array_equal(pipe.generate("a fox " * 7 + "again and again", seed=3).tokens, fits.tokens)
    with pytest.warns(UnreadWarning, match="not read: owl"):
        pipe.generate("a cat", negative_prompt="an owl " * 7 + "owl", seed=3)


def test_a_long_prompt_on_the_command_line_and_in_an_answer(run: Run, tiny_model: Path) -> None:
    done = run("generate", LONG, "--model", tiny_model, "--seed", 3, "--out", "fox.png")
    assert done.code == 0
    assert "stylemuse: the prompt is over 16 tokens; not read: a fox a fox" in done.error
    with serving(tiny_model) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": LONG, "style": "ink"}).json()
        assert answer["unread"].startswith("fox a fox")
        assert answer["usage"]["input_tokens"] == 16
        assert "unread" not in http.post("/v1/images/generations", json={"prompt": "a fox"}).json()


def files(pipe: Pipeline, path: Path, ranks: tuple[int, ...], prefix: str = "transformer.") -> Path:
    config, random = pipe.network.transformer.config, torch.Generator().manual_seed(1)
    tensors = {}
    for (site, sizes), rank in zip(sorted(config.sites().items()), ranks, strict=False):
        tensors[f"{prefix}{site}.lora_A.weight"] = torch.randn(rank, sizes.inputs, generator=random)
        tensors[f"{prefix}{site}.lora_B.weight"] = torch.randn(sizes.outputs, rank, generator=random)
    save_file(tensors, path)
    return path


def test_alpha_may_be_each_modules_rank(pipe: Pipeline, tmp_path: Path) -> None:
    """As diffusers and PEFT mean a file that says nothing: up down, as it is."""
    path = files(pipe, tmp_path / "mixed.safetensors", (4, 2, 1))
    made, stored = pipe.adapters.read("m", path, recipe="alpha-is-rank"), load_file(path)
    assert sorted(up.shape[1] for _, up in made.tensors.values()) == [1, 2, 4]
    for site, (_, up) in made.tensors.items():
        assert torch.equal(up, stored[f"transformer.{site}.lora_B.weight"])


@pytest.mark.parametrize("prefix", ["_orig_mod.transformer.", "_orig_mod.", "transformer._orig_mod."])
def test_names_that_torch_compile_left(pipe: Pipeline, tmp_path: Path, prefix: str) -> None:
    plain = pipe.adapters.read("a", files(pipe, tmp_path / "plain.safetensors", (2, 2)), alpha=2.0)
    made = pipe.adapters.read("a", files(pipe, tmp_path / "compiled.safetensors", (2, 2), prefix), alpha=2.0)
    assert made.sha256 == plain.sha256


def _in_a_child(pipe: Pipeline, engine: Engine, queue: Any) -> None:
    def said(draw: Callable[[], object]) -> str:
        try:
            draw()
            return "drawn"
        except StylemuseError as error:
            return str(error)

    queue.put(said(lambda: pipe.generate("a fox", seed=3)))
    queue.put(said(lambda: engine.submit(Request("a fox"))))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_child_is_told_to_spawn(tiny_model: Path) -> None:
    pipe, context = load(tiny_model), multiprocessing.get_context("fork")
    pipe.generate("a fox", seed=3)
    with Engine(pipe) as engine:
        queue = context.Queue()
        child = context.Process(target=_in_a_child, args=(pipe, engine, queue))
        child.start()
        told = [queue.get(timeout=60) for _ in range(2)]
        child.join(60)
    assert told == [
        "this pipeline was loaded before the process forked; start processes by 'spawn' "
        "(multiprocessing.get_context) and load the model in each"
    ] * 2  # fmt: skip


def test_styles_of_numpy_numbers(pipe: Pipeline) -> None:
    look = random_style(pipe.network.transformer.config, "look", seed=3)
    made = Adapter("look", "lora", look.tensors, scale=0.5, recommended={"steps": 3})
    pipe.adapters.add("look", made)
    one = pipe.generate("a fox", style={"look": np.float32(0.5)}, seed=1)
    assert np.array_equal(one.tokens, pipe.generate("a fox", style={"look": 0.5}, seed=1).tokens)
