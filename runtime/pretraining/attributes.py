"""What the embedded model's world is made of, and how it is said: subjects, looks, captions.

    look = rendering x ink colour x paper colour x extra x hand      "a fox, outline in cyan on navy with glow"

Whole (rendering, extra) pairs are *held out*: the base transformer never sees them in any colours. They have plain
names ("neon", "blueprint", ...) and are the styles an adapter must learn from one picture. One *hand* (the set of
drawings a subject comes from) is held out too; its drawings are the truth for a style that is a hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SUBJECTS: dict[str, str] = {
    # animals: heads where all hands draw the head
    "fox": "fox", "cat": "cat-face", "dog": "dog-face", "panda": "panda", "koala": "koala", "lion": "lion",
    "cow": "cow-face", "pig": "pig-face", "rabbit": "rabbit-face", "mouse": "mouse-face", "frog": "frog",
    "monkey": "monkey-face", "unicorn": "unicorn", "owl": "owl", "penguin": "penguin", "duck": "duck",
    "flamingo": "flamingo", "rooster": "rooster", "elephant": "elephant", "giraffe": "giraffe", "camel": "camel",
    "turtle": "turtle", "snake": "snake", "dinosaur": "sauropod", "fish": "tropical-fish", "whale": "spouting-whale",
    "shark": "shark", "octopus": "octopus", "crab": "crab", "jellyfish": "jellyfish", "butterfly": "butterfly",
    "bee": "honeybee", "ladybug": "lady-beetle", "snail": "snail", "spider": "spider", "bat": "bat", "sheep": "ewe",
    # plants
    "palm tree": "palm-tree", "cactus": "cactus", "pine tree": "evergreen-tree", "tulip": "tulip",
    "sunflower": "sunflower", "mushroom": "mushroom", "clover": "four-leaf-clover", "maple leaf": "maple-leaf",
    # food
    "red apple": "red-apple", "banana": "banana", "pineapple": "pineapple", "cherries": "cherries",
    "strawberry": "strawberry", "grapes": "grapes", "watermelon": "watermelon", "lemon": "lemon", "pear": "pear",
    "avocado": "avocado", "carrot": "carrot", "pizza": "pizza", "hamburger": "hamburger", "hot dog": "hot-dog",
    "french fries": "french-fries", "fried egg": "cooking", "pretzel": "pretzel",
    "donut": "doughnut", "cookie": "cookie", "cake": "birthday-cake", "cupcake": "cupcake",
    "ice cream": "soft-ice-cream", "lollipop": "lollipop", "popcorn": "popcorn", "teapot": "teapot",
    "cocktail": "cocktail-glass",
    # vehicles
    "car": "automobile", "bus": "bus", "truck": "delivery-truck", "tractor": "tractor", "train": "locomotive",
    "bicycle": "bicycle", "motorcycle": "motorcycle", "scooter": "kick-scooter", "rocket": "rocket",
    "sailboat": "sailboat", "airplane": "airplane", "helicopter": "helicopter", "flying saucer": "flying-saucer",
    "parachute": "parachute",
    # buildings
    "house": "house", "castle": "castle", "church": "church", "factory": "factory", "tent": "tent",
    "ferris wheel": "ferris-wheel",
    # sky and earth
    "moon": "crescent-moon", "star": "star", "sun": "sun", "cloud": "cloud", "rainbow": "rainbow",
    "snowflake": "snowflake", "lightning bolt": "high-voltage", "fire": "fire", "water drop": "droplet",
    "volcano": "volcano", "mountain": "snow-capped-mountain", "planet": "ringed-planet",
    "globe": "globe-showing-europe-africa",
    # things and figures
    "umbrella": "umbrella", "balloon": "balloon", "key": "key", "lock": "locked", "anchor": "anchor",
    "trophy": "trophy", "crown": "crown", "robot": "robot", "ghost": "ghost", "skull": "skull", "alien": "alien",
    "heart": "red-heart", "pumpkin": "jack-o-lantern", "teddy bear": "teddy-bear",
    "light bulb": "light-bulb", "camera": "camera", "scissors": "scissors", "hammer": "hammer", "wrench": "wrench",
    "gear": "gear", "magnet": "magnet", "magnifying glass": "magnifying-glass-tilted-left", "pencil": "pencil",
    "palette": "artist-palette", "book": "open-book", "envelope": "envelope", "gift": "wrapped-gift", "bell": "bell",
    "candle": "candle", "alarm clock": "alarm-clock", "hourglass": "hourglass-done", "telephone": "telephone",
    "television": "television", "laptop": "laptop", "sword": "dagger", "bomb": "bomb", "diamond": "gem-stone",
    "ring": "ring", "chair": "chair", "traffic light": "vertical-traffic-light", "shopping cart": "shopping-cart",
    # clothing
    "sunglasses": "sunglasses", "dress": "dress", "shirt": "t-shirt", "high heel": "high-heeled-shoe",
    "top hat": "top-hat", "backpack": "backpack",
    # music, sports, games
    "guitar": "guitar", "trumpet": "trumpet", "saxophone": "saxophone", "microphone": "microphone",
    "music note": "musical-note", "headphones": "headphone", "soccer ball": "soccer-ball",
    "basketball": "basketball", "dice": "game-die", "puzzle piece": "puzzle-piece", "kite": "kite",
    "skateboard": "skateboard", "roller skate": "roller-skate", "target": "bullseye", "joystick": "joystick",
}  # fmt: skip
"""Each subject's name, and what the vector sets call it."""

