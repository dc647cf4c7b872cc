"""The classes that a run folder may name, in one module: there diffusers looks for them, and for their bases."""

from diffusers import ModelMixin, SchedulerMixin

from semantica.model.conditioner import Conditioner
from semantica.model.encoders import ENCODERS
from semantica.model.uvit import UViT
from semantica.sampling.scheduler import SemanticaScheduler

__all__ = ["Conditioner", "ModelMixin", "SchedulerMixin", "SemanticaScheduler", "UViT"]


def __getattr__(name: str) -> type:
    if name in ENCODERS:
        return ENCODERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
