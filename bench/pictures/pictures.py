"""Does a model draw what it is asked for, and in the style? A judge (`stylemuse.pretraining.judge`) answers.

    stylemuse bench pictures --model demo --judge FILE [--clean FILE] [--out FILE] [--grid PNG]
                             [--prompts 200] [--seed 0]

base     captions of the world with random words left out, looks that are not held out
styled   "a SUBJECT" in each shipped style in turn, never the subject of the style's own picture
untuned  the same full prompt and seed without the style
truth    the world's own drawing of the subject in the style's held-out look, of several poses the nearest

The judges' files are trained where they are absent. ``--clean`` asks a second one, which learned from the truth alone:
the first was trained to look past a generator's flaws, so what it says is not the quality of the pictures.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import stylemuse
from stylemuse import Pipeline, Request
from stylemuse.loading.folder import weights_sha256
from stylemuse.loading.hub import resolve
from stylemuse.pretraining.attributes import HELD_OUT, article
from stylemuse.pretraining.examine import accuracy
from stylemuse.pretraining.judge import HEADS, PICTURE, Judge, labels_of, load_judge, to_tensor
from stylemuse.pretraining.judge_training import draw as drawn
from stylemuse.pretraining.judge_training import train_judge
from stylemuse.pretraining.world import SIZES, Pose, World

from ..harness.arguments import Arguments
from .prompts import Job, base_jobs, reference_subjects, styled_jobs
from .sheet import Row, contact_sheet

POSES = tuple(Pose(size=size) for size in (SIZES[0], Pose.size, SIZES[1]))
"""How the truth is drawn; the nearest counts."""

BARS = {"judge": 0.95, "base": 0.80, "styled": 0.60, "nearer": 0.90}
"""What is asked of the embedded model: subjects the judge names rightly on world pictures, on base and on styled ones,
and styled pictures nearer to the truth in style than the untuned answer."""

_SHOWN = ("cat", "penguin", "butterfly", "cactus", "pineapple", "sailboat", "castle", "robot", "skull", "umbrella")
_BATCH = 16


def draw(pipe: Pipeline, requests: Sequence[Request]) -> list[Image.Image]:
    """One picture per request."""
    pictures = []
    for begin in range(0, len(requests), _BATCH):
        pictures += [result.images[0] for result in pipe.run(requests[begin : begin + _BATCH])]
        print(f"{len(pictures)} of {len(requests)} pictures", file=sys.stderr, flush=True)
    return pictures


def judge_base(
    judge: Judge, jobs: Sequence[Job], pictures: Sequence[Image.Image], clean: Judge | None = None
) -> list[dict[str, Any]]:
    """Per picture: the subject the judge names, and the ``clean`` one; by attribute asked for, the name it gives."""
    tensor = to_tensor(pictures)
    opinion = judge.opinion(tensor)
    named = {head: opinion.names(head) for head in HEADS}
    outcomes = []
    for row, job in enumerate(jobs):
        truth = labels_of(job.subject, job.look)
        outcomes.append(
            {"prompt": job.prompt, "seed": job.seed, "subject": job.subject, "named": named["subject"][row]}
            | {"asked": {head: {"truth": truth[head], "named": named[head][row]} for head in job.asked}}
        )
    if clean is not None:
        for outcome, name in zip(outcomes, clean.opinion(tensor).names(), strict=True):
            outcome["named_clean"] = name
    return outcomes


def judge_styled(
    judge: Judge,
    jobs: Sequence[Job],
    styled: Sequence[Image.Image],
    untuned: Sequence[Image.Image],
    clean: Judge | None = None,
) -> list[dict[str, Any]]:
    """Per job, of the styled and of the untuned picture: what the judge names, and the style distance to the truth."""
    outcomes = judge_base(judge, jobs, styled, clean)
    world, wanted = World(PICTURE), [(job.subject, job.look) for job in jobs]
    truths = [judge.opinion(drawn(world, world.scenes(wanted, pose))) for pose in POSES]
    named = [truth.names() for truth in truths]
    for row, (outcome, job) in enumerate(zip(outcomes, jobs, strict=True)):
        outcome |= {"style": job.style, "truth_right": _mean([names[row] == job.subject for names in named])}
    for pictures, suffix in ((styled, ""), (untuned, "_untuned")):
        opinion = judge.opinion(to_tensor(pictures))
        nearest = torch.stack([opinion.distance(truth) for truth in truths]).amin(dim=0).tolist()
        for outcome, distance, name in zip(outcomes, nearest, opinion.names(), strict=True):
            outcome |= {f"distance{suffix}": round(distance, 5), f"named{suffix}": name}
    return outcomes


def summary(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares over outcomes.

    subject: the right subject is named (``_clean``: by the judge that forgives nothing, ``_untuned``: in the untuned
    answer, ``_truth``: in the truth, the most that can be reached); look: of the attributes asked for, those named;
    nearer: styled nearer to the truth than untuned.
    """
    right = [outcome["named"] == outcome["subject"] for outcome in outcomes]
    asked = [answer for outcome in outcomes for answer in outcome["asked"].values()]
    found: dict[str, Any] = {
        "pictures": len(outcomes),
        "subject": _mean(right),
        "subject_interval": interval(sum(right), len(right)),
        "look": _mean([answer["named"] == answer["truth"] for answer in asked]),
    }
    if "named_clean" in outcomes[0]:
        found["subject_clean"] = _mean([outcome["named_clean"] == outcome["subject"] for outcome in outcomes])
    if "distance" in outcomes[0]:
        nearer = [outcome["distance"] < outcome["distance_untuned"] for outcome in outcomes]
        found |= {
            "nearer": _mean(nearer),
            "nearer_interval": interval(sum(nearer), len(nearer)),
            "distance": _mean([outcome["distance"] for outcome in outcomes]),
            "distance_untuned": _mean([outcome["distance_untuned"] for outcome in outcomes]),
            "subject_truth": _mean([outcome["truth_right"] for outcome in outcomes]),
            "subject_untuned": _mean([outcome["named_untuned"] == outcome["subject"] for outcome in outcomes]),
        }
    return found


def interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, hits / of
    middle, spread = share + z * z / (2 * of), z * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    scale = 1 + z * z / of
    return round((middle - spread) / scale, 4), round((middle + spread) / scale, 4)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def measure(pipe: Pipeline, judge: Judge, prompts: int, seed: int, clean: Judge | None = None) -> dict[str, Any]:
    """Everything but where it was measured: summaries, whether each bar is met, raw outcomes."""
    references = reference_subjects({name: pipe.adapters.version(name).caption for name in pipe.adapters})
    base, styled = base_jobs(prompts, seed), styled_jobs(references, prompts, seed)
    full = [f"{job.prompt} {pipe.adapters.version(job.style).descriptor}" for job in styled if job.style is not None]
    requests = [Request(job.prompt, style=job.style, seed=job.seed) for job in [*base, *styled]]
    requests += [Request(prompt, seed=job.seed) for prompt, job in zip(full, styled, strict=True)]
    pictures = draw(pipe, requests)
    outcomes = judge_base(judge, base, pictures[:prompts], clean)
    styled_outcomes = judge_styled(judge, styled, pictures[prompts : 2 * prompts], pictures[2 * prompts :], clean)
    by_style = {style: [each for each in styled_outcomes if each["style"] == style] for style in references}
    totals = {"base": summary(outcomes), "styled": summary(styled_outcomes)}
    right, strict = accuracy(judge), {} if clean is None else {"clean_judge_accuracy": accuracy(clean)}
    reached = {
        "judge": right["subject"],
        "base": totals["base"]["subject"],
        "styled": totals["styled"]["subject"],
        "nearer": totals["styled"]["nearer"],
    }
    return {
        "judge_accuracy": right,
        **strict,
        "bars": {
            name: {"bar": bar, "reached": reached[name], "met": reached[name] >= bar} for name, bar in BARS.items()
        },
        **totals,
        "styles": {style: summary(each) for style, each in by_style.items() if each},
        "outcomes": {"base": outcomes, "styled": styled_outcomes},
    }


