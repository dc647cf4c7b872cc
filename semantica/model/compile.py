"""The blocks that make up most of a network, and how modules are compiled in place."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from semantica.model.encoders import ENCODERS
from semantica.model.layers import ResBlock, TransformerBlock
from semantica.model.vit import EncoderBlock

REPEATED = (TransformerBlock, ResBlock, EncoderBlock)


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks that make up most of a network: each is compiled, checkpointed and sharded as one."""
    return (block for block in module.modules() if isinstance(block, REPEATED))


def compile_in_place(module: nn.Module, scope: Literal["blocks", "network"] = "blocks") -> None:
    """Compile the repeated blocks, where one graph serves all of a kind, or the whole module as one graph.

    All batches of a run have one shape. Without saying so, the second level's blocks would be compiled for any height
    and width, and those of all further levels with them.
    """
    if scope == "network":
        module.compile(fullgraph=True, dynamic=False)
        return
    for block in repeated(module):
        block.compile(fullgraph=True, dynamic=False)
    for encoder in module.modules():
        if isinstance(encoder, tuple(ENCODERS.values())):
            for layer in getattr(encoder, "layers", ()):
                layer.compile(fullgraph=True, dynamic=False)
