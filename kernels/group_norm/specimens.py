"""Launches of the Triton kernels of `group_norm`: all to be compiled; those of one call to be tuned."""

from collections.abc import Callable, Iterator

import torch

from semantica.kernels.group_norm.backward import plan_backward
from semantica.kernels.group_norm.forward import forward, plan_forward
from semantica.kernels.launch import Launch

# shape, groups: the presets' feature maps, some with their skips; common latents and video; the odd and the extreme
SHAPES = [
    *(((8, c, s, s), g) for c, s, g in ((48, 16, 16), (96, 16, 32), (96, 8, 32), (192, 8, 32))),
    *(((8, c, s, s), 32) for c, s in ((96, 64), (192, 64), (192, 32), (384, 32))),
    *(((8, c, s, s), 32) for c, s in ((128, 128), (256, 128), (512, 64), (1024, 32))),
    *(((2, c, s, s), 32) for c, s in ((320, 64), (640, 32), (960, 64), (1280, 16), (1280, 8))),
    ((64, 320, 8, 8), 32),
    ((1, 128, 20, 256, 256), 32),
    *(((3, 32, 1, 1), 4), ((2, 30, 7, 5), 3), ((2, 12, 8, 8), 12), ((2, 288, 14, 14), 32), ((4, 64, 37), 8)),
    *(((1, 2048, 64, 64), 1), ((2, 320, 96, 96), 320), ((1, 8192, 4, 4), 2), ((1, 16, 4097, 5), 2)),
]
VARIANTS = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, True)]


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """Label and launches of every kernel and ladder row, planned from shapes alone: to compile, not to run."""
    for shape, groups in SHAPES:
        for last in (False, True):
            for dtype, film in VARIANTS:
                order = "channels-last" if last else "contiguous"
                label = f"{list(shape)} groups {groups} {order} {str(dtype)[6:]}{' FiLM' if film else ''}"
                x = torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device="meta").movedim(-1, 1)
                x = x if last else x.contiguous()
                weight = torch.empty(shape[1], device="meta")
                scale, shift = x.new_empty((shape[0], 2 * shape[1])).chunk(2, 1) if film else (None, None)
                rest = groups, weight, weight, scale, shift, "silu"
                # a time embedding beside the maps of public UNets
                for addend in (None, x.new_empty(shape[:2]))[: 2 if dtype == torch.bfloat16 and shape[0] == 2 else 1]:
                    given = f"{label}{'' if addend is None else ' addend'}"
                    launches, (y, mean, rstd) = plan_forward(x, *rest, 1e-5, addend)
                    yield f"forward {given}", launches
                    yield f"backward {given}", plan_backward(y, x, mean, rstd, *rest, addend)[0]


def planners(x, groups, weight, bias, scale, shift, activation) -> list[Callable[[], list[Launch]]]:
    """What plans the forward, and what the backward, of one call."""
    rest = groups, weight, bias, scale, shift, activation
    y, mean, rstd = forward(x, *rest, 1e-5)
    dy = torch.randn_like(y)
    return [lambda: plan_forward(x, *rest, 1e-5)[0], lambda: plan_backward(dy, x, mean, rstd, *rest)[0]]
