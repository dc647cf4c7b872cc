"""The bench that runs CUDA C++ on the host: planted mistakes are caught, and programs without one run clean."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
import building as cuda_host

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")
SEEDS = 10
RACE, FAULT = "ThreadSanitizer: data race", "cuda_host: fault: "
# what each mistake is called by, in the flavours that find it; "wrong": a result differs under one of the seeds
FAULTS = {
    "missing_syncthreads": {"plain": "wrong: sum of a block", "tsan": RACE},
    "missing_second_barrier": {"plain": "wrong: reversed", "tsan": RACE},
    "missing_syncwarp": {"plain": "wrong: neighbour's", "tsan": RACE},
    "missing_cluster_sync": {"plain": "wrong: sum over the cluster", "tsan": RACE},
    "missing_grid_sync": {"plain": "wrong: sum over the grid", "tsan": RACE},
    "missing_cp_async_wait": {"plain": "wrong: staged", "tsan": RACE},
    "source_overwritten_early": {"plain": "wrong: staged", "tsan": RACE},
    "missing_bulk_wait": {"plain": "wrong: loaded", "tsan": RACE},
    "missing_proxy_fence": {"tsan": RACE},
    "store_after_exit": {"plain": "wrong: stored", "asan": "heap-use-after-free", "tsan": RACE},
    "blocks_race": {"tsan": RACE},
    "block_leaves_cluster": {"plain": FAULT + "map_shared_rank: block 0 of the cluster has left"},
    "remote_read_after_exit": {"plain": "wrong: the neighbour's", "asan": "heap-use-after-free", "tsan": RACE},
    "global_past_the_end": {"asan": "heap-buffer-overflow"},
    "shared_past_the_end": {"asan": "heap-buffer-overflow"},
    "bulk_past_the_end": {"plain": FAULT + "bulk_load: 64 bytes past the end of shared memory"},
    "uninitialised": {"plain": "wrong: sum of what was written"},
    "misaligned": {"plain": FAULT + "misaligned load of 16 bytes"},
    "misaligned_pointer": {"asan": "misaligned address"},
    "divergent_syncthreads": {"plain": FAULT + "divergent __syncthreads"},
    "wrong_barrier_count": {"plain": "64 threads wait at faults.cu"},
    "wrong_transaction_count": {"plain": "wait at mbarrier_wait for 0 arrivals and 16 bytes"},
    "wrong_parity": {"tsan": RACE},
    "absent_lane": {"plain": FAULT + "__shfl_sync: reads lane 16, absent from mask 0000ffff"},
    "lane_has_left": {"plain": FAULT + "lane 16 leaves while lanes of mask ffffffff wait for it"},
    "grid_sync_alone": {"plain": FAULT + "faults.cu"},
}


@pytest.fixture(scope="module")
def programs():
    return cuda_host.build("faults.cu", *cuda_host.FLAVOURS)


@pytest.mark.parametrize("fault, flavour", [(fault, flavour) for fault, found in FAULTS.items() for flavour in found])
def test_a_planted_mistake_is_caught(programs, fault, flavour):
    done = cuda_host.run(programs[flavour], fault, "broken", 0, SEEDS)
    said = (done.stdout + done.stderr).replace(str(cuda_host.HERE) + "/", "")
    assert done.returncode and FAULTS[fault][flavour] in said, said[-2000:]


@pytest.mark.parametrize("flavour", cuda_host.FLAVOURS)
def test_without_the_mistake_all_run_clean(programs, flavour):
    names = cuda_host.run(programs[flavour]).stdout.split()
    assert set(names) == {*FAULTS, "too_large"}
    for name in names:
        if (name, flavour) != ("too_large", "tsan"):
            done = cuda_host.run(programs[flavour], name, "fixed", 0, SEEDS)
            assert done.returncode == 0, f"{name}: {(done.stdout + done.stderr)[-2000:]}"


def test_the_same_seed_is_the_same_run(programs):
    runs = [cuda_host.run(programs["plain"], "wrong_parity", "broken", seed, 1) for seed in (*range(8), *range(8))]
    said = [(done.returncode, done.stdout, done.stderr) for done in runs]
    # some orders hide this mistake, others do not; which ones do never changes
    assert said[:8] == said[8:] and len({code for code, *_ in said}) > 1


def test_16_bit_floats_round_as_torch_does():
    every = np.arange(1 << 16, dtype=np.uint32)
    # all bf16 numbers and their neighbourhoods: ties, both sides of them; all fp16 numbers likewise; random bits
    halves = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = [bits + delta & 0xFFFFFFFF for bits, ties in ((every << 16, 1 << 15), (halves, 1 << 12))
            for delta in (0, ties - 1, ties, ties + 1)]  # fmt: skip
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bits = np.concatenate([*near, drawn]).astype(np.uint32)
    program = cuda_host.build("rounding.cu", "plain")["plain"]
    done = subprocess.run([program], input=bits.tobytes(), capture_output=True, check=True)
    found = np.frombuffer(done.stdout, np.uint32).reshape(-1, 3)
    numbers = torch.from_numpy(bits.view(np.float32).copy())
    for made, back, dtype in ((found[:, 0] & 0xFFFF, found[:, 1], torch.bfloat16),
                              (found[:, 0] >> 16, found[:, 2], torch.float16)):  # fmt: skip
        expected = numbers.to(dtype)
        is_number = ~torch.isnan(expected).numpy()
        right = expected.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(made[is_number], right[is_number])
        assert np.isnan(back.view(np.float32)[~is_number]).all() and (made[~is_number] == 0x7FFF).all()
        assert np.array_equal(back[is_number], expected.float().numpy().view(np.uint32)[is_number])
