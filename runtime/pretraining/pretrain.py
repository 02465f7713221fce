"""The embedded model's recipe: ``python -m stylemuse.pretraining.pretrain --part PART --minutes M --run RUN``.

tokenizer     a VQ tokenizer on the world's pictures (`pretrain_vq`); two to three minutes of an H100
transformer   the masked transformer and its text encoder on its codes (`painter`); five minutes and more
export        the folder ``--out`` in diffusers layout, fp16

The same command trains on a GPU and on a CPU, where hours take the place of minutes. ``--minutes`` is all the time a
part has; what it left in RUN is gone on from, its rate falling towards the end of that time. The averaged weights lie
in RUN in files of at most 15 MiB, each as good as the last; the optimizers' state beside them, without ``--lean``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..loading.folder import write_model
from ..models.tokenizer import ClipTokenizer, build_word_tokenizer
from . import painter, pretrain_vq
from .attributes import vocabulary

PARTS = ("tokenizer", "transformer", "export")


def words(folder: Path) -> ClipTokenizer:
    """The tokenizer of the world's captions, written into the folder."""
    return build_word_tokenizer(vocabulary(), folder / "tokenizer", painter.TEXT_LENGTH)


def export(run: Path, out: Path) -> None:
    """Write the model folder from what both parts left in ``run``."""
    text = words(out)
    model = painter.read(run, text)
    write_model(out, model.transformer, pretrain_vq.read(run), model.text)


def main() -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m stylemuse.pretraining.pretrain", description=__doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole part, former runs included")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, help="model folder to write")
    parser.add_argument("--batch", type=int, help="pictures in a step; chosen by the device if left out")
    parser.add_argument("--pool", type=int, help="tokenized pictures at hand; chosen by the device if left out")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--compile", action="store_true", help="let torch compile the transformer")
    parser.add_argument("--lean", action="store_true", help="keep averaged weights only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if options.part == "export":
        if options.out is None:
            parser.error("--part export needs --out, the model folder to write")
        export(options.run, options.out)
    elif options.part == "tokenizer":
        batch = options.batch or (96 if on_gpu else 8)
        rate = options.rate * pretrain_vq.RATE
        pretrain_vq.train(
            options.run, options.minutes, batch=batch, rate=rate, resumable=not options.lean, seed=options.seed
        )
    else:
        painter.train(
            options.run,
            options.minutes,
            words(options.run),
            batch=options.batch or (768 if on_gpu else 32),
            rate=options.rate,
            pool=options.pool,
            compiled=options.compile,
            resumable=not options.lean,
            seed=options.seed,
        )


if __name__ == "__main__":
    main()
