"""The engine of a server, begun as its options say: in the server's process, or in a replica."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from semantica.pipelines.sample import load_pipeline
from semantica.serving.batcher import Batcher
from semantica.serving.job import Card
from semantica.serving.runner import Runner, card_of

if TYPE_CHECKING:
    from semantica.serving.command import ServeConfig


def begin(config: "ServeConfig", seen: Callable[[int, float, float], None]) -> tuple[Card, Batcher]:
    """What is served, and who makes it, whose thread is warming the engine up.

    seen: as of `semantica.serving.batcher.Batcher`. Raises `UserError` where the model cannot be used.
    """
    pipeline = load_pipeline(config.model, config.device, config.engine, config.precision)
    runner = Runner(pipeline, config.max_batch)
    card = card_of(pipeline, config.model, config.name, config.steps, config.guidance, config.solver)
    batcher = Batcher(runner, runner.most, config.max_wait / 1000, config.queue, seen, lambda: runner.warm_up(card))
    return card, batcher.start()
