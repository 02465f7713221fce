"""Draw with ONNX Runtime alone from a folder that `stylemuse export --form bank` wrote; "-" is the base, no style.

pip install onnxruntime numpy tokenizers pillow
python draw.py FOLDER "a fox" STYLE SEED OUT.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

folder, prompt, style, seed, out = Path(sys.argv[1]), *sys.argv[2:]
manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
steps, side = manifest["schedule"], manifest["side"]
count = len(steps["masked_after"])

# Guidance: a picture is a weighted sum of rows, each a prompt in a style's slot (0 is the base) at a scale.
if style == "-":
    scale = manifest["defaults"]["scale"]
    rows = [(scale, prompt, 0, 1.0), (1 - scale, "", 0, 1.0)]
else:
    chosen = manifest["styles"][style]
    prompt, advice = f"{prompt} {chosen['descriptor']}", {"style": 2.0, "text": 5.0} | chosen["recommended"]
    rows = [(1 + advice["style"], prompt, chosen["slot"], chosen["scale"])]
    rows += [(advice["text"] - advice["style"], prompt, 0, 1.0), (-advice["text"], "", 0, 1.0)]
    rows = [row for row in rows if row[0]]
weights, prompts, slots, scales = zip(*rows, strict=True)

feeds = {
    "ids": np.array([each.ids for each in tokenizer.encode_batch(list(prompts))], np.int64),
    "slots": np.array(slots, np.int64),
    "scales": np.array(scales, np.float32),
    "tokens": np.full((1, side, side), manifest["mask_id"], np.int64),
    "branches": np.arange(len(rows), dtype=np.int64)[None],
    "weights": np.tile(np.array(weights, np.float32), (count, 1, 1)),
    "seeds": np.array([int(seed)], np.int64),
    "masked": np.array(steps["masked_after"], np.int64)[:, None],
    "token_temperature": np.array(steps["token_temperature"], np.float32)[:, None],
    "choice_temperature": np.array(steps["choice_temperature"], np.float32)[:, None],
    "raw_logit": np.array([steps["score"] == "logit"]),
}
session = onnxruntime.InferenceSession(folder / "generate.onnx", providers=["CPUExecutionProvider"])
images, tokens = session.run(["images", "tokens_out"], feeds)
Image.fromarray(images[0]).save(out)
print(json.dumps(tokens[0].tolist()))
