"""A GPU that is full, lost, too old or behind an old driver: one line, and another path where there is one."""

import subprocess
import sys

import pytest
import torch

from semantica import cli, doctor
from semantica.errors import device_failure
from semantica.kernels import dispatch, launch

FULL = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB of which 1.00 MiB is "
    "free. Process 12 has 79.2 GiB memory in use. Of the allocated memory 78.00 GiB is allocated by PyTorch."
)
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call.\nFor debugging consider passing"


class CudaError(RuntimeError):
    """As `semantica._cuda` raises it."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


# what really comes, and words of the one line
MACHINES = {
    "full": (torch.OutOfMemoryError(FULL), ("of which 1.00 MiB is free: ask for less", "nvidia-smi")),
    "lost": (torch.AcceleratorError("CUDA error: unspecified launch failure" + HINT), ("failure: this process",)),
    "off the bus": (CudaError("group_norm: unknown error (cudaErrorUnknown)", 999), ("run the same command again",)),
    "ecc": (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + HINT), ("ECC error", "again")),
    "gone": (RuntimeError("No CUDA GPUs are available: no CUDA-capable device is detected"), ("run the same command",)),
    "old driver": (RuntimeError(OLD_DRIVER), ("too old (found version 12040): update the driver",)),
    "old driver, ours": (CudaError("group_norm: CUDA driver version is insufficient", 35), ("update the driver",)),
    "new card": (
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device" + HINT),
        ("install a torch that knows its compute capability",),
    ),
    "library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), ("ask for less",)),
}
# faults of a program on a healthy card, and what only sounds like one
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + HINT),
    torch.AcceleratorError("CUDA error: device-side assert triggered" + HINT),
    CudaError("group_norm: misaligned address (cudaErrorMisalignedAddress)", 716),
    RuntimeError("the oven is out of memory"),
    RuntimeError("shape '[3]' is invalid for input of size 4"),
]


def run(monkeypatch, error: Exception) -> int:
    def verb(name, rest):
        raise error

    monkeypatch.setitem(cli.VERBS, "fail", verb)
    return cli.main(["fail"])


@pytest.mark.parametrize("name", MACHINES)
def test_a_gpu_that_fails_is_one_line(monkeypatch, capsys, name):
    error, words = MACHINES[name]
    assert run(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert said.startswith("semantica: ") and said.count("\n") == 1 and len(said) < 330
    assert all(word in said for word in words), said
    # torch's page of advice is not in it
    assert "asynchronously" not in said and "nvidia.com" not in said and "Process 12" not in said


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_a_programs_fault_keeps_its_traceback(monkeypatch, error):
    assert device_failure(error) is None
    with pytest.raises(RuntimeError) as caught:
        run(monkeypatch, error)
    assert caught.value is error


def test_asking_costs_no_import():
    code = "import semantica.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


class Card:
    """What doctor asks of a card."""

    name, total_memory, multi_processor_count = "NVIDIA T4", 16 << 30, 40
    major, minor = 7, 5


def test_a_card_below_8_gets_plain_torch_and_doctor_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    launch.modern.cache_clear()
    try:
        assert not launch.modern(torch.device("cuda:0")) and launch.modern(torch.device("cuda:1"))
    finally:
        launch.modern.cache_clear()
    assert launch.modern(torch.device("cpu"))
    # the same seam, under a kernel that would not compile there
    kernel = dispatch.lazy_kernel("no.such.module:function", lambda first: True, lambda first, add: first + add)
    monkeypatch.setattr(launch, "modern", lambda device: False)
    assert kernel(torch.ones(2), 1).tolist() == [2, 2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    ((value, status),) = [(value, status) for name, value, status in doctor.devices() if name == "cuda:0"]
    assert "compute capability 7.5" in value and "plain torch serves" in value and status == "warning"


def test_doctor_says_why_torch_finds_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ((value, status),) = [(value, status) for name, value, status in doctor.devices() if name == "cuda"]
    assert "built for 13.0, but finds no GPU: The NVIDIA driver on your system is too old" in value and status == "note"
    assert "update the driver" in value and "\n" not in value
