"""`--deterministic`: a run and its continuation compute the same bits on a GPU, as they do on a CPU without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from semantica.errors import UserError

# cuBLAS chooses by what its workspaces hold unless they are of one size; read once, when CUDA starts
WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def repeatable(wanted: bool, compiles: bool = False) -> Iterator[None]:
    """Within it every operator of torch adds in the same order each time, or raises; nothing where it is not wanted.

    The fused operators have no atomics and one order of sums in any case.

    Args:
        compiles: whether anything will be compiled; the compiler then times nothing to choose how it adds.

    Raises:
        UserError: CUDA has started with other workspaces, or an operator has no repeatable form on this device.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(WORKSPACE)
    if given not in (SIZES if torch.cuda.is_initialized() else (*SIZES, None)):
        sizes = " or ".join(SIZES)
        raise UserError(f"--deterministic needs {WORKSPACE} to be {sizes} before CUDA starts: it is {given}")
    os.environ[WORKSPACE] = given or SIZES[0]
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory that it did not write, and to fill it would cost a pass over every tensor
    cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = True, False, False
    try:
        with compiler_repeatable() if compiles else nullcontext():
            yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise UserError(f"--deterministic: {str(error).partition('.')[0]}: leave it out") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = flags


def compiler_repeatable():
    # takes as long to import as torch itself
    import torch._inductor.config as inductor

    return inductor.patch(deterministic=True)
