"""``stylemuse.load``: a pipeline for a model, whatever it runs on."""

from __future__ import annotations

from pathlib import Path

from .core import StylemuseError
from .pipeline import Pipeline


def load(
    name: str = "demo",
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    slots: int = 64,
    rank: int = 32,
) -> Pipeline:
    """A pipeline for a model, with the styles that come with it.

    Args:
        name: "demo" (embedded), a folder in diffusers layout, a hub id, or a folder that ``stylemuse export`` wrote.
        backend: "auto", "reference", "triton" (the same networks with Triton kernels, on a GPU), or "onnx", which is
            what an exported folder always runs on.
        device, dtype: None chooses by what the machine has; ``explain()`` tells why.
        quantization: "int8" or "fp8" for weights and activations of the transformer layers in 8 bits, which changes
            pictures a little (``explain()``, ``stylemuse bench quantization``); None for none.
        variant, revision: of a hub id's files, say "fp16"; the commit is pinned for the published aMUSEd models.
        slots, rank: how many adapters can be resident at once, and their largest rank.

    Raises:
        StylemuseError: an unknown model, backend, device, dtype or quantization, or a folder that is not complete.
    """
    exported = (Path(name).expanduser() / "manifest.json").is_file()
    if exported and backend not in ("auto", "onnx"):
        raise StylemuseError(f"{name!r} is an exported folder, which needs backend 'onnx', not {backend!r}")
    if exported or backend == "onnx":
        if quantization is not None:
            raise StylemuseError(
                f"quantization {quantization!r} is not for backend 'onnx'; export with --precision int8 instead"
            )
        from .export.run.loading import load_onnx

        return load_onnx(name, device=device, dtype=dtype, variant=variant, revision=revision, slots=slots, rank=rank)
    from .loading.assembly import load_model

    return load_model(
        name, backend=backend, device=device, dtype=dtype, quantization=quantization, variant=variant,
        revision=revision, slots=slots, rank=rank,
    )  # fmt: skip