def grid(pipe: Pipeline, folder: Path, seed: int) -> Image.Image:
    """Per style: its own picture and `_SHOWN` drawn in it; the untuned base's answers; the truth."""
    world, rows, references = (
        World(PICTURE),
        [],
        reference_subjects({name: pipe.adapters.version(name).caption for name in pipe.adapters}),
    )
    words = {style: pipe.adapters.version(style).descriptor for style in references}
    requests = [Request(article(s), style=style, seed=seed) for style in references for s in _SHOWN]
    requests += [Request(f"{article(s)} {words[style]}", seed=seed) for style in references for s in _SHOWN]
    pictures = draw(pipe, requests)
    untuned, count = pictures[len(pictures) // 2 :], len(_SHOWN)
    for index, style in enumerate(references):
        with Image.open(folder / "styles" / style / "reference.png") as file:
            reference = file.convert("RGB")
        part = slice(index * count, (index + 1) * count)
        rows += [
            Row(style, [reference, *pictures[part]]),
            Row("untuned", [None, *untuned[part]]),
            Row("truth", [None, *(world.picture(subject, HELD_OUT[style]) for subject in _SHOWN)]),
        ]
    return contact_sheet(["its picture", *_SHOWN], rows)


def origin(pipe: Pipeline, folder: Path, judge: Path, clean: Path | None = None) -> dict[str, Any]:
    """What was measured, and where."""
    strict = {} if clean is None else {"clean_judge_sha256": hashlib.sha256(clean.read_bytes()).hexdigest()}
    return strict | {
        "model": _short(pipe.name),
        "sha256": {part: weights_sha256(folder / part) for part in ("transformer", "vqvae", "text_encoder")},
        "styles_sha256": {name: pipe.adapters.version(name).sha256 for name in pipe.adapters.names},
        "judge_sha256": hashlib.sha256(judge.read_bytes()).hexdigest(),
        "machine": f"{platform.system()} {platform.machine()}, {pipe.explain()['device'].partition(':')[0]}",
        "versions": {"stylemuse": stylemuse.__version__, "torch": torch.__version__},
    }


def _short(text: str) -> str:
    """A place on this machine says nothing elsewhere: only its last name is kept."""
    return Path(text).name if Path(text).is_absolute() else text


def show(found: Mapping[str, Any]) -> None:
    """The table and the bars."""
    titles = f"{'pictures':>9}{'subject':>9}{'clean':>8}{'look':>8}{'nearer':>8}{'distance':>10}"
    print(f"{'':12}{titles}   untuned: subject distance  truth: subject")
    for name, part in {"base": found["base"], **found["styles"], "all styles": found["styled"]}.items():
        clean = f"{part['subject_clean']:8.1%}" if "subject_clean" in part else f"{'-':>8}"
        line = f"{name:12}{part['pictures']:9}{part['subject']:9.1%}{clean}{part['look']:8.1%}"
        if "nearer" in part:
            line += f"{part['nearer']:8.1%}{part['distance']:10.3f}"
            line += f"{part['subject_untuned']:19.1%}{part['distance_untuned']:9.3f}{part['subject_truth']:16.1%}"
        print(line)
    for name, bar in found["bars"].items():
        print(f"{name:12}{bar['reached']:7.1%} of {bar['bar']:.0%} asked: {'met' if bar['met'] else 'NOT MET'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the JSON document and the sheet where asked."""
    parser = Arguments(prog="stylemuse bench pictures", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, or a model folder with the embedded model's styles")
    parser.add_argument("--judge", type=Path, required=True, help="file of the judge, trained there where it is absent")
    parser.add_argument(
        "--clean", type=Path, help="file of a judge trained on the truth alone; trained there if absent"
    )
    parser.add_argument("--prompts", type=int, default=200, help="of the base, and of the styles together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON document to this file")
    parser.add_argument("--grid", type=Path, help="write a contact sheet to this PNG")
    options = parser.parse_args(arguments)
    pipe, folder = stylemuse.load(options.model), resolve(options.model)
    judge = load_judge(options.judge) if options.judge.exists() else train_judge(options.judge)
    clean = train_judge(options.clean, flaws=False) if options.clean is not None else None
    found = measure(pipe, judge, options.prompts, options.seed, clean)
    show(found)
    given = [_short(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    command = " ".join(["stylemuse bench pictures", *given])
    document = {"command": command, "seed": options.seed, **origin(pipe, folder, options.judge, options.clean), **found}
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.grid is not None:
        grid(pipe, folder, options.seed).save(options.grid)
    print(json.dumps(document))
