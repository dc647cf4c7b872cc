"""What is said to the person at the keyboard: errors, warnings that come once, and what a failing GPU means."""

import functools
import logging
import re


class UserError(ValueError):
    """A mistake in what the user asked for: one line saying what is wrong, with which value, and what to do.

    The command line prints the message and exits with code 2; library users catch it as a `ValueError`.
    """


class ArtifactError(RuntimeError):
    """Something that was made is not right, or could not be made; nothing of it is kept.

    The command line prints the message and exits with code 1.
    """


@functools.cache
def warn_once(message: str) -> None:
    """A warning in the log, the first time in a process that it is given; others that differ are others."""
    logging.getLogger("semantica").warning(message)


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# CUDA's numbers of errors that are the machine's, not the program's, in its header driver_types.h; what to do
LOST = "this process cannot use it any more: run the same command again; nvidia-smi and the kernel's log say how it is"
TOO_OLD = "update the driver, or install a torch that was built for an older CUDA"
MEMORY = "ask for less at a time, or end what else uses the card: nvidia-smi lists it"
NO_CODE = "nothing here was built for this card: install a torch that knows its compute capability"
ADVICE = {
    2: MEMORY, 35: TOO_OLD, 46: LOST, 100: LOST, 101: LOST, 201: LOST, 209: NO_CODE, 214: LOST, 220: LOST, 222: TOO_OLD,
    719: LOST, 720: LOST, 721: LOST, 802: LOST, 803: TOO_OLD, 804: TOO_OLD, 999: LOST,
}  # fmt: skip
# the same where an error brings no number: what CUDA, NVML and torch say
SAID = {
    "out of memory": MEMORY,
    "driver on your system is too old": TOO_OLD,
    "driver version is insufficient": TOO_OLD,
    "no kernel image is available": NO_CODE,
    "gpu is lost": LOST,
    "ecc error": LOST,
    "nvlink error": LOST,
    "no cuda-capable device is detected": LOST,
    "device(s) is/are busy or unavailable": LOST,
    "unspecified launch failure": LOST,
    "cublas_status_alloc_failed": MEMORY,
}
# torch's and ours; known by name, so that asking costs no import
DEVICE_ERRORS = {"OutOfMemoryError", "AcceleratorError", "CudaError"}


def device_failure(error: BaseException) -> str | None:
    """What failed on a GPU, in one line that says what to do; None for another kind of error, and for what a program
    did to a healthy card (an illegal address, an assertion)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    words = first_line(error)
    number = getattr(error, "code", getattr(error, "error_code", None)) if names & DEVICE_ERRORS else None
    said = (advice for text, advice in SAID.items() if text in words.lower())
    advice = ADVICE.get(number) or next(said, None)
    if advice is None or not (names & DEVICE_ERRORS or re.search(r"\bcuda\b|\bnvidia\b", words, re.IGNORECASE)):
        return None
    # behind that, torch's allocator describes itself
    words = re.split(r"(?<=free)\.\s|\. Please ", words)[0].rstrip(".")
    return f"{words}: {advice}"
