"""Texts as one token for each word: frozen codes of words and places, from which the denoiser's projections learn."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from semantica.condition import Stream
from semantica.errors import UserError
from semantica.words import WordTokenizer


class WordEncoder(ModelMixin, ConfigMixin):
    """One token for each word of a text: the word's code plus that of its place. Nothing of it is trained.

    A word's code are random signs, a function of its letters alone: in W dimensions the cosine of two words is 0 on
    average and 1 / sqrt(W) in the root mean square (random projections: Achlioptas, J. Comput. Syst. Sci. 66, 2003).
    Places have sinusoids (Vaswani et al., arXiv 1706.03762, section 3.5). What words mean is learned by what reads the
    tokens: `UViT`'s projections to keys and values.

    Args:
        vocabulary: the words, in the order of their numbers, which begin at 1.
        length: the most words of a text.
        width: W, divisible by 8.

    Raises:
        UserError: no words, a width or length out of range.
    """

    trainable, input_dtype = False, torch.int64

    @register_to_config
    def __init__(self, vocabulary: tuple[str, ...], length: int, width: int = 256):
        super().__init__()
        if not vocabulary or length < 1 or width < 8 or width % 8:
            said = f"{len(vocabulary)} words, length {length}, width {width}"
            raise UserError(f"an encoder of words with {said}: give at least one word and a width that 8 divides")
        self.tokenizer = WordTokenizer(tuple(vocabulary), length)
        codes = np.stack([np.zeros(width, np.float32), *(code(word, width) for word in vocabulary)])
        # kept in the weights' file: a run does not depend on how codes are made
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("places", places(length, width))

    @classmethod
    def learn(cls, texts: Iterable[str]) -> Self:
        """The encoder of these texts' words. Raises `UserError` as `WordTokenizer.learn`."""
        tokenizer = WordTokenizer.learn(texts)
        return cls(tokenizer.vocabulary, tokenizer.length)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one text."""
        return self.tokenizer.shape

    @property
    def token_dim(self) -> int:
        return self.config.width

    def prepare(self, texts: Sequence[str]) -> Tensor:
        """int64 `[B, length]`. Raises `UserError` as `semantica.words.WordTokenizer`."""
        return torch.from_numpy(self.tokenizer(texts))

    def examples(self, count: int) -> Tensor:
        return torch.ones(count, *self.input_shape, dtype=torch.int64)

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> Stream:
        """Numbers `[B, length]` to tokens `[B, length, W]`, their mean as the pooled vector, and how many there are."""
        valid = numbers > 0
        lengths = valid.sum(1)
        tokens = self.codes[numbers] + self.places
        pooled = (tokens * valid[..., None]).sum(1) / lengths.clamp(min=1)[:, None]
        return Stream(tokens, pooled, lengths)


def code(word: str, width: int) -> np.ndarray:
    """Signs of a word: float32 `[width]` of 1 and -1, the bits of SHAKE-256 of its letters."""
    drawn = hashlib.shake_256(word.encode()).digest(width // 8)
    return 1 - 2 * np.unpackbits(np.frombuffer(drawn, np.uint8)).astype(np.float32)


def places(length: int, width: int) -> Tensor:
    """Sinusoids `[length, width]` of places, with periods of 2 pi to 20000 pi words."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    phase = torch.arange(length)[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], -1)
