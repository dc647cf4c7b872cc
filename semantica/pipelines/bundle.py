"""Pictures in, variations out, over any engine; numpy and Pillow only where the engine is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from semantica.condition import Condition
from semantica.engines.base import Engine
from semantica.errors import UserError
from semantica.images import fit, to_planes
from semantica.pipelines.base import VariationPipeline


class BundlePipeline(VariationPipeline):
    """Image variations from a bundle, called like `SemanticaPipeline`.

    Args:
        engine: from `semantica.engines.load_engine`.
    """

    seed, max_samples = 0, 64

    def __init__(self, engine: Engine):
        self.engine = engine
        if self.scheduler_config.get("class") != "SemanticaScheduler":
            raise UserError(f"{engine.bundle.folder} has another kind of scheduler: export the bundle again")

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
        return self.sample_shape[-1]

    def condition(self, image: Any) -> Condition:
        """Of pictures, or of an array `[B, 3, S, S]` in [-1, 1] in the size that the bundle's encoder takes."""
        if not hasattr(image, "shape"):
            if not all(isinstance(picture, Image.Image) for picture in image):
                raise UserError("image must be a picture or a list of pictures, one for each sample")
            side = self.engine.bundle.shapes["image"]
            image = to_planes([fit(picture.convert("RGB"), side) for picture in image])
        return self.engine.condition(self.array(image))

    def array(self, values: Any) -> Any:
        """Float32 values as the engine takes them, on its device."""
        if self.engine.array == "numpy":
            return np.asarray(values, np.float32)
        import torch

        return torch.as_tensor(values, dtype=torch.float32, device=self.engine.device)
