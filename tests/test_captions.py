"""Captions: what they say, and that the device's ids are the tokenizer's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stylemuse import StylemuseError
from stylemuse.models.tokenizer import ClipTokenizer, build_word_tokenizer
from stylemuse.pretraining.attributes import (
    HANDS,
    HELD_OUT,
    HELD_OUT_PAIRS,
    SUBJECTS,
    Look,
    article,
    caption,
    random_caption,
    random_look,
    vocabulary,
)
from stylemuse.pretraining.captions import Captions
from stylemuse.pretraining.world import World

LENGTH = 20
FULL = re.compile(r"(?:an? )?(detailed )?(.+), (\w+)(?: in (\w+))? on (\w+) (?:with (\w+)|(plain))")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return build_word_tokenizer(vocabulary(), tmp_path_factory.mktemp("words") / "tokenizer", LENGTH)


def looks(count: int, *, held_out: bool = False, seed: int = 0) -> list[Look]:
    numbers = np.random.default_rng(seed)
    return [random_look(numbers, held_out=held_out) for _ in range(count)]


def test_random_looks_hold_out_what_the_world_does() -> None:
    assert not {(look.rendering, look.extra) for look in looks(2000)} & HELD_OUT_PAIRS
    assert {(look.rendering, look.extra) for look in looks(3000, held_out=True)} >= HELD_OUT_PAIRS
    assert {look.hand for look in looks(200)} == {"fluent", "noto"}


def test_a_full_caption_tells_subject_and_look() -> None:
    for subject in SUBJECTS:
        for look in [*looks(8, seed=len(subject)), *HELD_OUT.values()]:
            found = FULL.fullmatch(caption(subject, look))
            assert found is not None
            detailed, name, rendering, ink, paper, extra, plain = found.groups()
            told = Look(rendering, ink, paper, extra or plain, "noto" if detailed else "fluent")
            assert (name, told) == (subject, look)


def test_attributes_can_be_left_out() -> None:
    look = HELD_OUT["neon"]
    assert caption("owl", look) == "an owl, outline in cyan on navy with glow"
    assert caption("owl", look, rendering=False, extra=False) == "an owl, in cyan on navy"
    assert caption("scissors", look, rendering=False, ink=False, paper=False, extra=False) == "scissors"
    assert random_caption("owl", look, np.random.default_rng(0), drop=0.0) == caption("owl", look)
    assert random_caption("owl", look, np.random.default_rng(0), drop=1.0) == article("owl") == "an owl"
    assert article("owl", "noto") == "a detailed owl"
    assert article("unicorn") == "a unicorn"


def test_vocabulary_has_every_word_as_one_token(tokenizer: ClipTokenizer) -> None:
    known = set(vocabulary())
    texts = [caption(subject, look) for subject in SUBJECTS for look in looks(4, seed=len(subject))]
    texts += [f"{article(subject)} in {style} style" for subject in SUBJECTS for style in HELD_OUT]
    seen: dict[tuple[int, ...], str] = {}
    for text, ids in zip(texts, tokenizer(texts).tolist(), strict=True):
        words = re.findall(r"\w+|,", text)
        assert set(words) <= known
        assert ids.index(tokenizer.end) == len(words) + 1
        assert seen.setdefault(tuple(ids), text) == text


def test_ids_are_the_tokenizers(tokenizer: ClipTokenizer) -> None:
    scenes = World(32).sample(400, torch.Generator().manual_seed(0), held_out=True)
    numbers = torch.Generator().manual_seed(1)
    kept, silent = torch.rand(400, 4, generator=numbers) > 0.5, torch.rand(400, generator=numbers) < 0.1
    attributes = ("rendering", "ink", "paper", "extra")
    texts = [
        "" if silent[row] else caption(*scenes.look(row), **dict(zip(attributes, kept[row].tolist(), strict=True)))
        for row in range(400)
    ]
    assert torch.equal(Captions(tokenizer).of(scenes, kept, silent), tokenizer(texts))


def test_words_are_dropped_at_random(tokenizer: ClipTokenizer) -> None:
    scenes = World(32).sample(2000, torch.Generator().manual_seed(0))
    captions = Captions(tokenizer)
    all_looks = {"bare": 0.0, "styled": 0.0}
    full = captions.ids(scenes, torch.Generator().manual_seed(0), drop=0.0, silent=0.0, **all_looks)
    assert torch.equal(full, tokenizer([caption(*scenes.look(row)) for row in range(2000)]))
    first, again = (captions.ids(scenes, torch.Generator().manual_seed(5), **all_looks) for _ in range(2))
    assert torch.equal(first, again)
    empty = tokenizer([""])[0]
    assert abs(float((first == empty).all(1).float().mean()) - 0.1) < 0.03
    told = (first == tokenizer(["on"])[0, 1]).any(1).float().mean()
    assert abs(float(told) - 0.9 * 0.75) < 0.04
    subjects = captions.ids(scenes, torch.Generator(), drop=1.0, silent=0.0, **all_looks)
    hands, names = list(HANDS), list(SUBJECTS)
    said = [article(names[s], hands[h]) for s, h in zip(scenes.subject.tolist(), scenes.hand.tolist(), strict=True)]
    assert torch.equal(subjects, tokenizer(said))


def test_a_tokenizer_too_short_is_refused(tmp_path: Path) -> None:
    short = build_word_tokenizer(vocabulary(), tmp_path / "tokenizer", 9)
    with pytest.raises(StylemuseError, match="length is 9"):
        Captions(short)


def test_plain_scenes_may_be_asked_for_by_their_subject_alone(tokenizer: ClipTokenizer) -> None:
    """And others by the name of a style, which says nothing about their look."""
    scenes = World(32).sample(500, torch.Generator().manual_seed(0), plain=0.5)
    plain = scenes.plain.tolist()
    assert 200 < sum(plain) < 300
    options = {"drop": 0.0, "silent": 0.0, "bare": 1.0, "styled": 1.0}
    found = Captions(tokenizer).ids(scenes, torch.Generator().manual_seed(1), **options)
    styles = [" ".join(("in", name, "style")) for name in HELD_OUT]
    for row in range(500):
        subject, look = scenes.look(row)
        named = article(subject, look.hand)
        allowed = [named] if plain[row] else [f"{named} {style}" for style in styles]
        assert found[row].tolist() in tokenizer(allowed).tolist()
