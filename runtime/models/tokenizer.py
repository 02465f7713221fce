"""CLIP's tokenizer: prompts -> token ids of one fixed length.

Law: NFC, white space folded to one blank, lower case; split into words, single digits and runs of signs; bytes of each
piece merged by byte-pair encoding, ``</w>`` ending a piece; framed by the start and end token, cut or padded to the
length (the end token survives a cut). Source: openai/CLIP simple_tokenizer.py; ids agree with transformers'
CLIPTokenizer, special tokens inside a prompt included.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..core import StylemuseError

if TYPE_CHECKING:
    from torch import Tensor

START = "<|startoftext|>"
END = "<|endoftext|>"
PIECE = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"
UNLIMITED = 10**6  # transformers writes a far larger number where it knows no limit
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ClipTokenizer:
    """Maps prompts to ids (R, length).

    Attributes:
        length: ids per prompt, start and end token included.
        start, end, pad: the ids of the special tokens.
        vocab_size: how many ids there are, i.e. the rows an embedding needs.
    """

    def __init__(self, backend: Tokenizer, *, length: int, pad: str = END) -> None:
        """Frames ``backend``, whose post-processor adds the start and the end token.

        Raises StylemuseError when it does not, when ``pad`` is not one of its tokens, or when ``length`` < 2.
        """
        backend.no_truncation()
        backend.no_padding()
        frame = backend.encode("").ids
        if len(frame) != 2:
            raise StylemuseError(f"tokenizer: an empty prompt gives {len(frame)} tokens; start and end are expected")
        pad_id = backend.token_to_id(pad)
        if pad_id is None:
            raise StylemuseError(f"tokenizer: pad token {pad!r} is not in the vocabulary")
        if length < 2:
            raise StylemuseError(f"tokenizer: length {length} given; at least 2 (start and end) is needed")
        backend.enable_truncation(max_length=length)
        backend.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
        self._backend = backend
        self.length = length
        self.start, self.end = frame
        self.pad = pad_id
        self.vocab_size = 1 + max(backend.get_vocab().values())

    @classmethod
    def from_folder(cls, folder: str | Path, length: int | None = None) -> ClipTokenizer:
        """Reads ``tokenizer.json``, or else ``vocab.json`` with ``merges.txt``, and the special tokens beside them.

        Args:
            folder: the ``tokenizer`` folder of a model.
            length: ids per prompt; by default ``model_max_length`` of ``tokenizer_config.json``.

        Raises StylemuseError when files are missing or damaged, or no length is given anywhere.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        length = config.get("model_max_length") if length is None else length
        if not isinstance(length, int) or length >= UNLIMITED:
            raise StylemuseError(f"{folder}: tokenizer_config.json gives no model_max_length, and no length was given")
        whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
            raise StylemuseError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
        try:
            if whole.is_file():
                backend = Tokenizer.from_file(str(whole))
            else:
                backend = _byte_pairs(*BPE.read_file(str(vocabulary), str(merges)), special)
        except Exception as error:  # the tokenizers library raises plain Exception for every damaged file
            raise StylemuseError(f"{folder}: tokenizer files cannot be read: {error}") from error
        return cls(backend, length=length, pad=special["pad_token"].content)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(R, length) int64, one row per prompt.

        Raises StylemuseError when a single string is given instead of a sequence.
        """
        import torch

        return torch.from_numpy(self.ids(texts))

    def ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The same as an array, without torch."""
        if isinstance(texts, str):
            raise StylemuseError("tokenizer: one string given; a sequence of strings is needed")
        ids = [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        return np.array(ids, np.int64).reshape(len(ids), self.length)

    def count(self, text: str) -> int:
        """Tokens of a text, start and end included; more than `length` where the text is cut."""
        encoded = self._backend.encode(text)
        return 2 + sum(sum(part.attention_mask) - 2 for part in (encoded, *encoded.overflowing))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as one tokenizer.json, with the little that is beside it, into a new folder."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        self._backend.save(str(folder / "tokenizer.json"))
        names = {role: self._backend.id_to_token(self.end) for role in ROLES}
        names |= {"bos_token": self._backend.id_to_token(self.start), "pad_token": self._backend.id_to_token(self.pad)}
        config = names | {"model_max_length": self.length, "tokenizer_class": "CLIPTokenizer"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8"
        )


def build_word_tokenizer(words: Sequence[str], folder: str | Path, model_max_length: int) -> ClipTokenizer:
    """Writes a CLIP tokenizer in which every given word is one token, and any other text falls back to bytes.

    Each word is run through the merges found so far; what is left in pieces is joined from the left by new merges.
    New merges rank below all earlier ones, so they never change how an earlier word is merged.
    The ids: 256 bytes, 256 bytes that end a word, the merges in order, start, end; padding is the end token.

    Args:
        words: lower-cased and normalized like any prompt; each must be one piece (letters, one digit, or signs).
        folder: gets vocab.json, merges.txt, special_tokens_map.json and tokenizer_config.json; made if missing.
        model_max_length: ids per prompt, at least 2.

    Raises StylemuseError naming a word that is not one piece.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(sign + WORD_END for sign in alphabet)])
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        piece = _single_piece(word)
        symbols = _merge([*piece[:-1], piece[-1] + WORD_END], ranks)
        while len(symbols) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            tokens[symbols[0] + symbols[1]] = None
            symbols = _merge(symbols, ranks)
    special = dict.fromkeys(ROLES, END) | {"bos_token": START}
    config = special | {"model_max_length": model_max_length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("vocab", vocabulary), ("special_tokens_map", special), ("tokenizer_config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in ranks)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ClipTokenizer.from_folder(folder)


def _merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one piece: the pair of lowest rank is joined, leftmost first, until none is left."""
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        place = min(pairs)[1]
        symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]


