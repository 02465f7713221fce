"""The embedded model's world: the same numbers draw the same picture, and what is held out stays held out."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from font import needs_font

from stylemuse import StylemuseError
from stylemuse.models.tokenizer import build_word_tokenizer
from stylemuse.tuning import pictograms
from stylemuse.tuning.looks import (
    COLOURS,
    EXTRAS,
    HELD_OUT,
    HELD_OUT_PAIRS,
    NATURAL,
    RENDERINGS,
    SUBJECTS,
    Look,
    article,
    caption,
    random_caption,
    random_look,
    vocabulary,
)
from stylemuse.tuning.world import Pose, World, random_pose

FULL = re.compile(r"(?:an? )?(.+), (\w+)(?: in (\w+))? on (\w+) (?:with (\w+)|(plain))")


def looks(count: int, *, held_out: bool = False, seed: int = 0) -> list[Look]:
    numbers = np.random.default_rng(seed)
    return [random_look(numbers, held_out=held_out) for _ in range(count)]


def test_held_out_pairs_come_only_when_asked_for() -> None:
    assert not {(look.rendering, look.extra) for look in looks(3000)} & HELD_OUT_PAIRS
    asked = {(look.rendering, look.extra) for look in looks(3000, held_out=True)}
    assert asked == {(rendering, extra) for rendering in RENDERINGS for extra in EXTRAS}
    assert asked >= HELD_OUT_PAIRS
    assert len(HELD_OUT_PAIRS) == len(HELD_OUT)


def test_every_attribute_comes_and_ink_stands_out() -> None:
    drawn = looks(3000)
    assert {look.paper for look in drawn} == set(COLOURS)
    assert {look.ink for look in drawn} == {None, *COLOURS}
    for look in [*drawn, *HELD_OUT.values()]:
        assert (look.ink is None) == (look.rendering in NATURAL)
        if look.ink is not None:
            apart = np.abs(np.subtract(COLOURS[look.ink], COLOURS[look.paper])).sum()
            assert apart >= 240, look


def test_a_full_caption_tells_subject_and_look() -> None:
    for subject in SUBJECTS:
        for look in [*looks(20, seed=len(subject)), *HELD_OUT.values()]:
            found = FULL.fullmatch(caption(subject, look))
            assert found is not None
            name, rendering, ink, paper, extra, plain = found.groups()
            assert (name, Look(rendering, ink, paper, extra or plain)) == (subject, look)


def test_attributes_can_be_left_out() -> None:
    look = HELD_OUT["neon"]
    assert caption("owl", look) == "an owl, outline in cyan on navy with glow"
    assert caption("owl", look, rendering=False, extra=False) == "an owl, in cyan on navy"
    assert caption("scissors", look, rendering=False, ink=False, paper=False, extra=False) == "scissors"
    assert random_caption("owl", look, np.random.default_rng(0), drop=0.0) == caption("owl", look)
    assert random_caption("owl", look, np.random.default_rng(0), drop=1.0) == article("owl") == "an owl"


def test_vocabulary_has_every_word_as_one_token(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(vocabulary(), tmp_path / "tokenizer", 20)
    numbers, known = np.random.default_rng(0), set(vocabulary())
    texts = [random_caption(subject, look, numbers) for subject in SUBJECTS for look in looks(10, seed=len(subject))]
    texts += [f"{article(subject)} in {style} style" for subject in SUBJECTS for style in HELD_OUT]
    seen: dict[tuple[int, ...], str] = {}
    for text, ids in zip(texts, tokenizer(texts).tolist(), strict=True):
        words = re.findall(r"\w+|,", text)
        assert set(words) <= known
        end = ids.index(tokenizer.end)
        assert end == len(words) + 1
        assert seen.setdefault(tuple(ids), text) == text


def test_poses_stay_near_the_middle() -> None:
    numbers = np.random.default_rng(0)
    poses = [random_pose(numbers) for _ in range(500)]
    assert all(0.78 <= pose.size <= 0.82 and max(map(abs, pose.shift)) <= 1 / 64 for pose in poses)
    assert {pose.mirrored for pose in poses} == {False, True}
    assert {pose.shift for pose in poses} == {(i / 64, j / 64) for i in (-1, 0, 1) for j in (-1, 0, 1)}


@needs_font
def test_no_pose_cuts_a_subject() -> None:
    world, look = World(), Look("silhouette", "black", "white", "plain")
    paper = np.array(COLOURS["white"]) / 255
    for subject in SUBJECTS:
        for corner in ((-1, -1), (1, 1)):
            picture = world.array(subject, look, Pose(0.82, (corner[0] / 64, corner[1] / 64)))
            rim = np.concatenate(
                [picture[:2], picture[-2:], picture[:, :2].swapaxes(0, 1), picture[:, -2:].swapaxes(0, 1)]
            )
            assert np.abs(rim - paper).max() < 1e-6, subject
            assert 0.04 < (np.abs(picture - paper).max(axis=2) > 0.5).mean() < 0.7, subject


@needs_font
def test_the_same_numbers_draw_the_same_pictures() -> None:
    first, again = (list(islice(World().samples(np.random.default_rng(3)), 8)) for _ in range(2))
    other = next(World().samples(np.random.default_rng(4)))
    for (subject, look, picture), (subject_again, look_again, picture_again) in zip(first, again, strict=True):
        assert (subject, look) == (subject_again, look_again)
        assert np.array_equal(picture, picture_again)
    assert not np.array_equal(first[0][2], other[2])


@needs_font
@pytest.mark.parametrize("size", [32, 64])
def test_every_rendering_and_extra_draws(size: int) -> None:
    """In range, of the size asked for, and no two alike."""
    world, seen = World(size), set()
    for rendering in RENDERINGS:
        for extra in EXTRAS:
            look = Look(rendering, None if rendering in NATURAL else "cyan", "purple", extra)
            picture = world.array("fox", look)
            assert picture.shape == (size, size, 3)
            assert picture.dtype == np.float32
            assert picture.min() >= 0
            assert picture.max() <= 1
            seen.add(picture.tobytes())
    assert len(seen) == len(RENDERINGS) * len(EXTRAS)


@needs_font
def test_mirroring_shifting_and_resizing_move_the_subject() -> None:
    world, look = World(), Look("silhouette", "black", "white", "plain")
    still = world.array("rocket", look, Pose(0.8))
    assert np.abs(world.array("rocket", look, Pose(0.8, mirrored=True)) - still[:, ::-1]).max() < 0.02
    moved = world.array("rocket", look, Pose(0.8, (1 / 64, -1 / 64)))
    assert np.abs(moved - np.roll(still, (-1, 1), axis=(0, 1))).max() < 1e-6
    assert world.array("rocket", look, Pose(0.82)).sum() < still.sum()


@needs_font
def test_a_drawing_is_the_array_in_bytes() -> None:
    world, look = World(), HELD_OUT["riso"]
    picture = np.asarray(world.draw("cat", look), dtype=np.float32) / 255
    assert np.abs(picture - world.array("cat", look)).max() <= 0.5 / 255 + 1e-6


@needs_font
def test_an_unknown_subject_is_named() -> None:
    with pytest.raises(StylemuseError, match=r"unknown subject 'unicorn'.*fox"):
        World().draw("unicorn", HELD_OUT["neon"])


def test_without_the_font_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rglob", lambda *_: iter(()))
    with pytest.raises(StylemuseError, match="fonts-noto-color-emoji"):
        pictograms.font.__wrapped__()
