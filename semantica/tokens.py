"""CLIP's tokenizer by the library `tokenizers` alone: prompts to numbers where torch and transformers are not imported.

Byte-pair encoding of Radford et al., arXiv 2103.00020, section 2.4: the numbers that transformers' CLIPTokenizer gives,
from the same files.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from semantica.errors import UserError, first_line, warn_once
from semantica.files import read_json

# the two files of old, or the one that holds both; and the settings, of which old folders have a second file
VOCABULARY, MERGES, WHOLE, SETTINGS = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
FILES = (VOCABULARY, MERGES, WHOLE, SETTINGS, SPECIAL)
START, END = "<|startoftext|>", "<|endoftext|>"
# short forms, runs of letters, single digits, runs of anything else but spaces
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# a file of merges has a megabyte; one of another kind under its name is not read into memory
LIMIT = 1 << 24


class Tokenizer:
    """Texts to rows of numbers, all of one length: what begins a row, the text cut to fit, the end, then padding.

    length: of a row. first: what begins it. end, padding: numbers. loud: whether to warn of each text that is cut.
    """

    length: int
    first: tuple[int, ...] = ()
    end: int
    padding: int
    loud = True

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Numbers of a text alone, and the places in it that each stands for, from and to."""
        raise NotImplementedError

    @property
    def room(self) -> int:
        """Numbers of a row that a text may have."""
        return self.length - len(self.first) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one text as numbers."""
        return (self.length,)

    @property
    def quiet(self) -> Self:
        """The same, for texts of which it was said before how many are cut."""
        made = copy.copy(self)
        made.loud = False
        return made

    def cut(self, texts: Iterable[str]) -> int:
        """How many of these texts are longer than what is read of them."""
        return sum(len(self.encode(text)[0]) > self.room for text in texts)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `[len(texts), length]`. Raises `UserError` for something else than text, or half a character."""
        rows = []
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a prompt is a {type(text).__name__}: give text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"a prompt holds bytes that are no text in UTF-8: {text!r}")
            ids, offsets = self.encode(text)
            if len(ids) > self.room and self.loud:
                rest = text[offsets[self.room][0] :]
                # both tokenizers of SDXL find it
                warn_once(f"a prompt has {len(ids)} tokens, {self.room} are read; left out: {rest!r}")
            row = [*self.first, *ids[: self.room], self.end]
            rows.append(row + [self.padding] * (self.length - len(row)))
        return np.array(rows, np.int64).reshape(-1, self.length)

    def tokens_of(self, prompt: str, words: str) -> tuple[int, ...]:
        """Places in a prompt's row that one or several words in succession have, wherever they stand in it.

        Raises:
            UserError: they are not in the prompt, or behind its part that is read.
        """
        wanted = words.split()
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, wanted)) + r"(?!\w)"
        spans = [found.span() for found in re.finditer(pattern, prompt, re.IGNORECASE)] if wanted else []
        if not spans:
            raise UserError(f"{words!r} is not in the prompt {prompt!r}: choose words of it")
        places = enumerate(self.encode(prompt)[1], len(self.first))
        found = [i for i, (a, b) in places if any(a < stop and b > start for start, stop in spans)]
        read = tuple(place for place in found if place < self.length - 1)
        if not read:
            raise UserError(f"{words!r} stands behind the {self.room} tokens that are read of {prompt!r}")
        return read


class ClipTokenizer(Tokenizer):
    """Prompts to rows of numbers, all of one length: start, the prompt cut to fit, end, then padding.

    Args:
        folder: with `tokenizer_config.json`, and `vocab.json` and `merges.txt` or `tokenizer.json`.

    Raises:
        UserError: a file is missing or something else.
    """

    def __init__(self, folder: Path):
        vocabulary, pairs = read_model(folder)
        config = read_json(folder / SETTINGS)
        numbers = vocabulary.values()
        if {START, END} - set(vocabulary) or not all(type(n) is int for n in numbers) or {*map(len, pairs)} - {2}:
            raise UserError(f"{folder} is no tokenizer of CLIP: it has other words or merges")
        self.length = config.get("model_max_length", 77)
        padding = config.get("pad_token", END)
        if "added_tokens_decoder" not in config and (folder / SPECIAL).is_file():
            # its word counts in folders of old: Stable Diffusion 2 pads with "!" and has the end in the other file
            padding = read_json(folder / SPECIAL).get("pad_token", padding)
        padding = padding.get("content") if isinstance(padding, dict) else padding
        known = isinstance(padding, str) and padding and padding in vocabulary
        if type(self.length) is not int or not 2 < self.length <= 1 << 16 or not known:
            raise UserError(f"{folder / SETTINGS} has length {self.length!r} and padding {padding!r}: these are none")
        self.pad_token, self.numbers = padding, frozenset(numbers)
        self.padding, self.end, self.first = vocabulary[padding], vocabulary[END], (vocabulary[START],)
        try:
            self.model = byte_pairs(vocabulary, pairs, padding)
        # the library has no error of its own
        except Exception as error:
            raise UserError(f"{folder} is no tokenizer of CLIP: {first_line(error)}") from error

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        made = self.model.encode(text, add_special_tokens=False)
        return made.ids, made.offsets

    def save(self, folder: Path) -> None:
        """Write what `ClipTokenizer(folder)` reads."""
        self.model.save(str(folder / WHOLE))
        settings = {"model_max_length": self.length, "pad_token": self.pad_token}
        (folder / SETTINGS).write_text(json.dumps(settings))


def read_model(folder: Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges, the first learned first. Raises `UserError` for a file that is missing or too large."""
    whole = not (folder / VOCABULARY).is_file() and (folder / WHOLE).is_file()
    for path in [folder / WHOLE] if whole else [folder / VOCABULARY, folder / MERGES]:
        if not path.is_file() or path.stat().st_size > LIMIT:
            raise UserError(f"{path} is missing, or none of a tokenizer: copy the tokenizer's files there")
    if whole:
        model = read_json(folder / WHOLE).get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, lines = model.get("vocab"), model.get("merges")
    else:
        text = (folder / MERGES).read_text(encoding="utf-8")
        vocabulary = read_json(folder / VOCABULARY)
        lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not isinstance(lines, list):
        raise UserError(f"{folder} is no tokenizer of CLIP: it has no vocabulary or no merges")
    return vocabulary, [tuple(line.split() if isinstance(line, str) else line) for line in lines]


def byte_pairs(vocabulary: dict[str, int], pairs: list[tuple[str, ...]], padding: str):
    """A `tokenizers.Tokenizer` as transformers makes it for CLIP."""
    # here, as bundles of pictures have no use for it
    from tokenizers import AddedToken, Regex
    from tokenizers import Tokenizer as Model
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC, Lowercase, Replace
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    model = BPE(vocabulary, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    made = Model(model)
    made.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    made.pre_tokenizer = PreTokenizers([Split(Regex(WORDS), "removed", invert=True), ByteLevel(False)])
    # the word that pads is never a part of others, nor do others join it
    made.add_special_tokens([AddedToken(word, special=True) for word in (START, END, padding)])
    return made