def _single_piece(word: str) -> str:
    """The byte-level form of a word, which must be a single piece."""
    pieces = _splitter().pre_tokenize_str(_normalizer().normalize_str(word))
    if len(pieces) != 1:
        raise StylemuseError(
            f"tokenizer: {word!r} is {len(pieces)} pieces; a word is a run of letters, one digit, or a run of signs"
        )
    return pieces[0][0]


def _normalizer() -> normalizers.Sequence:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()],
    )


def _splitter() -> pre_tokenizers.Sequence:
    # "removed" with invert keeps the matches as pieces and drops what lies between them, i.e. the white space.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _byte_pairs(vocabulary: Any, merges: Any, special: dict[str, AddedToken]) -> Tokenizer:
    """CLIP's tokenizer from its vocabulary and merges.

    Special tokens are matched inside a prompt before it is split; so where "!" pads, "!" in a prompt is that token.
    """
    unknown = special["unk_token"].content
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
        )
    )
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = _splitter()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special[role] for role in ROLES])
    start, end = (special[role].content for role in ("bos_token", "eos_token"))
    ids = backend.get_vocab()
    backend.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    """The special token of each role, CLIP's own where the files name none.

    special_tokens_map.json goes before tokenizer_config.json, except where the latter lists its added tokens (saves
    since transformers 4.34), for then the former is a leftover; transformers reads them in the same order.
    """
    listed = _read_json(folder / "special_tokens_map.json")
    added = config.get("added_tokens_decoder")
    sources = (config, listed) if added is None else (listed, config)
    entries: dict[str, Any] = dict.fromkeys(ROLES, END) | {"bos_token": START}
    for source in sources:
        entries |= {role: source[role] for role in ROLES if source.get(role)}
    options = {entry["content"]: entry for entry in (added or {}).values()}
    return {role: _added_token(entry, options) for role, entry in entries.items()}


def _added_token(entry: str | dict[str, Any], options: dict[str, dict[str, Any]]) -> AddedToken:
    """A special token from its entry: a table with matching options, or a plain text whose table may be elsewhere."""
    content = entry if isinstance(entry, str) else entry["content"]
    table = options.get(content, {"normalized": False} if isinstance(entry, str) else entry)
    flags = {name: bool(table[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in table}
    return AddedToken(content, special=True, **flags)


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StylemuseError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise StylemuseError(f"{path}: a JSON object is needed")
    return content
