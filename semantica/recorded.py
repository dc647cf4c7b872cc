"""What modules of a network give, kept while a block of code runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Keep the outputs of modules, with their graph where gradients are on.

        with recorded({"last": unet.up_blocks[-1].resnets[-2]}) as found:
            v = denoiser(z, logsnr, condition)
        found["last"].square().sum().backward()

    A module that is called twice has its last output there; one that is not called is missing. Call `backward` outside:
    with gradient checkpointing it runs blocks again, and what these give belongs to no loss. An output is kept whole,
    and nothing is computed of it inside the network, so that checkpointing finds the graph that it expects.

    Args:
        modules: of one network, by any names. Compiled networks call no hooks: ask `semantica.sampling.loop.refuse` for
            "module", and for "gradients", before.

    Returns:
        {name: output}, filled as the modules run; it stays as it is after the block.
    """
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[name] = output

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(keep(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
