"""`semantica pairs`: inputs -> shards, in three phases of independent units with two merges between them."""

import dataclasses
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from semantica import lock
from semantica.errors import UserError
from semantica.files import read_json, remove
from semantica.train.pages.config import FORMAT, MineConfig, Rules
from semantica.train.pages.describe import NONE, Encoder, describe_encoder, describer
from semantica.train.pages.join import join_unit
from semantica.train.pages.read import read_nothing, read_unit
from semantica.train.pages.report import summary, write_report
from semantica.train.pages.runners import Local, Ray, Remote, Unit, ray_encoders
from semantica.train.pages.sources import Input, digest, find_inputs
from semantica.train.pages.stats import gather
from semantica.train.pages.store import merge_captures, merge_counts, write_json
from semantica.train.pages.write import write_unit

# of the inputs, may fail before the run is one that failed
MAX_FAILED = 0.5
# bytes of a GPU for each process that describes there: what CUDA takes itself, the weights, a batch
ON_GPU = 3 << 29
# what an input has no part in, whichever it was: no room, no memory, a GPU that is full or gone
NO_ROOM = ("OSError", "OperationalError", "UserError", "MemoryError", "OutOfMemoryError", "AcceleratorError")


@dataclass(frozen=True)
class Job:
    """Everything that a unit's work needs, wherever it runs. place: the device of this machine's encoders."""

    inputs: tuple[Input, ...]
    out: Path
    rules: Rules
    encoder: Encoder
    place: str = "cpu"
    actors: tuple = ()

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def folders(self) -> list[Path]:
        return [self.work / source.digest for source in self.inputs]


def read_one(job: Job, unit: int) -> None:
    folder = job.folders[unit]
    if folder.exists():
        return
    describe = None
    if job.encoder.name != NONE:
        describe = Remote(job.actors[unit % len(job.actors)]) if job.actors else describer(job.encoder, job.place)
    read_unit(job.inputs[unit], folder, job.rules, job.encoder, describe)


def join_one(job: Job, unit: int) -> None:
    join_unit(unit, job.folders, job.work / "captures.sqlite")


def write_one(job: Job, unit: int) -> None:
    write_unit(unit, job.inputs[unit], job.folders, job.work / "counts.sqlite", job.out, job.rules)


def digest_one(sources: list[Input], out: Path, unit: int) -> None:
    write_json(out / f"{unit}.json", {"sha256": digest(sources[unit])})


def mine(config: MineConfig) -> dict:
    """Mine the inputs, or finish what an interrupted run left; returns what stats.json holds.

    Raises:
        UserError: inputs that cannot be read, an encoder that cannot be loaded, a folder with shards of other inputs
            or options, or most inputs failed.
    """
    config.check()
    out = config.out
    sources = find_inputs(config.inputs)
    if out.exists() and not (out / "index.json").exists() and not (out / "work").is_dir():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"{out} exists and holds no shards: choose another --out")
    for source in sources:
        if source.kind == "folder" and out.resolve().is_relative_to(Path(source.path).resolve()):
            raise UserError(f"--out {out} lies in the input {source.path!r}, and would be read with it: choose another")
    encoder, place = describe_encoder(config.encoder, config.device)
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        runner = Ray() if config.on == "ray" else Local(config.processes or processes(place))
        stack.callback(runner.close)
        phase = functools.partial(run_phase, runner)
        sources = digested(sources, out / "work" / "digests", phase)
        # a task of a cluster has what the cluster gave it, whatever that is called here
        place = encoder.device if config.on == "ray" else place
        job = Job(tuple(sources), out, config.rules(), encoder, place)
        claim(job)
        if (out / "index.json").exists():
            print(f"{out} is complete: nothing to do")
        else:
            if config.on == "ray" and encoder.name != NONE:
                actors = ray_encoders(functools.partial(describer, encoder, place))
                job = dataclasses.replace(job, actors=tuple(actors))
            phases(job, phase)
        remove(out / "work")
    return read_json(out / "stats.json")


