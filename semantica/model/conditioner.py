"""From pictures, texts and whatever else conditions a network to its streams.

A network is conditioned by one encoder that fills every stream, or by a `Conditioner`, in which each stream has an
encoder of its own. `prepare` and `encode` take either; nothing else has to know which of the two it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from semantica.condition import Stream
from semantica.device import sent
from semantica.errors import UserError
from semantica.files import read_json, refuse_unsafe
from semantica.inputs import SINGLE, Prepared, Several, by_name, prepare_inputs
from semantica.model.encoders import ENCODERS, read_class, refuse_code


class Conditioner(ModelMixin, ConfigMixin):
    """An encoder for each stream of a network, `{stream name: encoder}`.

    One encoder may stand under several names: it is then stored once, and encodes the values of each.

    Raises:
        UserError: no encoder, or a name that cannot be that of a folder.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]):
        super().__init__()
        if not encoders or not all(map(safe_name, encoders)):
            raise UserError(f"encoders are named {list(encoders)}: expected names of streams, such as 'image', 'text'")
        names: dict[nn.Module, str] = {}
        for name, encoder in encoders.items():
            names.setdefault(encoder, name)
        # the encoders that differ, each under the first stream that it fills
        self.parts = nn.ModuleDict({name: encoder for encoder, name in names.items()})
        self.register_to_config(streams={name: names[encoder] for name, encoder in encoders.items()})

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoder of each stream."""
        return {name: self.parts[part] for name, part in self.config.streams.items()}

    @property
    def trainable(self) -> bool:
        """Whether any of the encoders is trained along."""
        return any(encoder.trainable for encoder in self.parts.values())

    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Prepared]:
        """Values of each stream to what `forward` takes, see `semantica.inputs.prepare_inputs`; on the host."""
        return prepare(self, inputs)

    def forward(self, inputs: Mapping[str, Prepared]) -> dict[str, Stream]:
        """Prepared values of each stream to the streams. Raises `UserError` where one is missing or unknown."""
        return encodings(self, inputs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """A folder with one sub-folder for each encoder; options as for any model of diffusers."""
        self.save_config(save_directory)
        for name, encoder in self.parts.items():
            encoder.save_pretrained(Path(save_directory) / name, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "Conditioner":
        """Read what `save_pretrained` wrote: safetensors and JSON only, whatever the options say.

        Raises:
            UserError: an encoder's class is not registered, or a file could execute code.
        """
        kwargs |= {"use_safetensors": True, "local_files_only": True}
        streams = read_streams(Path(folder))
        kinds = {part: read_class(Path(folder) / part) for part in dict.fromkeys(streams.values())}
        parts = {part: kind.from_pretrained(Path(folder) / part, **kwargs) for part, kind in kinds.items()}
        return cls({name: parts[part] for name, part in streams.items()})


def safe_name(name: Any) -> bool:
    """Whether it can name a stream, a folder and a module."""
    return isinstance(name, str) and name.isidentifier() and name.isascii() and not hasattr(nn.ModuleDict, name)


def read_streams(folder: Path) -> dict[str, str]:
    """Which sub-folder of a conditioner's folder holds the encoder of each stream, once the folder is known to be safe.

    Raises:
        UserError: another class, a file that could execute code, or no such streams.
    """
    refuse_unsafe(folder)
    config = read_json(folder / "config.json")
    refuse_code(config, folder / "config.json")
    streams = config.get("streams")
    named = isinstance(streams, dict) and bool(streams) and all(map(safe_name, (*streams, *streams.values())))
    if config.get("_class_name") != Conditioner.__name__ or not named:
        raise UserError(f"{folder} is no folder of a {Conditioner.__name__}: restore or remake it")
    return streams


def encoders_of(encoder: nn.Module) -> dict[str, nn.Module]:
    """The encoder of each input: of the streams of a `Conditioner`, or of the one input `image` of a single encoder."""
    return encoder.encoders if isinstance(encoder, Conditioner) else {SINGLE: encoder}


def picture_input(encoder: nn.Module) -> tuple[str, nn.Module]:
    """Name and encoder of the first input that takes pictures.

    Raises:
        UserError: there is none.
    """
    parts = encoders_of(encoder)
    for name, part in parts.items():
        if hasattr(part, "image_size"):
            return name, part
    raise UserError(f"none of the encoders of {', '.join(parts)} takes pictures: this needs one that does")


def prepare(encoder: nn.Module, inputs: Any) -> dict[str, Prepared]:
    """Values as a user gives them to what `encode` takes, see `semantica.inputs.prepare_inputs`; on the host.

    encoder: a single encoder, whose only input is `image`, or a `Conditioner`.
    """
    return prepare_inputs({name: part.prepare for name, part in encoders_of(encoder).items()}, inputs)


def placed(inputs: Mapping[str, Prepared], device: torch.device, dtype: torch.dtype) -> dict[str, Prepared]:
    """Prepared inputs on a device, numbers with a fraction in a type."""

    def place(value: Prepared | None) -> Prepared | None:
        if value is None:
            return None
        if isinstance(value, Several | Stream):
            return value.map(place)
        value = torch.as_tensor(value)
        return sent(value.to(dtype) if value.is_floating_point() else value, torch.device(device))

    return {name: place(value) for name, value in inputs.items()}


def encode(encoder: nn.Module, names: Sequence[str], inputs: Prepared | Mapping[str, Prepared]) -> dict[str, Stream]:
    """The streams of a network from prepared inputs.

    Args:
        encoder: a single encoder, which fills every stream, or a `Conditioner`.
        names: `stream_names` of the network; none where it is not conditioned.
        inputs: as `prepare` gives them, or one of them where there is a single encoder.

    Raises:
        UserError: an input is missing or unknown.
    """
    return fill(names, encodings(encoder, inputs))


def encodings(encoder: nn.Module, inputs: Prepared | Mapping[str, Prepared]) -> dict[str, Stream]:
    """What the encoders make of each input, whether or not a network is conditioned by it; as `encode`.

    An input of None is absent, and so is its stream.
    """
    parts = encoders_of(encoder)
    inputs = by_name(inputs, parts)
    return {name: None if inputs[name] is None else encode_one(part, inputs[name]) for name, part in parts.items()}


def fill(names: Sequence[str], made: Mapping[str, Stream]) -> dict[str, Stream]:
    """A single encoding fills every stream; of several, each fills the stream of its name."""
    if len(made) == 1:
        return dict.fromkeys(names, *made.values())
    return dict(made) if names else {}


def encode_one(encoder: nn.Module, value: Prepared) -> Stream:
    """One input to its stream.

    K values of a sample are one stream of K times as many tokens, with the mean of their pooled vectors. A value that
    is there twice weighs twice, and one that is there K times alone is the same as once. Where K differs from sample
    to sample, shorter ones are filled up and masked. Raises `UserError` for an array of another number of axes.
    """
    if isinstance(value, Stream):
        return value
    if isinstance(value, Several):
        return joined(whole(encoder(value.values)), value.counts)
    if value.ndim == len(encoder.input_shape) + 1:
        return encoder(value)
    if value.ndim != len(encoder.input_shape) + 2:
        shape = ", ".join(map(str, encoder.input_shape))
        raise UserError(f"prepared values have shape {list(value.shape)}: expected [B, {shape}] or [B, K, {shape}]")
    batch, count = value.shape[:2]
    stream = whole(encoder(value.flatten(0, 1)))
    tokens = stream.tokens.unflatten(0, (batch, count)).flatten(1, 2)
    return Stream(tokens, None if stream.pooled is None else stream.pooled.unflatten(0, (batch, count)).mean(1))


def joined(stream: Stream, counts: Sequence[int]) -> Stream:
    """The streams of single values as those of the samples that they belong to."""
    each, pooled = stream.tokens.shape[1], stream.pooled
    tokens = [part.flatten(0, 1) for part in stream.tokens.split(counts)]
    lengths = torch.tensor([each * count for count in counts], device=stream.tokens.device)
    if pooled is not None:
        # of a narrow type, in fp32: the network may read a wider one
        wide = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        pooled = torch.stack([part.mean(0) for part in wide.split(counts)])
    return Stream(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), pooled, lengths)


def whole(stream: Stream) -> Stream:
    """The stream of single values, to be joined. Raises `UserError` where their tokens are not all there."""
    if stream.lengths is not None:
        raise UserError("several values for one sample need tokens without lengths: join them into one value")
    return stream


def to_plain(module: ConfigMixin) -> dict[str, Any]:
    """A configuration as JSON, with its class; of a `Conditioner` those of its encoders too."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    plain = {"class": type(module).__name__, **json.loads(json.dumps(config, default=list))}
    if isinstance(module, Conditioner):
        plain["parts"] = {name: to_plain(part) for name, part in module.parts.items()}
    return plain


def from_plain(config: Any, where: Path) -> nn.Module:
    """An encoder or `Conditioner` with random weights from what `to_plain` gave.

    Raises:
        UserError: it names a class that is not registered, or code to run; the line names `where`.
    """
    config = dict(config) if isinstance(config, Mapping) else {}
    kind, parts, streams = config.pop("class", None), config.get("parts"), config.get("streams")
    if kind == Conditioner.__name__ and isinstance(parts, dict) and isinstance(streams, dict):
        made = {name: from_plain(part, where) for name, part in parts.items()}
        if set(made) == set(streams.values()):
            return Conditioner({name: made[part] for name, part in streams.items()})
    if kind not in ENCODERS:
        raise UserError(f"{where} asks for other code as its encoder: it is never loaded")
    refuse_code(config, where)
    return ENCODERS[kind].from_config(config)
