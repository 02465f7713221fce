"""LoRA on the whole transformer against diffusers with peft: every saved form, and mixed rows of one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel
from diffusers.loaders.lora_pipeline import AmusedLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peers import text_inputs, transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from stylemuse.adapters import lora
from stylemuse.adapters.bank import Bank
from stylemuse.adapters.canonical import Adapter
from stylemuse.adapters.merge import merged
from stylemuse.kernels.rows import RowAdapters, RowSlots
from stylemuse.loading import weights
from stylemuse.models.amused import Amused

ATTENTION = ["to_q", "to_k", "to_v"]
EVERYTHING = [*ATTENTION, "to_out.0", "net.0.proj", "net.2"]
GRID = (5, 7)
TOLERANCE = 1e-5


def adapted(seed: int, name: str = "default", **config: Any) -> UVit2DModel:
    """diffusers' transformer, base weights of seed 0, with a random adapter in it."""
    peer, _ = transformers()
    torch.manual_seed(seed)
    settings = {"r": 5, "lora_alpha": 7, "target_modules": EVERYTHING, "init_lora_weights": False} | config
    peer.add_adapter(LoraConfig(**settings), adapter_name=name)
    return peer


def batch(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    _, ours = transformers()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, ours.config.vocab_size, (rows, *GRID), generator=generator)
    return tokens, text_inputs(ours.config, rows, 6)


@torch.no_grad()
def logits(ours: Amused, rows: int, adapters: RowAdapters | None = None) -> Tensor:
    tokens, inputs = batch(rows)
    features = ours.features(tokens, ours.condition(**inputs, adapters=adapters), adapters)
    return ours.logits(ours.readout(features.flatten(0, 1))).view(rows, *GRID, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def expected(peer: UVit2DModel, rows: int) -> Tensor:
    tokens, inputs = batch(rows)
    result: Tensor = peer(tokens, inputs["text"], inputs["pooled"], inputs["micro"])
    return result


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def through_bank(adapter: Adapter, rows: int = 2) -> Tensor:
    _, ours = transformers()
    bank = Bank(ours.config.sites(), ours.config.bottleneck_sites(), slots=2, rank=8)
    slots = RowSlots(torch.full((rows,), bank.add(adapter)), torch.ones(rows))
    return logits(ours, rows, RowAdapters(slots, bank.sites))


def read(path: Path, **options: Any) -> Adapter:
    _, ours = transformers()
    return lora.read(path, name="ink", sites=ours.config.sites(), **options)


def save_pipeline(peer: UVit2DModel, folder: Path) -> None:
    """As the training script of diffusers does."""
    layers = get_peft_model_state_dict(peer)
    AmusedLoraLoaderMixin.save_lora_weights(str(folder), transformer_lora_layers=layers)


def save_older(peer: UVit2DModel, folder: Path) -> None:
    state = get_peft_model_state_dict(peer).items()
    renamed = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): side for key, side in state}
    save_file({f"unet.{key}": side for key, side in renamed.items()}, folder / "a.safetensors")


def save_kohya(peer: UVit2DModel, folder: Path) -> None:
    state = convert_state_dict_to_kohya({f"unet.{key}": side for key, side in get_peft_model_state_dict(peer).items()})
    # The converter has no alpha to write and takes the rank; kohya's trainer writes the one it trained with.
    trained = {key: torch.tensor(7.0) if key.endswith(".alpha") else side for key, side in state.items()}
    save_file(trained, folder / "a.safetensors")


