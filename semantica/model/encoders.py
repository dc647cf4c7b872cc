"""The encoders that there are, by name, and how one is read from a folder.

An encoder is a model of diffusers (`ModelMixin`, `ConfigMixin`) that turns one kind of value into a stream of tokens:

    prepare(values) -> Tensor       on the host: a list of B values, such as pictures or texts, to `[B, *input_shape]`
    forward(tensor) -> Stream       tokens `[B, M, token_dim]` and a pooled vector `[B, token_dim]`
    input_shape, input_dtype        of one prepared value
    token_dim                       width of a token
    trainable                       whether it is trained along with the denoiser
    image_size                      of encoders of pictures (`semantica.model.image_encoder`): their side in pixels
    examples(count) -> Tensor       of other encoders: prepared values that exported graphs are compared on
    tokenizer                       of encoders of texts: what training prepares them with, and `tokens_of` a word
    layers                          repeated layers that training compiles one by one, where there are any
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from semantica.errors import UserError, first_line
from semantica.files import read_json, refuse_unsafe
from semantica.inputs import TEXT, text_names
from semantica.model.clip import ClipTextEncoder
from semantica.model.hub import located
from semantica.model.phrases import PhraseEncoder
from semantica.model.pretrained import PretrainedEncoder
from semantica.model.t5 import KINDS, T5TextEncoder
from semantica.model.vit import ViTEncoder
from semantica.model.whole import require_whole, unsaid
from semantica.model.words import WordEncoder
from semantica.words import WordTokenizer

# class name -> class: what run folders, bundles and stored tokens may name; nothing else is ever built from them
ENCODERS: dict[str, type[nn.Module]] = {}
REQUIRED = ("prepare", "forward", "input_shape", "input_dtype", "token_dim", "trainable")


def register_encoder(kind: type[nn.Module]) -> type[nn.Module]:
    """Make a class of encoders known by its name, so that folders which name it can be read; a decorator.

    Raises:
        UserError: it lacks a part of the interface above, or the name belongs to another class.
    """
    absent = [name for name in REQUIRED if not hasattr(kind, name)]
    if absent or not issubclass(kind, ModelMixin) or not issubclass(kind, ConfigMixin):
        lacks = ", ".join(absent) or "ModelMixin and ConfigMixin of diffusers"
        raise UserError(f"encoder {kind.__name__} lacks {lacks}: see semantica.model.encoders")
    if ENCODERS.setdefault(kind.__name__, kind) is not kind:
        raise UserError(f"an encoder {kind.__name__} is registered already: choose another name")
    return kind


for kind in (ViTEncoder, PretrainedEncoder, WordEncoder, PhraseEncoder, ClipTextEncoder, T5TextEncoder):
    register_encoder(kind)


def read_class(folder: Path) -> type[nn.Module]:
    """The registered class that an encoder's folder names, once the folder is known to be safe and whole.

    Raises:
        UserError: another class, a file that could execute code, or no weights.
    """
    refuse_unsafe(folder)
    config = read_json(folder / "config.json")
    refuse_code(config, folder / "config.json")
    if config.get("_class_name") not in ENCODERS:
        raise UserError(f"{folder} is a {config.get('_class_name')!r}: expected one of {', '.join(ENCODERS)}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no safetensors weights: the folder is half written, remake it")
    return ENCODERS[config["_class_name"]]


def refuse_code(config: dict, where: Path) -> None:
    """Raises `UserError` for a configuration that names code to run, at any depth."""
    if "auto_map" in config:
        raise UserError(f"{where} names code to run (auto_map): remote code is never loaded")
    for part in config.values():
        if isinstance(part, dict):
            refuse_code(part, where)


def frozen_encoder(source: str, image_size: int | None = None, tokens: str = "patches") -> nn.Module:
    """An encoder of pictures that is not trained (any more).

    Args:
        source: a hub name or folder as `PretrainedEncoder.from_source` takes it, or a run folder of this package, or
            the encoder folder in one, whose size and tokens are fixed.
        image_size, tokens: see `PretrainedEncoder.from_source`.

    Raises:
        UserError: nothing safe can be loaded from there, or the size or tokens do not fit.
    """
    folder = own_folder(source)
    if folder is None:
        return PretrainedEncoder.from_source(source, image_size=image_size, tokens=tokens)
    encoder = loaded(read_class(folder), folder, f"encoder {source!r}")
    fixed = getattr(encoder.config, "tokens", "patches")
    if image_size not in (None, encoder.image_size) or tokens != fixed:
        raise UserError(
            f"encoder {source!r} of a run has image size {encoder.image_size} and tokens {fixed!r}: leave the size out "
            "and ask for these tokens"
        )
    encoder.trainable = False
    return encoder.requires_grad_(False).eval()


# of a text tower on the hub: itself and its tokenizer, or those of a diffusers pipeline
TOWER_FILES = (
    "config.json", "model*.safetensors*", "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "text_encoder/config.json", "text_encoder/model*.safetensors*", "tokenizer/*",
)  # fmt: skip
# what `--text-encoder` may name beside folders: made of the training texts
TEXT_ENCODERS: dict[str, Callable[[Iterable[str]], nn.Module]] = {
    "words": WordEncoder.learn,
    "phrases": PhraseEncoder.learn,
}


def text_encoders(sources: Iterable[str], texts: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Frozen encoders of texts, one stream each: `text`, `text_2`, ...; of a run folder all that it has.

    Args:
        sources: each a name in `TEXT_ENCODERS`; a CLIP text tower, T5, UL2 or ByT5 with its tokenizer by folder or hub
            name (`from_source`); or a run folder of this package with an encoder of texts.
        texts: that the model is to be trained on.

    Raises:
        UserError: nothing safe can be loaded from there, or the texts do not fit.
    """
    texts = list(texts)
    made = [encoder for source in sources for encoder in text_encoders_of(source, texts)]
    return dict(zip(text_names(len(made)), made))


def text_encoders_of(source: str, texts: list[str]) -> list[nn.Module]:
    """The encoders of one source."""
    if source in TEXT_ENCODERS:
        return [TEXT_ENCODERS[source](texts)]
    folder = own_folder(source, f"encoder/{TEXT}")
    if folder is None:
        return [tower_of_texts(source, texts)]
    beside = sorted(folder.parent.glob(f"{TEXT}_*"), key=lambda path: (len(path.name), path.name))
    folders = [folder, *(beside if folder.name == TEXT and folder.parent.name == "encoder" else ())]
    return [own_text_encoder(source, place, texts) for place in folders]


def own_text_encoder(source: str, folder: Path, texts: list[str]) -> nn.Module:
    """An encoder of texts that this package saved."""
    kind = read_class(folder)
    encoder = loaded(kind, folder, f"text encoder {source!r}")
    if not hasattr(encoder, "tokenizer"):
        raise UserError(f"text encoder {source!r} is a {kind.__name__}: give one that reads text")
    if isinstance(encoder.tokenizer, WordTokenizer):
        # now, not at the step that first draws a text which it cannot read
        encoder.tokenizer.check_all(texts)
    return encoder.requires_grad_(False).eval()


def tower_of_texts(source: str, texts: list[str]) -> nn.Module:
    """A tower of transformers, by a folder or a name on the hub."""
    folder = located(source, TOWER_FILES)
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") in KINDS:
        return T5TextEncoder.from_folder(folder, source, texts)
    return ClipTextEncoder.from_source(source, folder)


def loaded(kind: type[nn.Module], folder: Path, what: str) -> nn.Module:
    """An encoder that this package saved, all of whose weights are there.

    Raises:
        UserError: files are broken, do not fit each other, or lack a weight; the line begins with `what`.
    """
    try:
        with unsaid():
            encoder = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
    require_whole(encoder, folder)
    return encoder


def own_folder(source: str, within: str = "encoder") -> Path | None:
    """The folder of an encoder that this package saved, where `source` is one or a run folder that has one."""
    for folder in (Path(source) / within, Path(source)):
        if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in ENCODERS:
            return folder
    return None


def weights_sha256(module: nn.Module) -> str:
    """64 hex digits over the names and bytes of a module's weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()
