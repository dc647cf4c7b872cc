"""T5's tokenizers by the library `tokenizers` alone, and ByT5's, which numbers bytes."""

from collections.abc import Iterable
from pathlib import Path

from semantica.errors import UserError, first_line
from semantica.files import read_json
from semantica.tokens import LIMIT, SETTINGS, WHOLE, Tokenizer

# tokens of a text at most: positions are relative, and these towers were trained on as many
LONGEST = 512
BYTES = "ByT5Tokenizer"
# the numbers before ByT5's bytes: padding, end, unknown
SPECIAL_BYTES = 3
# a vocabulary of 250 000 pieces, umT5's, has some 17 MB
LARGEST = 4 * LIMIT


class PieceTokenizer(Tokenizer):
    """Texts to pieces of T5's vocabulary, or to ByT5's bytes, then an end and padding.

    Args:
        folder: with `tokenizer.json` (SentencePiece's unigrams, arXiv 1808.06226, as transformers writes them), or the
            `tokenizer_config.json` of a ByT5 (arXiv 2105.13626), which needs no more.
        length: numbers of a row.
        end, padding: of the tower's configuration.

    Raises:
        UserError: a file is missing or something else.
    """

    def __init__(self, folder: Path, length: int = LONGEST, end: int = 1, padding: int = 0):
        self.length, self.end, self.padding, self.model = length, end, padding, None
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        path = folder / WHOLE
        if settings.get("tokenizer_class") == BYTES:
            return
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UserError(
                f"{path} is missing, or none of a tokenizer: write it with transformers' "
                f"AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
            )
        from tokenizers import Tokenizer as Model

        try:
            self.model = Model.from_file(str(path))
        # the library has no error of its own
        except Exception as error:
            raise UserError(f"{path} is no tokenizer: {first_line(error)}") from error
        self.model.no_truncation()
        self.model.no_padding()

    @property
    def highest(self) -> int:
        """The highest number that a text may have."""
        return SPECIAL_BYTES + 255 if self.model is None else max(self.model.get_vocab().values())

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text.strip():
            raise UserError(f"text {text!r} is empty: give words, or no text at all")
        if self.model is not None:
            made = self.model.encode(text, add_special_tokens=False)
            return made.ids, made.offsets
        characters = [character.encode() for character in text]
        spans = [(place, place + 1) for place, encoded in enumerate(characters) for _ in encoded]
        return [SPECIAL_BYTES + byte for encoded in characters for byte in encoded], spans

    def fitted(self, texts: Iterable[str]) -> int:
        """The length of rows that no text is cut in, at most as it is; without texts, as it is."""
        longest = max((len(self.encode(text)[0]) + 1 for text in texts), default=self.length)
        return min(self.length, longest)

    def save(self, folder: Path) -> None:
        """Write what `PieceTokenizer(folder)` reads."""
        if self.model is None:
            (folder / SETTINGS).write_text(f'{{"tokenizer_class": "{BYTES}"}}')
        else:
            self.model.save(str(folder / WHOLE))
