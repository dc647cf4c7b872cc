"""The bench that runs CUDA C++ on the host: planted mistakes are caught, and programs without one run clean."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from semantica import nvcc

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
import building as cuda_host

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")
# under ThreadSanitizer a run is dear, and one order shows what is not ordered
SEEDS = {"plain": 10, "asan": 10, "tsan": 3}
RACE, PAST = "ThreadSanitizer: data race", "AddressSanitizer: (heap-buffer-overflow|use-after-poison)"


def fault(call: str, what: str) -> str:
    return rf"cuda_host: fault: faults_[a-z]+\.cuh:\d+: {re.escape(call)}: {what}"


def wait(threads: int, call: str, what: str) -> str:
    return rf"cuda_host: {threads} threads wait at faults_[a-z]+\.cuh:\d+: {re.escape(call)} {what}"


# what each mistake is called by, in the flavours that find it; "wrong": a result differs under one of the seeds
FAULTS = {
    "missing_syncthreads": {"plain": "wrong: sum of a block", "tsan": RACE},
    "missing_second_barrier": {"plain": "wrong: reversed", "tsan": RACE},
    "divergent_syncthreads": {"plain": fault("__syncthreads", "divergent, others are at faults")},
    "skipped_barrier": {"plain": wait(32, "__syncthreads", "until 64 threads are there")},
    "wrong_barrier_count": {"plain": wait(64, "named_barrier_sync", "until 96 threads are there")},
    "barrier_counts_differ": {"plain": fault("named_barrier_sync", "barrier 1 of (96|64) threads, others wait for")},
    "half_warps_at_a_barrier": {"plain": fault("named_barrier_sync", "barrier 1: warp 0 came without its lanes")},
    "missing_syncwarp": {"plain": "wrong: neighbour's", "tsan": RACE},
    "absent_lane": {"plain": fault("__shfl_sync", "reads lane 16, absent from mask 0000ffff")},
    "lane_has_left": {"plain": fault("__shfl_xor_sync", r"reads lane \d+, which has left")},
    "lane_is_elsewhere": {"plain": wait(16, "__shfl_xor_sync", "for the lanes of mask ffffffff")},
    "shuffles_of_two_kinds": {"plain": r"__shfl_\w+: divergent, others of mask ffffffff are at"},
    "odd_segments": {"plain": fault("__shfl_down_sync", "width 12 is not a power of 2")},
    "missing_cluster_sync": {"plain": "wrong: sum over the cluster", "tsan": RACE},
    "mapped_before_the_start": {"plain": fault("map_shared_rank", r"block \d may not have started")},
    "block_leaves_cluster": {"plain": fault("map_shared_rank", r"block \d of the cluster has left")},
    "remote_read_after_exit": {"plain": "wrong: the neighbour's", "asan": "heap-use-after-free", "tsan": RACE},
    "leaves_after_arriving": {"plain": fault("cluster.barrier_arrive", "its thread leaves without having waited")},
    "arrives_twice": {"plain": fault("cluster.barrier_arrive", "arrives again before it has waited")},
    "absent_from_the_cluster": {"plain": wait(124, "cluster.barrier_wait", "for the cluster")},
    "blocks_race": {"tsan": RACE},
    "missing_grid_sync": {"plain": "wrong: sum over the grid", "tsan": RACE},
    "grid_sync_alone": {"plain": fault("grid_sync", "in a grid that is not cooperative")},
    "missing_cp_async_wait": {"plain": "wrong: staged", "tsan": RACE},
    "missing_commit": {"plain": "wrong: staged", "tsan": RACE},
    "never_waited_for": {"plain": fault("cp_async16", "its thread leaves without having waited for it")},
    "waits_for_too_few": {"plain": "wrong: reversed in rounds", "tsan": RACE},
    "refilled_too_early": {"plain": "wrong: reversed in rounds", "tsan": RACE},
    "source_overwritten_early": {"plain": "wrong: staged", "tsan": RACE},
    "copied_from_shared": {"plain": fault("cp_async16", "0x[0-9a-f]+ is in shared memory")},
    "misaligned_shared": {"plain": fault("cp_async16", "misaligned: 16 bytes")},
    "bulk_past_the_end": {"plain": fault("bulk_load", "64 bytes past the end of shared memory")},
    "missing_bulk_wait": {"plain": "wrong: loaded", "tsan": RACE},
    "left_before_the_load": {"plain": fault("bulk_load", "unfinished when its block leaves"), "tsan": RACE},
    "wrong_transaction_count": {"plain": wait(32, "mbarrier_wait", "for 0 arrivals and 16 bytes")},
    "wrong_parity": {"plain": f"wrong: loaded|{wait(1, 'mbarrier_wait', 'for')}", "tsan": RACE},
    "missing_sync_after_init": {"plain": fault("mbarrier_wait", "no mbarrier was initialised"), "tsan": RACE},
    "mbarrier_overwritten": {"plain": fault("mbarrier_wait", "the mbarrier's memory was overwritten"), "tsan": RACE},
    "one_arrival_too_many": {"plain": "(for 1 arrivals and 0 bytes|more arrivals than the 1 expected)"},
    "missing_proxy_fence": {"tsan": RACE},
    "store_after_exit": {"plain": fault("bulk_store", "its thread leaves without having waited for it")},
    "global_past_the_end": {"asan": PAST},
    "global_a_row_past": {"asan": PAST},
    "shared_past_the_end": {"asan": PAST},
    "static_shared_past_the_end": {"asan": PAST},
    "remote_past_the_end": {"asan": PAST},
    "misaligned": {"plain": fault("__ldcs", "misaligned: 16 bytes at")},
    "misaligned_pointer": {"asan": "misaligned address"},
    "uninitialised": {"plain": "wrong: sum of what was written"},
    "uninitialised_under_a_maximum": {"plain": "wrong: maximum of what was written"},
    "read_only_but_written": {"tsan": RACE},
    "too_many_locals": {"plain": "local variables of more than"},
    "no_dynamic_memory": {"plain": fault("dynamic_shared", "the launch gives no dynamic shared memory")},
    "too_much_shared": {"plain": "shared memory: 232464 bytes, a block has 232448"},
    "waits_in_a_loop": {"plain": "its start: since then a thread runs and meets nobody"},
}
# five seconds of processor time are what the bench waits before it says so
LONG = {"waits_in_a_loop": pytest.mark.slow}
PLANTED = [
    pytest.param(name, flavour, marks=LONG.get(name, ()), id=f"{name}-{flavour}")
    for name, found in FAULTS.items()
    for flavour in found
]


def run(flavour: str, mode: str, *names: str, seed: int = 0, seeds: int = 0) -> tuple[int, str]:
    program = cuda_host.build("faults.cu", *cuda_host.FLAVOURS)[flavour]
    done = cuda_host.run(program, mode, seed, seeds or SEEDS[flavour], *names)
    return done.returncode, done.stdout + done.stderr


def names() -> list[str]:
    return cuda_host.run(cuda_host.build("faults.cu", *cuda_host.FLAVOURS)["plain"]).stdout.split()


@pytest.mark.parametrize("name, flavour", PLANTED)
def test_a_planted_mistake_is_caught(name, flavour):
    code, said = run(flavour, "broken", name)
    assert code and re.search(FAULTS[name][flavour], said), said[-2000:]


@pytest.mark.parametrize("flavour", cuda_host.FLAVOURS)
def test_without_the_mistake_all_run_clean(flavour):
    assert set(names()) == {*FAULTS, "too_large"}
    # the largest grid has more threads than ThreadSanitizer knows
    code, said = run(flavour, "fixed", *(name for name in names() if (name, flavour) != ("too_large", "tsan")))
    assert code == 0, said[-2000:]


def test_the_same_seed_is_the_same_run():
    runs = [run("plain", "broken", "wrong_parity", seed=seed, seeds=1) for seed in (*range(8), *range(8))]
    # in some orders threads wait for ever, in others they read too early; in which ones never changes
    assert runs[:8] == runs[8:] and len({said for _, said in runs}) > 1


def test_the_same_text_compiles_for_a_gpu(tmp_path):
    if not nvcc.find():
        pytest.skip("needs nvcc")
    source, made = tmp_path / "faults.cu", tmp_path / "faults.cubin"
    files = sorted(path.name for path in cuda_host.HERE.glob("faults_*.cuh"))
    source.write_text("".join(f'#include "{name}"\n' for name in files))
    target = ["-std=c++17", "-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([nvcc.find(), *target, f"-I{cuda_host.CUDA}", f"-I{cuda_host.HERE}", source, "-o", made], check=True)
    kernels = set(re.findall(r"__global__ void (\w+)", "".join((cuda_host.HERE / name).read_text() for name in files)))
    assert len(kernels) > 30 and all(name.encode() in made.read_bytes() for name in kernels)


def test_threads_that_launch_one_kernel_do_not_take_each_others_shared_memory(tmp_path):
    """The limit is the kernel's, whoever set it last; the module lets other threads run while it launches."""
    here, program = Path(__file__).parent, tmp_path / "launches"
    folders = own, _ = here / "cuda_host" / "launching", here.parent / "csrc" / "cuda"
    command = [cuda_host.COMPILER, "-std=c++17", "-O1", "-pthread", *(f"-I{folder}" for folder in folders)]
    command += [own / "launches.cpp", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([program], capture_output=True, text=True).stdout == "0 refused\n"


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
