"""Texts as one token for each word that also knows the word before it, as those of a causal text tower do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.condition import Stream
from semantica.model.words import WordEncoder


class PhraseEncoder(WordEncoder):
    """`WordEncoder` whose tokens also have the code of the word before, turned by one place so that it is told apart.

    In "a red cross and a blue ring" what has found the red part of a picture finds, by the same code, that it is a
    cross: with tokens of single words that takes two layers of attention, one to read a word's place and one to read
    the next place. It has the arguments of a `WordEncoder`, and nothing of it is trained.
    """

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> Stream:
        """Numbers `[B, length]` to tokens `[B, length, W]`, their mean without neighbours, and how many there are."""
        stream = super().forward(numbers)
        before = F.pad(self.codes[numbers[:, :-1]], (0, 0, 1, 0))
        return Stream(stream.tokens + before.roll(1, -1), stream.pooled, stream.lengths)
