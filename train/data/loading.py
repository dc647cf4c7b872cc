"""Endless batches from worker processes, through memory that all of them share and that is made once."""

import itertools
import shutil
import signal
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from semantica.errors import UserError
from semantica.train.data.batch import PICTURES, empty, finish, stack
from semantica.train.data.pairs import Pairs

# batches that each worker makes ahead, and places for them: one more is being read
AHEAD = 2
PLACES = AHEAD + 1
# where processes share memory on Linux; containers often give it 64 MiB
SHARED = Path("/dev/shm")


def batches(
    dataset: Pairs,
    *,
    first_index: int,
    batch: int,
    workers: int,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """Endless batches, see `semantica.train.data.batch.finish`, of consecutive indices from `first_index` on.

    Args:
        batch: samples of each batch over all processes.
        part: (which, of how many) equal parts of each batch this process takes; batch must be divisible.

    The same bytes for any number of workers (0 loads in this process). Worker processes end when the iterator is
    closed or forgotten. The global random state of torch is not touched.

    Raises:
        UserError: as `Pairs.__getitem__`, also from a worker; no room for the shared memory.
    """
    device = torch.device(device)
    for loaded in host_batches(dataset, first_index=first_index, batch=batch, workers=workers, part=part):
        yield finish(own(loaded, device), dataset.seed, device)


def host_batches(
    dataset: Pairs, *, first_index: int, batch: int, workers: int, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:
    """`batches` as `semantica.train.data.batch.stack` leaves them. Each is in memory that the next may overwrite.

    Raises:
        UserError: as `batches`.
    """
    size = batch // part[1]
    require_room(workers, workers * worker_bytes(dataset, size))
    fetch = Fetch(dataset, size, workers)
    loader = DataLoader(
        fetch,
        batch_sampler=_ranges(first_index, batch, *part),
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=start_worker,
        # of its own, since the loader draws a seed from it
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        for made in iterator:
            if isinstance(made, UserError):
                raise made
            yield {name: memory[made.place] for name, memory in fetch.memory[made.worker].items()} | {"bad": made.bad}
    finally:
        # the workers are stopped by its destructor
        del iterator


def own(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch out of shared memory: pinned for a GPU, or without what `finish` copies anyway."""
    if device.type == "cuda":
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
    kept = {name for name, value in batch.items() if not isinstance(value, Tensor) or name in PICTURES}
    return {name: value if name in kept else value.clone() for name, value in batch.items()}


def worker_bytes(dataset: Pairs, batch: int) -> int:
    """Of the memory that one worker shares with the trainer, for batches of this process' size."""
    return PLACES * sum(tensor.nbytes for tensor in empty(dataset.layout(), batch).values())


def shared_room() -> float:
    """Bytes that processes can still share."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else float("inf")


def require_room(workers: int, need: int) -> None:
    """Raises `UserError` where workers, of one trainer or of several, would share more bytes than there is room for."""
    if workers and (room := shared_room()) < need:
        raise UserError(
            f"{workers} workers share {need / 2**20:.0f} MiB with their trainers and {SHARED} has room for "
            f"{room / 2**20:.0f}: give it more (docker: --shm-size or --ipc=host), or give fewer --workers"
        )


class Made(NamedTuple):
    """Where a batch lies, and the (path, reason) of pictures found broken."""

    worker: int
    place: int
    bad: list[tuple[str, str]]


class Fetch(Dataset):
    """Makes batches in their places, each worker in turn in its own.

    A worker is asked for its batch n + AHEAD once its batch n has arrived, and for the one after that when its batch
    n + 1 has: then the place of batch n has been read. Without workers there is one place.
    """

    def __init__(self, dataset: Pairs, batch: int, workers: int):
        self.dataset, self.turn = dataset, -1
        places = PLACES if workers else 1
        self.memory = [empty(dataset.layout(), places, batch) for _ in range(max(1, workers))]
        for tensor in (tensor for memory in self.memory for tensor in memory.values() if workers):
            tensor.share_memory_()

    def __getitems__(self, indices: Iterable[int]) -> Made | UserError:
        """A `UserError` is a value: the loader would bury its one line in the worker's traceback."""
        try:
            self.dataset.prefetch(indices)
            items = [self.dataset[index] for index in indices]
        except UserError as error:
            return error
        worker = get_worker_info()
        number, places = (worker.id, PLACES) if worker else (0, 1)
        self.turn = (self.turn + 1) % places
        stack(items, {name: memory[self.turn] for name, memory in self.memory[number].items()})
        return Made(number, self.turn, [entry for item in items for entry in item["bad"]])


def _as_it_is(made: Made | UserError) -> Made | UserError:
    return made


def _ranges(first: int, batch: int, part: int, parts: int) -> Iterator[range]:
    own = batch // parts
    return (range(start, start + own) for start in itertools.count(first + part * own, batch))


def start_worker(_: int) -> None:
    """What a `DataLoader`'s processes begin with."""
    # the main process decides what these mean, and then ends the workers; a scheduler may send them to all alike
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")
