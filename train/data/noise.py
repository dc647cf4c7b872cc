"""Noise that every device draws alike: counters to words by Philox4x32-10, words to normals by a table, in integers.

Each number is a pure function of (seed, sample index, place in the sample): it depends neither on the device nor on
workers, processes or batches. Nothing is rounded before the last step, a conversion to fp32 that IEEE 754 fixes.
"""

import functools
import statistics

import numpy as np
import torch
from torch import Tensor

from semantica.kernels import launch
from semantica.train.data.draws import NOISE

# Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011)
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF
# an octave of probabilities is cut into 2^PIECES pieces
PIECES = 9
# bits of a piece within fp32's mantissa, and of a normal's fraction
WITHIN, FRACTION = 23 - PIECES, 24
# counters at a time: what the processor's cache, or some 200 MB of the device's memory, holds of them
AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 22}


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of a counter, int64 tensors that hold 32 bits each, to four random words alike."""
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        # the lower 64 bits of a product are the same with and without signs
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) ^ b ^ first) & LOW, q & LOW, ((p >> 32) ^ d ^ second) & LOW, p & LOW
        first, second = (first + WEYL[0]) & LOW, (second + WEYL[1]) & LOW
    return a, b, c, d


@functools.cache
def quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """-z at the lower end of each piece and its fall over the piece, in units of 2^-24: int32 `[32 * 2^9 + 1]`.

    The normal quantile is cut where fp32 numbers are: each octave of probabilities into equal pieces, and straight in
    between (hierarchical segmentation, Lee et al., IEEE Trans. VLSI 2006; within 6e-7).
    """
    # at 2^-33 and on, in octaves; the last number is 1/2
    place = np.arange((32 << PIECES) + 1)
    probability = np.ldexp(1 + (place & ((1 << PIECES) - 1)) / 2.0**PIECES, (place >> PIECES) - 33)
    quantile = statistics.NormalDist().inv_cdf
    ends = np.array([round(-quantile(p) * 2.0**FRACTION) for p in probability.tolist()], np.int32)
    falls = np.append(ends[:-1] - ends[1:], 0).astype(np.int32)
    return torch.from_numpy(ends).to(device), torch.from_numpy(falls).to(device)


def normals(words: Tensor) -> Tensor:
    """Words, int64 that hold 32 random bits, to standard normals in fp32, at most 6.34 from zero.

    The first bit is the sign; the others are the probability (m + 1/2) / 2^32 of what is farther out.
    """
    ends, falls = quantiles(words.device)
    # fp32's exponent and first digits say in which piece it lies, the rest where in there
    bits = (((words & 0x7FFFFFFF) << 1) | 1).float().view(torch.int32)
    piece = (bits >> WITHIN) - (127 << PIECES)
    fall = (falls[piece] * (bits & ((1 << WITHIN) - 1)) + (1 << (WITHIN - 1))) >> WITHIN
    size = (ends[piece] - fall).float().mul_(2.0**-FRACTION)
    return torch.where(words > 0x7FFFFFFF, size, -size)


@functools.cache
def key_of(seed: int, purpose: int) -> tuple[int, int]:
    """The key of a seed's numbers for a purpose, as `semantica.train.data.draws.generator` keeps purposes apart."""
    first, second = np.random.SeedSequence(seed, spawn_key=(purpose,)).generate_state(2).tolist()
    return first, second


@functools.cache
def key_tensor(seed: int, device: torch.device) -> Tensor:
    """The key of a seed's noise as one number, int64 `[1]`: the first word is its lower half."""
    return torch.from_numpy(np.array(key_of(seed, NOISE), np.uint32).view(np.int64)).to(device)


def noise(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of samples, fp32 `[B, *shape]` on the device of `index` `[B]`, their numbers in the run.

    Word `i` of sample `n` is word `i % 4` of the counter (i // 4, 0, n mod 2^32, n // 2^32).
    """
    size = int(np.prod(shape))
    if launch.DEVICE == index.device.type and launch.modern(index.device):
        # one launch in the place of some hundred
        from semantica.kernels.noise import fill

        filled = torch.empty(len(index), size, device=index.device)
        fill(filled, index, key_tensor(seed, index.device), *quantiles(index.device), WITHIN, FRACTION)
        return filled.view(len(index), *shape)
    return plain_noise(seed, index, size).view(len(index), *shape)


def plain_noise(seed: int, index: Tensor, size: int) -> Tensor:
    """`noise` as `[B, size]`, by torch's operators."""
    blocks = -(-size // 4)
    key = key_of(seed, NOISE)
    result = torch.empty(len(index), blocks, 4, device=index.device)
    step = AT_ONCE["cpu" if index.device.type == "cpu" else "cuda"]
    zero = torch.zeros((), dtype=torch.int64, device=index.device)
    rows = max(1, step // blocks)
    for row in range(0, len(index), rows):
        samples = index[row : row + rows, None]
        for start in range(0, blocks, step):
            block = torch.arange(start, min(start + step, blocks), device=index.device)
            words = philox((block, zero, samples & LOW, samples >> 32), key)
            for part, word in zip(result[row : row + rows, start : start + step].unbind(-1), words):
                part.copy_(normals(word))
    return result.flatten(1)[:, :size].contiguous()
