"""What "fp32" means in every row: products and convolutions of fp32 numbers in fp32, not in TF32."""

import sys


def exact_fp32() -> None:
    """Turn TF32 off for whatever torch computes in this process, where torch is imported.

    As PyTorch starts, convolutions of a GPU use TF32 and matrix products do not: rows named fp32 would differ in what
    they compute, and so would the ceilings beside them.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def tf32() -> bool:
    """Whether torch computes anything in TF32 in this process."""
    import torch

    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
