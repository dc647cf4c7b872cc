"""CLIP's text tower as an encoder of this package, kept whole in run folders: weights, tokenizer, configuration."""

from collections.abc import Sequence
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
from semantica.tokens import ClipTokenizer

# where a folder of diffusers' pipelines has the two parts
TOWER, TOKENIZER = "text_encoder", "tokenizer"


class ClipTextEncoder(ModelMixin, ConfigMixin):
    """The frozen text tower of a CLIP: the tokens of its last layer, padding among them, as in Stable Diffusion.

    Make one from a local folder with `ClipTextEncoder.from_source`; `from_pretrained` reads it back from a run folder,
    without the source.

    Args:
        source: where the weights came from; kept for the record.
        text: the tower's configuration for transformers.
    """

    trainable, input_dtype = False, torch.int64

    @register_to_config
    def __init__(self, source: str, text: dict):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig.from_dict(dict(text))
        # the pinned attention is torch's own: nothing is fetched to run it
        config._attn_implementation = "sdpa"
        self.tower = CLIPTextModel(config).requires_grad_(False).eval()
        # from the files beside the configuration, where it is read from a folder
        self.tokenizer: ClipTokenizer | None = None

    @classmethod
    def from_source(cls, source: str | Path, folder: Path | None = None) -> Self:
        """The tower and the tokenizer of a local folder, safetensors and JSON only.

        Args:
            source: the folder, or the name that it has elsewhere: kept for the record.
            folder: as `save_pretrained` of transformers writes a CLIP and its tokenizer into one folder, or the folder
                of a diffusers pipeline with `text_encoder` and `tokenizer`; by default `source`.

        Raises:
            UserError: there is no such folder, a part is missing or unsafe, or they do not fit each other.
        """
        from transformers import CLIPTextModel

        folder = folder or Path(source)
        if not folder.is_dir():
            raise UserError(f'--text-encoder {source} is no folder: give "words" or the folder of a text tower')
        whole = (folder / TOWER).is_dir()
        tower, words = (folder / TOWER, folder / TOKENIZER) if whole else (folder, folder)
        refuse_unsafe(tower, words)
        kind = read_json(tower / "config.json").get("model_type")
        if kind not in ("clip", "clip_text_model"):
            raise UserError(f"text encoder {source} is of type {kind!r}: expected a CLIP, or a T5")
        tokenizer = ClipTokenizer(words)
        try:
            loaded = complete(CLIPTextModel, tower, local_files_only=True)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"text encoder {source} has no loadable safetensors: {first_line(error)}") from error
        config = loaded.config
        if max(tokenizer.numbers) >= config.vocab_size or tokenizer.length > config.max_position_embeddings:
            has = f"{config.vocab_size} words and {config.max_position_embeddings} places"
            raise UserError(f"text encoder {source} has {has}, its tokenizer more: they belong to different models")
        made = cls(str(source), {**config.to_dict(), "model_type": "clip_text_model"})
        made.tower.load_state_dict(loaded.state_dict())
        made.tokenizer = tokenizer
        return made

    @property
    def layers(self) -> nn.ModuleList:
        """The tower's repeated layers."""
        return next(module for module in self.tower.modules() if isinstance(module, nn.ModuleList))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one text as numbers."""
        return (self.tower.config.max_position_embeddings,) if self.tokenizer is None else self.tokenizer.shape

    @property
    def token_dim(self) -> int:
        return self.tower.config.hidden_size

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: the tower is frozen."""
        return super().train(False)

    def prepare(self, texts: Sequence[str]) -> Tensor:
        """int64 `[B, length]`. Raises `UserError` for something else than text."""
        return torch.from_numpy(self.tokenizer(texts))

    def examples(self, count: int) -> Tensor:
        return self.prepare([EXAMPLES[i % len(EXAMPLES)] for i in range(count)])

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> Stream:
        """Numbers `[B, length]` to tokens `[B, length, C]`, and that of the text's end as the pooled vector."""
        made = self.tower(numbers)
        return Stream(made.last_hidden_state, made.pooler_output)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As any model of diffusers, with the tokenizer beside it."""
        super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save(Path(save_directory))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Self:
        """What `save_pretrained` wrote. Raises `UserError` where the tokenizer is missing or something else."""
        made = super().from_pretrained(folder, **kwargs)
        made.tokenizer = ClipTokenizer(Path(folder))
        return made
