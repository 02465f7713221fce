"""How good the judge is: ``python -m stylemuse.pretraining.examine --judge FILE`` (trained there where it is absent).

On fresh world pictures, held-out looks too: how often each head is right, by rendering and by extra, which subjects are
taken for which, and how often the style distance ignores the subject.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .attributes import SUBJECTS, Look, random_look
from .judge import HEADS, PICTURE, STYLE, Judge
from .judge_training import SAMPLES, answers, draw, train_judge
from .world import Scenes, World

_FRESH = 2_000_000_000  # seeds from here on draw what no training has seen; a generator takes 32 bits of them
_BATCH = 256


@dataclass(frozen=True)
class Examination:
    """The judge's answers and the truth, by head, for the same pictures."""

    answers: Mapping[str, Sequence[str]]
    truth: Mapping[str, Sequence[str]]

    def accuracy(self, head: str) -> float:
        """Share of right answers."""
        return float(self._right(head).mean())

    def by(self, attribute: str, head: str = "subject") -> dict[str, float]:
        """Accuracy of a head among the pictures of each name of an attribute."""
        right, names = self._right(head), np.array(self.truth[attribute])
        return {name: float(right[names == name].mean()) for name in HEADS[attribute] if (names == name).any()}

    def confusions(self, head: str = "subject", most: int = 10) -> list[tuple[str, str, int]]:
        """The commonest errors: (truth, answer, how often)."""
        pairs = zip(self.truth[head], self.answers[head], strict=True)
        counted = Counter((true, answer) for true, answer in pairs if true != answer)
        return [(true, answer, count) for (true, answer), count in counted.most_common(most)]

    def _right(self, head: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.array([a == b for a, b in zip(self.answers[head], self.truth[head], strict=True)])


def examine(judge: Judge, samples: int = 2000, *, seed: int = 0) -> Examination:
    """Ask the judge about fresh world pictures; no seed here draws the pictures of training."""
    world, chance = World(PICTURE), torch.Generator().manual_seed(_FRESH + seed)
    named: dict[str, list[str]] = {head: [] for head in HEADS}
    truth: dict[str, list[str]] = {head: [] for head in HEADS}
    for begin in range(0, samples, _BATCH):
        scenes = world.sample(min(_BATCH, samples - begin), chance, held_out=True)
        opinion = judge.eval().opinion(draw(world, scenes))
        for head, right in answers(scenes).items():
            named[head] += opinion.names(head)
            truth[head] += [HEADS[head][index] for index in right.tolist()]
    return Examination(named, truth)


def accuracy(judge: Judge, samples: int = 2000, *, seed: int = 0) -> dict[str, float]:
    """Share of fresh world pictures that each head names rightly."""
    examination = examine(judge, samples, seed=seed)
    return {head: examination.accuracy(head) for head in HEADS}


def separation(judge: Judge, triples: int = 1000, *, seed: int = 0, near: bool = False) -> float:
    """Share of random triples in which style wins over subject.

    In a triple, picture a is nearer in style to another subject in the same look than to its own subject in another
    look. All three are of one hand; poses are random. ``near``: the other look differs in one attribute only,
    the hardest other look there is.
    """
    numbers, world = np.random.default_rng([seed, 2]), World(PICTURE)
    chance = torch.Generator().manual_seed(_FRESH + seed)
    drawn: tuple[list[tuple[str, Look]], ...] = ([], [], [])
    for _ in range(triples):
        one, two = (list(SUBJECTS)[i] for i in numbers.choice(len(SUBJECTS), size=2, replace=False))
        look = other = random_look(numbers, held_out=True)
        while not _differences(look, other) or (near and _differences(look, other) > 1):
            other = replace(random_look(numbers, held_out=True), hand=look.hand)
        for pictures, subject, drawn_look in zip(drawn, (one, two, one), (look, look, other), strict=True):
            pictures.append((subject, drawn_look))
    right = 0
    for begin in range(0, triples, _BATCH):
        a, same, changed = (
            judge.eval().opinion(draw(world, _moved(world, pictures[begin : begin + _BATCH], chance)))
            for pictures in drawn
        )
        right += int((a.distance(same) < a.distance(changed)).sum())
    return right / triples


def _moved(world: World, pictures: list[tuple[str, Look]], chance: torch.Generator) -> Scenes:
    """These subjects and looks, each in a random pose."""
    poses = world.sample(len(pictures), chance)
    return world.scenes(pictures)._replace(size=poses.size, left=poses.left, top=poses.top, mirrored=poses.mirrored)


def report(judge: Judge, samples: int, triples: int, *, seed: int = 0) -> dict[str, Any]:
    """All of the module's text, as one JSON object."""
    examination = examine(judge, samples, seed=seed)
    return {
        "samples": samples,
        "seed": seed,
        "accuracy": {head: examination.accuracy(head) for head in HEADS},
        "subject_by": {attribute: examination.by(attribute) for attribute in STYLE},
        "worst_subjects": dict(sorted(examination.by("subject").items(), key=lambda item: item[1])[:8]),
        "confusions": {head: examination.confusions(head) for head in HEADS},
        "triples": triples,
        "separation": {
            "other look": separation(judge, triples, seed=seed),
            "one attribute away": separation(judge, triples, seed=seed, near=True),
        },
    }


def _differences(one: Look, other: Look) -> int:
    return sum(getattr(one, head) != getattr(other, head) for head in STYLE)


def main() -> None:
    """The command; see the module's text."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m stylemuse.pretraining.examine", description=about)
    parser.add_argument("--judge", type=Path, required=True, help="file of the judge; trained there where it is absent")
    parser.add_argument("--training-samples", type=int, default=SAMPLES)
    parser.add_argument("--clean", action="store_true", help="a judge trained on the truth alone, without flaws")
    parser.add_argument("--samples", type=int, default=4000, help="pictures to ask about")
    parser.add_argument("--triples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judge = train_judge(options.judge, options.training_samples, options.seed, flaws=not options.clean)
    print(json.dumps(report(judge, options.samples, options.triples, seed=options.seed), indent=2))


if __name__ == "__main__":
    main()
