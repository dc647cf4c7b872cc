"""What encoders of pictures have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from semantica.errors import UserError
from semantica.images import to_tensor
from semantica.sight import Sight

# what configurations say of how pictures become what an encoder reads; some were written before they said all of it
PREPARATION = ("image_size", "mean", "std", "resize", "interpolation", "bgr")
UNSAID = {"resize": None, "interpolation": None, "bgr": False}


class ImageEncoder(ModelMixin, ConfigMixin):
    """An encoder of square pictures, whose side is `image_size` in its configuration."""

    input_dtype = torch.float32

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that it is given."""
        return self.config.image_size

    @property
    def sight(self) -> Sight:
        """How a picture of any size becomes one that it is given."""
        return Sight(self.image_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one prepared picture."""
        return 3, self.image_size, self.image_size

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size to `[B, 3, S, S]` in [-1, 1]: the square in their middle.

        Raises:
            UserError: something else than a picture.
        """
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise UserError(f"a condition is a {type(picture).__name__}: give Pillow images, or one array of all")
        return to_tensor([self.sight.see(picture.convert("RGB")) for picture in pictures])


def preparation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures become what an encoder reads, by its configuration, as JSON values: its weights do not tell."""
    said = {**UNSAID, **config}
    return {n: list(said[n]) if isinstance(said[n], tuple) else said[n] for n in PREPARATION if n in said}


def sight_of(encoder: nn.Module) -> Sight:
    """Of any encoder of pictures; those from elsewhere may say no more than their size."""
    return getattr(encoder, "sight", None) or Sight(encoder.image_size)
