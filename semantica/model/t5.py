"""Text towers of the T5 family (T5, UL2, ByT5, mT5, umT5) as encoders, kept whole in run folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError, first_line
from semantica.files import read_json, refuse_unsafe
from semantica.fused.towers import EXAMPLES
from semantica.model.whole import complete
from semantica.pieces import LONGEST, PieceTokenizer

# model_type -> the encoder's half and its configuration in transformers; UL2 and ByT5 call themselves t5
KINDS = {
    "t5": ("T5EncoderModel", "T5Config"),
    "mt5": ("MT5EncoderModel", "MT5Config"),
    "umt5": ("UMT5EncoderModel", "UMT5Config"),
}


class T5TextEncoder(ModelMixin, ConfigMixin):
    """The frozen encoder of a T5 (arXiv 1910.10683): a token for each piece of a text, or for each byte (ByT5).

    Make one from a local folder with `T5TextEncoder.from_folder`; `from_pretrained` reads it back from a run folder,
    without the source.

    Args:
        source: where the weights came from; kept for the record.
        text: the tower's configuration for transformers, with its `model_type`.
        length: tokens of a text at most; the rest is cut.
    """

    trainable, input_dtype = False, torch.int64

    @register_to_config
    def __init__(self, source: str, text: dict, length: int):
        super().__init__()
        import transformers

        text = dict(text)
        model, config = (getattr(transformers, name) for name in KINDS[text.get("model_type", "t5")])
        # without the model around it, which shares its embeddings
        self.tower = model(config.from_dict(text)).encoder.requires_grad_(False).eval()
        # from the files beside the configuration, where it is read from a folder
        self.tokenizer: PieceTokenizer | None = None

    @classmethod
    def from_folder(cls, folder: Path, source: str, texts: Iterable[str] = ()) -> Self:
        """The tower and the tokenizer of a local folder, safetensors and JSON only.

        Args:
            folder: as `save_pretrained` of transformers writes a T5 (whole or its encoder) and its tokenizer.
            texts: that it has to read; rows of numbers are as long as the longest, up to 512.

        Raises:
            UserError: a part is missing or unsafe, or they do not fit each other.
        """
        import transformers

        refuse_unsafe(folder)
        kind = read_json(folder / "config.json").get("model_type")
        try:
            loaded = complete(getattr(transformers, KINDS[kind][0]), folder, local_files_only=True)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"text encoder {source} has no loadable safetensors: {first_line(error)}") from error
        config = loaded.config
        tokenizer = PieceTokenizer(folder, LONGEST, config.eos_token_id, config.pad_token_id)
        if tokenizer.highest >= config.vocab_size:
            raise UserError(
                f"text encoder {source} has {config.vocab_size} pieces, its tokenizer more: they belong to two models"
            )
        tokenizer.length = tokenizer.fitted(texts)
        made = cls(source, {**config.to_dict(), "model_type": kind}, tokenizer.length)
        made.tower.load_state_dict(loaded.encoder.state_dict())
        made.tokenizer = tokenizer
        return made

    @property
    def layers(self) -> nn.ModuleList:
        """The tower's repeated layers."""
        return self.tower.block

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one text as numbers."""
        return (self.config.length,)

    @property
    def token_dim(self) -> int:
        return self.tower.config.d_model

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: the tower is frozen."""
        return super().train(False)

    def prepare(self, texts: Sequence[str]) -> Tensor:
        """int64 `[B, length]`. Raises `UserError` for something else than text, and for an empty one."""
        return torch.from_numpy(self.tokenizer(texts))

    def examples(self, count: int) -> Tensor:
        return self.prepare([EXAMPLES[i % 2] for i in range(count)])

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> Stream:
        """Numbers `[B, length]` to tokens `[B, length, C]`, the mean of those that are there, and their number."""
        there = numbers != self.tower.config.pad_token_id
        # as what is added to logits: of rows the library would ask for values, which meta tensors lack
        mask = torch.where(there, 0.0, torch.finfo(self.dtype).min).to(self.dtype)[:, None, None]
        mask = mask.expand(-1, 1, numbers.shape[1], -1)
        tokens, lengths = self.tower(numbers, attention_mask=mask).last_hidden_state, there.sum(1)
        pooled = (tokens * there[..., None]).sum(1) / lengths.clamp(min=1)[:, None]
        return Stream(tokens, pooled.to(tokens.dtype), lengths)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As any model of diffusers, with the tokenizer beside it."""
        super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save(Path(save_directory))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Self:
        """What `save_pretrained` wrote. Raises `UserError` where the tokenizer is missing or something else."""
        made = super().from_pretrained(folder, **kwargs)
        config = made.tower.config
        made.tokenizer = PieceTokenizer(Path(folder), made.config.length, config.eos_token_id, config.pad_token_id)
        return made
