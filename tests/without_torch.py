"""A program that draws from an exported folder where torch is not installed.

python tests/without_torch.py FOLDER      prints JSON: the tokens of three pictures, and which packages were imported
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from typing import Any

MISSING = ("torch", "triton", "onnx", "safetensors", "huggingface_hub", "diffusers", "transformers", "typer", "scipy")
PRESENT = ("numpy", "onnxruntime", "tokenizers", "PIL")


class Missing(MetaPathFinder):
    """Finds that these packages are not there."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    sys.meta_path.insert(0, Missing())
    import stylemuse as sm

    pipe = sm.load(sys.argv[1])
    seen: list[int] = []
    results = pipe.run(
        [
            sm.Request("a fox", style="ink", seed=5, n=2),
            sm.Request("a cat", style={"ink": 0.5, "neon": 0.5}, seed=6, sampling=sm.Sampling(schedule="styledrop")),
        ],
        on_step=lambda preview: seen.append(int((preview.tokens(0) == 69).sum())),
    )
    again = pipe.generate("a fox", image=results[0].images[0], strength=0.5, seed=7)
    found = {
        "tokens": [result.tokens.tolist() for result in (*results, again)],
        "seeds": [list(result.seeds) for result in results],
        "masked": seen,
        "explain": pipe.explain(),
        "packages": sorted({name.partition(".")[0] for name in sys.modules} & {*MISSING, *PRESENT}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
