"""What the public operators refuse, in the same words."""

import torch
from torch import Tensor

# what the operators compute in
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}: expected one of float32, bfloat16, float16, float64")


def check_tensors(name: str, first: Tensor, others: dict[str, tuple[Tensor | None, tuple, tuple]]) -> None:
    """Others, by name, with the shape and the types they must have; `None` is left out. All belong to `first`."""
    for other, (tensor, shape, dtypes) in others.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{other} has shape {tuple(tensor.shape)}: expected {list(shape)} for {name} {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{other} is on {tensor.device}: expected {first.device}, where {name} is")
        if tensor.dtype not in dtypes:
            known = " or ".join(dict.fromkeys(map(str, dtypes)))
            raise ValueError(f"{other} has dtype {tensor.dtype}: expected {known}")
