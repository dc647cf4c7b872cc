"""Noise: Philox against its authors' known answers, normals against float64, the same whatever is drawn beside them."""

import hashlib
import math

import numpy as np
import pytest
import torch

from semantica.train.data import noise as module
from semantica.train.data.draws import DROP, NOISE
from semantica.train.data.noise import key_of, noise, normals, philox, quantiles

# counter, key, result: known-answer tests of philox4x32 with 10 rounds (kat_vectors of Random123 1.14)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, result):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == result


def test_a_normal_is_the_quantile_of_its_word():
    words = torch.cat([torch.arange(4096), torch.randint(0, 2**32, (1 << 20,), generator=torch.Generator())])
    words = torch.cat([words, words ^ 0x80000000, torch.tensor([0x7FFFFFFF, 0xFFFFFFFF])])
    z = normals(words).double()
    # the first bit is the sign, the rest how far out
    outside = torch.special.ndtri(((words & 0x7FFFFFFF) + 0.5).double() / 2**32)
    truth = torch.where(words > 0x7FFFFFFF, -outside, outside)
    assert (z - truth).abs().max() < 4e-7 and z.abs().max() < 6.34


def test_the_table_is_the_same_on_every_machine():
    """A library that rounds a logarithm otherwise would draw other noise."""
    ends, falls = quantiles(torch.device("cpu"))
    assert ends.shape == falls.shape == (16385,) and int(ends[-1]) == 0
    assert torch.equal(ends[:-1] - falls[:-1], ends[1:])
    assert hashlib.sha256(ends.numpy().tobytes()).hexdigest()[:16] == "79a264cd77d602c1"


def test_noise_is_standard_normal():
    z = noise(5, torch.arange(40), (3, 128, 128)).double().numpy()
    count, flat = z.size, z.ravel()
    # moments of the normal distribution, within four standard errors
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        assert abs((flat**power).mean() - moment) < 4 * math.sqrt(variance / count), power
    # Kolmogorov and Smirnov against the float64 distribution, p = 0.001
    below = torch.special.ndtr(torch.from_numpy(flat).sort().values).numpy()
    places = np.arange(count) / count
    assert max((below - places).max(), (places + 1 / count - below).max()) < 1.95 / math.sqrt(count)
    # neighbours, halves of a counter and samples know nothing of each other
    for lag in (1, 2, 3, 4, 128):
        assert abs(np.mean(flat[:-lag] * flat[lag:])) < 4 / math.sqrt(count)
    assert np.abs(np.corrcoef(z.reshape(40, -1)) - np.eye(40)).max() < 5 / math.sqrt(z[0].size)


def test_a_samples_noise_is_its_own(monkeypatch):
    index = torch.tensor([0, 7, 2**31 + 1, 2**32 + 7, 3])
    whole = noise(3, index, (3, 10, 7))
    assert whole.dtype == torch.float32 and whole.shape == (5, 3, 10, 7) and whole.is_contiguous()
    assert len({row.numpy().tobytes() for row in whole}) == 5
    for i in range(5):
        assert torch.equal(noise(3, index[i : i + 1], (3, 10, 7))[0], whole[i])
    assert not torch.equal(noise(4, index, (3, 10, 7)), whole)
    # a larger sample begins as a smaller one does, and pieces are cut anywhere
    assert torch.equal(noise(3, index, (500,))[:, :210], whole.flatten(1))
    for piece in (1, 5, 64):
        monkeypatch.setitem(module.AT_ONCE, "cpu", piece)
        assert torch.equal(noise(3, index, (3, 10, 7)), whole)
    assert len({key_of(seed, purpose) for seed in range(50) for purpose in (NOISE, DROP)}) == 100


def test_the_layout_of_counters_is_what_is_written():
    """Word i of sample n is word i % 4 of counter (i // 4, 0, n mod 2^32, n // 2^32)."""
    made = noise(9, torch.tensor([2**40 + 11]), (10,))[0]
    counter = tuple(torch.tensor([part]) for part in (1, 0, 11, 2**8))
    words = torch.cat(philox(counter, key_of(9, NOISE)))
    assert torch.equal(made[4:8], normals(words))


def test_the_triton_kernel_draws_the_same_bits(interpreted):
    pytest.importorskip("triton")
    assert interpreted("interpreted/noise.py") > 0


def on_meta(samples: int, size: int):
    """The launch for so many samples, planned without memory."""
    from semantica.kernels.noise import plan_noise

    shapes = dict(out=((samples, size), torch.float32), index=((samples,), torch.int64), key=((1,), torch.int64))
    shapes |= dict.fromkeys(("ends", "falls"), ((16385,), torch.int32))
    tensors = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in shapes.items()}
    return plan_noise(**tensors, within=module.WITHIN, fraction=module.FRACTION)


def test_large_samples_fit_a_grid():
    pytest.importorskip("triton")
    for samples, size in ((2, 2**31 - 1), (65535, 3 * 256 * 256)):
        # CUDA takes 2^31 - 1 programs along the first axis, 65535 along the second
        runs, rows = on_meta(samples, size).grid
        assert runs * 4096 >= size and rows == samples and runs < 2**31 and rows <= 65535
    for samples, size in ((1, 2**31), (65536, 1)):
        with pytest.raises(ValueError, match=rf"noise \({samples}, {size}\): 65535 samples of fewer than 2\^31"):
            on_meta(samples, size)


def test_cards_that_triton_does_not_serve_draw_by_torch(monkeypatch):
    monkeypatch.setattr(module.launch, "DEVICE", "cpu")
    monkeypatch.setattr(module.launch, "modern", lambda device: False)
    assert torch.equal(noise(5, torch.tensor([7]), (3, 4)), module.plain_noise(5, torch.tensor([7]), 12).view(1, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_the_triton_kernel_writes_whole_lines_and_spills_nothing(arch):
    pytest.importorskip("triton")
    from semantica.benchmarks.kernels.compile_only import inspect

    row = inspect("noise", on_meta(64, 3 * 256 * 256), arch)
    assert row["spill_loads_bytes"] == row["spill_stores_bytes"] == 0 and set(row["stores"]) == {"128"}, row
    assert row["registers"] <= 64, row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_draws_the_same_bits():
    index = torch.tensor([0, 7, 2**31 + 1, 2**40 + 11])
    for shape in ((3, 256, 256), (3, 10, 7), (1,)):
        expected = noise(5, index, shape)
        assert torch.equal(noise(5, index.cuda(), shape).cpu(), expected)
        # without Triton too
        assert torch.equal(module.plain_noise(5, index.cuda(), expected[0].numel()).cpu(), expected.flatten(1))
