"""The Triton kernel of noise in Triton's interpreter, run by tests/test_noise.py in its own process."""

import runpy
from pathlib import Path

import pytest
import torch

from semantica.kernels import launch
from semantica.kernels import noise as kernel
from semantica.kernels.noise import BLOCK, plan_noise
from semantica.train.data.noise import FRACTION, WITHIN, key_tensor, noise, plain_noise, quantiles

run_guarded = runpy.run_path(str(Path(__file__).with_name("guards.py")))["run_guarded"]


@pytest.mark.parametrize("shape", [(3, 10, 7), (3, 16, 16), (1,), (4 * BLOCK + 3,)])
def test_the_kernel_draws_the_same_bits(shape):
    assert launch.DEVICE == "cpu"
    index = torch.tensor([0, 7, 2**31 + 1, 2**40 + 11])
    for seed in (0, 3, 12345678901234567890):
        made = noise(seed, index, shape)
        assert made.shape == (4, *shape) and torch.equal(made.flatten(1), plain_noise(seed, index, made[0].numel()))


def test_more_samples_than_a_launch_takes_are_drawn_by_several(monkeypatch):
    index = torch.arange(7) ** 9
    whole = noise(3, index, (50,))
    monkeypatch.setattr(kernel, "SAMPLES", 3)
    assert torch.equal(noise(3, index, (50,)), whole) and torch.equal(plain_noise(3, index, 50), whole)


def test_nothing_is_written_outside_and_nothing_left_unwritten():
    index, out = torch.tensor([5, 6, 7]), torch.empty(3, 1001)
    inputs = [index, key_tensor(1, index.device), *quantiles(index.device)]
    (made,) = run_guarded([plan_noise(out, *inputs, WITHIN, FRACTION)], inputs, [out])
    assert torch.equal(made, plain_noise(1, index, 1001))
