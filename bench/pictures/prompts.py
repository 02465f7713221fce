"""What the judged pictures show: random prompts for the base, and random subjects for each shipped style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stylemuse import StylemuseError
from stylemuse.pretraining.attributes import HELD_OUT, SUBJECTS, Look, article, caption, random_look
from stylemuse.pretraining.judge import STYLE

_DROP = 0.25  # of a caption's attributes


@dataclass(frozen=True)
class Job:
    """One picture to draw, and what is right about it."""

    prompt: str
    subject: str
    look: Look
    seed: int
    style: str | None = None
    asked: tuple[str, ...] = ()  # attributes of the look that the prompt names


def base_jobs(count: int, seed: int) -> list[Job]:
    """Captions of random subjects in random looks, each attribute's words left out one time in four."""
    numbers, jobs = np.random.default_rng([seed, 1]), []
    for _ in range(count):
        subject, look = list(SUBJECTS)[numbers.integers(len(SUBJECTS))], random_look(numbers)
        kept = dict(zip(STYLE, (numbers.random(len(STYLE)) >= _DROP).tolist(), strict=True))
        asked = tuple(head for head in STYLE if kept[head] and (head != "ink" or look.ink is not None))
        jobs.append(Job(caption(subject, look, **kept), subject, look, int(numbers.integers(2**31)), asked=asked))
    return jobs


def styled_jobs(references: Mapping[str, str], count: int, seed: int) -> list[Job]:
    """ "a SUBJECT" in each style in turn; ``references`` names the subject of each style's own picture."""
    numbers, jobs = np.random.default_rng([seed, 2]), []
    left: dict[str, list[str]] = {style: [] for style in references}
    for style in [list(references)[index % len(references)] for index in range(count)]:
        if not left[style]:
            left[style] = numbers.permutation([name for name in SUBJECTS if name != references[style]]).tolist()
        subject = left[style].pop()
        jobs.append(Job(article(subject), subject, HELD_OUT[style], int(numbers.integers(2**31)), style, STYLE))
    return jobs


def reference_subjects(captions: Mapping[str, str]) -> dict[str, str]:
    """By style that the world can draw, the subject of its own picture, with which the caption begins."""
    found = {}
    for name in (name for name in captions if name in HELD_OUT):
        subject = max((s for s in SUBJECTS if captions[name].startswith(f"{article(s)} ")), key=len, default=None)
        if subject is None:
            raise StylemuseError(f"style {name}: {captions[name]!r} does not begin with a subject of the world")
        found[name] = subject
    if not found:
        raise StylemuseError(
            f"styles {', '.join(captions) or '(none)'}: none has a truth; the world draws {', '.join(HELD_OUT)}"
        )
    return found
