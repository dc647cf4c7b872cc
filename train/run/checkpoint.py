"""Checkpoints: safetensors and JSON in a folder that is written aside, synced, then renamed."""

import json
import logging
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from semantica.errors import UserError, first_line
from semantica.files import UNSAFE, aside_of, full, move_in, remove, sha256, sync
from semantica.train.processes import Vote, World
from semantica.train.run.storage import Damaged, Reader, Writer
from semantica.train.sharding import is_sharded

logger = logging.getLogger(__name__)
PREFIX = "step-"
# one process without a group is what was asked for; its saving thread cannot change filters for itself
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
# of a folder whose files hold whole tensors, and of one where several processes wrote parts
WHOLE, PARTS = 1, 2


def folders(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and number(p) >= 0]
    return sorted(found, key=number)


def number(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 for another folder."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() else -1


def save(
    root: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write `step-XXXXXXXX/`: safetensors files and `state.json` with their hashes; drop the oldest ones.

    Args:
        root: a folder that all processes see.
        tensors: `NAME/KEY` -> the tensor that this process holds, or its part as a DTensor.
        state: further JSON values to keep.
        keep: how many finished checkpoints are kept.
        group: the processes that save together, with CPU tensors; None for one.

    Raises:
        UserError: the disk is full, or does not take files any more; earlier checkpoints are intact.
    """
    final = root / f"{PREFIX}{step:08d}"
    aside = aside_of(final)

    def finish(hashes: dict[str, str]) -> None:
        version = PARTS if any("-of-" in name for name in hashes) else WHOLE
        record = {"format": version, "step": step, **state, "sha256": hashes}
        (aside / "state.json").write_text(json.dumps(record, indent=1))
        sync(aside / "state.json")
        sync(aside)
        move_in(aside, final)
        prune(root, step, keep)

    lead = group is None or dist.get_rank(group) == 0
    if lead:
        remove(aside)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    try:
        dcp.save(
            tensors, storage_writer=Writer(aside, finish), planner=planner, process_group=group, no_dist=group is None
        )
    except CheckpointException as failed:
        if lead:
            remove(aside)
        cause = next(iter(failed.failures.values()))[0]
        problem = full(final, cause, "earlier checkpoints are")
        # of a disk that fails, or that the system has made read-only
        if problem is None and isinstance(cause, OSError | SafetensorError):
            said = f"{final} cannot be written ({first_line(cause)}): look at the disk"
            problem = UserError(f"{said}; earlier checkpoints are intact, and the same command continues")
        raise problem or cause from failed
    return final


def prune(root: Path, step: int, keep: int) -> None:
    """Leave `keep` checkpoints up to this step. Later ones were damaged, or the run would have continued from them."""
    found = folders(root)
    upto = [folder for folder in found if number(folder) <= step]
    for folder in {*found} - {*upto[-keep:]}:
        # out of the way at once: half of a checkpoint must not look like one
        old = folder.rename(aside_of(folder, "old"))
        remove(old)


def tidy(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    for what in ("incomplete", "old"):
        for left in root.glob(f".{PREFIX}*.{what}"):
            remove(left)


def load(reader: Reader, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill tensors, or this process' parts of them, with what a checkpoint holds.

    Raises:
        UserError: the checkpoint holds other tensors. Of several processes the first raises it, the others
            `SystemExit` with code 2.
    """
    held = {key: entry.size for key, entry in reader.metadata.state_dict_metadata.items()}
    if held != {key: tensor.shape for key, tensor in tensors.items()}:
        # all processes find the same: the first says it
        if group is not None and dist.get_rank(group):
            raise SystemExit(2)
        raise UserError("the checkpoint belongs to another model: give the options it was trained with")
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)


def read_state(folder: Path) -> dict:
    """The state of one checkpoint.

    Raises:
        UserError: another format version, or a pickle in the folder.
        Damaged: it cannot be read, or names files outside the folder.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in UNSAFE:
            raise UserError(f"{path} is refused unopened: checkpoints are safetensors and JSON; remove the file")
    try:
        state = json.loads((folder / "state.json").read_text())
        version, step, names = state["format"], state["step"], list(dict(state["sha256"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"state.json: {type(error).__name__}") from error
    if version not in (WHOLE, PARTS):
        raise UserError(
            f"{folder} has checkpoint format {version}: this version reads {WHOLE} and {PARTS}; use a matching version"
        )
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise Damaged("state.json: names of files")
    if step != number(folder):
        raise Damaged(f"state.json: it is of step {step}")
    return state


def verify(folder: Path, hashes: dict[str, str], world: World) -> None:
    """Every file is what was written, before any is parsed; the processes share the work.

    Raises:
        Damaged: a file is missing, cut short, altered or cannot be read.
    """
    problem = None
    for name in sorted(hashes)[world.rank :: world.size]:
        try:
            if not (folder / name).is_file():
                problem = f"{name} is missing"
            elif sha256(folder / name) != hashes[name]:
                problem = f"{name} is not what was written (sha256 differs)"
        # a disk that fails where it lies
        except OSError as error:
            problem = f"{name} cannot be read ({error.strerror})"
    found = [said for said in world.all_gather_object(problem) if said]
    if found:
        raise Damaged(found[0])


def load_newest(root: Path, world: World, say: Callable[[str], None]) -> tuple[dict, Reader] | None:
    """State and files of the newest checkpoint that is whole; says which ones were not.

    Raises:
        UserError: checkpoints are there and every one is damaged.
    """
    # as the first process sees them
    found = world.from_main(lambda: [folder.name for folder in folders(root)])
    for name in reversed(found):
        try:
            state, damage = world.from_main(lambda name=name: look(root / name))
            if damage:
                raise Damaged(damage)
            verify(root / name, state["sha256"], world)
            return state, read(root / name, list(state["sha256"]), world)
        except Damaged as problem:
            say(f"checkpoint {name} is damaged ({problem}); trying the one before")
    with world.consensus():
        if found:
            raise UserError(f"every checkpoint in {root} is damaged: choose another --out")
    return None


def read(folder: Path, names: list[str], world: World) -> Reader:
    """What reads a checkpoint, on all processes or on none: a disk may fail one of them alone. Raises `Damaged`."""
    reader = problem = None
    try:
        reader = Reader(folder, names)
    except Damaged as error:
        problem = str(error)
    found = [said for said in world.all_gather_object(problem) if said]
    if found:
        raise Damaged(found[0])
    return reader


def look(folder: Path) -> tuple[dict | None, str]:
    """The state of a checkpoint, or what is wrong with it."""
    try:
        return read_state(folder), ""
    except Damaged as problem:
        return None, str(problem)


def stager(pinned: bool) -> DefaultStager:
    """What copies tensors to the CPU, through memory that is the same for every checkpoint."""
    shared = {"use_shared_memory": False, "use_async_staging": False}
    return DefaultStager(StagingOptions(use_pinned_memory=pinned, use_non_blocking_copy=pinned, **shared))


def forget_error(device: torch.device) -> None:
    """Launches a kernel that is told of an error in its place: the runtime keeps those that PyTorch does not check, and
    the next launch of this thread raises them. A device that is lost still says so."""
    with suppress(RuntimeError):
        torch.ones((), device=device)


class Saver:
    """Saves while training goes on: copied to the CPU at once, written by a thread; at most one save is under way.

    `torch.distributed.checkpoint.async_save` would keep its thread alive, and the process with it, when another process
    is gone; this one's ends with the process.
    """

    def __init__(self, root: Path, world: World, keep: int, device: torch.device):
        self.root, self.world, self.keep = root, world, keep
        self.device, self.pinned = device, device.type == "cuda"
        self.stager = stager(self.pinned)
        self.thread: threading.Thread | None = None
        self.problem: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Start to save; raises what went wrong with the save before."""
        self.wait()
        # what every process has alike, the first one writes
        held = {key: tensor for key, tensor in tensors.items() if self.world.is_main or is_sharded(tensor)}
        self.thread = threading.Thread(target=self._write, args=(step, self._staged(held), state), daemon=True)
        self.thread.start()

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU. A machine that locks no more memory copies more slowly: a run must not end at its first
        checkpoint."""
        try:
            return self.stager.stage(tensors)
        except RuntimeError as error:
            if not self.pinned:
                raise
            logger.warning("checkpoints are copied through memory that is not locked (%s)", first_line(error))
            self.pinned, self.stager = False, stager(False)
            forget_error(self.device)
            return self.stager.stage(tensors)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        try:
            save(self.root, step, tensors, state, self.keep, self.world.saving)
        except BaseException as problem:
            self.problem = problem

    def close(self) -> None:
        """Until nothing is under way."""
        if self.thread is not None:
            self.thread.join()

    @property
    def vote(self) -> Vote:
        return Vote.SAVE_FAILED if self.problem is not None else Vote.CONTINUE

    def wait(self) -> None:
        """Until nothing is under way; raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem
