"""What a run leaves behind: its folder, its logs, its pipeline."""

import dataclasses
import itertools
import json
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import semantica
from semantica.errors import UserError
from semantica.files import remove, write_json, write_text, written
from semantica.images import grid, save_png, to_uint8
from semantica.model.uvit import UViT
from semantica.pipelines.networks import NetworkPipeline
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.config import FORMAT, FREE, TrainConfig
from semantica.train.data.draws import DRAWS
from semantica.train.data.pairs import bad_record
from semantica.train.objective import take
from semantica.train.processes import World
from semantica.train.run import track

SAMPLE_CONDITIONS, SAMPLE_VARIATIONS, SAMPLE_STEPS = 6, 4, 20


class Run:
    """The run folder: configuration, logs, sample grids, and the pipeline at the end.

    Of several processes the main one writes. All of them call `log`, `rewind`, `sample` and `publish`, and where it
    cannot write all of them end; what each found bad is collected in `log`. `close` it at the end.

    Raises:
        UserError: the folder holds a run of another configuration, or something else, or cannot be written. Then also
            from the methods that write.
    """

    def __init__(self, config: TrainConfig, data_digest: str, world: World):
        self.out, self.config, self.world = config.out, config, world
        self.known_bad: set[str] = set()
        self.found_bad: list[tuple[str, str]] = []
        self.board = self.tracked = None
        with world.consensus():
            if world.is_main:
                self._open(data_digest)

    def _open(self, data_digest: str) -> None:
        record = {"format": FORMAT, "semantica": semantica.__version__, "torch": torch.__version__}
        record |= {"train": self.config.record(), "data_digest": data_digest, "draws": DRAWS}
        path, config = self.out / "config.json", self.config
        identity = None
        if path.exists():
            identity = self._compare(path, record).get("tracked_as")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not a run folder: choose another --out")
        if config.track != "none":
            identity = identity or secrets.token_hex(4)
            self.tracked = track.begin(config.track, self.out.name, identity, record["train"])
        record |= {"tracked_as": identity} if identity else {}
        with self._writing("make room" if path.exists() else "choose another --out"):
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            self.known_bad = self._known_bad()
            self.board = self._board()

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
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
        for name, now in record["train"].items():
            # a run made before an option existed had its default
            then = before.get(name, defaults.get(name))
            if name not in free and then != now:
                option = name.replace("_", "-")
                raise UserError(f"{self.out} was made with --{option} {then}, not {now}: choose another --out")
        if old.get("draws", 1) != DRAWS:
            self.say(f"{self.out} was begun by a version that drew noise and crops in another way: from here on as now")
        if seen != record["data_digest"]:
            raise UserError(
                f"the pictures in {self.config.data} changed since {self.out} was made: choose another --out"
            )
        return old

    def _known_bad(self) -> set[str]:
        path = self.out / "bad_samples.jsonl"
        text = path.read_text() if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            # by a crash or a full disk: it names nothing, and the next line must not stick to it
            write_text(path, whole + "\n" * bool(whole))
        return {json.loads(line)["path"] for line in whole.splitlines()}

    def _board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard logs: install semantica-diffusion[train] for them")
            return None
        return SummaryWriter(str(self.out / "logs"))

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
        """Name each bad picture once; the next `log` writes them down."""
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
            kept = [line for line in path.read_text().splitlines() if json_step(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def log(self, row: dict) -> None:
        """Write a row; all processes call this."""
        own, *others = self.world.all_gather_object(self.found_bad)
        self.found_bad = []
        if self.world.is_main:
            self.found_bad = own
            self.bad_samples(itertools.chain(*others))
        self._write(self._log, row)
        self.found_bad = []

    def _log(self, row: dict) -> None:
        if self.found_bad:
            with (self.out / "bad_samples.jsonl").open("a") as file:
                file.writelines(json.dumps(bad_record(*found)) + "\n" for found in self.found_bad)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])
        if self.tracked is not None:
            self.tracked.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Let a tracker end its run: what it has not sent yet it sends now."""
        if self.tracked is not None:
            self.tracked.finish()

    def sample(self, pipeline: NetworkPipeline, batch: dict, step: int) -> None:
        """A grid: each condition (or several), its target, its variations. All processes make it: a sharded network
        needs them all."""
        few = torch.arange(min(SAMPLE_CONDITIONS, len(batch["target"])))
        conditions, targets = take(batch["condition"], few), batch["target"][few]
        pictures = batch.get("shown", batch["condition"])[few]
        generator = torch.Generator().manual_seed(self.config.seed)
        # several conditions [B, K, 3, C, C] are shown one after the other
        columns = pictures.reshape(len(pictures), -1, *pictures.shape[-3:])
        made = pipeline(
            conditions,
            num_images_per_prompt=SAMPLE_VARIATIONS,
            num_inference_steps=SAMPLE_STEPS,
            generator=generator,
            output_type="pt",
        ).images
        self._write(self._save_grid, columns, targets, made, step)

    def _save_grid(self, columns: Tensor, targets: Tensor, made: Tensor, step: int) -> None:
        """Conditions `[B, K, 3, C, C]`, targets `[B, 3, S, S]` and variations `[B n, 3, S, S]`, those in [0, 1]."""
        size = targets.shape[-1]
        shown = torch.nn.functional.interpolate(columns.flatten(0, 1), (size, size), mode="bilinear", antialias=True)
        shown = to_uint8(shown).reshape(*columns.shape[:2], size, size, 3)
        made = to_uint8(made * 2 - 1).reshape(len(targets), SAMPLE_VARIATIONS, size, size, 3)
        rows = [[*c, t, *m] for c, t, m in zip(shown, to_uint8(targets), made, strict=True)]
        (self.out / "samples").mkdir(exist_ok=True)
        save_png(grid(rows, apart=1), self.out / "samples" / f"step-{step:08d}.png")

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
        if self.board is not None:
            self.board.flush()


def json_step(line: str) -> float:
    """The step of a log line; lines cut short by a crash count as never kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
