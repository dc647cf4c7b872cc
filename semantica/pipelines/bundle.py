"""Pictures in, variations out, over any engine; numpy and Pillow only where the engine is."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from semantica.condition import Condition, Stream
from semantica.discrete import CLASS
from semantica.engines.base import Engine
from semantica.errors import UserError
from semantica.images import to_planes
from semantica.inputs import Prepared, Several, prepare_inputs
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.kinds import CHUNK, at_once, usual_guidance
from semantica.sight import sight_in
from semantica.tokens import ClipTokenizer


class BundlePipeline(VariationPipeline):
    """Image variations from a bundle, called like `SemanticaPipeline`.

    Args:
        engine: from `semantica.engines.load_engine`.
    """

    seed, max_samples = 0, CHUNK

    def __init__(self, engine: Engine):
        self.engine, folder = engine, engine.bundle.folder
        self.tokenizers = {
            name: [ClipTokenizer(folder / part) for part in parts] for name, parts in engine.bundle.tokenizers.items()
        }
        if self.scheduler_config.get("class") not in ("SemanticaScheduler", CLASS):
            raise UserError(f"{engine.bundle.folder} has another kind of scheduler: export the bundle again")
        if self.scheduler_config["class"] == CLASS:
            self.guidance = usual_guidance(engine.manifest["model"]["unet"])
            self.max_samples = at_once(self.sample_shape[-1])

    @property
    def denoiser(self) -> Engine:
        return self.engine

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return self.engine.manifest["model"]["scheduler"]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.engine.bundle.shape_of("z", 1)[1:]

    @property
    def image_size(self) -> int:
        """Side in pixels of what is made."""
        return self.engine.manifest.get("decode", self.sample_shape[-1])

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.engine.bundle.inputs)

    def prepare(self, inputs: Any) -> dict[str, Prepared]:
        names = self.inputs
        if set(names) == set(self.tokenizers) and len(names) == 1 and not isinstance(inputs, Mapping):
            # prompts alone, where there is nothing but text
            inputs = dict.fromkeys(names, inputs)
        return prepare_inputs({name: partial(self.planes, name) for name in names}, inputs)

    def planes(self, name: str, values: list) -> np.ndarray:
        """Pictures or prompts as an array; what other encoders take comes as an array that was prepared before."""
        shape = self.engine.bundle.shape_of(name, len(values))
        if name in self.tokenizers:
            # one tower's rows may come without an axis of towers
            return np.stack([tokenizer(values) for tokenizer in self.tokenizers[name]], 1).reshape(shape)
        if len(shape) != 4:
            raise UserError(f"{name} must be an array {list(shape)}: a bundle prepares nothing but pictures")
        if not all(isinstance(picture, Image.Image) for picture in values):
            raise UserError(f"{name} must be a picture or a list of pictures, one for each sample")
        sight = sight_in(self.engine.manifest, name, shape[-1])
        return to_planes([sight.see(picture.convert("RGB")) for picture in values])

    def condition(self, prepared: dict[str, Prepared]) -> Condition:
        if any(value is None for value in prepared.values()):
            raise UserError(f"a bundle takes all of {', '.join(prepared)}: give each, or sample the run folder")
        if any(isinstance(value, Several | Stream) for value in prepared.values()):
            raise UserError("a bundle's streams are fixed: give one value for each sample, not encoded before")
        return self.engine.condition({name: self.array(value) for name, value in prepared.items()})

    def decode(self, z: Any) -> Any:
        return z if "decode" not in self.engine.manifest else self.engine.decode(z)

    def array(self, values: Any) -> Any:
        """Values as the engine takes them, on its device: float32, or whole numbers as they are."""
        if self.engine.array == "numpy":
            # numpy reads neither a tensor of a GPU nor one in bf16
            values = values.cpu() if hasattr(values, "cpu") else values
            values = np.asarray(values.float() if str(values.dtype) == "torch.bfloat16" else values)
            return values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values
        import torch

        from semantica.device import sent

        values = torch.as_tensor(values)
        return sent(values.float() if values.is_floating_point() else values, torch.device(self.engine.device))
