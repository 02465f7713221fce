"""The page's modules, in node: the numbers, the tokens and the errors of the Python runtime."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_style
from node import ask, needs_node

import stylemuse as sm
from stylemuse import Adapter, Sampling
from stylemuse.decoding.schedule import amused
from stylemuse.export.graphs.deploy import export
from stylemuse.models.tokenizer import ClipTokenizer

pytestmark = needs_node
RUNTIMES = ("onnxruntime-web", "onnxruntime-node")


@pytest.fixture(scope="module")
def bank(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs of ranks 2 and 5, and a bottleneck in some places."""
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    config, generator = pipe.network.transformer.config, torch.Generator().manual_seed(9)
    pairs = {
        name: (torch.randn(width, 3, generator=generator) * 0.3, torch.randn(3, width, generator=generator) * 0.3)
        for name, width in list(config.bottleneck_sites().items())[:3]
    }
    pipe.adapters.add("drop", Adapter("drop", "bottleneck", pairs, base_model="tiny", scale=0.8))
    pipe.adapters.add("wide", random_style(config, "wide", rank=5, seed=4))
    export(pipe, out := tmp_path_factory.mktemp("exports") / "bank")
    return out


def test_schedules() -> None:
    pairs = [(side * side, steps) for side in (8, 16, 32) for steps in (*range(1, 65), 100, 333, 1000)]
    for (tokens, steps), made in zip(pairs, ask(schedules=pairs)["schedules"], strict=True):
        wanted = amused(tokens, tokens, steps)
        assert made["maskedAfter"] == list(wanted.masked_after), (tokens, steps)
        assert made["tokenTemperature"] == list(wanted.token_temperature)
        assert made["choiceTemperature"] == list(wanted.choice_temperature), (tokens, steps)
        assert made["rawLogit"] is (wanted.score == "logit")


def any_text(choice: random.Random) -> str:
    signs = (
        *"abcxyzAZ019 '!?.,-_<|>/\\\t\n", "é", "É", "e\u0301", "ß", "Σ", "ΟΔΟΣ", "İ", "ﬁ", "日本", "한", "🦊", "\u00a0",
        "\u0085", "\u2028", "\ufeff", "٣", "½", "'s", "'LL", "a fox", " in ", "<|endoftext|>", "<|STARTOFTEXT|>",
        "<|startoftext|>", "</w>", "style", "castle", "\x00", "\x1f",
    )  # fmt: skip
    return "".join(choice.choices(signs, k=choice.randrange(0, 16)))


@pytest.mark.parametrize("saved", ["as it is", "normalized special tokens, merges as texts"])
def test_token_ids(bank: Path, tmp_path: Path, saved: str) -> None:
    folder = Path(shutil.copytree(bank, tmp_path / "bank"))
    if saved != "as it is":
        file = folder / "tokenizer" / "tokenizer.json"
        facts = json.loads(file.read_text())
        for token in facts["added_tokens"]:
            token["normalized"] = True
        facts["model"]["merges"] = [" ".join(pair) for pair in facts["model"]["merges"]]
        file.write_text(json.dumps(facts))
    choice = random.Random(3)
    prompts = ["", " ", "a fox in neon style", "A FOX", "fox " * 40, *(any_text(choice) for _ in range(400))]
    wanted = ClipTokenizer.from_folder(folder / "tokenizer").ids(prompts).tolist()
    got = ask(folder=str(folder), prompts=prompts)["ids"]
    different = [prompt for prompt, one, other in zip(prompts, got, wanted, strict=True) if one != other]
    assert not different


