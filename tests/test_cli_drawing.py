"""generate and demo: the pictures they write are the pipeline's, and the pictures they read may be anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Ran, Run, picture, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SIDE, STYLES
from PIL import Image

import stylemuse
from stylemuse.commands import pictures, subjects
from stylemuse.commands.demo import SUBJECTS, sheet
from stylemuse.core import StylemuseError
from stylemuse.pretraining.attributes import SUBJECTS as WORLD
from stylemuse.pretraining.attributes import article


def test_generate_writes_what_the_pipeline_draws(run: Run, tiny_model: Path) -> None:
    line = ("generate", "a fox", "--style", "ink", "--seed", 7, "--n", 2, "--model", tiny_model)
    ran = run(*line, "--out", "new/fox.png", "--json").document
    result = stylemuse.load(str(tiny_model)).generate("a fox", style="ink", seed=7, n=2)
    assert [entry["path"] for entry in ran["pictures"]] == ["new/fox-0.png", "new/fox-1.png"]
    assert tuple(entry["seed"] for entry in ran["pictures"]) == result.seeds
    for entry, image in zip(ran["pictures"], result.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(entry["path"])), np.asarray(image))
    assert len(ran["timings"]["step"]) == 4
    assert sorted(path.name for path in Path("new").iterdir()) == ["fox-0.png", "fox-1.png"]

    again = run("generate", "a fox", "--style", "ink", "--seed", result.seeds[1], "--model", tiny_model)
    assert again == Ran(0, f"out/picture.png  seed {result.seeds[1]}\n", "")
    assert np.array_equal(np.asarray(Image.open("out/picture.png")), np.asarray(result.images[1]))


def test_generate_passes_every_option_on(run: Run, tiny_model: Path) -> None:
    """Each option changes the picture, and to what the same argument in Python gives."""
    start, mask = picture(), picture(Path("mask.png"), mode="1")
    shown = Image.open(start)
    shown.load()
    region = Image.open(mask).convert("RGB")
    pipe = stylemuse.load(str(tiny_model))
    changes: list[tuple[tuple[object, ...], dict[str, Any]]] = [
        ((), {}),
        (("--negative", "red"), {"negative_prompt": "red"}),
        (("--steps", 2), {"steps": 2}),
        (("--schedule", "styledrop"), {"schedule": "styledrop"}),
        (("--guidance", "cfg:2"), {"guidance": stylemuse.CFG(2.0)}),
        (("--style", "ink=0.6", "--style", "neon=0.4"), {"style": {"ink": 0.6, "neon": 0.4}}),
        (("--size", "48x16"), {"size": (48, 16)}),
        (("--image", start, "--strength", 0.5), {"image": shown, "strength": 0.5}),
        (("--image", start, "--mask", mask), {"image": shown, "mask": region}),
        (
            ("--style", "ink", "--guidance", "styledrop:0.5,3"),
            {"style": "ink", "guidance": stylemuse.StyleDrop(0.5, 3)},
        ),
    ]
    seen = set()
    for options, arguments in changes:
        assert run("generate", "a fox", "--seed", 3, "--model", tiny_model, "--force", *options).code == 0
        drawn = Image.open("out/picture.png")
        assert np.array_equal(np.asarray(drawn), np.asarray(pipe.generate("a fox", seed=3, **arguments).images[0]))
        seen.add(drawn.tobytes())
    assert len(seen) == len(changes)


@pytest.mark.parametrize("ending", sorted(pictures.WRITTEN))
def test_every_format_can_be_written(run: Run, tiny_model: Path, ending: str) -> None:
    out = f"fox{ending.upper()}"
    assert run("generate", "a fox", "--model", tiny_model, "--seed", 1, "--out", out).code == 0
    with Image.open(out) as image:
        assert image.format == pictures.WRITTEN[ending][0]
        assert image.size == (SIDE, SIDE)


def test_a_failed_write_leaves_nothing(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    refused(run("generate", "a fox", "--model", tiny_model, "--out", "new/fox.png"), "No space left on device")
    assert list(Path("new").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "not a picture"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), "picture"),
        (lambda path: Image.new("1", (8001, 8000)).save(path), "at most 64000000"),
        (lambda path: Image.new("1", (20000, 20000)).save(path), "at most 64000000"),
        (lambda path: Image.new("I;16", (8, 8)).save(path), "8 bits per channel"),
        (lambda path: path.write_bytes(picture().read_bytes()[:-300]), "damaged"),
        (lambda path: path.mkdir(), "not a regular file"),
    ],
    ids=["empty", "header only", "large", "bomb", "16 bits", "truncated", "folder"],
)
@pytest.mark.parametrize("option", ["--image", "--mask"])
def test_bad_pictures_are_refused(
    run: Run, no_model: None, make: Callable[[Path], object], words: str, option: str
) -> None:
    make(Path("bad.png"))
    images = ["--image", "bad.png"] if option == "--image" else ["--image", picture(), "--mask", "bad.png"]
    refused(run("generate", "a fox", *images), words)


def test_mask_and_image_have_one_size(run: Run, no_model: None) -> None:
    mask = picture(Path("mask.png"), (SIDE, 2 * SIDE))
    refused(run("generate", "a fox", "--image", picture(), "--mask", mask), "32 x 32, not 32 x 64")


def test_pictures_are_read_upright_and_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    clear.save(tmp_path / "clear.png", exif=exif)
    read = pictures.read_picture(tmp_path / "clear.png")
    assert (read.mode, read.size) == ("RGB", (2, 4))
    colours = np.unique(np.asarray(read).reshape(-1, 3), axis=0, return_counts=True)
    assert [part.tolist() for part in colours] == [[[255, 0, 0], [255, 255, 255]], [1, 7]]


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(pictures.READ), place=st.integers(0, 10**6), value=st.binary(min_size=1, max_size=6))
def test_a_damaged_picture_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, form: str, place: int, value: bytes
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "bad.png"
    Image.radial_gradient("L").resize((24, 24)).convert("RGB").save(path, form)
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    path.write_bytes(data)
    with suppress(StylemuseError):
        assert pictures.read_picture(path).mode == "RGB"


def test_demo_draws_every_style_in_one_batch(run: Run, tiny_model: Path) -> None:
    ran = run("demo", "--model", tiny_model, "--seed", 5, "--json").document
    assert ran["styles"] == [None, *STYLES]
    assert ran["subjects"] == list(SUBJECTS)
    assert ran["pictures"] == 3 * len(SUBJECTS)
    assert ran["seconds"].keys() >= {
        "text",
        "condition",
        "transformer",
        "head",
        "sampling",
        "remask",
        "step",
        "pixels",
        "total",
    }
    assert len(ran["seconds"]["step"]["steps"]) == ran["steps"] == 4
    page = Image.open("out/demo.png")
    gap, side = 4, SIDE * 4
    pipe = stylemuse.load(str(tiny_model))
    for row, column in ((0, 0), (1, len(SUBJECTS) - 1), (2, 2)):
        alone = pipe.generate(
            article(SUBJECTS[column]),
            style=ran["styles"][row],
            seed=ran["seeds"][column],
        ).images[0]
        right, below = page.width - (len(SUBJECTS) - column) * (side + gap), page.height - (3 - row) * (side + gap)
        shown = np.asarray(page.crop((right, below, right + side, below + side)), dtype=int)
        enlarged = np.asarray(alone.resize((side, side), Image.Resampling.LANCZOS), dtype=int)
        assert np.abs(shown - enlarged).max() <= 2

    text = run("demo", "--model", tiny_model, "--seed", 5, "--out", "again.png")
    assert (text.code, text.error) == (0, "")
    assert "transformer" in text.out
    assert f"again.png  {3 * len(SUBJECTS)} pictures" in text.out
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(page))


def test_the_demo_asks_for_what_the_model_knows() -> None:
    assert len(SUBJECTS) >= 4
    assert set(SUBJECTS) <= set(WORLD)


def test_a_sheet_of_large_pictures_is_not_enlarged() -> None:
    page = sheet([[Image.new("RGB", (512, 256), "red")]], ["a" * 40], ["fox"])
    assert page.height < 300
    assert page.getpixel((page.width - 10, page.height - 10)) == (255, 0, 0)


def test_a_picture_that_is_there_stays(run: Run, tiny_model: Path) -> None:
    """The next free name is taken and told, of all pictures of a call the same; --force replaces."""
    line = ("generate", "a fox", "--model", tiny_model, "--out", "fox.png")
    first = run(*line, "--seed", 1)
    kept = Path("fox.png").read_bytes()
    assert run(*line, "--seed", 2).out.startswith("fox_2.png  seed 2")
    assert run(*line, "--seed", 3, "--json").document["pictures"][0]["path"] == "fox_3.png"
    assert first.out.startswith("fox.png  seed 1")
    assert Path("fox.png").read_bytes() == kept
    assert run(*line, "--seed", 2, "--force").out.startswith("fox.png  seed 2")
    assert Path("fox.png").read_bytes() == Path("fox_2.png").read_bytes() != kept
    Path("fox-1.png").write_bytes(kept)
    drawn = run(*line, "--n", 2, "--json").document["pictures"]
    assert [each["path"] for each in drawn] == ["fox_2-0.png", "fox_2-1.png"]


def test_what_the_embedded_model_draws_is_told(run: Run) -> None:
    told = run("subjects", "--json").document
    assert set(told["subjects"]) == set(WORLD)
    assert {"flat", "outline"} <= set(told["renderings"])
    text = run("subjects")
    assert (text.code, text.error) == (0, "")
    assert all(subject in text.out for subject in WORLD)


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("a fox", True),
        ("Two FOX-like owls, an owl", True),
        ("a palm tree on navy", True),
        ("a dragonfly", False),
        ("foxes", False),
    ],
)
def test_a_prompt_without_a_subject_gets_one_hint(prompt: str, known: bool) -> None:
    told = subjects.hint(prompt, "demo")
    assert (told is None) == known
    assert subjects.hint(prompt, "amused-256") is None
    if told is not None:
        assert told.endswith("see: stylemuse subjects")
