"""Semantica: fast image-conditioned diffusion. Public names are loaded on first use, so that importing stays light."""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "UserError": "semantica.errors",
    "Condition": "semantica.condition",
    "Stream": "semantica.condition",
    "UViT": "semantica.model.uvit",
    "ViTEncoder": "semantica.model.vit",
    "PretrainedEncoder": "semantica.model.pretrained",
    "WordEncoder": "semantica.model.words",
    "ClipTextEncoder": "semantica.model.clip",
    "register_encoder": "semantica.model.encoders",
    "Conditioner": "semantica.model.conditioner",
    "SemanticaScheduler": "semantica.sampling.scheduler",
    "SemanticaPipeline": "semantica.pipelines.variations",
    "Sampling": "semantica.sampling.settings",
    "accelerate": "semantica.fused.accelerate",
    "restore": "semantica.fused.accelerate",
}
_MODULES = ("engines",)
__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"semantica.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'semantica' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted(__all__)
