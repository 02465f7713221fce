"""The tokenizer against transformers' CLIPTokenizer, on hard text and on every form of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from stylemuse.core import StylemuseError
from stylemuse.models.tokenizer import ClipTokenizer, build_word_tokenizer

WORDS = ["fox", "ox", "of", "a", "foxes", "café", "in", "neon", "style", ",", "3", "shone", "one", "hones", "ONE", "ß"]
LENGTH = 13
HARD = [
    "",
    "   \n\t ",
    "a fox in neon style",
    "A  FOX\n\tin CAFÉ, cafe\u0301 style 33!",
    "🦊 emoji 👩\u200d👩\u200d👧 ¿qué? 中文 हिन्दी",
    "fox " * 40,
    "unknownword" * 20,
    "<|endoftext|> a <|STARTOFTEXT|> <|startoftext|>fox<|endoftext|>",
    "it's we'll THEY'VE 'quoted' don't",
    "İstanbul ß ﬁ ǅ \u200bzero\u3000wide\u00a0blank \x00\x1f",
    "!!! ! hi! a!b",
    "12345 x86 3.14",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_word_tokenizer(WORDS, folder, LENGTH)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[ClipTokenizer, CLIPTokenizer]:
    return ClipTokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def reference(tokenizer: CLIPTokenizer, texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """As diffusers' AmusedPipeline calls it."""
    return tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length).input_ids


def rewrite(source: Path, target: Path, name: str, content: dict[str, Any] | None) -> Path:
    """A copy of a tokenizer folder with one of its JSON files replaced, or removed."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if content is None:
        (target / name).unlink()
    else:
        (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def test_every_given_word_is_one_token(both: tuple[ClipTokenizer, CLIPTokenizer]) -> None:
    ours, theirs = both
    vocabulary = theirs.get_vocab()
    for word in WORDS:
        ids = ours([f"fox {word} of"])[0].tolist()
        assert ids[4:] == [ours.end] * (LENGTH - 4), f"{word} is not one token"
        assert ids[0] == ours.start
        if word.isascii():
            assert ids[2] == vocabulary[word.lower() + "</w>"]


def test_hard_text_agrees_with_transformers(both: tuple[ClipTokenizer, CLIPTokenizer]) -> None:
    ours, theirs = both
    ids = ours(HARD)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(HARD), LENGTH)
    assert torch.equal(ids, reference(theirs, HARD))
    assert theirs.model_max_length == ours.length == LENGTH
    assert ours.vocab_size == len(theirs)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_agrees_with_transformers(both: tuple[ClipTokenizer, CLIPTokenizer], text: str) -> None:
    ours, theirs = both
    assert torch.equal(ours([text]), reference(theirs, [text]))


def test_a_cut_keeps_the_end_token(both: tuple[ClipTokenizer, CLIPTokenizer]) -> None:
    ours, _ = both
    cut = ours(["fox " * 40])[0]
    assert cut[0] == ours.start
    assert cut[-1] == ours.end
    assert (cut[1:-1] == cut[1]).all()


def test_a_batch_is_its_rows(both: tuple[ClipTokenizer, CLIPTokenizer]) -> None:
    ours, _ = both
    assert torch.equal(ours(HARD), torch.cat([ours([text]) for text in HARD]))
    assert ours([]).shape == (0, LENGTH)


def test_tokenizer_json_alone_gives_the_same_ids(both: tuple[ClipTokenizer, CLIPTokenizer], tmp_path: Path) -> None:
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not (tmp_path / "vocab.json").exists()
    assert torch.equal(ClipTokenizer.from_folder(tmp_path)(HARD), ours(HARD))


def options(content: str, normalized: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>", options("!", normalized=False)])
@pytest.mark.parametrize("normalized", [True, False, None])
def test_special_tokens_come_from_the_files(folder: Path, tmp_path: Path, pad: Any, normalized: bool | None) -> None:
    """As older saves write them: a table or a text per role; "!" pads in the text encoders that open_clip trained."""
    start, end = (
        token if normalized is None else options(token, normalized) for token in ("<|startoftext|>", "<|endoftext|>")
    )
    listed = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    copy = rewrite(folder, tmp_path, "special_tokens_map.json", listed)
    ours, theirs = ClipTokenizer.from_folder(copy), CLIPTokenizer.from_pretrained(copy)
    assert ours.pad == theirs.pad_token_id
    assert torch.equal(ours(HARD), reference(theirs, HARD))


def test_a_config_that_lists_its_added_tokens_goes_before_the_map(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = ("!", "<|startoftext|>", "<|endoftext|>")
    config["added_tokens_decoder"] = {
        str(vocabulary[token]): options(token, normalized=token != "!") | {"special": True} for token in tokens
    }
    config["pad_token"] = "!"
    copy = rewrite(folder, tmp_path, "tokenizer_config.json", config)
    ours, theirs = ClipTokenizer.from_folder(copy), CLIPTokenizer.from_pretrained(copy)
    assert ours.pad == theirs.pad_token_id == vocabulary["!"]
    assert torch.equal(ours(HARD), reference(theirs, HARD))


def test_the_length_can_be_given(folder: Path, tmp_path: Path) -> None:
    copy = rewrite(folder, tmp_path, "tokenizer_config.json", None)
    with pytest.raises(StylemuseError, match="gives no model_max_length, and no length was given"):
        ClipTokenizer.from_folder(copy)
    assert ClipTokenizer.from_folder(copy, length=7)(["a fox"]).shape == (1, 7)
    (copy / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}), encoding="utf-8")
    with pytest.raises(StylemuseError, match="gives no model_max_length"):
        ClipTokenizer.from_folder(copy)


def test_errors_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StylemuseError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        ClipTokenizer.from_folder(tmp_path, length=7)
    with pytest.raises(StylemuseError, match="at least 2"):
        ClipTokenizer.from_folder(folder, length=1)
    with pytest.raises(StylemuseError, match="one string given"):
        ClipTokenizer.from_folder(folder)("a fox")
    with pytest.raises(StylemuseError, match="'well-known' is 3 pieces"):
        build_word_tokenizer(["well-known"], tmp_path, 7)
    with pytest.raises(StylemuseError, match="'' is 0 pieces"):
        build_word_tokenizer([""], tmp_path, 7)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"])
def test_a_damaged_file_is_reported(folder: Path, tmp_path: Path, name: str) -> None:
    copy = rewrite(folder, tmp_path, "special_tokens_map.json", {})
    (copy / name).write_text("{ not json", encoding="utf-8")
    with pytest.raises(StylemuseError, match=str(tmp_path)):
        ClipTokenizer.from_folder(copy)
