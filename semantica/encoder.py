"""Where run folders of version 0.1 say that these classes are."""

from semantica.model.encoders import PretrainedEncoder, ViTEncoder

__all__ = ["PretrainedEncoder", "ViTEncoder"]
