"""adapters/formats.py: what is written is read back by us, by peft and by diffusers, at the same strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peers import text_inputs, transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stylemuse.adapters import lora
from stylemuse.adapters.bank import Bank
from stylemuse.adapters.canonical import Adapter
from stylemuse.adapters.formats import FORMATS, pack
from stylemuse.core import StylemuseError
from stylemuse.kernels.rows import RowAdapters, RowSlots, Site

GRID = (5, 7)
TOLERANCE = 1e-5
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def sites() -> dict[str, Site]:
    return transformers()[1].config.sites()


def style(*, scale: float = 1.0, mixed: bool = True, name: str = "ink") -> Adapter:
    """A strong LoRA on every linear layer, of rank 3, where mixed of 2 to 4."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for index, (site, place) in enumerate(sites().items()):
        assert site.endswith(LINEAR)
        rank = 2 + index % 7 % 3 if mixed else 3
        down = torch.randn(rank, place.inputs, generator=generator) * place.inputs**-0.5
        tensors[site] = down, torch.randn(place.outputs, rank, generator=generator) * 0.3
    return Adapter(name=name, kind="lora", tensors=tensors, base_model="org/tiny", scale=scale)


def written(files: Mapping[str, bytes], folder: Path) -> Path:
    """The packed files, written; the path of the tensors."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / next(name for name in files if name.endswith(".safetensors"))


def batch(rows: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    _, ours = transformers()
    tokens = torch.randint(0, ours.config.vocab_size, (rows, *GRID), generator=torch.Generator().manual_seed(1))
    return tokens, text_inputs(ours.config, rows, 6)


@torch.no_grad()
def expected(adapter: Adapter) -> Tensor:
    """Our logits with the adapter at its default strength."""
    _, ours = transformers()
    tokens, inputs = batch()
    bank = Bank(sites(), {}, slots=1, rank=8)
    slots = RowSlots(torch.full((2,), bank.add(adapter)), torch.full((2,), adapter.scale))
    rows = RowAdapters(slots, bank.sites)
    features = ours.features(tokens, ours.condition(**inputs, adapters=rows), rows)
    return ours.logits(ours.readout(features.flatten(0, 1))).view(2, *GRID, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def peers_logits(peer: Any) -> Tensor:
    tokens, inputs = batch()
    result: Tensor = peer(tokens, inputs["text"], inputs["pooled"], inputs["micro"])
    return result


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5, 0.0])
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("form", FORMATS)
def test_we_read_back_every_bit(tmp_path: Path, form: str, mixed: bool, scale: float) -> None:
    adapter = style(scale=scale, mixed=mixed)
    back = lora.read(written(pack(adapter, form), tmp_path), name="ink", sites=sites(), base_model="other/tiny")
    assert back.scale == 1.0
    assert back.tensors.keys() == adapter.tensors.keys()
    for site, (down, up) in adapter.tensors.items():
        assert torch.equal(back.tensors[site][0], down)
        assert torch.equal(back.tensors[site][1], up * scale)


@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
def test_peft_loads_it_at_the_right_strength(tmp_path: Path, mixed: bool, scale: float) -> None:
    adapter = style(scale=scale, mixed=mixed)
    written(pack(adapter, "peft"), tmp_path)
    peer, _ = transformers()
    base = peers_logits(peer)
    result = peers_logits(PeftModel.from_pretrained(peer, str(tmp_path)))
    assert distance(result, base) > 0.1, "the adapter must matter"
    assert distance(result, expected(adapter)) <= TOLERANCE


@pytest.mark.parametrize("header", [True, False], ids=["with its header", "header lost"])
@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
def test_diffusers_loads_it_at_the_right_strength(tmp_path: Path, mixed: bool, scale: float, header: bool) -> None:
    adapter = style(scale=scale, mixed=mixed)
    file = written(pack(adapter, "diffusers"), tmp_path)
    if not header:  # what a program does that loads and saves the tensors alone
        save_file(load_file(file), file, {"format": "pt"})
    peer, _ = transformers()
    assert isinstance(peer, UVit2DModel)
    peer.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=file.name)
    assert distance(peers_logits(peer), expected(adapter)) <= TOLERANCE


def test_kohya_names_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    adapter = style()
    tensors = load_file(written(pack(adapter, "kohya"), tmp_path))
    plain = {}
    for site, (down, up) in adapter.tensors.items():
        plain |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    assert tensors.keys() == convert_state_dict_to_kohya(plain).keys()
    for site, (down, _) in adapter.tensors.items():
        assert float(tensors[f"lora_unet_{site.replace('.', '_')}.alpha"]) == down.shape[0]


def test_the_alpha_is_stored_where_readers_look(tmp_path: Path) -> None:
    adapter = style()
    with safe_open(written(pack(adapter, "diffusers"), tmp_path), "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    written(pack(adapter, "peft"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for facts in ({key.removeprefix("transformer."): value for key, value in header.items()}, config):
        assert facts["r"] == facts["lora_alpha"]
        assert facts["rank_pattern"] == facts["alpha_pattern"] != {}
    assert config["base_model_name_or_path"] == "org/tiny"


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(StylemuseError, match=r"'gguf' is unknown; allowed: diffusers, peft, kohya"):
        pack(style(), "gguf")
    pair = torch.ones(4, 2), torch.ones(2, 4)
    with pytest.raises(StylemuseError, match="wide is a bottleneck; peft files hold LoRA only"):
        pack(Adapter(name="wide", kind="bottleneck", tensors={"transformer_layers.0.ff": pair}), "peft")
