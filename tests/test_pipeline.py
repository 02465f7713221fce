"""Prompt to picture in one call: what `Pipeline.generate` takes, and what its results hold."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, load, noise
from models import random_style
from PIL import Image

import stylemuse
from stylemuse import CFG, ObjectInStyle, Pipeline, Preview, Request, Sampling, Style, StyleDrop, StylemuseError
from stylemuse.decoding import schedule
from stylemuse.requests import start


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    """Shared: a test that changes its styles loads one of its own."""
    return load(tiny_model)


def differ(*pictures: np.ndarray) -> bool:
    """Whether no two of them are equal."""
    return len({picture.tobytes() for picture in pictures}) == len(pictures)


# What comes back.


def test_a_result_has_pictures_tokens_seeds_and_times(pipe: Pipeline) -> None:
    result = pipe.generate("a fox", n=3, seed=5, size=(48, 16), steps=4)
    assert [(image.mode, image.size) for image in result.images] == [("RGB", (48, 16))] * 3
    assert (result.tokens.shape, result.tokens.dtype) == ((3, 4, 12), np.int64)
    assert 0 <= result.tokens.min() <= result.tokens.max() < 64
    assert result.seeds[0] == 5
    assert all(len(result.timings[part]) == 4 for part in ("step", "transformer", "head", "sampling", "remask"))
    whole = sum(result.timings[part] for part in ("text", "condition", "pixels")) + sum(result.timings["step"])
    assert result.timings["total"] >= whole > 0


def test_pictures_are_the_tokens_decoded(pipe: Pipeline) -> None:
    result = pipe.generate("a fox", n=2, seed=5)
    again = pipe.network.pixels(torch.from_numpy(result.tokens))
    assert all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(result.images, again, strict=True)
    )


def test_a_prompt_gives_a_result_and_a_list_a_list(pipe: Pipeline) -> None:
    prompts = ["a fox", "a cat", "a fox"]
    results = pipe.generate(prompts, seed=5, style="ink")
    assert [result.tokens.tolist() for result in results] == [
        draw(pipe, p, seed=5, style="ink").tolist() for p in prompts
    ]
    assert pipe.generate([], seed=5) == []
    assert pipe.run([]) == []


def test_explain_says_what_runs_and_why(tiny_model: Path) -> None:
    facts = load(tiny_model, backend="reference", device="cpu", slots=5, rank=7).explain()
    assert facts["model"] == str(tiny_model)
    assert facts["backend"] == "reference: asked for"
    assert facts["device"] == "cpu: asked for"
    assert facts["dtype"] == "float32: asked for"
    assert re.fullmatch(r"2 .*\b5 slots, rank up to 7, \d+ MB", facts["adapters"])
    assert all(facts.values())


def test_a_model_without_extras_has_no_styles(tiny_model: Path, tmp_path: Path) -> None:
    """A folder in plain diffusers layout, without stylemuse.json."""
    for path in tiny_model.iterdir():
        if path.name not in ("stylemuse.json", "styles"):
            (tmp_path / path.name).symlink_to(path)
    plain = load(tmp_path)
    assert plain.adapters.names == ()
    assert len(plain.generate("a fox").timings["step"]) == 12
    with pytest.raises(StylemuseError, match=r"^style 'ink' is unknown; allowed: none$"):
        plain.generate("a fox", style="ink")


def test_bf16_draws(tiny_model: Path) -> None:
    pipe = load(tiny_model, dtype="bfloat16")
    assert draw(pipe, style="ink", n=2).shape == (2, 8, 8)
    assert pipe.explain()["dtype"] == "bfloat16: asked for"


# Prompts.


def test_negative_prompts(pipe: Pipeline) -> None:
    """None, one for all, one each; empty and absent are the same."""
    prompts, guidance = ["a fox", "a cat"], CFG(3.0)

    def tokens(**options: Any) -> list[Any]:
        return [result.tokens.tolist() for result in pipe.generate(prompts, seed=5, guidance=guidance, **options)]

    alone = [draw(pipe, prompt, seed=5, guidance=guidance, negative_prompt="a frog").tolist() for prompt in prompts]
    assert tokens(negative_prompt="a frog") == tokens(negative_prompt=["a frog", "a frog"]) == alone
    assert tokens(negative_prompt="") == tokens() != alone
    assert tokens(negative_prompt=["a frog", ""]) == [alone[0], tokens()[1]]
    with pytest.raises(StylemuseError, match=r"^3 negative prompts for 2 prompts; give one, or one each$"):
        tokens(negative_prompt=["", "", ""])
    with pytest.raises(StylemuseError, match=r"^negative_prompt must be a text"):
        pipe.generate("a fox", negative_prompt=["a frog"])


def test_the_descriptor_is_added_once(pipe: Pipeline) -> None:
    expected = draw(pipe, "a fox", style="ink")
    assert np.array_equal(draw(pipe, " a fox ", style="ink"), expected)
    assert np.array_equal(draw(pipe, "a fox in ink style", style="ink"), expected)
    assert differ(expected, draw(pipe, "a fox in neon style", style="ink"))


def test_spaces_around_do_not_matter_and_words_do(pipe: Pipeline) -> None:
    assert np.array_equal(draw(pipe, "  a fox\n"), draw(pipe, "a fox"))
    assert differ(draw(pipe, "a fox"), draw(pipe, "a cat"))


# Sampling and guidance.


def test_steps_and_schedule_are_short_for_sampling(pipe: Pipeline) -> None:
    for name in schedule.SCHEDULES:
        short = pipe.generate("a fox", seed=5, steps=6, schedule=name)
        assert len(short.timings["step"]) == 6
        assert np.array_equal(short.tokens, draw(pipe, seed=5, sampling=Sampling(6, name)))
    longer = pipe.generate("a fox", seed=5, sampling=Sampling(3, "maskgit"), steps=6)
    assert np.array_equal(longer.tokens, draw(pipe, seed=5, sampling=Sampling(6, "maskgit")))


def test_every_option_of_sampling_matters(pipe: Pipeline) -> None:
    options = [Sampling(8), Sampling(5), Sampling(8, temperature=(9.0, 3.0)), Sampling(8, temperature=1.0)]
    options += [Sampling(8, "maskgit"), Sampling(8, "styledrop"), Sampling(8, "styledrop", 1.0)]
    options += [Sampling(8, ramp="linear"), Sampling(8, ramp="after_first")]
    assert differ(*(draw(pipe, sampling=sampling, guidance=CFG(6.0), n=3) for sampling in options))


def test_every_guidance_matters(pipe: Pipeline) -> None:
    recipes = [CFG(1.0), CFG(4.0), StyleDrop(0.0, 2.0), StyleDrop(2.0, 2.0), StyleDrop(2.0, 5.0)]
    recipes += [ObjectInStyle("neon", "a cat"), ObjectInStyle("neon", "a cat", gamma=0.3, style=1.0, text=3.0)]
    recipes += [ObjectInStyle("neon", "a cat", strength=0.5), ObjectInStyle("neon", "an owl")]
    assert differ(*(draw(pipe, style="ink", guidance=recipe, steps=6, n=3) for recipe in recipes))


def test_every_use_of_a_style_matters(pipe: Pipeline) -> None:
    uses: list[Any] = [None, "ink", "neon", {"ink": 0.5}, {"ink": 0.5, "neon": 0.5}, {"ink": 0.3, "neon": 0.6}]
    uses += [{"ink": Style(1.0, strength=0.5)}, {"ink": Style(1.0, strength=-1.0)}]
    prompt = "a fox in ink style in neon style"
    assert differ(*(draw(pipe, prompt, style=use, guidance=StyleDrop(2.0, 3.0), steps=6, n=3) for use in uses))


def test_styles_of_no_effect_are_the_base(pipe: Pipeline) -> None:
    """A whole weight is the name alone; a strength of 0 adds nothing to any weight."""
    prompt, guidance = "a fox in ink style", CFG(3.0)
    whole = draw(pipe, prompt, style="ink", guidance=guidance)
    assert np.array_equal(draw(pipe, prompt, style={"ink": 1.0}, guidance=guidance), whole)
    without = draw(pipe, prompt, style={"ink": Style(strength=0.0)}, guidance=guidance)
    assert np.array_equal(without, draw(pipe, prompt, guidance=guidance))
    assert differ(whole, without)


def test_strength_and_scale_multiply(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    plain = random_style(pipe.network.transformer.config, "plain")
    pipe.adapters.add("plain", plain)
    pipe.adapters.add("half", stylemuse.Adapter("half", "lora", plain.tensors, scale=0.5, descriptor=plain.descriptor))
    guidance = CFG(3.0)
    half = draw(pipe, style={"plain": Style(strength=0.5)}, guidance=guidance)
    assert np.array_equal(draw(pipe, style="half", guidance=guidance), half)
    assert np.array_equal(
        draw(pipe, style={"half": Style(strength=2.0)}, guidance=guidance), draw(pipe, style="plain", guidance=guidance)
    )


def test_what_is_left_open_is_as_recommended(tiny_model: Path) -> None:
    """The model's own: 4 steps and CFG 3. The styles': StyleDrop(1, 2), and the steps of one that says so."""
    pipe = load(tiny_model)
    assert np.array_equal(draw(pipe), draw(pipe, steps=4, guidance=CFG(3.0)))
    assert np.array_equal(draw(pipe, style="ink"), draw(pipe, style="ink", steps=4, guidance=StyleDrop(1.0, 2.0)))
    plain = random_style(pipe.network.transformer.config, "slow")
    recommended = {"guidance": "CFG", "scale": 2.0, "steps": 9}
    pipe.adapters.add("slow", stylemuse.Adapter("slow", "lora", plain.tensors, recommended=recommended))
    open_ended = pipe.generate("a fox", style="slow", seed=7)
    assert len(open_ended.timings["step"]) == 9
    assert np.array_equal(open_ended.tokens, draw(pipe, style="slow", steps=9, guidance=CFG(2.0)))
    other_schedule = draw(pipe, style="slow", schedule="maskgit")
    assert np.array_equal(other_schedule, draw(pipe, style="slow", sampling=Sampling(9, "maskgit")))


# From a picture.


def test_a_whole_strength_draws_everything_anew(pipe: Pipeline) -> None:
    assert np.array_equal(draw(pipe, image=noise(), strength=1.0), draw(pipe))
    request = Request("a fox", image=noise(), mask=Image.new("L", (32, 32), 255))
    assert start.prepare(request, (8, 8), (5,), Sampling(4), pipe.network)[0].unknown.all()


def test_smaller_strengths_keep_more(pipe: Pipeline) -> None:
    picture = noise()
    codes, kept = pipe.network.codes(picture, (8, 8)).numpy(), []
    for strength in (0.75, 0.5, 0.25):
        result = pipe.generate("a fox", image=picture, strength=strength, steps=8, n=3, seed=5)
        request = Request("a fox", image=picture, strength=strength)
        begins = start.prepare(request, (8, 8), result.seeds, Sampling(8), pipe.network)
        assert len(result.timings["step"]) == 8 * strength
        for tokens, begin in zip(result.tokens, begins, strict=True):
            assert np.array_equal(tokens.flatten()[~begin.unknown], codes.flatten()[~begin.unknown])
        assert differ(*(begin.unknown.numpy() for begin in begins))
        kept.append(int((~begins[0].unknown).sum()))
    assert 0 < kept[0] < kept[1] < kept[2] < 64


def test_outside_the_mask_nothing_changes(pipe: Pipeline) -> None:
    """White is drawn anew; a token of whose area half is white is white."""
    picture, mask = noise(), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 14, 32))
    codes = pipe.network.codes(picture, (8, 8)).numpy()
    tokens = draw(pipe, image=picture, mask=mask, n=2, steps=6)
    assert np.array_equal(tokens[:, :, 4:], np.stack([codes[:, 4:]] * 2))
    assert differ(*tokens[:, :, :4], codes[:, :4])
    gentle = draw(pipe, image=picture, mask=mask, strength=0.5, steps=6)[0]
    assert np.array_equal(gentle[:, 4:], codes[:, 4:])
    assert differ(gentle[:, :4], tokens[0][:, :4])


def test_pictures_of_any_size_and_mode(pipe: Pipeline) -> None:
    """A picture is fitted to the size that is drawn, a mask too."""
    for mode in ("L", "RGBA", "P"):
        image = noise(size=(50, 20)).convert(mode)
        mask = Image.new("1", (7, 9), 1)
        assert draw(pipe, image=image, mask=mask, size=(16, 24), strength=0.5).shape == (1, 6, 4)


# Previews.


def test_previews_follow_the_schedule(pipe: Pipeline) -> None:
    counts, sizes, steps = [], [], []

    def look(preview: Preview) -> None:
        counts.append([int((grid == pipe.network.mask_id).sum()) for grid in preview.tokens(0)])
        sizes.extend(image.size for image in preview.images(0))
        steps.append((preview.step, preview.steps, preview.requests))

    result = pipe.generate("a fox", n=2, seed=5, steps=6, size=(48, 16), on_step=look)
    assert counts == [[left, left] for left in schedule.amused(48, 48, 6).masked_after]
    assert set(sizes) == {(48, 16)}
    assert steps == [(step, 6, (0,)) for step in range(1, 7)]
    assert np.array_equal(result.tokens, pipe.generate("a fox", n=2, seed=5, steps=6, size=(48, 16)).tokens)


def test_previews_of_a_batch_say_who_took_part(pipe: Pipeline) -> None:
    """Two requests of 2 and 4 steps, and one that starts at the second half of its 4."""
    seen = []

    def look(preview: Preview) -> None:
        seen.append((preview.step, preview.steps, preview.requests, [tuple(preview.tokens(i).shape) for i in range(3)]))

    requests = [
        Request("a fox", sampling=Sampling(2), n=2),
        Request("a cat", sampling=Sampling(4), size=(16, 16)),
        Request("a cat", sampling=Sampling(4), image=noise(), strength=0.5),
    ]
    pipe.run(requests, on_step=look)
    shapes = [(2, 8, 8), (1, 4, 4), (1, 8, 8)]
    everyone, longest = (0, 1, 2), (1,)
    assert seen == [(step, 4, everyone if step <= 2 else longest, shapes) for step in (1, 2, 3, 4)]


def test_the_last_preview_is_the_result(pipe: Pipeline) -> None:
    previews: list[tuple[Any, Any]] = []
    result = pipe.generate("a fox", on_step=lambda preview: previews.append((preview.tokens(0), preview.images(0))))
    tokens, images = previews[-1]
    assert np.array_equal(tokens.numpy(), result.tokens)
    assert np.array_equal(np.asarray(images[0]), np.asarray(result.images[0]))


def test_a_style_of_a_model_folder_must_be_a_name(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "stylemuse.json").write_text('{"styles": ["../../elsewhere"]}')
    with pytest.raises(StylemuseError, match=r"its style '\.\./\.\./elsewhere' is not a name"):
        load(str(folder))
