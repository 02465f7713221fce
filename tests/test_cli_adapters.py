"""tune and adapters: styles tuned, listed, inspected, imported, exported and verified."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Ran, Run, picture, refused
from models import STYLES, random_style, write_tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

import stylemuse
from stylemuse.adapters import canonical
from stylemuse.loading import weights
from stylemuse.models.amused import AmusedConfig
from stylemuse.tuning import style as tuning


def tune(run: Run, model: Path, *options: object) -> Ran:
    line = ("tune", picture(), "--prompt", "a cat in blue style", "--model", model, "--steps", 3, "--batch", 2)
    return run(*line, "--rank", 2, *options)


def test_tune_writes_an_adapter_that_draws(run: Run, tiny_model: Path) -> None:
    ran = tune(run, tiny_model, "--out", "styles/blue", "--style-strength", 0.5, "--seed", 4, "--json").document
    assert sorted(path.name for path in Path("styles/blue").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "reference.png",
    ]
    adapter = canonical.load("styles/blue")
    assert (adapter.name, adapter.descriptor, adapter.rank) == ("blue", "in blue style", 2)
    assert adapter.caption == "a cat in blue style"
    assert adapter.recommended == {"guidance": "StyleDrop", "style": 0.5, "text": 5.0}
    assert ran["sha256"] == adapter.sha256
    assert ran["loss"].keys() == {"first", "last"}
    assert np.array_equal(np.asarray(Image.open("styles/blue/reference.png")), np.asarray(Image.open("reference.png")))

    use = ("--model", tiny_model, "--adapter", "sky=styles/blue", "--style", "sky")
    assert run("generate", "a fox", *use).code == 0
    text = tune(run, tiny_model, "--out", "styles/again", "--name", "b", "--descriptor", "as a print")
    assert "'as a print', rank 2, loss" in text.out
    assert canonical.load("styles/again").name == "b"


def test_tune_refuses_a_full_folder_before_it_begins(run: Run, no_model: None) -> None:
    Path("full").mkdir()
    Path("full/note").touch()
    refused(tune(run, Path(), "--out", "full"), "full exists already")
    refused(tune(run, Path(), "--out", "full/note"), "exists already")
    refused(tune(run, Path(), "--out", "full/note/ink"), "cannot be written")


def test_tune_says_when_the_rate_is_too_high(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_logits", lambda *_: torch.full((1, 2), torch.nan, requires_grad=True))
    monkeypatch.setattr(tuning.F, "cross_entropy", lambda logits, _: logits.sum())
    refused(tune(run, tiny_model, "--out", "ink"), "loss became nan", "--rate")
    assert not Path("ink").exists()


def test_an_interrupt_is_quiet_and_leaves_nothing(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupted)
    assert tune(run, tiny_model, "--out", "ink") == Ran(130, "", "")
    assert sorted(path.name for path in Path().iterdir()) == ["reference.png"]


def test_adapters_list_and_inspect(run: Run, tiny_model: Path) -> None:
    listed = run("adapters", "list", "--model", tiny_model, "--json").document
    assert [entry["name"] for entry in listed["adapters"]] == list(STYLES)
    assert "in neon style" in run("adapters", "list", "--model", tiny_model).out

    ink = tiny_model / "styles" / "ink"
    facts = run("adapters", "inspect", ink, "--model", tiny_model, "--json").document
    adapter, pipe = canonical.load(ink), stylemuse.load(str(tiny_model))
    total = sum(parameter.numel() for parameter in pipe.network.transformer.parameters())
    assert facts["sha256"] == adapter.sha256
    assert facts["share"] == pytest.approx(facts["parameters"] / total)
    assert facts["bytes"] == 4 * sum(down.numel() + up.numel() for down, up in adapter.tensors.values())
    assert facts["modules"]["transformer_layers.0.attn1.to_q"] == {"rank": 2, "shape": [32, 32]}
    text = run("adapters", "inspect", ink, "--model", tiny_model).out
    assert "2 on 24 sites" in text
    assert adapter.sha256 in text
    unknown = run("adapters", "inspect", ink, "--json").document
    assert unknown["share"] is None


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_export_and_import_give_the_adapter_back(run: Run, tiny_model: Path, form: str) -> None:
    source = tiny_model / "styles" / "ink"
    out = "new/ink" if form == "peft" else "new/ink.safetensors"
    ran = run("adapters", "export", source, "--format", form, "--out", out, "--json").document
    assert ran["bytes"] > 0
    refused(run("adapters", "export", source, "--format", form, "--out", out), "exists already")
    line = ("adapters", "import", out, "--name", "ink", "--descriptor", "in ink style", "--model", tiny_model)
    assert run(*line, "--out", "back", "--json").document["name"] == "ink"
    back, adapter = canonical.load("back"), canonical.load(source)
    assert (back.sha256, back.descriptor, back.base_sha256) == (adapter.sha256, adapter.descriptor, None)
    refused(run(*line, "--out", "back"), "exists already")
    refused(run(*line, "--out", "other", "--alpha", 3), "one source is allowed")
    assert run("adapters", "inspect", out, "--model", tiny_model, "--json").document["sha256"] == adapter.sha256


def test_import_needs_the_alpha(run: Run, tiny_model: Path) -> None:
    run("adapters", "export", tiny_model / "styles" / "ink", "--format", "diffusers", "--out", "ink.safetensors")
    save_file(load_file("ink.safetensors"), "bare.safetensors")
    line = ("adapters", "import", "bare.safetensors", "--name", "ink", "--model", tiny_model)
    refused(run(*line, "--out", "a"), "does not store alpha", "amused-256, amused-512")
    refused(run(*line, "--out", "a", "--recipe", "sdxl"), "amused-256, amused-512")
    for folder, option in (("a", ("--alpha", 4)), ("b", ("--recipe", "amused-256"))):
        assert run(*line, "--out", folder, *option).code == 0
    a, b = canonical.load("a"), canonical.load("b")
    assert a.sha256 == b.sha256
    use = ("--adapter", "new=bare.safetensors", "--style", "new", "--model", tiny_model)
    refused(run("generate", "a fox", *use), "does not store alpha")
    assert run("generate", "a fox", *use, "--alpha", 4).code == 0


def test_a_save_with_its_base_says_for_which_weights_it_is(run: Run, tiny_model: Path) -> None:
    adapter = canonical.load(tiny_model / "styles" / "ink")
    tensors = {}
    for site, (down, up) in adapter.tensors.items():
        tensors |= {f"{site}.lora_A.default.weight": down, f"{site}.lora_B.default.weight": up}
    for name, weight in weights.read(tiny_model / "transformer").items():
        site = name.removesuffix(".weight")
        tensors[f"{site}.base_layer.weight" if site in adapter.tensors else name] = weight
    save_file(tensors, "injected.safetensors")
    line = ("adapters", "import", "injected.safetensors", "--name", "ink", "--alpha", 2, "--model", tiny_model)
    assert run(*line, "--out", "back").code == 0
    assert canonical.load("back").base_sha256 == adapter.base_sha256


def test_verify(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    ink = tiny_model / "styles" / "ink"
    ran = run("adapters", "verify", ink, "--model", tiny_model, "--json").document
    assert ran == {"path": str(ink), "ok": True, "fits": str(tiny_model), "same_weights": True}
    assert "sound" in run("adapters", "verify", ink, "--model", tiny_model).out
    refused(run("adapters", "verify", ink), "give --model")
    other = write_tiny_model(tmp_path / "other", seed=1)
    refused(run("adapters", "verify", ink, "--model", other), "made for another base model")
    shutil.copytree(ink, "damaged")
    data = bytearray(Path("damaged/adapter.safetensors").read_bytes())
    data[-1] ^= 1
    Path("damaged/adapter.safetensors").write_bytes(data)
    refused(run("adapters", "verify", "damaged", "--model", tiny_model), "does not match the sha256")
    canonical.save(random_style(AmusedConfig(num_hidden_layers=1), "big"), "big")
    refused(run("adapters", "verify", "big", "--model", tiny_model), "made for another model")
