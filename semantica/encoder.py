"""Where run folders of version 0.1 say that these classes are; diffusers looks up their base class beside them."""

from diffusers.models.modeling_utils import ModelMixin

from semantica.model.encoders import PretrainedEncoder, ViTEncoder

__all__ = ["ModelMixin", "PretrainedEncoder", "ViTEncoder"]
