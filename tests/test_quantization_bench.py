"""``stylemuse bench quantization``: its figures are those of two pipelines, and small where little is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, refused

from stylemuse.bench.step import quantization

RESULTS = Path(__file__).resolve().parent.parent / "bench/results/quantization.json"


def test_a_tiny_model(run: Run, tiny_model: Path) -> None:
    """Two styles and none, two prompts; int8 loses less than fp8, and neither nothing."""
    ran = run("bench", "quantization", "--model", tiny_model, "--prompts", "a fox", "a cat", "--out", "found.json")
    assert ran.code == 0, ran.error
    document = json.loads(ran.out.splitlines()[-1])
    assert document == json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert list(document["results"]) == ["int8", "fp8"]
    for found in document["results"].values():
        assert found["pictures"] == 6
        assert found["tokens"]["of"] == 6 * 64
        assert 0 < found["hidden"]["relative_rms"] < 0.2
        assert found["choices"]["of"] / 2 < found["choices"]["equal"] <= found["choices"]["of"]
    int8, fp8 = (document["results"][name]["hidden"]["relative_rms"] for name in ("int8", "fp8"))
    assert int8 < fp8


def test_nothing_is_lost_between_equals(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = quantization.sm.load
    told = {"quantization": "none"}

    def plain(*arguments: object, **options: object) -> object:
        pipe = load(*arguments, **options | {"quantization": None})
        monkeypatch.setattr(pipe, "explain", lambda: told, raising=False)
        return pipe

    monkeypatch.setattr(quantization.sm, "load", plain)
    found = quantization.losses("int8", str(tiny_model), ["a fox"])
    assert found["hidden"]["max"] == 0
    assert all(found[each]["equal"] == found[each]["of"] > 0 for each in ("choices", "tokens"))


def test_refusals(run: Run) -> None:
    refused(run("bench", "quantization", "--formats", "int4"), "int8")


@pytest.mark.skipif(not RESULTS.exists(), reason=f"no {RESULTS.name}; `stylemuse bench quantization` makes it")
def test_the_committed_figures_are_of_the_embedded_model() -> None:
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert document["model"] == "demo"
    assert document["results"]["int8"]["choices"]["equal"] / document["results"]["int8"]["choices"]["of"] > 0.9