FORMS: dict[str, tuple[Callable[[UVit2DModel, Path], Any], dict[str, Any]]] = {
    "pipeline": (save_pipeline, {"alpha": 7.0}),
    "save_lora_adapter": (lambda peer, folder: peer.save_lora_adapter(folder), {}),
    "injected": (lambda peer, folder: peer.save_pretrained(folder), {"alpha": 7.0}),
    "older": (save_older, {"alpha": 7.0}),
    "kohya": (save_kohya, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_saved_form_gives_pefts_logits(tmp_path: Path, form: str) -> None:
    peer = adapted(3)
    save, options = FORMS[form]
    save(peer, tmp_path)
    if form == "injected":
        options = options | {"base_weights": transformers()[0].state_dict()}
    reference = expected(peer, 2)
    assert distance(reference, expected(transformers()[0], 2)) > 0.1, "the adapter must matter"
    assert distance(through_bank(read(tmp_path, **options)), reference) <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"transformer_layers.1.attn1.to_q": 2}, "alpha_pattern": {"to_v": 3, "attn2.to_k": 11}},
        {"target_modules": ATTENTION},
    ],
    ids=["rslora", "patterns", "attention only"],
)
def test_peft_folders_give_pefts_logits(tmp_path: Path, config: dict[str, Any]) -> None:
    peer, _ = transformers()
    torch.manual_seed(3)
    settings = {"r": 5, "lora_alpha": 7, "target_modules": EVERYTHING, "init_lora_weights": False} | config
    wrapped = get_peft_model(peer, LoraConfig(**settings))
    wrapped.save_pretrained(str(tmp_path))
    assert distance(through_bank(read(tmp_path)), expected(peer, 2)) <= TOLERANCE


@pytest.mark.parametrize(("recipe", "alpha"), [("amused-256", 8.0), ("amused-512", 0.25)])
def test_recipes_give_back_what_was_trained(tmp_path: Path, recipe: str, alpha: float) -> None:
    """The published training commands have alpha / r = 2 and 1/16; diffusers reloads their files with 1."""
    peer = adapted(3, r=4, lora_alpha=alpha, target_modules=ATTENTION)
    save_pipeline(peer, tmp_path)
    assert distance(through_bank(read(tmp_path, recipe=recipe)), expected(peer, 2)) <= TOLERANCE
    assert distance(through_bank(read(tmp_path, alpha=4.0)), expected(peer, 2)) > 100 * TOLERANCE


def test_mixed_rows_in_one_batch(tmp_path: Path) -> None:
    """Two LoRAs of different rank and targets, one at half strength, and base rows, against one diffusers run each."""
    first, second = adapted(3), adapted(4, r=3, lora_alpha=6, target_modules=ATTENTION)
    for name, peer in (("first", first), ("second", second)):
        peer.save_lora_adapter(tmp_path / name)
    _, ours = transformers()
    sites = ours.config.sites()
    bank = Bank(sites, ours.config.bottleneck_sites(), slots=4, rank=8)
    a, b = (bank.add(lora.read(tmp_path / name, name=name, sites=sites)) for name in ("first", "second"))
    slots, scales = [a, -1, b, a, -1, b], [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    result = logits(ours, 6, RowAdapters(RowSlots(torch.tensor(slots), torch.tensor(scales)), bank.sites))

    by_first, by_second = expected(first, 6), expected(second, 6)
    first.set_adapters(["default"], [0.5])
    by_half = expected(first, 6)
    for row, reference in enumerate((by_first, None, by_second, by_half, None, by_second)):
        if reference is not None:
            assert distance(result[row], reference[row]) <= TOLERANCE
    plain = logits(ours, 6)
    assert torch.equal(result[[1, 4]], plain[[1, 4]])
    nobody = RowAdapters(RowSlots(torch.full((6,), -1), torch.ones(6)), bank.sites)
    assert torch.equal(logits(ours, 6, nobody), plain)


def test_swapping_is_exact(tmp_path: Path) -> None:
    adapted(3).save_lora_adapter(tmp_path / "a")
    adapted(4, r=8).save_lora_adapter(tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    _, ours = transformers()
    bank = Bank(ours.config.sites(), ours.config.bottleneck_sites(), slots=1, rank=8)
    rows, seen = RowSlots(torch.tensor([0, -1]), torch.ones(2)), []
    for adapter in (a, b, a):
        bank.write(0, adapter)
        seen.append(logits(ours, 2, RowAdapters(rows, bank.sites)))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1]), "the base row does not notice"


def test_merged_weights_give_pefts_logits(tmp_path: Path) -> None:
    peer = adapted(3)
    peer.save_lora_adapter(tmp_path)
    base, ours = transformers()
    weights.load_into(ours, merged(base.state_dict(), read(tmp_path), 1.0), weights.AMUSED)
    assert distance(logits(ours.rest(), 2), expected(peer, 2)) <= TOLERANCE
