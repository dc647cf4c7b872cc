"""CLIP's tokenizer in plain Python: prompts to numbers where neither torch nor transformers is installed.

Byte-pair encoding of Radford et al., arXiv 2103.00020, section 2.4: the numbers that transformers' CLIPTokenizer gives,
from the same two files.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from semantica.errors import UserError
from semantica.files import read_json

# the two files of old, or the one that holds both; and the settings, of which old folders have a second file
VOCABULARY, MERGES, WHOLE, SETTINGS = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
FILES = (VOCABULARY, MERGES, WHOLE, SETTINGS, SPECIAL)
START, END, WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
SHORT = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# a file of merges has a megabyte; one of another kind under its name is not read into memory
LIMIT = 1 << 24


class ClipTokenizer:
    """Prompts to rows of numbers, all of one length: start, the prompt cut to fit, end, then padding.

    Args:
        folder: with `tokenizer_config.json`, and `vocab.json` and `merges.txt` or `tokenizer.json`.

    Raises:
        UserError: a file is missing or something else.
    """

    def __init__(self, folder: Path):
        self.vocabulary, pairs = read_model(folder)
        config = read_json(folder / SETTINGS)
        numbers = self.vocabulary.values()
        if {START, END} - set(self.vocabulary) or not all(type(n) is int for n in numbers) or {*map(len, pairs)} - {2}:
            raise UserError(f"{folder} is no tokenizer of CLIP: it has other words or merges")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.length = config.get("model_max_length", 77)
        padding = config.get("pad_token", END)
        if "added_tokens_decoder" not in config and (folder / SPECIAL).is_file():
            # its word counts in folders of old: Stable Diffusion 2 pads with "!" and has the end in the other file
            padding = read_json(folder / SPECIAL).get("pad_token", padding)
        padding = padding.get("content") if isinstance(padding, dict) else padding
        known = isinstance(padding, str) and padding and padding in self.vocabulary
        if type(self.length) is not int or not 2 < self.length <= 1 << 16 or not known:
            raise UserError(f"{folder / SETTINGS} has length {self.length!r} and padding {padding!r}: these are none")
        self.padding, self.start, self.end = (self.vocabulary[word] for word in (padding, START, END))
        # the word that pads is never a part of others, nor do others join it
        self.special = re.compile("|".join(map(re.escape, {START, END, padding})))
        self.encode = functools.lru_cache(4096)(self._encode)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `[len(texts), length]`. Raises `UserError` for something else than text, or half a character."""
        rows = []
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a prompt is a {type(text).__name__}: give text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"a prompt holds bytes that are no text in UTF-8: {text!r}")
            inner = [number for word in self.words(text) for number in self.encode(word)][: self.length - 2]
            row = [self.start, *inner, self.end]
            rows.append(row + [self.padding] * (self.length - len(row)))
        return np.array(rows, np.int64).reshape(-1, self.length)

    def words(self, text: str) -> Iterator[str]:
        """Special words as they stand, and those of `split` between them."""
        done = 0
        for found in self.special.finditer(text):
            yield from split(text[done : found.start()])
            yield found.group()
            done = found.end()
        yield from split(text[done:])

    def _encode(self, word: str) -> list[int]:
        """The numbers of one word: its bytes, the pair that was learned first merged until there is none left."""
        if word in (START, END) or self.special.fullmatch(word):
            return [self.vocabulary[word]]
        parts = [BYTES[byte] for byte in word.encode()]
        parts[-1] += WORD
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
                merged.append(parts[i] + parts[i + 1] if both else parts[i])
                i += 2 if both else 1
            parts = merged
        return [self.vocabulary.get(part, self.end) for part in parts]


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


def split(text: str) -> Iterator[str]:
    """Words of a prompt: short forms, runs of letters, single digits, runs of anything else but spaces."""
    # character by character: a sigma at a word's end is no other letter there
    text, i = "".join(map(str.lower, unicodedata.normalize("NFC", text))), 0
    while i < len(text):
        special = next((word for word in (START, END, *SHORT) if text.startswith(word, i)), None)
        kind, stop = kind_of(text[i]), i + 1
        if special:
            stop = i + len(special)
        elif kind in "lo":
            while stop < len(text) and kind_of(text[stop]) == kind:
                stop += 1
        if kind != "s":
            yield text[i:stop]
        i = stop


def kind_of(character: str) -> str:
    """Letter, number, space or other."""
    if character.isspace():
        return "s"
    return {"L": "l", "N": "n"}.get(unicodedata.category(character)[0], "o")


def visible_bytes() -> list[str]:
    """A printable character for each byte, as GPT-2's vocabulary has them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


BYTES = visible_bytes()
