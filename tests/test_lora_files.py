"""adapters/lora.py: every published file form, and every bad file refused with one line."""

from __future__ import annotations

import json
import math
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from stylemuse.adapters import lora
from stylemuse.adapters.bank import Bank
from stylemuse.adapters.canonical import Adapter
from stylemuse.core import StylemuseError
from stylemuse.kernels.rows import Site

MODULES = {
    "down_block.attention_blocks.0.attn1.to_q": (6, 6),
    "transformer_layers.0.attn1.to_q": (8, 8),
    "transformer_layers.0.attn1.to_v": (8, 8),
    "transformer_layers.10.attn2.to_out.0": (8, 8),
    "transformer_layers.10.ff.net.0.proj": (8, 24),
}
SITES = {name: Site(name, 0, 1, inputs, outputs) for name, (inputs, outputs) in MODULES.items()}
RANKS = {name: 2 + (index == 1) for index, name in enumerate(MODULES)}
ALPHA = 5.0


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def pair(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)

    return {name: pair(*sizes, RANKS[name]) for name, sizes in MODULES.items()}


def keyed(down: str, up: str, name: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The pairs under a form's names; `down` and `up` hold {} for the module."""
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs().items():
        for pattern, side in zip((down, up), pair, strict=True):
            tensors[pattern.format(name(module))] = side
    return tensors


def base_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": torch.randn(*size[::-1], generator=generator) for name, size in MODULES.items()}
    return {**weights, "embed.weight": torch.randn(9, 4, generator=generator)}


def config(**changes: Any) -> dict[str, Any]:
    ranks = {name: rank for name, rank in RANKS.items() if rank != 2}
    numbers = {"r": 2, "lora_alpha": ALPHA, "rank_pattern": ranks, "alpha_pattern": {}}
    rest = {"peft_type": "LORA", "bias": "none", "use_dora": False, "target_modules": ["to_q"], "megatron_core": "m"}
    return numbers | rest | changes


def peft_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = keyed("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    return folder


def underscored(module: str) -> str:
    return module.replace(".", "_")


def kohya() -> dict[str, Tensor]:
    tensors = keyed("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", underscored)
    return tensors | {f"lora_unet_{underscored(name)}.alpha": torch.tensor(ALPHA) for name in MODULES}


def processors() -> dict[str, Tensor]:
    """The oldest diffusers form, which only the projections of attentions have."""
    tensors = {}
    for module, (down, up) in pairs().items():
        attention, _, leaf = module.removesuffix(".0").rpartition(".")
        if "ff" not in module:
            tensors[f"unet.{attention}.processor.{leaf}_lora.down.weight"] = down
            tensors[f"unet.{attention}.processor.{leaf}_lora.up.weight"] = up
    return tensors


def injected(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = keyed("{}.lora_A.default.weight", "{}.lora_B.default.weight")
    for name, weight in base_weights().items():
        module = name.removesuffix(".weight")
        tensors[f"{module}.base_layer.weight" if module in MODULES else name] = weight.to(dtype)
    return tensors


FORMS: dict[str, Callable[[], Mapping[str, Tensor]]] = {
    "diffusers": lambda: keyed("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "injected": lambda: keyed("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "injected with its base": injected,
    "injected with its base in half": lambda: injected(torch.bfloat16),
    "older": lambda: keyed("{}.lora.down.weight", "{}.lora.up.weight"),
    "older under unet": lambda: keyed("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "processors": processors,
}


def read(path: Path, **options: Any) -> Adapter:
    return lora.read(path, name="ink", sites=SITES, **options)


def check(adapter: Adapter, factor: Callable[[int], float]) -> None:
    expected = pairs()
    assert adapter.tensors.keys() <= expected.keys()
    for site, (down, up) in adapter.tensors.items():
        assert torch.equal(down, expected[site][0])
        torch.testing.assert_close(up, expected[site][1] * factor(RANKS[site]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_forms_without_alpha(tmp_path: Path, form: str) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(dict(FORMS[form]()), file)
    weights = base_weights()
    adapter = read(tmp_path, alpha=ALPHA, base_weights=weights)
    check(adapter, lambda rank: ALPHA / rank)
    assert len(adapter.tensors) == (4 if form == "processors" else 5)
    check(read(file, recipe="amused-256", base_weights=weights), lambda rank: 2.0)
    check(read(file, recipe="amused-512", base_weights=weights), lambda rank: 1 / 16)
    with pytest.raises(StylemuseError, match=r"does not store alpha; give alpha=..., or recipe= one of amused-256"):
        read(file, base_weights=weights)
    with pytest.raises(StylemuseError, match="alpha is given by alpha and recipe"):
        read(file, alpha=1.0, recipe="amused-256", base_weights=weights)


def test_kohya(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    save_file(kohya(), file)
    check(read(file), lambda rank: ALPHA / rank)
    with pytest.raises(StylemuseError, match="alpha is given by its alpha tensors and alpha"):
        read(file, alpha=ALPHA)


def test_peft_folder(tmp_path: Path) -> None:
    check(read(peft_folder(tmp_path / "plain")), lambda rank: ALPHA / rank)
    check(read(peft_folder(tmp_path / "stable", use_rslora=True)), lambda rank: ALPHA / math.sqrt(rank))
    alphas = {"^transformer_layers.0.attn1.to_q": 1.0, "to_v": 7.0}
    adapter = read(peft_folder(tmp_path / "patterns", alpha_pattern=alphas))
    expected = pairs()
    for site, alpha in (("transformer_layers.0.attn1.to_q", 1.0), ("transformer_layers.0.attn1.to_v", 7.0)):
        torch.testing.assert_close(adapter.tensors[site][1], expected[site][1] * alpha / RANKS[site])
    with pytest.raises(StylemuseError, match="alpha is given by its PEFT config and recipe"):
        read(tmp_path / "plain", recipe="amused-256")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_header_metadata(tmp_path: Path, prefix: str) -> None:
    header = {prefix + key: value for key, value in config().items()}
    tensors = keyed(prefix + "{}.lora_A.weight", prefix + "{}.lora_B.weight")
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    check(read(tmp_path), lambda rank: ALPHA / rank)


def test_half_precision_is_kept_exactly(tmp_path: Path) -> None:
    save_file({key: tensor.half() for key, tensor in kohya().items()}, tmp_path / "a.safetensors")
    for site, (down, up) in read(tmp_path).tensors.items():
        assert down.dtype == up.dtype == torch.float32
        assert torch.equal(down, pairs()[site][0].half().float())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"bias": "all"}, "options bias are not supported"),
        ({"layer_replication": [[0, 2]]}, "options layer_replication"),
        ({"of_the_future": 1}, "options of_the_future"),
        ({"r": 3}, "has rank 2 but its config says 3"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0, not None"),
        ({"lora_alpha": float("nan")}, "not valid JSON"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "not a plain module name"),
        ({"alpha_pattern": {"to_q": True}}, "must be a number"),
        ({"alpha_pattern": [1]}, "must be an object"),
        ({"base_model_name_or_path": "amused/amused-512"}, "trained on amused/amused-512; this model is x/amused-256"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StylemuseError, match=words):
        read(peft_folder(tmp_path / "a", **changes), base_model="x/amused-256")


def add(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda flat: flat.update({key.replace("__", "."): tensor for key, tensor in tensors.items()})


def drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(flat: dict[str, Tensor]) -> None:
        del flat[key]

    return change


Q = "transformer_layers.0.attn1.to_q"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "unknown key": (add(stray__weight=torch.ones(1)), "tensors of no known LoRA form: stray.weight"),
    "bias": (lambda flat: flat.update({f"{Q}.lora_B.bias": torch.ones(8)}), "no known LoRA form"),
    "no up": (drop(f"transformer.{Q}.lora_B.weight"), f"{Q} has no up tensor"),
    "no down": (drop(f"transformer.{Q}.lora_A.weight"), f"{Q} has no down tensor"),
    "other module": (add(norm__lora_A__weight=torch.ones(1, 8)), "adapts norm, which this model cannot adapt"),
    "wrong inputs": (lambda flat: flat.update({f"transformer.{Q}.lora_A.weight": torch.ones(3, 9)}), "has pairs"),
    "wrong rank": (lambda flat: flat.update({f"transformer.{Q}.lora_B.weight": torch.ones(8, 2)}), "needs \\(r, 8\\)"),
    "convolution": (lambda flat: flat.update({f"transformer.{Q}.lora_A.weight": torch.ones(3, 8, 1, 1)}), "has pairs"),
    "rank 0": (lambda flat: flat.update({f"transformer.{Q}.lora_A.weight": torch.ones(0, 8)}), "has pairs"),
    "NaN": (lambda flat: flat[f"transformer.{Q}.lora_A.weight"].fill_(torch.nan), "holds NaN or infinity"),
    "Inf": (lambda flat: flat[f"transformer.{Q}.lora_B.weight"][0].fill_(torch.inf), "holds NaN or infinity"),
    "integers": (lambda flat: flat.update({f"transformer.{Q}.lora_A.weight": torch.ones(3, 8).to(torch.uint8)}), "U8"),
    "DoRA": (lambda flat: flat.update({f"{Q}.lora_magnitude_vector": torch.ones(8)}), "is DoRA"),
    "LoHa": (lambda flat: flat.update({f"{Q}.hada_w1_a": torch.ones(8)}), "is LoHa"),
    "text encoder": (add(text_encoder__a__lora_A__weight=torch.ones(1, 1)), "adapts the text encoder"),
    "kohya text encoder": (add(lora_te_a__lora_down__weight=torch.ones(1, 1)), "adapts the text encoder"),
    "one alpha of five": (lambda flat: flat.update({f"{Q}.alpha": torch.tensor(1.0)}), "is given by|have no alpha"),
    "twice": (lambda flat: flat.update({f"{Q}.lora.down.weight": torch.ones(3, 8)}), "twice"),
    "twice under another name": (lambda flat: flat.update({f"{Q}.lora_A.b.weight": torch.ones(3, 8)}), "twice"),
    "huge": (lambda flat: flat[f"transformer.{Q}.lora_B.weight"].fill_(3e38), "NaN or infinity"),
    "two lines": (lambda flat: flat.update({"a\nb": torch.ones(1)}), "must be printable"),
    "nothing": (lambda flat: flat.clear(), "holds no LoRA tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_line_and_change_nothing(tmp_path: Path, case: str) -> None:
    bank = Bank(SITES, {}, slots=2, rank=4)
    slot = bank.add(Adapter("old", "lora", {Q: (torch.ones(1, 8), torch.ones(8, 1))}))
    before = [bytes(site.up.numpy().tobytes()) for site in bank.sites.values()]
    flat = dict(FORMS["diffusers"]())
    break_it, words = BAD[case]
    break_it(flat)
    save_file(flat, tmp_path / "a.safetensors")
    with pytest.raises(StylemuseError, match=words) as caught:
        bank.add(read(tmp_path, alpha=ALPHA))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert [bytes(site.up.numpy().tobytes()) for site in bank.sites.values()] == before
    assert bank.adapter(slot).name == "old"


@pytest.mark.parametrize("change", ["value", "shape", "name", "not given"])
def test_an_injected_save_of_another_model_is_refused(tmp_path: Path, change: str) -> None:
    weights: dict[str, Tensor] | None = base_weights()
    assert weights is not None
    if change == "value":
        weights["embed.weight"][0, 0] += 0.01
    if change == "shape":
        weights["embed.weight"] = weights["embed.weight"][:5]
    if change == "name":
        del weights["embed.weight"]
    save_file(injected(), tmp_path / "a.safetensors")
    words = {"not given": "holds base weights too", "name": "neither a LoRA tensor nor a weight of the base model"}
    with pytest.raises(StylemuseError, match=words.get(change, "embed.weight differs from this base model")):
        read(tmp_path, alpha=1.0, base_weights=None if change == "not given" else weights)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {key.replace("default", "b") if Q in key else key: side for key, side in FORMS["injected"]().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(StylemuseError, match=r"holds several adapters \(b, default\); one per file is allowed"):
        read(tmp_path, alpha=1.0)


def test_places_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StylemuseError, match=r"holds no \.safetensors file"):
        read(tmp_path)
    with pytest.raises(StylemuseError, match="is missing"):
        read(tmp_path / "nowhere.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(StylemuseError, match="is a pickle, which can run code when read; convert it"):
            read(path)
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=2) * 9)
    with pytest.raises(StylemuseError, match="is a pickle"):
        read(tmp_path)
    save_file(kohya(), tmp_path / "b.safetensors")
    with pytest.raises(StylemuseError, match=r"holds a.safetensors, b.safetensors; one LoRA is allowed"):
        read(tmp_path)
    save_file(kohya(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(StylemuseError, match=r"needs the adapter_config.json"):
        read(tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(StylemuseError, match="is a canonical adapter already"):
        read(tmp_path)


@pytest.mark.parametrize("recipe", ["amused-1024", ""])
def test_unknown_recipes_and_alphas(tmp_path: Path, recipe: str) -> None:
    save_file(dict(FORMS["older"]()), tmp_path / "a.safetensors")
    with pytest.raises(StylemuseError, match="is unknown; allowed are amused-256, amused-512"):
        read(tmp_path, recipe=recipe)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(StylemuseError, match="alpha must be a number above 0"):
            read(tmp_path, alpha=alpha)


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(kohya(), file)
    whole = file.read_bytes()
    with file.open("ab") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(StylemuseError, match="at most 8589934592 are allowed"):
        read(file)
    file.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(StylemuseError, match="truncated or not a safetensors file"):
        read(file)
    for length in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StylemuseError, match=r"truncated|damaged"):
            read(file)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_mutated_files_import_finite_or_fail_clearly(edits: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "a.safetensors"
        save_file(kohya(), file)
        data = bytearray(file.read_bytes())
        for position, new in edits:
            at = position % len(data)
            data[at : at + len(new)] = new
        file.write_bytes(data)
        error = ""
        try:
            assert read(file).tensors.keys() == MODULES.keys()
        except StylemuseError as refusal:
            error = str(refusal)
        assert "\n" not in error