def any_request(choice: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same request for the page and for the pipeline."""
    prompt, seed = choice.choice(("a fox", " an owl in the castle ", "a cat in ink style")), choice.getrandbits(63)
    style, steps = choice.choice((None, "ink", "neon", "wide", "drop")), choice.choice((None, 1, 2, 5, 9))
    page: dict[str, Any] = {"prompt": prompt, "style": style, "seed": str(seed)}
    ours: dict[str, Any] = {"prompt": prompt, "style": style, "seed": seed}
    if style is not None and choice.random() < 0.5:
        page["strength"] = choice.choice((0.0, 0.35, 1.5))
        ours["style"] = {style: sm.Style(strength=page["strength"])}
    if choice.random() < 0.6:
        numbers = {"style": choice.choice((0.0, 0.25, 2.0)), "text": choice.choice((0.0, 0.75, 2.0))}
        page["guidance"], ours["guidance"] = numbers, sm.StyleDrop(**numbers)
    if steps is not None:
        page["steps"], ours["sampling"] = steps, Sampling(steps=steps)
    return page, ours


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_request_gives_the_same_tokens(bank: Path, runtime: str) -> None:
    choice = random.Random(11)
    pairs = [any_request(choice) for _ in range(24)]
    pipe = sm.load(str(bank))
    drawn = ask(folder=str(bank), runtime=runtime, requests=[page for page, _ in pairs])["results"]
    for made, (page, ours) in zip(drawn, pairs, strict=True):
        wanted = pipe.run([sm.Request(**ours)])[0]
        assert made["tokens"] == wanted.tokens.flatten().tolist(), page
        assert made["seed"] == page["seed"]
        assert made["masked"] == list(amused(64, 64, len(wanted.timings["step"])).masked_after)
        picture = np.asarray(wanted.images[0])
        assert (made["height"], made["width"]) == picture.shape[:2]
        assert np.abs(picture.flatten().astype(int) - made["pixels"]).max() <= 1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_is_the_same_in_both_runtimes(tiny_model: Path, tmp_path: Path, runtime: str) -> None:
    """WebAssembly multiplies bytes its own way. A number between two steps of int8 may be rounded either way."""
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    export(pipe, folder := tmp_path / "int8", precision="int8")
    choice = random.Random(12)
    pairs = [any_request(choice) for _ in range(24)]
    pairs = [(page, ours) for page, ours in pairs if ours["style"] in (None, "ink", "neon")]
    exported = sm.load(str(folder))
    drawn = ask(folder=str(folder), runtime=runtime, requests=[page for page, _ in pairs])["results"]
    wanted = [exported.run([sm.Request(**ours)])[0].tokens.flatten() for _, ours in pairs]
    same = [np.mean(np.array(made["tokens"]) == tokens) for made, tokens in zip(drawn, wanted, strict=True)]
    assert np.mean(same) > 0.95


def test_a_number_that_is_left_out_is_the_recommended_one(bank: Path) -> None:
    """Style ink recommends StyleDrop with style 1 and text 2; for drop and the base these are StyleDrop's own."""
    pairs: list[tuple[dict[str, Any], str | None, sm.StyleDrop]] = [
        ({"text": 0.5}, "ink", sm.StyleDrop(style=1.0, text=0.5)),
        ({"style": 0.5}, "ink", sm.StyleDrop(style=0.5, text=2.0)),
        ({"style": 0.5}, "drop", sm.StyleDrop(style=0.5)),
        ({"text": 1.5}, None, sm.StyleDrop(text=1.5)),
    ]
    requests = [{"prompt": "a fox", "style": style, "seed": "5", "guidance": numbers} for numbers, style, _ in pairs]
    drawn = ask(folder=str(bank), runtime=RUNTIMES[0], requests=requests)["results"]
    pipe = sm.load(str(bank))
    for made, (_, style, guidance) in zip(drawn, pairs, strict=True):
        assert (
            made["tokens"] == pipe.generate("a fox", style=style, seed=5, guidance=guidance).tokens.flatten().tolist()
        )


def test_a_seed_is_drawn_and_told_and_a_picture_is_stopped(bank: Path) -> None:
    requests = [{"prompt": "a fox"}, {"prompt": "a fox"}, {"prompt": "a fox", "stop": 2}]
    one, other, stopped = ask(folder=str(bank), runtime=RUNTIMES[0], requests=requests)["results"]
    assert one["seed"] != other["seed"]
    wanted = sm.load(str(bank)).generate("a fox", seed=int(one["seed"])).tokens.flatten().tolist()
    assert one["tokens"] == wanted
    assert stopped == {"stopped": list(amused(64, 64, 4).masked_after[:2])}


def test_what_is_not_allowed_is_one_line(bank: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": " \t"}, "the prompt is empty; say what to draw, for example 'a fox'"),
        ({"prompt": "a" * 10_001}, "over 10000 characters"),
        ({"style": "oil"}, "style 'oil' is unknown; allowed are drop, ink, neon, wide"),
        ({"style": "constructor"}, "style 'constructor' is unknown"),
        ({"steps": 0}, "steps = 0 is not allowed: a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps = 2.5 is not allowed"),
        ({"seed": str(2**63)}, "seed 9223372036854775808 is not allowed"),
        ({"seed": "-1"}, "seed -1 is not allowed"),
        ({"strength": None}, "strength null is not allowed"),
        ({"guidance": {"text": -1}}, "StyleDrop text -1 is not allowed: a finite number, at least 0"),
    ]
    requests = [{"prompt": "a fox", "seed": "1"} | request for request, _ in wrong]
    results = ask(folder=str(bank), runtime=RUNTIMES[0], requests=requests)["results"]
    for made, (request, words) in zip(results, wrong, strict=True):
        assert words in made.get("error", ""), request
        assert "\n" not in made["error"]


def test_a_changed_or_damaged_style_is_named(bank: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bank, tmp_path / "bank"))
    manifest = json.loads((folder / "manifest.json").read_text())
    changed, damaged = (folder / manifest["styles"][name]["files"]["step"]["path"] for name in ("ink", "neon"))
    changed.write_bytes(changed.read_bytes()[:-4] + b"ZZZZ")
    damaged.write_bytes(data := damaged.read_bytes()[:200])
    file = manifest["styles"]["neon"]["files"]["step"]
    file["bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    requests = [{"prompt": "a fox", "style": style} for style in ("ink", "neon", "wide")]
    ink, neon, wide = ask(folder=str(folder), runtime=RUNTIMES[0], requests=requests)["results"]
    assert ink["error"].endswith("adapters/ink.step.onnx_adapter was changed: its sha256 is another")
    assert neon["error"].startswith("adapters/neon.step.onnx_adapter cannot be read: ")
    assert len(wide["tokens"]) == 64, "the others are not touched"
