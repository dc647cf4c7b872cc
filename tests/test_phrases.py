"""Tokens of words that know the word before them."""

import torch

from semantica.model.phrases import PhraseEncoder
from semantica.model.words import WordEncoder

WORDS = ("a", "and", "blue", "cross", "red", "ring")


def test_a_token_is_its_word_its_place_and_the_word_before():
    plain, phrases = WordEncoder(WORDS, 6, 64), PhraseEncoder(WORDS, 6, 64)
    texts = ["red cross", "blue cross", "red ring and a blue cross"]
    numbers = phrases.prepare(texts)
    made, single = phrases(numbers), plain(numbers)
    assert made.lengths.tolist() == [2, 2, 6] and torch.equal(made.pooled, single.pooled)
    # the first word has none before it
    assert torch.equal(made.tokens[:, 0], single.tokens[:, 0])
    turned = plain.codes[phrases.tokenizer.numbers["red"]].roll(1)
    assert torch.equal(made.tokens[0, 1], single.tokens[0, 1] + turned)
    # the same word at the same place, told apart by what stands before it; alone they are alike
    assert not torch.equal(made.tokens[0, 1], made.tokens[1, 1])
    assert torch.equal(single.tokens[0, 1], single.tokens[1, 1])


def test_what_was_before_is_not_taken_for_the_word_itself():
    width = 256
    encoder = PhraseEncoder(WORDS, 2, width)
    codes = encoder.codes[1:]
    # cosines of codes with turned codes: those of random signs
    assert (codes @ codes.roll(1, -1).T / width).abs().max() < 4 / width**0.5


def test_it_is_stored_and_read_like_any_encoder(tmp_path):
    encoder = PhraseEncoder(WORDS, 6, 64)
    encoder.save_pretrained(tmp_path)
    again = PhraseEncoder.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    numbers = encoder.prepare(["a red cross and a ring"])
    assert torch.equal(encoder(numbers).tokens, again(numbers).tokens)
    assert again.tokenizer.tokens_of("a red cross", "cross") == (2,)
