"""Blocks that the backward pass computes again, all but their matrix products, convolutions and attention."""

import functools
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# by name, whatever library or overload: attention has an operator for each kind of device
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm"}
ATTENTION = ("_scaled_dot_product", "_flash_attention_forward", "_efficient_attention_forward")


def is_product(name: str) -> bool:
    """Whether an operator takes so long for its memory that its result is worth keeping."""
    library, _, short = name.partition("::")
    return short in PRODUCTS or short.startswith(ATTENTION) or (library, short) == ("semantica", "cross_attention")


def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # a result that is written into given memory is the compiler's, which uses that memory again
    kept = getattr(operator, "_overloadname", "") == "default" and is_product(operator._schema.name)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keeping_products(block: nn.Module, *inputs: Any) -> Tensor:
    """What diffusers' `enable_gradient_checkpointing` takes: runs a block, and again for its gradients."""
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)
