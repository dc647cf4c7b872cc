"""A CLIP and an aggregator as one model: pictures and names of classes in, a logit for each class and place out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from semantica.errors import UserError, first_line
from semantica.files import read_json, refuse_unsafe
from semantica.model.encoders import loaded, refuse_code
from semantica.model.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, of_transformers, settings_of
from semantica.model.whole import complete
from semantica.segmentation.aggregator import Aggregator
from semantica.segmentation.sizes import Sizes
from semantica.tokens import ClipTokenizer

# the authors' (cat_seg_predictor.py, "single")
TEMPLATE = "A photo of a {} in the scene"
# which parts of CLIP are trained along: see `Segmenter.tune`
TUNED = ("attention", "all", "none")


class Dense(NamedTuple):
    """What the vision tower says of each place: tokens in CLIP's joint space `[B, width, H, W]`, and those of two
    layers inside, `[B, inner, H, W]` each."""

    tokens: Tensor
    inner: tuple[Tensor, ...]


class Segmenter(ModelMixin, ConfigMixin):
    """CAT-Seg (Cho et al., arXiv 2303.11797): what of a picture belongs to each of any number of named classes.

    Make one from a CLIP with `Segmenter.from_clip`; `load_segmenter` reads it back from its folder.

    Args:
        source: where CLIP's weights came from; kept for the record.
        clip: its configuration for transformers, of both towers.
        image_size: side in pixels of the squares that it looks at; the table of positions is interpolated to it.
        templates: texts with {} where the name of a class goes, each a channel of the cost volume.
        details: two layers of the vision tower whose output guides the decoder, counted from 0.
        sizes: of the aggregator, see `semantica.segmentation.aggregator.Sizes`.
        mean, std: per-channel normalisation of pictures in [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        source: str,
        clip: dict,
        image_size: int,
        templates: tuple[str, ...] = (TEMPLATE,),
        details: tuple[int, int] = (3, 7),
        sizes: dict | None = None,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ):
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_dict(dict(clip))
        # the pinned attention is torch's own: nothing is fetched to run it
        config._attn_implementation = "sdpa"
        self.towers = CLIPModel(config).eval()
        vision, patch = config.vision_config, config.vision_config.patch_size
        if image_size % patch:
            raise UserError(f"image size {image_size} is no multiple of CLIP's patches of {patch} pixels: choose one")
        if not all(isinstance(t, str) and t.count("{}") == 1 for t in templates) or not templates:
            raise UserError(f"templates {list(templates)}: give texts that each have {{}} once, for the class")
        if len(details) != 2 or not 0 <= details[0] < details[1] < vision.num_hidden_layers:
            raise UserError(f"details {list(details)}: give two of CLIP's {vision.num_hidden_layers} layers, in order")
        self.grid, self.details = image_size // patch, tuple(details)
        made = Sizes(**{k: tuple(v) if isinstance(v, list) else v for k, v in (sizes or {}).items()}).check(self.grid)
        self.aggregator = Aggregator(made, config.projection_dim, vision.hidden_size, len(templates))
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        # from the files beside the configuration, where it is read from a folder
        self.tokenizer: ClipTokenizer | None = None

    @classmethod
    def from_clip(
        cls,
        source: str | Path,
        image_size: int | None = None,
        templates: Sequence[str] = (TEMPLATE,),
        sizes: Sizes | None = None,
    ) -> Self:
        """A CLIP of transformers with a fresh aggregator.

        Args:
            source: a folder with a CLIP (safetensors) and its tokenizer, or a name on the hub.
            image_size: by default the one that gives the authors' grid of 24 x 24 tokens, or CLIP's own if that is
                smaller than 224.

        Raises:
            UserError: no CLIP is there, a part of it is missing or unsafe, or the sizes do not fit.
        """
        from transformers import CLIPModel
        from transformers.utils import logging

        folder = fetched(source)
        kind = read_json(folder / "config.json")
        refuse_code(kind, folder / "config.json")
        if kind.get("model_type") != "clip":
            raise UserError(f"{source} is of type {kind.get('model_type')!r}: give a CLIP with both of its towers")
        tokenizer = ClipTokenizer(folder)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            clip = complete(CLIPModel, folder, local_files_only=True)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"CLIP {source} has no loadable safetensors: {first_line(error)}") from error
        finally:
            if shown:
                logging.enable_progress_bar()
        vision, text = clip.config.vision_config, clip.config.text_config
        if max(tokenizer.numbers) >= text.vocab_size or tokenizer.length > text.max_position_embeddings:
            has = f"{text.vocab_size} words and {text.max_position_embeddings} places"
            raise UserError(f"CLIP {source} has {has}, its tokenizer more: they belong to different models")
        own = vision.image_size if vision.image_size < 224 else 24 * vision.patch_size
        third = vision.num_hidden_layers // 3
        pixels = of_transformers(settings_of(folder, None), str(source), Preprocessing(mean=CLIP_MEAN, std=CLIP_STD))
        made = cls(
            str(source), clip.config.to_dict(), image_size or own, tuple(templates),
            (max(third - 1, 0), max(2 * third - 1, 1)), dataclasses.asdict(sizes or Sizes()), pixels.mean, pixels.std,
        )  # fmt: skip
        made.towers.load_state_dict(clip.state_dict())
        made.tokenizer = tokenizer
        return made

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def repeated(self) -> dict[str, nn.ModuleList]:
        """The repeated layers of both towers."""
        return {"vision": self.towers.vision_model.encoder.layers, "text": self.towers.text_model.encoder.layers}

    def tune(self, what: str) -> Self:
        """Choose what is trained beside the aggregator.

        what: "attention": the projections to queries and values of both towers (section 3.4), but for the queries of
            the vision tower's last layer, which dense tokens do not use; "all" of CLIP; or "none".
        """
        if what not in TUNED:
            raise UserError(f"tune={what!r}: expected one of {', '.join(TUNED)}")
        self.towers.requires_grad_(what == "all")
        if what == "attention":
            for layers in self.repeated.values():
                for layer in layers:
                    layer.self_attn.q_proj.weight.requires_grad_(layer is not self.repeated["vision"][-1])
                    layer.self_attn.v_proj.weight.requires_grad_(True)
        return self

    def numbers(self, names: Sequence[str]) -> Tensor:
        """Classes as numbers of tokens, int64 `[T, P, L]`: each name in each template.

        Raises:
            UserError: there is no name, or one that has no tokens.
        """
        if not names:
            raise UserError("there are no classes: name at least one")
        for name in names:
            if not isinstance(name, str) or not self.tokenizer.model.encode(name, add_special_tokens=False).ids:
                raise UserError(f"class {name!r} has no words that CLIP's tokenizer knows: give it a name")
        rows = self.tokenizer([t.replace("{}", name) for name in names for t in self.config.templates])
        # a causal tower: what stands behind the last end changes nothing before it
        longest = int((rows == self.tokenizer.end).argmax(1).max()) + 1
        return torch.from_numpy(rows[:, :longest]).unflatten(0, (len(names), -1))

    def embed(self, numbers: Tensor) -> Tensor:
        """Classes `[T, P, L]` to vectors in CLIP's joint space, `[T, P, width]`."""
        made = self.towers.text_model(input_ids=numbers.flatten(0, 1)).pooler_output
        return self.towers.text_projection(made).unflatten(0, numbers.shape[:2])

    def dense(self, pictures: Tensor) -> Dense:
        """`[B, 3, S, S]` in [-1, 1] to what the vision tower says of each place.

        In its last layer a token takes its own value, not a mixture by attention, beside the class token (as Zhou et
        al., arXiv 2112.01071, section 3.2; the residual of the class token is that of the authors' code).
        """
        tower, kept = self.towers.vision_model, []
        pixels = ((pictures + 1) / 2 - self.pixel_mean) / self.pixel_std
        x = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=True))
        *layers, last = tower.encoder.layers
        for number, layer in enumerate(layers):
            x = layer(x, None)
            if number in self.details:
                kept.append(x)
        x = x[:, :1] + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        if len(layers) in self.details:
            kept.append(x)
        made = [self.towers.visual_projection(tower.post_layernorm(x)), *kept]
        # without the class token, in rows from the top left
        tokens, *inner = (part[:, 1:].mT.unflatten(-1, (self.grid, self.grid)) for part in made)
        return Dense(tokens, tuple(inner))

    def forward(self, pictures: Tensor, classes: Tensor) -> Tensor:
        """Logits of each class at each place.

        Args:
            pictures: `[B, 3, S, S]` in [-1, 1], S the image size. classes: `[T, P, width]`, see `embed`.

        Returns:
            `[B, T, 4 * grid, 4 * grid]`; each class by itself, its sigmoid is the probability that it is there.
        """
        seen = self.dense(pictures)
        return self.aggregator(seen.tokens, classes, seen.inner)

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


def fetched(source: str | Path) -> Path:
    """The folder of a CLIP, from the hub if there is none of that name here. Raises `UserError` where there is none."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
        # the hub's library, and whatever carries it
        except Exception as error:
            raise UserError(f"CLIP {source} is no folder, nor on the hub: {first_line(error)}") from error
    refuse_unsafe(folder)
    return folder


def load_segmenter(folder: str | Path) -> Segmenter:
    """A segmenter from its folder, in evaluation mode.

    Raises:
        UserError: it is no segmenter, half written, or holds a file that could execute code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one made by 'semantica train-segmenter'")
    refuse_unsafe(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no segmenter: it has no config.json, give one made by 'semantica train-segmenter'"
        )
    config = read_json(folder / "config.json")
    refuse_code(config, folder / "config.json")
    if config.get("_class_name") != Segmenter.__name__:
        raise UserError(
            f"{folder} holds a {config.get('_class_name')!r}: expected one made by 'semantica train-segmenter'"
        )
    return loaded(Segmenter, folder, f"segmenter {folder}").requires_grad_(False).eval()
