"""What a run leaves behind: its folder, its logs, its pipeline."""

import dataclasses
import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import semantica
from semantica.errors import UserError, first_line
from semantica.files import remove, write_json, write_text, written
from semantica.images import grid, save_png, to_uint8
from semantica.inputs import SINGLE
from semantica.lock import locked
from semantica.model.uvit import UViT
from semantica.pipelines.networks import NetworkPipeline
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.config import APART, FORMAT, FREE, TrainConfig
from semantica.train.data.draws import DRAWS
from semantica.train.data.pairs import bad_record
from semantica.train.objective import stretches, take
from semantica.train.processes import World
from semantica.train.run import checkpoint, track

SAMPLE_CONDITIONS, SAMPLE_VARIATIONS, SAMPLE_STEPS = 6, 4, 20
# there while a run is
LOCK = ".lock"


class Run:
    """The run folder: configuration, logs, sample grids, and the pipeline at the end.

    Of several processes the main one writes. All of them call `log`, `note_bad`, `rewind`, `sample` and `publish`, and
    where it cannot write all of them end. `close` it at the end: until then no other run gets the folder.

    Args:
        encoders: SHA-256 of the weights of frozen encoders, by the option that names each. prepared: how pictures are
            for those that read them, see `semantica.model.image_encoder.preparation_of`.

    Raises:
        UserError: the folder holds a run of another configuration that saved something, or something else, or cannot be
            written, or another training is at work there. Also from the methods that write, where the folder cannot be
            written.
    """

    def __init__(
        self,
        config: TrainConfig,
        data_digest: str,
        world: World,
        encoders: Mapping[str, str] | None = None,
        prepared: Mapping[str, dict] | None = None,
    ):
        self.out, self.config, self.world = config.out, config, world
        self.known_bad: set[str] = set()
        self.found_bad: list[tuple[str, str]] = []
        self.board = self.tracked = None
        self.held = ExitStack()
        with world.consensus():
            if world.is_main:
                self._claim()
                try:
                    self._open(data_digest, dict(encoders or {}), dict(prepared or {}))
                except BaseException:
                    self.close()
                    raise

    def _claim(self) -> None:
        """The folder for this run alone, for as long as it lasts."""
        known = (self.out / "config.json").exists()
        if not known and self.out.exists():
            if not self.out.is_dir() or any(path.name != LOCK for path in self.out.iterdir()):
                raise UserError(f"{self.out} exists and is not a run folder: choose another --out")
        taken = f"another training writes into {self.out}: wait for it, or choose another --out"
        if not self.out.exists():
            self.held.callback(self._drop_empty)
        with self._writing("make room" if known else "choose another --out"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(locked(self.out / LOCK, taken))

    def _drop_empty(self) -> None:
        with suppress(OSError):
            self.out.rmdir()

    def _open(self, data_digest: str, encoders: dict[str, str], prepared: dict[str, dict]) -> None:
        record = {"format": FORMAT, "semantica": semantica.__version__, "torch": torch.__version__}
        record |= {"train": self.config.record(), "data_digest": data_digest, "draws": DRAWS, "encoders": encoders}
        record |= {"prepared": prepared} if prepared else {}
        path, config = self.out / "config.json", self.config
        # an attempt that failed before it saved anything, as where memory was short, binds to nothing
        kept = checkpoint.folders(self.out / "checkpoints")
        if not kept and (self.out / "model_index.json").exists():
            # it would begin at step 0, and in the end replace the model
            raise UserError(
                f"{self.out} has a model and no checkpoint to go on from: choose another --out, with --init {self.out} "
                "to begin with its weights"
            )
        identity = self._compare(path, record).get("tracked_as") if path.exists() and kept else None
        if config.track != "none":
            identity = identity or secrets.token_hex(4)
            self.tracked = track.begin(config.track, self.out.name, identity, record["train"])
        record |= {"tracked_as": identity} if identity else {}
        with self._writing("make room" if path.exists() else "choose another --out"):
            write_json(path, record)
            if not kept:
                remove(self.out / "bad_samples.jsonl")
            self.known_bad = self._known_bad()

    def _compare(self, path: Path, record: dict) -> dict:
        """The record of the run that is continued."""
        try:
            old = json.loads(path.read_text())
            before, version, seen = old["train"], old["format"], old["data_digest"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read: restore it or choose another --out") from error
        if version != record["format"]:
            raise UserError(f"{self.out} has format {version}: this version continues format {record['format']} only")
        # other parts add up to the same, unless each is compared within itself
        free = FREE if self.config.align else FREE | {"accumulate"}
        free = free if self.config.condition_on == "both" else free.union(APART)
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
        for name, now in record["train"].items():
            # a run made before an option existed had its default
            then = before.get(name, defaults.get(name))
            # one that may be several now
            then = [then] if isinstance(now, list) and isinstance(then, str) else then
            if name not in free and then != now:
                option = name.replace("_", "-")
                raise UserError(f"{self.out} was made with --{option} {then}, not {now}: choose another --out")
        for name, sha in record["encoders"].items():
            # of runs that do not know it anything may be
            if old.get("encoders", {}).get(name, sha) != sha:
                given = getattr(self.config, name)
                given = given if isinstance(given, str) else " ".join(given)
                option = f"--{name.replace('_', '-')} {given}"
                raise UserError(f"the weights of {option} changed since {self.out} was made: choose another --out")
        for name, now in record.get("prepared", {}).items():
            option = f"--{name.replace('_', '-')} {getattr(self.config, name)}"
            then = old.get("prepared", {}).get(name)
            if then is None:
                self.say(
                    f"{self.out} was begun by a version that may have prepared pictures for {option} in another way"
                )
            elif then != now:
                raise UserError(
                    f"how pictures are prepared for {option} changed since {self.out} was made: choose another --out"
                )
        if old.get("draws", 1) != DRAWS:
            self.say(f"{self.out} was begun by a version that drew noise and crops in another way: from here on as now")
        if seen != record["data_digest"]:
            given = {"pictures": True, "texts": self.config.texts, "tokens": self.config.tokens or before.get("tokens")}
            what = " or ".join(name for name, there in given.items() if there)
            raise UserError(f"the {what} of {self.config.data} changed since {self.out} was made: choose another --out")
        return old

    def _known_bad(self) -> set[str]:
        path = self.out / "bad_samples.jsonl"
        text = path.read_text(errors="replace") if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            # by a crash or a full disk: it names nothing, and the next line must not stick to it
            write_text(path, whole + "\n" * bool(whole))
        return {path for line in whole.splitlines() if (path := value_in(line, "path"))}

    def _board(self, step: int):
        """TensorBoard's log from a step on; what an earlier start of the run wrote beyond it is no longer shown."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard logs: install semantica-diffusion[train] for them")
            return None
        return SummaryWriter(str(self.out / "logs"), purge_step=step + 1)

    @contextmanager
    def _writing(self, advice: str = "make room, then the same command continues") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run folder {self.out} cannot be written ({error.strerror}): {advice}") from error

    def _write(self, work: Callable, *arguments) -> None:
        """The main process writes; where it cannot, all of them end."""
        with self.world.consensus(), self._writing():
            if self.world.is_main:
                work(*arguments)

    def say(self, *lines: str) -> None:
        for line in lines if self.world.is_main else ():
            tqdm.write(line)

    def bad_samples(self, found: Iterable[tuple[str, str]]) -> None:
        """Name each bad picture once; the next `log` or `note_bad` writes them down."""
        for path, reason in found:
            if path not in self.known_bad:
                self.known_bad.add(path)
                self.found_bad.append((path, reason))
                self.say(f"bad picture {path}: {reason}")

    def rewind(self, step: int) -> None:
        """Forget what was logged after the step that the run continues from."""
        self._write(self._rewind, step)

    def _rewind(self, step: int) -> None:
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if (at := value_in(line, "step")) is not None and at <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self.board = self._board(step)

    def log(self, row: dict) -> None:
        """Write a row; all processes call this."""
        self.note_bad()
        self._write(self._log, row)

    def note_bad(self) -> None:
        """Write down the bad pictures that any process found; all of them call this."""
        own, *others = self.world.all_gather_object(self.found_bad)
        self.found_bad = []
        if not own and not any(others):
            return
        if self.world.is_main:
            self.found_bad = own
            self.bad_samples(itertools.chain(*others))
        self._write(self._note_bad)
        self.found_bad = []

    def _note_bad(self) -> None:
        with (self.out / "bad_samples.jsonl").open("a") as file:
            file.writelines(json.dumps(bad_record(*found)) + "\n" for found in self.found_bad)

    def _log(self, row: dict) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])
        self._tell("log", {name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Let a tracker end its run: what it has not sent yet it sends now; and others have the folder."""
        self._tell("finish")
        if self.board is not None:
            with suppress(OSError):
                self.board.close()
        self.held.close()

    def _tell(self, what: str, *arguments: Any, **named: Any) -> None:
        """Call a tracker, if there is one. What goes wrong there ends the tracking and not the run."""
        try:
            if self.tracked is not None:
                getattr(self.tracked, what)(*arguments, **named)
        # each has errors of its own
        except Exception as error:
            self.tracked = None
            said = f"--track {self.config.track} fails ({first_line(error)})"
            self.say(f"{said}: no more is sent there, metrics.jsonl goes on")

    def sample(self, pipeline: NetworkPipeline, batch: dict, step: int, most: int | None = None) -> None:
        """A grid: each condition (or several), its target, its variations, and texts below them. All processes make it:
        a sharded network needs them all.

        most: samples at a time, as far as one condition's variations are not more; all by default.
        """
        few = torch.arange(min(SAMPLE_CONDITIONS, len(batch["target"])))
        conditions, targets = take(batch["condition"], few), batch["target"][few]
        named = batch["condition"] if isinstance(batch["condition"], dict) else {SINGLE: batch["condition"]}
        pictures, columns = batch.get("shown", named.get(SINGLE)), None
        # texts alone have none; several conditions [B, K, 3, C, C] are shown one after the other
        if pictures is not None:
            columns = pictures[few].reshape(len(few), -1, *pictures.shape[-3:])
        generator = torch.Generator().manual_seed(self.config.seed)
        texts = batch.get("captions", ())[: len(few)]
        # each is sampled with and without its condition
        at_once = most and max(1, most // (2 * SAMPLE_VARIATIONS))
        made = [
            pipeline(
                take(conditions, rows),
                num_images_per_prompt=SAMPLE_VARIATIONS,
                num_inference_steps=SAMPLE_STEPS,
                generator=generator,
                output_type="pt",
            ).images
            for rows in stretches(len(few), at_once)
        ]
        self._write(self._save_grid, columns, targets, torch.cat(made), texts, step)

    def _save_grid(
        self, columns: Tensor | None, targets: Tensor, made: Tensor, texts: Sequence[str], step: int
    ) -> None:
        """Conditions `[B, K, 3, C, C]`, targets `[B, 3, S, S]` and variations `[B n, 3, S, S]`, those in [0, 1]."""
        size, shown = targets.shape[-1], [[]] * len(targets)
        if columns is not None:
            flat = torch.nn.functional.interpolate(columns.flatten(0, 1), (size, size), mode="bilinear", antialias=True)
            shown = to_uint8(flat).reshape(*columns.shape[:2], size, size, 3)
        made = to_uint8(made * 2 - 1).reshape(len(targets), SAMPLE_VARIATIONS, size, size, 3)
        rows = [[*c, t, *m] for c, t, m in zip(shown, to_uint8(targets), made, strict=True)]
        (self.out / "samples").mkdir(exist_ok=True)
        save_png(grid(rows, apart=1, texts=texts), self.out / "samples" / f"step-{step:08d}.png")

    def publish(
        self, unet: UViT | None, encoder: nn.Module | None, scheduler: SemanticaScheduler, place: str | None = None
    ) -> None:
        """Write the pipeline, on the first process, which has the whole networks; its index, which makes the folder
        usable, comes last. All processes call this.

        place: a folder of its own in the run folder, for another one than the run's.
        """
        self._write(self._publish, unet, encoder, scheduler, place)

    def _publish(self, unet: UViT, encoder: nn.Module, scheduler: SemanticaScheduler, place: str | None) -> None:
        # what it imports of diffusers takes as long as PyTorch, and only this needs it
        from semantica.pipelines.variations import SemanticaPipeline

        pipeline, index = SemanticaPipeline(unet, encoder, scheduler), self.out / "model_index.json"
        if place:
            with written(self.out / place) as folder:
                pipeline.save_pretrained(folder, safe_serialization=True)
            return
        index.unlink(missing_ok=True)
        aside = self.out / "pipeline"
        with written(aside) as folder:
            pipeline.save_pretrained(folder, safe_serialization=True)
        for part in sorted(aside.iterdir(), key=lambda p: p.name == index.name):
            target = self.out / part.name
            remove(target)
            part.rename(target)
        aside.rmdir()


def value_in(line: str, name: str) -> Any:
    """What a line of JSON has under a name; None of a line that a crash left half written, or full of zeros."""
    try:
        return json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        return None
