"""What the embedded model's world is made of, and how it is said: subjects, looks, captions.

    look = rendering x ink colour x paper colour x extra          "a fox, outline in cyan on navy with glow"

Whole (rendering, extra) pairs are *held out*: the base transformer never sees them in any colours. They have plain
names ("neon", "blueprint", ...) and are the styles an adapter must learn from one picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUBJECTS: dict[str, str] = {
    "fox": "🦊", "cat": "🐱", "dog": "🐶", "owl": "🦉", "frog": "🐸", "elephant": "🐘", "turtle": "🐢", "fish": "🐠",
    "whale": "🐳", "octopus": "🐙", "butterfly": "🦋", "bee": "🐝", "snail": "🐌", "duck": "🦆", "penguin": "🐧",
    "dinosaur": "🦕", "palm tree": "🌴", "cactus": "🌵", "tulip": "🌷", "sunflower": "🌻", "mushroom": "🍄",
    "red apple": "🍎", "banana": "🍌", "pineapple": "🍍", "cherries": "🍒", "strawberry": "🍓",
    "carrot": "🥕", "pizza": "🍕", "ice cream": "🍦", "car": "🚗", "bicycle": "🚲",
    "rocket": "🚀", "sailboat": "⛵", "airplane": "🛩", "house": "🏠", "castle": "🏰", "tent": "⛺", "umbrella": "☂",
    "balloon": "🎈", "key": "🔑", "anchor": "⚓", "trophy": "🏆", "crown": "👑",
    "robot": "🤖", "ghost": "👻", "skull": "💀", "moon": "🌙", "star": "⭐", "heart": "❤", "light bulb": "💡",
    "camera": "📷", "scissors": "✂", }  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 34), "white": (250, 250, 248), "red": (224, 52, 46), "orange": (248, 146, 40),
    "yellow": (250, 214, 70), "green": (70, 170, 90), "cyan": (60, 232, 222), "blue": (58, 116, 216),
    "navy": (16, 16, 62), "purple": (142, 82, 188), "pink": (244, 158, 190), "cream": (255, 247, 226),
}  # fmt: skip

RENDERINGS = ("flat", "pixel", "tint", "outline", "silhouette", "duotone", "halftone")
NATURAL = frozenset({"flat", "pixel"})  # drawn in the subject's own colours: no ink
EXTRAS = ("plain", "glow", "grid", "shadow", "border", "stripes")


@dataclass(frozen=True)
class Look:
    """How a subject is drawn. ``ink`` is None for renderings in the subject's own colours."""

    rendering: str
    ink: str | None
    paper: str
    extra: str


HELD_OUT: dict[str, Look] = {
    "neon": Look("outline", "cyan", "navy", "glow"),
    "blueprint": Look("outline", "white", "blue", "grid"),
    "riso": Look("halftone", "red", "cream", "border"),
    "retro": Look("duotone", "purple", "yellow", "shadow"),
    "ember": Look("silhouette", "orange", "black", "glow"),
    "arcade": Look("pixel", None, "black", "grid"),
}
HELD_OUT_PAIRS = frozenset((look.rendering, look.extra) for look in HELD_OUT.values())


def random_look(generator: np.random.Generator, *, held_out: bool = False) -> Look:
    """A look drawn evenly over renderings, inks, papers and extras; held-out pairs only when asked for."""
    names = list(COLOURS)
    while True:
        rendering, extra = RENDERINGS[generator.integers(len(RENDERINGS))], EXTRAS[generator.integers(len(EXTRAS))]
        paper, ink = (names[i] for i in generator.choice(len(names), size=2, replace=False))
        too_close = rendering not in NATURAL and _contrast(ink, paper) < 120
        if too_close or ((rendering, extra) in HELD_OUT_PAIRS and not held_out):
            continue
        return Look(rendering, None if rendering in NATURAL else ink, paper, extra)


def article(subject: str) -> str:
    """The subject with its article: "a fox", "an owl", "cherries"."""
    if subject in ("cherries", "scissors"):
        return subject
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def caption(
    subject: str, look: Look, *, rendering: bool = True, ink: bool = True, paper: bool = True, extra: bool = True
) -> str:
    """ "a fox, outline in cyan on navy with glow", with any attribute's words left out."""
    words = []
    if rendering:
        words.append(look.rendering)
    if ink and look.ink is not None:
        words.append(f"in {look.ink}")
    if paper:
        words.append(f"on {look.paper}")
    if extra:
        words.append(f"with {look.extra}" if look.extra != "plain" else "plain")
    return f"{article(subject)}, {' '.join(words)}" if words else article(subject)


def random_caption(subject: str, look: Look, generator: np.random.Generator, drop: float = 0.25) -> str:
    """A caption from which each attribute's words are dropped with probability ``drop``."""
    rendering, ink, paper, extra = (generator.random(4) >= drop).tolist()
    return caption(subject, look, rendering=rendering, ink=ink, paper=paper, extra=extra)


def vocabulary() -> list[str]:
    """Every word of every caption, and of the held-out styles' names, sorted: the text tokenizer's whole words."""
    words = {"a", "an", "in", "on", "with", "style", ",", *RENDERINGS, *EXTRAS, *COLOURS, *HELD_OUT}
    for subject in SUBJECTS:
        words.update(subject.split())
    return sorted(words)


def _contrast(one: str, other: str) -> float:
    return float(np.abs(np.subtract(COLOURS[one], COLOURS[other])).sum() / 2)
