"""Words of texts as numbers: a fixed vocabulary, learned from the texts that a model is trained on."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from semantica.errors import UserError

# letters and digits, with an apostrophe or hyphen within
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
# texts with more words, and vocabularies of more, are for a text tower
LONGEST, LARGEST = 256, 1 << 16
# words that a message shows
SHOWN = 8


def split_words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation: "Two red crosses, please" has four."""
    return WORD.findall(unicodedata.normalize("NFC", text).replace("\u2019", "'").lower())


@dataclass(frozen=True)
class WordTokenizer:
    """Texts to rows of numbers, one for each word, then zeros.

    vocabulary: word i has the number i + 1. length: the most words that a text may have. strict: refuse what is not
    known; without it, unknown words and those past the length are left out.
    """

    vocabulary: tuple[str, ...]
    length: int
    strict: bool = True

    @classmethod
    def learn(cls, texts: Iterable[str]) -> Self:
        """The tokenizer of these texts, in whatever order they come.

        Raises:
            UserError: there is no text, one has no words, or there are too many words for one token each.
        """
        vocabulary: set[str] = set()
        length = 0
        for text in texts:
            words = with_words(text, split_words(text))
            vocabulary.update(words)
            length = max(length, len(words))
        advice = "give the folder of a CLIP text tower as --text-encoder"
        if not vocabulary:
            raise UserError("there is no text: a vocabulary of words needs some")
        if length > LONGEST:
            raise UserError(f"a text has {length} words, and one token for each word goes up to {LONGEST}: {advice}")
        if len(vocabulary) > LARGEST:
            raise UserError(f"texts have {len(vocabulary)} different words, more than {LARGEST}: {advice}")
        return cls(tuple(sorted(vocabulary)), length)

    @property
    def lenient(self) -> Self:
        return replace(self, strict=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one text as numbers."""
        return (self.length,)

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary, 1)}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `[len(texts), length]`.

        Raises:
            UserError: something else than text, a text without words, with an unknown word or too many of them.
        """
        return np.array([self.row(text) for text in texts], np.int64).reshape(-1, self.length)

    def row(self, text: str) -> list[int]:
        words = split_words(checked(text))
        if self.strict:
            self.check(text, words)
        known = [self.numbers[word] for word in words if word in self.numbers][: self.length]
        return known + [0] * (self.length - len(known))

    def check(self, text: str, words: list[str]) -> None:
        for word in with_words(text, words):
            if word not in self.numbers:
                close = difflib.get_close_matches(word, self.vocabulary, 3, 0.5)
                known = f"close to it are {', '.join(close)}" if close else f"it knows {listed(self.vocabulary)}"
                raise UserError(f"word {word!r} is not among the {len(self.vocabulary)} of this model: {known}")
        if len(words) > self.length:
            raise UserError(f"text {text!r} has {len(words)} words: this model takes at most {self.length}")

    def check_all(self, texts: Iterable[str]) -> None:
        """Raises `UserError` as `__call__`, where nothing but that is wanted."""
        for text in texts:
            self.check(text, split_words(text))

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Words of texts that are not in the vocabulary, in alphabetical order."""
        return sorted({word for text in texts for word in split_words(text)} - set(self.numbers))

    def tokens_of(self, prompt: str, word: str) -> tuple[int, ...]:
        """Places of a word's tokens, or those of several words in a row, wherever a prompt has them.

        Raises:
            UserError: the prompt does not have it.
        """
        words, wanted = split_words(checked(prompt)), split_words(checked(word))
        count = len(wanted)
        starts = [i for i in range(len(words) - count + 1) if words[i : i + count] == wanted] if wanted else []
        if not starts:
            raise UserError(f"{word!r} is not in the prompt {prompt!r}: choose among {listed(dict.fromkeys(words))}")
        return tuple(sorted({start + i for start in starts for i in range(count)}))


def with_words(text: str, words: list[str]) -> list[str]:
    """The words of a text. Raises `UserError` where it has none."""
    if not words:
        raise UserError(f"text {text!r} has no words: give some, or no text at all")
    return words


def checked(text: str) -> str:
    """A text. Raises `UserError` for something else."""
    if not isinstance(text, str):
        raise UserError(f"a prompt is a {type(text).__name__}: give text")
    return text


def listed(words: Iterable[str]) -> str:
    """The first of some words, for a message."""
    words = list(words)
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")
