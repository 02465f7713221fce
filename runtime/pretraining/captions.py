"""Captions of scenes as token ids, made on the device from tables of phrases.

A caption is a row of phrases (subject, comma, rendering, ink, paper, extra), and a word-level tokenizer gives each
phrase the same ids wherever it stands; so a batch of captions is a few look-ups and one scatter. Equal to the
tokenizer's ids of `looks.caption`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import StylemuseError
from ..models.tokenizer import ClipTokenizer
from .attributes import COLOURS, EXTRAS, HANDS, HELD_OUT, RENDERINGS, SUBJECTS, Look, article, phrases
from .world import Scenes


class Captions:
    """Draws captions for scenes; ``tokenizer`` is one of `looks.vocabulary`'s words."""

    def __init__(self, tokenizer: ClipTokenizer, device: torch.device | str = "cpu") -> None:
        """Raises StylemuseError where the longest caption doesn't fit the tokenizer's length."""
        self._tokenizer, self._device = tokenizer, torch.device(device)
        first = next(iter(COLOURS))
        self._subject = self._table([article(subject, hand) for hand in HANDS for subject in SUBJECTS])
        self._comma = self._table([","])
        said = [phrases(Look(rendering, first, first, "plain"))["rendering"] for rendering in RENDERINGS]
        self._rendering = self._table(said)
        self._ink = self._table([phrases(Look("flat", ink, first, "plain"))["ink"] for ink in (None, *COLOURS)])
        self._paper = self._table([phrases(Look("flat", None, paper, "plain"))["paper"] for paper in COLOURS])
        self._extra = self._table([phrases(Look("flat", None, first, extra))["extra"] for extra in EXTRAS])
        self._style = self._table([f"in {name} style" for name in HELD_OUT])
        tables = (self._subject, self._comma, self._rendering, self._ink, self._paper, self._extra)
        longest = 2 + sum(table.shape[1] for table in tables)
        if longest > tokenizer.length:
            raise StylemuseError(f"captions of up to {longest} ids; the tokenizer's length is {tokenizer.length}")

    def ids(
        self,
        scenes: Scenes,
        generator: torch.Generator,
        *,
        drop: float = 0.25,
        silent: float = 0.1,
        bare: float = 0.5,
        styled: float = 0.15,
    ) -> Tensor:
        """(B, length) int64: each attribute's words left out with probability ``drop``, all with ``silent``.

        A share ``bare`` of the plainest scenes is captioned by its subject alone, so that "a fox" means one of them; a
        share ``styled`` of all others as "a fox in neon style", with a name at random: words that mean no look until an
        adapter gives them one. ``generator`` is one of the captions' device.
        """
        rows = len(scenes.subject)
        chance = torch.rand(rows, 7, generator=generator, device=self._device)
        plain = scenes.plain
        alone, named = plain & (chance[:, 5] < bare), ~plain & (chance[:, 6] < styled)
        kept = (chance[:, :4] >= drop) & ~(alone | named)[:, None]
        names = torch.randint(len(HELD_OUT), (rows,), generator=generator, device=self._device)
        return self.of(scenes, kept, chance[:, 4] < silent, torch.where(named, names, -1))

    def of(self, scenes: Scenes, kept: Tensor, silent: Tensor, style: Tensor | None = None) -> Tensor:
        """(B, length) int64 with the words of the attributes (rendering, ink, paper, extra) kept in (B, 4) bool; the
        empty caption where ``silent`` (B,); "in NAME style" at the end where ``style`` (B,) is not -1."""
        rows = len(scenes.subject)
        subject = self._subject[scenes.hand * len(SUBJECTS) + scenes.subject]
        said = [
            table[index].masked_fill(~kept[:, place, None], -1)
            for place, (table, index) in enumerate(
                [
                    (self._rendering, scenes.rendering),
                    (self._ink, scenes.ink),
                    (self._paper, scenes.paper),
                    (self._extra, scenes.extra),
                ]
            )
        ]
        words = torch.cat(said, 1)
        comma = self._comma.expand(rows, -1).masked_fill((words < 0).all(1, keepdim=True), -1)
        parts = [subject, comma, words]
        if style is not None:
            parts.append(self._style[style.clamp(min=0)].masked_fill(style[:, None] < 0, -1))
        body = torch.cat(parts, 1).masked_fill(silent[:, None], -1)
        start, end = (torch.full((rows, 1), token, device=self._device) for token in self._frame)
        whole = torch.cat([start, body, end], 1)
        # Each id moves left over the gaps before it; what is no id goes to a column that is cut off.
        length = self._tokenizer.length
        place = torch.where(whole >= 0, (whole >= 0).cumsum(1) - 1, length)
        padded = torch.full((rows, length + 1), self._tokenizer.pad, device=self._device)
        return padded.scatter_(1, place, whole)[:, :length].contiguous()

    @property
    def _frame(self) -> tuple[int, int]:
        return self._tokenizer.start, self._tokenizer.end

    def _table(self, texts: Sequence[str]) -> Tensor:
        """(n, longest) int64: the ids of each phrase, without start and end, padded with -1."""
        rows = []
        for row in self._tokenizer(texts).tolist():
            if self._tokenizer.end not in row[1:]:
                raise StylemuseError(f"a phrase is longer than the tokenizer's {self._tokenizer.length} ids")
            rows.append(row[1 : row.index(self._tokenizer.end, 1)])
        width = max(map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=self._device)
