"""``stylemuse subjects``: what the embedded model can draw, and the words for how."""

from __future__ import annotations

import re

from . import options
from .output import document, say


def subjects(as_json: options.Json = False) -> None:
    """Say what the embedded model can draw, and in which looks."""
    from ..pretraining.attributes import COLOURS, EXTRAS, HELD_OUT_PAIRS, RENDERINGS, SUBJECTS

    known = sorted(SUBJECTS)
    looks = {"renderings": list(RENDERINGS), "colours": list(COLOURS), "extras": list(EXTRAS)}
    if as_json:
        document({"subjects": known, **looks, "held_out": sorted(map(list, HELD_OUT_PAIRS))})
        return
    say(", ".join(known))
    for name, words in looks.items():
        say(f"{name}: {', '.join(words)}")
    say('say "a fox, outline in cyan on navy with glow", or "a fox" with --style')


def hint(prompt: str, model: str) -> str | None:
    """What to tell of a prompt for the embedded model that names nothing it knows; None of any other."""
    from ..loading.hub import EMBEDDED

    if model != EMBEDDED:
        return None
    from ..pretraining.attributes import SUBJECTS

    words = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    if any(re.search(rf"\b{re.escape(subject)}\b", words) for subject in SUBJECTS):
        return None
    return f"the embedded model knows none of these words as a subject: {prompt.strip()[:80]}; see: stylemuse subjects"
