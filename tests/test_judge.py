"""The judge: its parts, its file, its distance, and the flaws it is trained with. How good it is once trained is
measured by ``stylemuse.pretraining.examine``, which takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stylemuse import StylemuseError
from stylemuse.pretraining import judge as judging
from stylemuse.pretraining import judge_training
from stylemuse.pretraining.attributes import HELD_OUT, Look
from stylemuse.pretraining.examine import Examination, accuracy, report, separation
from stylemuse.pretraining.flaws import BLOCK, flawed
from stylemuse.pretraining.judge import HEADS, STYLE, Judge, Opinion, labels_of, load_judge, style_distance
from stylemuse.pretraining.judge_training import answers, draw, train_judge
from stylemuse.pretraining.world import World


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def untrained() -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Judge().eval()


def sure(**names: str) -> Opinion:
    """An opinion without any doubt, and without statistics."""
    named = {
        "subject": "fox",
        "hand": "fluent",
        "rendering": "flat",
        "ink": "none",
        "paper": "white",
        "extra": "plain",
    } | names
    logits = {head: torch.full((1, len(HEADS[head])), -1e4) for head in HEADS}
    for head, name in named.items():
        logits[head][0, HEADS[head].index(name)] = 0.0
    return Opinion(logits, torch.zeros(1, 4))


def test_names_and_labels() -> None:
    opinion = sure(subject="owl", ink="pink")
    assert (opinion.names(), opinion.names("ink")) == (["owl"], ["pink"])
    assert labels_of("owl", HELD_OUT["neon"]) == {
        "subject": "owl", "hand": "fluent", "rendering": "outline", "ink": "cyan", "paper": "navy", "extra": "glow"
    }  # fmt: skip
    assert labels_of("owl", HELD_OUT["arcade"])["ink"] == "none"


def test_distance_counts_the_attributes_that_differ() -> None:
    here = sure()
    assert float(here.distance(sure())) == 0
    assert float(here.distance(sure(subject="owl"))) == 0
    assert float(here.distance(sure(paper="navy"))) == pytest.approx(1 / 8)
    assert float(here.distance(sure(paper="navy", extra="glow"))) == pytest.approx(1 / 4)
    all_apart = sure(rendering="tint", ink="red", paper="navy", extra="glow")
    assert float(here.distance(all_apart)) == pytest.approx(1 / 2)
    doubtful = Opinion({**here.logits, "paper": torch.zeros(1, len(HEADS["paper"]))}, here.statistics)
    assert float(doubtful.distance(doubtful)) == 0
    assert float(here.distance(doubtful)) == pytest.approx((1 - 1 / len(HEADS["paper"])) / 8)


def test_distance_of_statistics_is_between_none_and_half() -> None:
    here, ones = sure(), torch.ones(1, 4)
    near, far = Opinion(here.logits, ones * 1.5), Opinion(here.logits, -ones)
    here = Opinion(here.logits, ones)
    assert float(here.distance(near)) == pytest.approx(0.1)
    assert float(here.distance(far)) == pytest.approx(0.5)


def test_distance_is_symmetric_bounded_and_row_by_row(untrained: Judge) -> None:
    a, b = noise(5), noise(5, seed=1) * torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0]).view(5, 1, 1, 1)
    there = style_distance(untrained, a, b)
    assert there.shape == (5,)
    assert torch.allclose(there, style_distance(untrained, b, a))
    assert bool((there > 0).all() and (there <= 1).all())
    assert bool((style_distance(untrained, a, a) == 0).all())
    assert torch.allclose(style_distance(untrained, a[2:3], b[2:3]), there[2:3], atol=1e-5)
    rows = torch.tensor([4, 4, 0])
    assert torch.equal(untrained.opinion(a).take(rows).distance(untrained.opinion(b).take(rows)), there[rows])


def test_opinions_do_not_depend_on_the_batch(untrained: Judge) -> None:
    pictures = noise(130)
    whole = untrained.opinion(pictures)
    assert {head: logits.shape for head, logits in whole.logits.items()} == {
        head: (130, len(names)) for head, names in HEADS.items()
    }
    alone = untrained.opinion(pictures[100:101])
    for head in HEADS:
        assert torch.allclose(whole.logits[head][100:101], alone.logits[head], atol=1e-5)


def test_pictures_become_tensors() -> None:
    own, half = judging.Image.new("L", (128, 128), 51), judging.Image.new("RGB", (64, 32), (255, 0, 51))
    assert torch.allclose(judging.to_tensor([own]), torch.full((1, 3, 128, 128), 0.2))
    assert judging.to_tensor([own, half])[1, :, 9, 9].tolist() == pytest.approx([1, 0, 0.2])


def test_answers_are_the_labels() -> None:
    """The heads number their names as the world does: an answer by number is the label by name."""
    world = World()
    scenes = world.sample(60, torch.Generator().manual_seed(0), held_out=True)
    right = answers(scenes)
    for row in range(60):
        assert {head: HEADS[head][int(right[head][row])] for head in HEADS} == labels_of(*scenes.look(row))
    assert torch.equal(draw(world, scenes)[40:], world.draw(type(scenes)(*(field[40:] for field in scenes))))


def test_fresh_pictures_are_not_those_of_training(untrained: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of examining lie beyond those of training, in the 32 bits that a generator takes."""
    seen = []
    monkeypatch.setattr(World, "sample", lambda _, count, chance, **__: seen.append(chance.initial_seed()) or 1 / 0)
    for seed in (0, 1):
        with pytest.raises(ZeroDivisionError):
            accuracy(untrained, 1, seed=seed)
    assert len(set(seen)) == 2
    assert all(10**9 < seed < 2**32 for seed in seen)


