"""Safetensors in every published arrangement, and loading that is complete or names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stylemuse.core import StylemuseError
from stylemuse.loading.weights import AMUSED, CLIP_TEXT, VQ, Table, load_into, read, to_checkpoint
from stylemuse.models.text import ClipText, ClipTextConfig

TEXT = {
    "vocab_size": 31,
    "hidden_size": 15,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 7,
    "max_position_embeddings": 9,
    "eos_token_id": 30,
}


class Names(nn.Module):
    """A module that holds tensors under any dotted names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))


def text_tower() -> ClipText:
    return ClipText(ClipTextConfig(**TEXT))


def text_checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_text_names_are_transformers_and_back() -> None:
    checkpoint = text_checkpoint()
    tower = text_tower()
    load_into(tower, checkpoint, CLIP_TEXT)
    fused = tower.layers[1].attention.qkv.bias
    parts = [checkpoint[f"text_model.encoder.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(fused, torch.cat(parts))
    assert same(to_checkpoint(tower, CLIP_TEXT), checkpoint)


def test_text_files_may_leave_out_the_prefix_and_carry_position_ids() -> None:
    checkpoint = text_checkpoint()
    tower = text_tower()
    short = {name.removeprefix("text_model."): tensor for name, tensor in checkpoint.items()}
    assert short.keys() >= CLIPTextModel(CLIPTextConfig(**TEXT)).state_dict().keys()
    for buffer in ("embeddings.position_ids", "text_model.embeddings.position_ids"):
        load_into(tower, short | {buffer: torch.arange(9)[None]}, CLIP_TEXT)
        assert same(to_checkpoint(tower, CLIP_TEXT), checkpoint)
    with pytest.raises(StylemuseError, match="1 tensors are there twice, with and without 'text_model"):
        load_into(tower, checkpoint | {"final_layer_norm.bias": torch.zeros(15)}, CLIP_TEXT)


def test_saved_text_folders_are_read(tmp_path: Path) -> None:
    model = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB", variant="fp16")
    expected = dict(model.state_dict())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert same(read(tmp_path / "plain"), expected)
    assert same(read(tmp_path / "variant", variant="fp16"), expected)
    assert same(read(tmp_path / "sharded", variant="fp16"), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "4KB"])
def test_saved_diffusers_folders_are_read(tmp_path: Path, variant: str | None, size: str) -> None:
    model = VQModel(block_out_channels=(16,), norm_num_groups=4, num_vq_embeddings=9, latent_channels=3)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "4KB")
    tensors = read(tmp_path, variant=variant)
    assert same(tensors, dict(model.state_dict()))
    module = Names(tensors)
    load_into(module, tensors, VQ)
    assert same(to_checkpoint(module, VQ), tensors)


@pytest.mark.parametrize("resampled", [False, True])
def test_amused_names_are_diffusers_and_back(resampled: bool) -> None:
    peer, ours = peers.transformers(downsample=resampled, upsample=resampled)
    checkpoint = dict(peer.state_dict())
    assert same(to_checkpoint(ours, AMUSED), checkpoint)
    state = ours.state_dict()
    for site, parts in {
        "transformer_layers.1.attn1.qkv": ("to_q", "to_k", "to_v"),
        "transformer_layers.1.attn2.kv": ("to_k", "to_v"),
        "down_block.attention_blocks.1.attn1.kv": ("to_k", "to_v"),
    }.items():
        block = site.rpartition(".")[0]
        assert torch.equal(state[f"{site}.weight"], torch.cat([checkpoint[f"{block}.{part}.weight"] for part in parts]))


def test_vq_names_are_diffusers() -> None:
    peer, ours = peers.tokenizers()
    assert same(to_checkpoint(ours, VQ), dict(peer.state_dict()))


