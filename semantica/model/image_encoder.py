"""What encoders of pictures have in common."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor

from semantica.errors import UserError
from semantica.images import fit, to_tensor


class ImageEncoder(ModelMixin, ConfigMixin):
    """An encoder of square pictures, whose side is `image_size` in its configuration."""

    input_dtype = torch.float32

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that it is given."""
        return self.config.image_size

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
        return to_tensor([fit(picture.convert("RGB"), self.image_size) for picture in pictures])
