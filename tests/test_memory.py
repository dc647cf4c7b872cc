"""What is freed on the host is kept: counted in page faults, in processes of their own; and a process's peak."""

import os
import subprocess
import sys

import numpy as np
import pytest

from semantica.memory import peak_resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

# a block of 64 MiB, written and freed again and again: above 32 MiB glibc never keeps one by itself
FAULTS = """
import ctypes, resource, sys
# PR_SET_THP_DISABLE: pages of one size wherever this runs
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
import torch
from semantica.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    return torch.ones(2**24).sum()
# by then there is room for one beside whatever small lies in between
for _ in range(20):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    told = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(told)}
    command = [sys.executable, "-P", "-c", FAULTS, how]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_kept_memory_is_not_asked_for_again():
    pages = 20 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults("kept") < 0.01 * pages < 0.99 * pages < faults("given back")


def test_the_peak_is_this_programs_own():
    """What the process that starts it holds is not in it, though rusage hands that on."""
    held = np.ones(300 * 2**20 // 8)
    code = "from semantica.memory import peak_resident; print(peak_resident())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert 5 * 2**20 < int(done.stdout) < 150 * 2**20 < peak_resident() and held.all()
