"""Named ranges of a run for a profiler, such as NVTX for Nsight Systems; free while nobody has asked for them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from semantica.errors import UserError

Mark = Callable[[str], AbstractContextManager]
NOTHING = nullcontext()
_mark: Mark | None = None


def span(name: str) -> AbstractContextManager:
    """Around what a profiler is to show under a name; does nothing where no ranges are marked."""
    return NOTHING if _mark is None else _mark(name)


@contextmanager
def marked(mark: Mark | None) -> Iterator[None]:
    """Mark every span of this process meanwhile; None leaves it as it is."""
    global _mark
    before, _mark = _mark, mark or _mark
    try:
        yield
    finally:
        _mark = before


def nvtx() -> Mark:
    """Ranges of NVIDIA's profilers. Raises `UserError` where torch is a build without CUDA."""
    import torch

    if torch.version.cuda is None:
        raise UserError("--nvtx marks ranges for NVIDIA's profilers: it needs a CUDA build of torch")
    return torch.cuda.nvtx.range
