"""The judged pictures (``bench/pictures.py``): fair jobs, honest counts, and a run from end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest

from stylemuse import StylemuseError
from stylemuse.bench.pictures import pictures, prompts
from stylemuse.bench.pictures.sheet import Row, contact_sheet
from stylemuse.pretraining.attributes import HELD_OUT, HELD_OUT_PAIRS, SUBJECTS, Look, article, vocabulary
from stylemuse.pretraining.judge import STYLE, Judge
from stylemuse.pretraining.world import World

REFERENCES = {"neon": "fox", "riso": "cat", "ember": "elephant"}


@pytest.fixture(scope="module")
def untrained() -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Judge().eval()


def test_base_jobs_ask_in_known_words_for_looks_that_are_not_held_out() -> None:
    jobs, known = prompts.base_jobs(300, seed=0), set(vocabulary())
    assert jobs == prompts.base_jobs(300, seed=0)
    assert jobs[:10] != prompts.base_jobs(10, seed=1)
    assert len({job.seed for job in jobs}) == 300
    for job in jobs:
        assert set(job.prompt.replace(",", " ,").split()) <= known
        assert job.prompt.startswith(article(job.subject, job.look.hand))
        assert (job.look.rendering, job.look.extra) not in HELD_OUT_PAIRS
        assert job.style is None
        for head in job.asked:
            assert getattr(job.look, head) in job.prompt
    share = np.mean([head in job.asked for job in jobs for head in ("rendering", "paper", "extra")])
    assert 0.68 < share < 0.82


def test_styled_jobs_take_turns_and_never_show_the_reference() -> None:
    jobs = prompts.styled_jobs(REFERENCES, 600, seed=0)
    assert jobs == prompts.styled_jobs(REFERENCES, 600, seed=0)
    assert [job.style for job in jobs[:4]] == ["neon", "riso", "ember", "neon"]
    for style, reference in REFERENCES.items():
        subjects = [job.subject for job in jobs if job.style == style]
        assert reference not in subjects
        assert len(set(subjects[: len(SUBJECTS) - 1])) == len(SUBJECTS) - 1 < len(subjects), (
            "every other subject once before any comes again"
        )
    for job in jobs:
        assert job.style is not None
        assert (job.prompt, job.look, job.asked) == (article(job.subject), HELD_OUT[job.style], STYLE)


def test_subjects_of_the_references() -> None:
    captions = {"neon": "a red apple in neon style", "other": "a thing", "riso": "scissors in riso style"}
    assert prompts.reference_subjects(captions) == {"neon": "red apple", "riso": "scissors"}
    with pytest.raises(StylemuseError, match=r"neon.*'a griffin in neon style'"):
        prompts.reference_subjects({"neon": "a griffin in neon style"})
    with pytest.raises(StylemuseError, match="none has a truth"):
        prompts.reference_subjects({"other": "a thing"})


def test_the_truth_is_nearer_than_another_look(untrained: Judge) -> None:
    """Drawings of the world in the place of a model's: right ones, and the same subjects flat on white."""
    world, jobs = World(), prompts.styled_jobs(REFERENCES, 9, seed=0)
    right = [world.picture(job.subject, job.look, pictures.POSES[1]) for job in jobs]
    wrong = [world.picture(job.subject, Look("flat", None, "white", "plain")) for job in jobs]
    outcomes = pictures.judge_styled(untrained, jobs, right, wrong)
    assert [outcome["style"] for outcome in outcomes] == [job.style for job in jobs]
    assert all(outcome["distance"] < 0.01 < outcome["distance_untuned"] for outcome in outcomes)
    found = pictures.summary(outcomes)
    assert found["nearer"] == 1.0
    assert pictures.summary(pictures.judge_styled(untrained, jobs, wrong, right))["nearer"] == 0.0


def test_summary_counts() -> None:
    asked = {"paper": {"truth": "red", "named": "red"}, "extra": {"truth": "grid", "named": "glow"}}
    outcomes = [
        {"subject": "fox", "named": "fox", "asked": asked},
        {"subject": "fox", "named": "owl", "asked": {}},
        {"subject": "owl", "named": "owl", "asked": {"paper": {"truth": "red", "named": "red"}}},
        {"subject": "key", "named": "key", "asked": {}},
    ]
    found = pictures.summary(outcomes)
    assert found == {
        "pictures": 4,
        "subject": 0.75,
        "subject_interval": pictures.interval(3, 4),
        "look": pytest.approx(2 / 3, abs=1e-4),
    }


@pytest.mark.parametrize(("hits", "of"), [(160, 200), (0, 20), (33, 33), (1, 3)])
def test_intervals_are_wilsons(hits: int, of: int) -> None:
    expected = binomtest(hits, of).proportion_ci(method="wilson")
    assert pictures.interval(hits, of) == pytest.approx((expected.low, expected.high), abs=2e-4)


def test_sheet_has_a_cell_per_picture() -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 32), "blue")
    sheet = contact_sheet(["one", "two"], [Row("first", [red, None]), Row("second", [None, blue])], zoom=1)
    colours = sheet.getcolors(1 << 20)
    assert colours is not None
    counts = {colour: count for count, colour in colours}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 64 * 64


def test_a_run_from_end_to_end(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    untrained: Judge,
) -> None:
    model, judge = tmp_path / "tiny", tmp_path / "judge.safetensors"
    shutil.copytree(tiny_model, model)
    Image.new("RGB", (32, 32), "teal").save(model / "styles" / "neon" / "reference.png")
    save_file({name: value.contiguous() for name, value in untrained.state_dict().items()}, judge)
    monkeypatch.setattr(pictures, "accuracy", lambda _: {"subject": 0.97})
    monkeypatch.setattr(pictures, "_SHOWN", ("cat", "owl"))
    out, grid = tmp_path / "found.json", tmp_path / "grid.png"
    monkeypatch.setattr(pictures, "train_judge", lambda path, *, flaws: untrained)
    clean = tmp_path / "clean.safetensors"
    shutil.copyfile(judge, clean)
    pictures.main(f"--model {model} --judge {judge} --clean {clean} --prompts 3 --out {out} --grid {grid}".split())

    text = out.read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(tmp_path) not in text, "places on this machine stay out of the document"
    assert found["command"].startswith("stylemuse bench pictures --model tiny --judge judge.safetensors")
    assert set(found["sha256"]) == {"transformer", "vqvae", "text_encoder"}
    assert set(found["styles"]) == {"neon"}, "of the model's styles the one that has a truth"
    assert found["bars"]["judge"] == {"bar": 0.95, "reached": 0.97, "met": True}
    assert found["bars"]["base"]["reached"] == found["base"]["subject"]
    for part in ("base", "styled"):
        assert found[part]["subject_clean"] == found[part]["subject"], "both files hold the same judge"
    assert found["clean_judge_accuracy"] == {"subject": 0.97}
    assert len(found["outcomes"]["base"]) == len(found["outcomes"]["styled"]) == 3
    assert {"distance", "distance_untuned", "named", "named_untuned"} < set(found["outcomes"]["styled"][0])
    table = capsys.readouterr().out
    assert "all styles" in table
    assert "of 95% asked: met" in table
    with Image.open(grid) as sheet:
        assert sheet.size[0] > 3 * 128