def processes(place: str) -> int:
    """As many as there are processors, and as the encoder's device has room for: each has an encoder of its own."""
    count = os.cpu_count() or 1
    if not place.startswith("cuda"):
        return count
    import torch

    free, _ = torch.cuda.mem_get_info(place)
    return max(1, min(count, free // ON_GPU))


def mine_and_show(config: MineConfig) -> None:
    """`mine`, then what was found, in words."""
    summary(config.out, mine(config))


def run_phase(runner: Local | Ray, name: str, work: Unit, units: list[int]) -> dict[int, str]:
    """Run units, with a bar; what went wrong, by unit."""
    failed: dict[int, str] = {}
    if not units:
        return failed
    with tqdm(total=len(units), desc=name, unit="input") as bar:

        def done(unit: int, error: str) -> None:
            bar.update()
            if error:
                failed[unit] = error

        runner.run(work, units, done)
    return failed


def digested(sources: list[Input], folder: Path, phase: Callable) -> list[Input]:
    """The inputs in the order of their contents' hashes, so that neither names nor their order matter; equal ones once.

    Raises:
        UserError: one cannot be read.
    """
    folder.mkdir(exist_ok=True)
    for unit, error in phase("hash", functools.partial(digest_one, sources, folder), list(range(len(sources)))).items():
        raise UserError(f"input {sources[unit].path!r} cannot be read ({error}): make it readable")
    known: dict[str, Input] = {}
    for unit, source in enumerate(sources):
        sha = read_json(folder / f"{unit}.json")["sha256"]
        if sha in known:
            print(f"{source.path} holds the same as {known[sha].path}: read once")
        known.setdefault(sha, dataclasses.replace(source, digest=sha))
    return [known[sha] for sha in sorted(known)]


def phases(job: Job, phase: Callable) -> None:
    """What is missing of the run, then its statistics, report and, last, its index."""
    units = list(range(len(job.inputs)))
    missing = [u for u in units if not (job.out / "done" / f"{job.inputs[u].digest}.json").exists()]
    if missing:
        read = phase("read", functools.partial(read_one, job), [u for u in units if not job.folders[u].exists()])
        give_up(job, read)
        merge_captures(job.folders, job.work / "captures.sqlite")
        stop(job, phase("join", functools.partial(join_one, job), units))
        merge_counts(job.folders, job.work / "counts.sqlite")
        stop(job, phase("write", functools.partial(write_one, job), missing))
    for stale in job.out.glob(".*.incomplete*"):
        remove(stale)
    stats, shards = gather(job.out, [source.digest for source in job.inputs])
    write_json(job.out / "stats.json", stats)
    index = identity(job) | {"shards": shards}
    write_report(job.out, stats, index)
    # last: with it, the shards are complete
    write_json(job.out / "index.json", index)


def give_up(job: Job, failed: dict[int, str]) -> None:
    """Leave out inputs whose reading ended a process; each is named in the statistics.

    Raises:
        UserError: most of them failed, or one for lack of room or by its GPU.
    """
    for unit, error in failed.items():
        if error.startswith(NO_ROOM) or "CUDA" in error:
            stop(job, {unit: error})
    if len(failed) > MAX_FAILED * len(job.inputs):
        stop(job, failed)
    for unit, error in failed.items():
        read_nothing(job.folders[unit], error)


def stop(job: Job, failed: dict[int, str]) -> None:
    for unit, error in failed.items():
        name = job.inputs[unit].path
        fewer = ", with fewer --processes" if "MemoryError" in error else ""
        raise UserError(f"{len(failed)} of {len(job.inputs)} inputs failed, the first is {name!r} ({error}): the same "
                        f"command continues{fewer}")  # fmt: skip


def identity(job: Job) -> dict:
    """What two runs must share for their shards to be the same."""
    return {
        "format": FORMAT,
        "rules": dataclasses.asdict(job.rules),
        "encoder": dataclasses.asdict(job.encoder),
        "inputs": [source.digest for source in job.inputs],
    }


def claim(job: Job) -> None:
    """Write what this run is, or compare with what the folder was begun with.

    Raises:
        UserError: the folder belongs to other inputs or options.
    """
    path = next((p for p in (job.out / "index.json", job.work / "run.json") if p.exists()), None)
    now = identity(job)
    if path is None:
        write_json(job.work / "run.json", now)
        return
    before = read_json(path)
    if before.get("format") != FORMAT:
        raise UserError(f"{job.out} has format {before.get('format')}: this version writes format {FORMAT} only")
    for part in ("rules", "encoder"):
        for name, value in now[part].items():
            if (old := before.get(part, {}).get(name)) != value:
                option = f"--{name.replace('_', '-')}" if part == "rules" else f"an encoder of {name}"
                raise UserError(f"{job.out} was made with {option} {old}, not {value}: choose another --out")
    if before.get("inputs") != now["inputs"]:
        raise UserError(
            f"{job.out} was made of {len(before.get('inputs', []))} inputs, and these {len(now['inputs'])} are not the "
            "same: pictures are looked up and counted across inputs, so choose another --out"
        )


def locked(out: Path) -> AbstractContextManager[None]:
    """Only one run at a time may write into a folder. Raises `UserError` where another does."""
    return lock.locked(out / "work" / "lock", f"another run is writing into {out}: wait for it or choose another --out")
