"""What is freed on the host is kept: counted in page faults, in processes of their own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

# a block of 8 MiB, written and freed again and again, among other live ones
FAULTS = """
import resource, sys
import torch
from semantica.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    held = [torch.ones(2**20) for _ in range(4)]
    return torch.ones(2**21).sum() + held[0][0]
for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-P", "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_kept_memory_is_not_asked_for_again():
    pages = 20 * (8 + 4 * 4) * 2**20 // 4096
    assert faults("kept") < 0.01 * pages < 0.1 * pages < faults("given back")
