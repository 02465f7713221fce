"""The peers of ``stylemuse bench peers``: diffusers' `AmusedPipeline` on a folder, its transformer in many ways.

plain     as loaded, in a number format
compiled  through torch.compile, as the page on aMUSEd in diffusers' documentation recommends; on a GPU with the mode
          "max-autotune", on a CPU with the default one, since the others are about CUDA graphs
peft      with LoRAs from PEFT: one for all rows, or one per row (``adapter_names``)
onnx      exported by ``torch.onnx.export`` and run by ONNX Runtime, fp32 or with dynamic int8 weights per channel

The pipeline around the transformer is always diffusers' own, so a step is its forward, its guidance and its scheduler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stylemuse.adapters.canonical import Adapter
from stylemuse.adapters.formats import pack


def package(name: str) -> Any:
    """A package of the ``dev`` extra, which has no types to check by."""
    return import_module(name)


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a model's folder."""
    pipe = package("diffusers").AmusedPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return pipe


class Transformer(nn.Module):
    """What a pipeline asks of its transformer, answered by a function of (tokens, text, pooled, micro-conditions)."""

    def __init__(self, original: Any, answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = original.config, original.dtype, original.device
        self.answer = answer

    def forward(
        self,
        tokens: Tensor,
        encoder_hidden_states: Tensor,
        pooled_text_emb: Tensor,
        micro_conds: Tensor,
        cross_attention_kwargs: None = None,
    ) -> Tensor:
        return self.answer(tokens, encoder_hidden_states, pooled_text_emb, micro_conds)


def compile_transformer(pipe: Any, device: torch.device) -> None:
    """Compile in place; the first call takes minutes at full size."""
    mode = "max-autotune" if device.type == "cuda" else "default"
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, mode=mode, fullgraph=True, dynamic=False)


def with_loras(transformer: Any, adapters: Sequence[Adapter]) -> Any:
    """A transformer in a `PeftModel` that holds these, none of them chosen."""
    peft = package("peft")
    made = None
    with tempfile.TemporaryDirectory() as folder:
        for adapter in adapters:
            place = Path(folder) / adapter.name
            place.mkdir()
            for name, data in pack(adapter, "peft").items():
                (place / name).write_bytes(data)
            if made is None:
                made = peft.PeftModel.from_pretrained(transformer, place, adapter_name=adapter.name)
            else:
                made.load_adapter(place, adapter_name=adapter.name)
    assert made is not None, "no adapter was given"
    return made.eval().requires_grad_(False).to(transformer.dtype)


def export_onnx(pipe: Any, path: Path, *, rows: int) -> None:
    """The transformer as torch.onnx.export writes it, fp32, for this many rows; weights in a file beside it."""
    config = pipe.transformer.config
    side = config.sample_size
    example = (
        torch.zeros(rows, side, side, dtype=torch.int64),
        torch.zeros(rows, pipe.tokenizer.model_max_length, config.encoder_hidden_size),
        torch.zeros(rows, config.cond_embed_dim),
        torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]]).repeat(rows, 1),
    )
    torch.onnx.export(
        pipe.transformer,
        example,
        path,
        input_names=["tokens", "text", "pooled", "micro"],
        output_names=["logits"],
        dynamo=True,
        external_data=True,
        verbose=False,
    )


def quantize_onnx(source: Path, target: Path) -> None:
    """Dynamic int8: signed weights per channel on the matrix products, activations as they come.

    The weights have seven bits, or CPUs without VNNI would compute something else; it is as fast.
    """
    onnx, quantization = package("onnx"), package("onnxruntime.quantization")
    model = onnx.load(source)
    # The exporter's shapes contradict what the quantizer infers, and it stops at that; they are optional.
    model.graph.ClearField("value_info")
    quantization.quantize_dynamic(
        model,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )


def onnx_answer(path: Path) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The transformer's answer from an exported graph, on as many threads as torch has."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def answer(*inputs: Tensor) -> Tensor:
        feeds = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return answer
