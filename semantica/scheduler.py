"""Where run folders of version 0.1 say that these classes are."""

from semantica.sampling.scheduler import SemanticaScheduler

__all__ = ["SemanticaScheduler"]
