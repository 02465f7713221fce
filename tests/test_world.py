"""The embedded model's world: the same numbers draw the same pictures, and what is held out stays held out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stylemuse import StylemuseError
from stylemuse.pretraining import layers
from stylemuse.pretraining.attributes import (
    COLOURS,
    EXTRAS,
    HANDS,
    HELD_OUT,
    HELD_OUT_HANDS,
    HELD_OUT_PAIRS,
    NATURAL,
    RENDERINGS,
    SUBJECTS,
    Look,
    inks_on_papers,
)
from stylemuse.pretraining.world import SHIFT, SIZES, Pose, Scenes, World

PLAIN = Look("stencil", "black", "white", "plain")
LOOKS = [
    Look(rendering, None if rendering in NATURAL else "cyan", "purple", extra)
    for rendering in RENDERINGS
    for extra in EXTRAS
]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def drawn(world: World, subject: str, look: Look, pose: Pose | None = None) -> Tensor:
    return world.draw(world.scenes([(subject, look)], pose))[0]


def names(scenes: Scenes) -> list[tuple[str, Look]]:
    return [scenes.look(row) for row in range(len(scenes.subject))]


def paper(look: Look) -> Tensor:
    return torch.tensor(COLOURS[look.paper]).view(3, 1, 1) / 255


def test_the_same_numbers_draw_the_same_pictures(world: World) -> None:
    first, again, other = (world.sample(6, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.subject, other.subject)
    pictures = world.draw(first)
    assert torch.equal(pictures, world.draw(again))
    assert pictures.shape == (6, 3, 128, 128)
    assert pictures.dtype == torch.float32
    assert float(pictures.min()) >= 0
    assert float(pictures.max()) <= 1


def test_a_picture_is_the_same_alone_and_in_a_batch(world: World) -> None:
    scenes = world.sample(5, torch.Generator().manual_seed(1))
    together = world.draw(scenes)
    for row in range(5):
        alone = world.draw(Scenes(*(part[row : row + 1] for part in scenes)))[0]
        assert float((alone - together[row]).abs().max()) < 1e-5


def test_what_is_held_out_comes_only_when_asked_for(world: World) -> None:
    usual = {(look.rendering, look.extra, look.hand) for _, look in names(world.sample(4000, torch.Generator()))}
    assert not {(rendering, extra) for rendering, extra, _ in usual} & HELD_OUT_PAIRS
    assert not {hand for _, _, hand in usual} & HELD_OUT_HANDS
    asked = {(r.rendering, r.extra) for _, r in names(world.sample(4000, torch.Generator(), held_out=True))}
    assert asked == {(rendering, extra) for rendering in RENDERINGS for extra in EXTRAS}
    assert asked - HELD_OUT_PAIRS == {(rendering, extra) for rendering, extra, _ in usual}
    hands = {look.hand for _, look in names(world.sample(200, torch.Generator(), held_out=True))}
    assert hands == set(HANDS)


def test_every_attribute_comes_and_ink_stands_out(world: World) -> None:
    scenes = world.sample(6000, torch.Generator())
    every = names(scenes)
    assert {subject for subject, _ in every} == set(SUBJECTS)
    assert {look.paper for _, look in every} == set(COLOURS)
    assert {look.ink for _, look in every} == {None, *COLOURS}
    for look in [*(look for _, look in every), *HELD_OUT.values()]:
        assert (look.ink is None) == (look.rendering in NATURAL)
        assert look.ink is None or (look.ink, look.paper) in inks_on_papers()
    assert SIZES[0] <= float(scenes.size.min()) < float(scenes.size.max()) <= SIZES[1]
    middle = (scenes.left + scenes.size / 2, scenes.top + scenes.size / 2)
    assert all(float((side - 0.5).abs().max()) <= SHIFT + 1e-6 for side in middle)


def test_names_and_scenes_are_one(world: World) -> None:
    scenes = world.sample(50, torch.Generator().manual_seed(2), held_out=True)
    assert all(torch.equal(a, b) for a, b in zip(world.scenes(names(scenes))[:6], scenes[:6], strict=True))


@pytest.mark.parametrize("hand", list(HANDS))
def test_no_pose_cuts_a_subject(world: World, hand: str) -> None:
    look = Look("stencil", "black", "white", "plain", hand)
    for corner in (-SHIFT, SHIFT):
        for first in range(0, len(SUBJECTS), 56):
            some = list(SUBJECTS)[first : first + 56]
            pictures = world.draw(world.scenes([(name, look) for name in some], Pose(SIZES[1], (corner, corner))))
            inked = (pictures - paper(look)).abs().amax(1)
            rim = inked.clone()
            rim[:, 5:-5, 5:-5] = 0
            assert float(rim.max()) < 0.02
            share = (inked > 0.5).float().mean((1, 2))
            assert float(share.min()) > 0.02, some[int(share.argmin())]
            assert float(share.max()) < 0.7, some[int(share.argmax())]


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_every_subject_is_seen_on_every_paper(world: World, rendering: str) -> None:
    """A picture differs from its own paper by more than a third in at least 2 % of its pixels."""
    papers = list(COLOURS)
    inks = {paper: [ink for ink, other in inks_on_papers() if other == paper] for paper in papers}
    jobs = []
    for index, subject in enumerate(SUBJECTS):
        on = papers[index % len(papers)]
        ink = None if rendering in NATURAL else inks[on][index % len(inks[on])]
        jobs.append((subject, Look(rendering, ink, on, "plain", list(HANDS)[index // len(papers) % len(HANDS)])))
    for first in range(0, len(jobs), 56):
        some = jobs[first : first + 56]
        away = world.draw(world.scenes(some)) - torch.stack([paper(look) for _, look in some])
        share = (away.abs().amax(1) > 1 / 3).float().mean((1, 2))
        assert float(share.min()) > 0.02, some[int(share.argmin())]


@pytest.mark.parametrize("size", [32, 96, 128])
def test_every_rendering_and_extra_draws_another_picture(size: int) -> None:
    world = World(size)
    pictures = world.draw(world.scenes([("fox", look) for look in LOOKS]))
    assert pictures.shape == (len(LOOKS), 3, size, size)
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(LOOKS)
    hands = world.draw(world.scenes([("fox", Look("flat", None, "white", "plain", hand)) for hand in HANDS]))
    assert len({picture.numpy().tobytes() for picture in hands}) == len(HANDS)


def test_papers_and_pixels_lie_on_the_grid_of_tokens(world: World) -> None:
    for extra in ("grid", "stripes"):
        still, moved = (
            drawn(world, "heart", Look("flat", None, "blue", extra), Pose(shift=(shift, shift)))[:, :8]
            for shift in (0.0, SHIFT)
        )
        assert torch.equal(still, moved)
        assert float(still.std()) > 0.01
        tokens = drawn(world, "heart", Look("flat", None, "blue", extra))[:, :8].unflatten(2, (16, 8))
        assert float((tokens[:, :, 0] - tokens[:, :, 4]).abs().max()) < 1e-6  # every 32 pixels it begins anew
    blocks = drawn(world, "fox", Look("pixel", None, "blue", "plain")).unflatten(2, (32, 4)).unflatten(1, (32, 4))
    assert float((blocks - blocks[:, :, :1, :, :1]).abs().max()) == 0


def test_mirroring_shifting_and_resizing_move_the_subject(world: World) -> None:
    still = drawn(world, "rocket", PLAIN, Pose(0.8))
    assert float((drawn(world, "rocket", PLAIN, Pose(0.8, mirrored=True)) - still.flip(2)).abs().max()) < 1e-4
    moved = drawn(world, "rocket", PLAIN, Pose(0.8, (1 / 64, -1 / 64)))
    assert float((moved - still.roll((-2, 2), (1, 2))).abs().max()) < 1e-4
    assert float(drawn(world, "rocket", PLAIN, Pose(0.85)).sum()) < float(still.sum())


def test_a_tile_is_placed_as_pillow_would(world: World) -> None:
    """The same cubic as Pillow's resize."""
    picture = drawn(world, "pizza", Look("flat", None, "green", "plain"), Pose(0.75))
    tile = layers.read()[0, list(SUBJECTS).index("pizza"), :4]
    small = Image.fromarray(tile.permute(1, 2, 0).numpy()[..., 3]).resize((96, 96), Image.Resampling.BICUBIC)
    alpha = torch.from_numpy(np.array(small)).float()[None] / 255
    inside = picture[:, 16:112, 16:112]
    solid = alpha[0] == 0
    assert float((inside - paper(Look("flat", None, "green", "plain")))[:, solid].abs().max()) < 0.02
    colour = torch.stack(
        [
            torch.from_numpy(np.array(Image.fromarray(plane.numpy()).resize((96, 96), Image.Resampling.BICUBIC)))
            for plane in tile[:3]
        ]
    )
    expected = colour / 255 + (1 - alpha) * paper(Look("flat", None, "green", "plain"))
    assert float((inside - expected.clamp(0, 1)).abs().max()) < 0.03


