"""Where run folders of version 0.1 say that these classes are; diffusers looks up their base class beside them."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from semantica.sampling.scheduler import SemanticaScheduler

__all__ = ["SchedulerMixin", "SemanticaScheduler"]