def test_flaws_are_small_seeded_and_leave_some_pictures_alone() -> None:
    pictures = torch.nn.functional.interpolate(noise(200)[:, :, :8, :8], scale_factor=16, mode="bilinear")
    spoiled = flawed(pictures, torch.Generator().manual_seed(1))
    assert torch.equal(spoiled, flawed(pictures, torch.Generator().manual_seed(1)))
    assert not torch.equal(spoiled, flawed(pictures, torch.Generator().manual_seed(2)))
    assert spoiled.shape == pictures.shape
    assert bool((spoiled >= 0).all() and (spoiled <= 1).all())
    error = (spoiled - pictures).abs().mean(dim=(1, 2, 3))
    untouched = float((error < 1e-5).float().mean())
    assert 0.15 < untouched < 0.35
    assert 0.01 < float(error.mean()) < 0.08
    assert float(error.max()) < 0.25


def test_spoiled_blocks_lie_on_the_grid_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CLEAN", "_SHIFT", "_ZOOM", "_NOISE", "_TONE"):
        monkeypatch.setattr(f"stylemuse.pretraining.flaws.{name}", 0.0)
    tones = torch.arange(32.0).view(32, 1, 1, 1) / 64 + torch.zeros(1, 3, 128, 128)
    changed = (flawed(tones, torch.Generator().manual_seed(0)) - tones).abs() > 1e-3
    blocks = changed[:, 0].float().unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).mean(dim=(3, 4))
    assert bool(((blocks == 0) | (blocks == 1)).all())
    assert 0.001 < float(blocks.mean()) < 0.04


def test_an_examination_counts_by_attribute() -> None:
    truth = {head: [HEADS[head][0]] * 4 for head in HEADS} | {"paper": ["red", "red", "blue", "blue"]}
    answers = {**truth, "subject": ["fox", "cat", "cat", "owl"], "extra": ["glow"] * 4}
    found = Examination(answers, truth)
    assert found.accuracy("subject") == 0.25
    assert found.accuracy("extra") == 0.0
    assert found.by("paper") == {"red": 0.5, "blue": 0.0}
    assert found.by("paper", "rendering") == {"red": 1.0, "blue": 1.0}
    assert found.confusions() == [("fox", "cat", 2), ("fox", "owl", 1)]


class Corner(Judge):
    """Sees nothing but the colour of the corner, which is the paper's."""

    def forward(self, pictures: Tensor) -> Opinion:
        logits = {head: torch.zeros(len(pictures), len(HEADS[head])) for head in HEADS}
        return Opinion(logits, pictures[:, :, 1, 1])


def test_separation_is_the_share_of_looks_told_apart() -> None:
    """Another look nearly always has another paper; one attribute away it has so in every second triple or so."""
    assert 0.8 < separation(Corner(), 50) < 1.0
    assert 0.1 < separation(Corner(), 30, near=True) < 0.8


def test_style_of_a_picture_is_not_its_subject() -> None:
    """What an untrained network already does: its statistics are those of colours and textures."""
    assert separation(Judge(), 60) > 0.8


def test_training_stops_goes_on_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batch = 6
    for name, value in {"_POOL": 24, "_BATCH": batch, "_KEEP": 1}.items():
        monkeypatch.setattr(judge_training, name, value)
    path, samples, calls = tmp_path / "deep" / "judge.safetensors", 5 * batch, 0
    state = torch.random.get_rng_state()

    def interrupted(loss: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(judge_training, "finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_judge(path, samples)
    assert not path.exists()
    partial = path.with_suffix(".partial.pt")
    assert partial.exists()
    trained = train_judge(path, samples)
    assert calls == 6, "two steps before the interruption and three after it"
    assert not partial.exists()
    assert torch.equal(torch.random.get_rng_state(), state), "the process's own random numbers are left alone"

    again = train_judge(path, samples)
    assert calls == 6, "nothing was trained"
    assert not again.training
    pictures = noise(3)
    assert torch.equal(again.opinion(pictures).logits["subject"], trained.opinion(pictures).logits["subject"])
    assert not load_judge(path).training
    train_judge(path, samples + batch)
    assert calls == 12, "made with other samples, it is trained from the start"
    train_judge(path, samples + batch, flaws=False)
    assert calls == 18, "and so where it learned from flawed pictures"


def test_training_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few pictures by heart: every head's answer gets better than any constant one."""
    drawn = [("fox", Look("flat", None, "navy", "grid")), ("key", Look("outline", "pink", "green", "plain"))]
    world = World()
    pictures = world.draw(world.scenes(drawn))
    labels = [labels_of(subject, look) for subject, look in drawn]
    answers = {head: torch.tensor([HEADS[head].index(label[head]) for label in labels]) for head in HEADS}
    batch = pictures.repeat(4, 1, 1, 1), {head: value.repeat(4) for head, value in answers.items()}
    monkeypatch.setattr(judge_training, "_batches", lambda _: iter(lambda: batch, None))
    judge = train_judge(tmp_path / "judge.safetensors", 30 * 64)
    opinion = judge.opinion(pictures)
    assert {head: opinion.names(head) for head in HEADS} == {head: [label[head] for label in labels] for head in HEADS}


def test_report_has_every_figure(untrained: Judge) -> None:
    found = report(untrained, 40, 10)
    assert set(found["accuracy"]) == set(HEADS)
    assert set(found["subject_by"]) == set(STYLE)
    assert all(0 <= share <= 1 for share in (*found["accuracy"].values(), *found["separation"].values()))
    assert accuracy(untrained, 40) == found["accuracy"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    path.write_bytes(b"not tensors at all")
    with pytest.raises(StylemuseError, match="not a judge of this release"):
        load_judge(path)
    with pytest.raises(StylemuseError, match="not a safetensors file"):
        train_judge(path)
