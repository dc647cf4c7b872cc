"""Where run folders of version 0.1 say that these classes are."""

from semantica.model.uvit import UViT

__all__ = ["UViT"]