def test_a_picture_is_the_drawing_in_bytes(world: World) -> None:
    picture = np.asarray(world.picture("cat", HELD_OUT["riso"]), dtype=np.float32) / 255
    drawing = drawn(world, "cat", HELD_OUT["riso"]).permute(1, 2, 0).numpy()
    assert np.abs(picture - drawing).max() <= 0.5 / 255 + 1e-6


def test_names_that_the_world_lacks_are_refused(world: World) -> None:
    with pytest.raises(StylemuseError, match=r"unknown subject 'gryphon'.*fox"):
        world.picture("gryphon", HELD_OUT["neon"])
    with pytest.raises(StylemuseError, match=r"unknown paper 'teal'.*cream"):
        world.picture("fox", Look("outline", "cyan", "teal", "glow"))
    with pytest.raises(StylemuseError, match="ink None for the rendering 'outline'"):
        world.picture("fox", Look("outline", None, "navy", "glow"))
    with pytest.raises(StylemuseError, match="ink 'red' for the rendering 'flat'; allowed: none"):
        world.picture("fox", Look("flat", "red", "navy", "glow"))
    with pytest.raises(StylemuseError, match="100 pixels"):
        World(100)


def test_the_layers_file_is_the_one_described(tmp_path: Path) -> None:
    content = layers.PATH.read_bytes()
    assert len(content) < 4 << 20
    notes = (layers.PATH.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in notes
    for hand, package in layers.PACKAGES.items():
        assert f"| `{hand}` |" in notes
        assert f"@iconify-json/{package}" in notes
        assert (layers.PATH.parent / f"LICENSE-{hand}").is_file()
    tiles = layers.read()
    assert tiles.shape == (len(HANDS), len(SUBJECTS), 6, layers.SIDE, layers.SIDE)
    assert bool((tiles[:, :, :3] <= tiles[:, :, 3:4]).all())  # premultiplied
    with pytest.raises(StylemuseError, match="is missing"):
        layers.read(tmp_path / "layers.safetensors")


def test_a_layers_file_for_other_subjects_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SUBJECTS", {"fox": "fox"})
    with pytest.raises(StylemuseError, match="made for other subjects"):
        layers.read()