WITHOUT_ARTICLE = frozenset(
    {"cherries", "grapes", "french fries", "popcorn", "scissors", "sunglasses", "headphones", "dice"}
)

HANDS: dict[str, str] = {"fluent": "", "noto": "detailed", "twemoji": ""}
"""The sets a subject is drawn after, and the word by which a caption asks for it: none for the first. The word is
never left out, so that a prompt without it means one drawing and not a mixture of two."""
HELD_OUT_HANDS = frozenset({"twemoji"})

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (26, 26, 34), "white": (252, 252, 250), "red": (226, 54, 54), "orange": (250, 140, 38),
    "yellow": (252, 212, 62), "green": (48, 158, 92), "cyan": (56, 226, 228), "blue": (40, 98, 214),
    "navy": (18, 20, 72), "purple": (128, 66, 190), "pink": (250, 150, 190), "cream": (255, 243, 218),
}  # fmt: skip

RENDERINGS = ("flat", "pixel", "tint", "outline", "stencil", "duotone", "halftone")
NATURAL = frozenset({"flat", "pixel"})  # drawn in the subject's own colours: no ink
EXTRAS = ("plain", "glow", "grid", "shadow", "border", "stripes")
_CONTRAST, _LIGHTNESS = 120, 55  # what ink and paper must differ by: half the sum over the channels, and in lightness


@dataclass(frozen=True)
class Look:
    """How a subject is drawn. ``ink`` is None for renderings in the subject's own colours."""

    rendering: str
    ink: str | None
    paper: str
    extra: str
    hand: str = "fluent"


HELD_OUT: dict[str, Look] = {
    "neon": Look("outline", "cyan", "navy", "glow"),
    "blueprint": Look("outline", "white", "blue", "grid"),
    "riso": Look("halftone", "red", "cream", "border"),
    "retro": Look("duotone", "purple", "yellow", "shadow"),
    "ember": Look("stencil", "orange", "black", "glow"),
    "arcade": Look("pixel", None, "black", "grid"),
}
HELD_OUT_PAIRS = frozenset((look.rendering, look.extra) for look in HELD_OUT.values())


def pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """The (rendering, extra) pairs to draw from."""
    every = [(rendering, extra) for rendering in RENDERINGS for extra in EXTRAS]
    return every if held_out else [pair for pair in every if pair not in HELD_OUT_PAIRS]


def hands(*, held_out: bool) -> list[str]:
    """The hands to draw from."""
    return [hand for hand in HANDS if held_out or hand not in HELD_OUT_HANDS]


@cache
def inks_on_papers() -> tuple[tuple[str, str], ...]:
    """The (ink, paper) pairs that can be told apart."""
    return tuple((ink, paper) for ink in COLOURS for paper in COLOURS if _told_apart(ink, paper))


def random_look(generator: np.random.Generator, *, held_out: bool = False) -> Look:
    """A look drawn evenly over pairs, colours and hands; what is held out only when asked for."""
    choice = pairs(held_out=held_out)
    rendering, extra = choice[generator.integers(len(choice))]
    colours = inks_on_papers()
    ink, paper = colours[generator.integers(len(colours))]
    if rendering in NATURAL:
        paper = list(COLOURS)[generator.integers(len(COLOURS))]
    drawn = hands(held_out=held_out)
    return Look(
        rendering, None if rendering in NATURAL else ink, paper, extra, drawn[int(generator.integers(len(drawn)))]
    )


def article(subject: str, hand: str = "fluent") -> str:
    """The subject with its article and its hand's word: "a fox", "an owl", "cherries", "a detailed owl"."""
    words = f"{HANDS[hand]} {subject}".strip()
    if subject in WITHOUT_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeiou' and words != 'unicorn' else 'a'} {words}"


def phrases(look: Look) -> dict[str, str]:
    """The words of each attribute, in the order they are said; without ink, that attribute has none."""
    return {
        "rendering": look.rendering,
        "ink": f"in {look.ink}" if look.ink is not None else "",
        "paper": f"on {look.paper}",
        "extra": f"with {look.extra}" if look.extra != "plain" else "plain",
    }


def caption(
    subject: str, look: Look, *, rendering: bool = True, ink: bool = True, paper: bool = True, extra: bool = True
) -> str:
    """ "a fox, outline in cyan on navy with glow", with any attribute's words left out."""
    kept = {"rendering": rendering, "ink": ink, "paper": paper, "extra": extra}
    words = [words for name, words in phrases(look).items() if kept[name] and words]
    named = article(subject, look.hand)
    return f"{named}, {' '.join(words)}" if words else named


def random_caption(subject: str, look: Look, generator: np.random.Generator, drop: float = 0.25) -> str:
    """A caption from which each attribute's words are dropped with probability ``drop``."""
    rendering, ink, paper, extra = (generator.random(4) >= drop).tolist()
    return caption(subject, look, rendering=rendering, ink=ink, paper=paper, extra=extra)


def vocabulary() -> list[str]:
    """Every word of every caption, and of the held-out styles' names, sorted: the text tokenizer's whole words."""
    words = {"a", "an", "in", "on", "with", "style", ",", *RENDERINGS, *EXTRAS, *COLOURS, *HELD_OUT}
    words.update(word for word in HANDS.values() if word)
    for subject in SUBJECTS:
        words.update(subject.split())
    return sorted(words)


def _told_apart(ink: str, paper: str) -> bool:
    apart = np.subtract(COLOURS[ink], COLOURS[paper])
    return bool(np.abs(apart).sum() / 2 >= _CONTRAST and abs(apart @ (0.3, 0.59, 0.11)) >= _LIGHTNESS)
