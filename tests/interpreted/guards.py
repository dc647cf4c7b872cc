"""Launches with every tensor in memory of its own between guards, so that nothing stray goes unseen."""

import dataclasses

import torch

from semantica.kernels import launch

GUARD = 64
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def guarded(tensor, filled):
    """A twin inside a larger buffer of NaN (or of a large integer), with the same strides."""
    span = GUARD * 2 + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    buffer = torch.full((span,), float("nan") if tensor.is_floating_point() else 10**6, dtype=tensor.dtype)
    twin = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
    return buffer, twin.copy_(tensor) if filled else twin


def run_guarded(launches, inputs, outputs):
    """Start launches on guarded twins: inputs stay as they are, all else is written whole. Returns the outputs'."""
    known, buffers, twins = {id(a) for a in inputs}, [], {}

    def twin(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in twins:
            buffer, view = guarded(value, id(value) in known)
            twins[id(value)] = view
            writable = torch.zeros(buffer.shape, dtype=torch.bool)
            if id(value) not in known:
                writable.as_strided(view.shape, view.stride(), GUARD).fill_(True)
            buffers.append((buffer, buffer.clone(), writable))
        return twins[id(value)]

    moved = [dataclasses.replace(a, arguments={k: twin(v) for k, v in a.arguments.items()}) for a in launches]
    launch.run(moved)
    for buffer, before, writable in buffers:
        bits = BITS[buffer.element_size()]
        assert torch.equal(buffer.view(bits)[~writable], before.view(bits)[~writable])
        assert not buffer[writable].isnan().any()
    return [twins[id(output)] for output in outputs if output.numel()]