def test_to_checkpoint_gives_copies_that_safetensors_saves(tmp_path: Path) -> None:
    tower = text_tower()
    saved = to_checkpoint(tower, CLIP_TEXT)
    before = {name: tensor.clone() for name, tensor in saved.items()}
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(1.0)
    assert same(saved, before)
    save_file(saved, tmp_path / "model.safetensors")
    assert same(read(tmp_path), before)


def test_a_module_on_meta_takes_the_tensors_as_they_are() -> None:
    checkpoint = {name: tensor.half() for name, tensor in text_checkpoint().items()}
    with torch.device("meta"):
        tower = text_tower()
    load_into(tower, checkpoint, CLIP_TEXT)
    assert all(parameter.dtype == torch.float16 and not parameter.is_meta for parameter in tower.parameters())
    elsewhere = text_tower()
    load_into(elsewhere, checkpoint, CLIP_TEXT)
    assert all(parameter.dtype == torch.float32 for parameter in elsewhere.parameters())


def test_missing_and_unused_tensors_are_named_and_nothing_is_changed() -> None:
    tower = text_tower()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    checkpoint = text_checkpoint()
    del checkpoint["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    for number in range(6):
        checkpoint[f"extra.{number}"] = torch.zeros(1)
    with pytest.raises(StylemuseError) as caught:
        load_into(tower, checkpoint, CLIP_TEXT, source="text_encoder")
    assert str(caught.value) == (
        "text_encoder: missing text_model.encoder.layers.1.self_attn.k_proj.bias; "
        "not used extra.0, extra.1, extra.2, extra.3 and 2 more"
    )
    assert same(dict(tower.state_dict()), before)


def test_a_wrong_shape_is_named() -> None:
    checkpoint = text_checkpoint()
    name = "text_model.encoder.layers.0.self_attn.v_proj.weight"
    checkpoint[name] = torch.zeros(15, 14)
    with pytest.raises(StylemuseError, match=rf"tensor {name} has shape \(15, 14\); \(15, 15\) is needed"):
        load_into(text_tower(), checkpoint, CLIP_TEXT)


def test_scalars_pass_through() -> None:
    module = Names({"temperature": torch.tensor(0.0)})
    load_into(module, {"temperature": torch.tensor(2.5)}, Table())
    assert to_checkpoint(module, Table())["temperature"].item() == 2.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_numbers_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 5, dtype=dtype)
    bad[1, 2] = value
    tensors = {"good": torch.ones(2), "empty": torch.zeros(0, 3), "whole": torch.ones(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read(tmp_path / "model.safetensors").keys() == tensors.keys()
    save_file(tensors | {"layer.bad": bad}, tmp_path / "model.safetensors")
    with pytest.raises(StylemuseError, match=r"tensor layer\.bad holds NaN or infinity"):
        read(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StylemuseError, match="it holds no safetensors file"):
        read(tmp_path)
    with pytest.raises(StylemuseError, match=r"model\.safetensors: no such file"):
        read(tmp_path / "model.safetensors")
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(StylemuseError, match=r"model\.bin: not supported; allowed: \*\.safetensors"):
        read(tmp_path / "model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 cut short")
    with pytest.raises(StylemuseError, match="cannot be read as safetensors"):
        read(tmp_path)


def test_a_variant_is_never_guessed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(StylemuseError, match=r"or model\.safetensors; it holds model\.fp16\.safetensors"):
        read(tmp_path)
    with pytest.raises(StylemuseError, match="variant 'fp16' given for a file"):
        read(tmp_path / "model.fp16.safetensors", variant="fp16")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            {"a": "one.safetensors", "b": "../one.safetensors"},
            r"'\.\./one\.safetensors' is not a plain file name",
        ),
        ({"a": "one.safetensors", "c": "one.safetensors"}, r"it and one\.safetensors do not agree about b, c"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, r"it and one\.safetensors do not agree about b"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors: no such file"),
        (["a"], "not an index of safetensors shards"),
        (None, "not an index of safetensors shards"),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path: Path, listed: object, message: str) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    content = {"weight_map": listed} if listed is not None else {}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StylemuseError, match=message):
        read(tmp_path)
