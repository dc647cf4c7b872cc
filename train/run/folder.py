"""What a run leaves behind: its folder, its logs, its figures."""

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import semantica
from semantica.errors import UserError
from semantica.images import grid, save_png, to_uint8
from semantica.model.cost import peak_flops
from semantica.pipelines.variations import SemanticaPipeline
from semantica.train.config import FORMAT, FREE, TrainConfig
from semantica.train.data.pairs import bad_record
from semantica.train.data.source import Source
from semantica.train.objective import take
from semantica.train.processes import Ranks
from semantica.train.run import checkpoint

SAMPLE_CONDITIONS, SAMPLE_VARIATIONS, SAMPLE_STEPS = 6, 4, 20


class Measure:
    """Loss, gradient norm and speed since the last row, without a device synchronisation at each step."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype, flops: int, ranks: Ranks):
        self.config, self.device, self.flops, self.ranks = config, device, flops, ranks
        self.peak, self.peak_source = peak_flops(device, dtype)
        self.peak *= ranks.world
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        self.busy = self.waited = 0.0
        self.steps = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.aligned: list[Tensor] = []

    def start(self) -> None:
        self.began = time.perf_counter()

    def waiting(self, feed: Iterator[dict]) -> dict:
        began = time.perf_counter()
        batch = next(feed)
        self.waited += time.perf_counter() - began
        return batch

    def step(self, loss: Tensor, norm: Tensor, aligned: Tensor | None = None) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if aligned is not None:
            self.aligned.append(aligned)
        self.finite &= torch.isfinite(loss) & torch.isfinite(norm)
        self.steps += 1
        self.busy += time.perf_counter() - self.began

    def check(self) -> None:
        # the same answer on every process: a mean over 0 and 1 is 1 only where all are
        if self.ranks.mean(self.finite.float()) < 1:
            raise FloatingPointError(
                "the loss or a gradient is not finite any more; nothing was saved since: continue from the last "
                "checkpoint with a lower --lr or with --precision fp32"
            )

    def row(self, step: int, rate: float) -> dict:
        self.check()
        images = self.steps * self.config.batch / max(self.busy, 1e-9)
        row = {
            "step": step,
            "loss": self.ranks.mean(torch.stack(self.losses).mean()).item(),
            "grad_norm": torch.stack(self.norms).mean().item(),
            "lr": rate,
            "images_per_s": images,
            "data_wait": self.waited / max(self.busy, 1e-9),
            "peak_memory_bytes": peak_memory(self.device),
            "mfu": images * self.flops / self.peak,
            "flops_per_image": self.flops,
            "peak_flops": self.peak,
            "peak_flops_source": self.peak_source,
        }
        if self.aligned:
            row["repa_loss"] = self.ranks.mean(torch.stack(self.aligned).mean()).item()
        self.reset()
        return row


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process' largest resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run:
    """The run folder: configuration, logs, sample grids, and the pipeline at the end.

    Of several processes the first one writes. All of them call `log`, `rewind`, `sample` and `publish`, and where it
    cannot write all of them end; what each found bad is collected in `log`.

    Raises:
        UserError: the folder holds a run of another configuration, or something else, or cannot be written. Then also
            from the methods that write.
    """

    def __init__(self, config: TrainConfig, data: Source, ranks: Ranks):
        self.out, self.config, self.ranks = config.out, config, ranks
        self.known_bad: set[str] = set()
        self.found_bad: list[tuple[str, str]] = []
        self.board = None
        ranks.settle(lambda: self._open(data) if ranks.lead else None)

    def _open(self, data: Source) -> None:
        record = {"format": FORMAT, "semantica": semantica.__version__, "torch": torch.__version__}
        record |= {"train": self.config.record(), "data_digest": data.digest()}
        path = self.out / "config.json"
        if path.exists():
            self._compare(path, record)
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not a run folder: choose another --out")
        with self._writing("make room" if path.exists() else "choose another --out"):
            self.out.mkdir(parents=True, exist_ok=True)
            aside = self.out / ".config.json.incomplete"
            aside.write_text(json.dumps(record, indent=1))
            aside.replace(path)
            self.known_bad = self._known_bad()
            self.board = self._board()

    def _compare(self, path: Path, record: dict) -> None:
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
        for name, now in record["train"].items():
            # a run made before an option existed had its default
            then = before.get(name, defaults.get(name))
            if name not in free and then != now:
                option = name.replace("_", "-")
                raise UserError(f"{self.out} was made with --{option} {then}, not {now}: choose another --out")
        if seen != record["data_digest"]:
            raise UserError(
                f"the pictures in {self.config.data} changed since {self.out} was made: choose another --out"
            )

    def _known_bad(self) -> set[str]:
        path = self.out / "bad_samples.jsonl"
        text = path.read_text() if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            # by a crash or a full disk: it names nothing, and the next line must not stick to it
            aside = path.with_name(".bad_samples.jsonl.incomplete")
            aside.write_text(whole + "\n" * bool(whole))
            aside.replace(path)
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

    def _lead_writes(self, work: Callable[[], None]) -> None:
        """The first process writes; where it cannot, all of them end."""

        def write() -> None:
            with self._writing():
                work()

        self.ranks.settle(write if self.ranks.lead else lambda: None)

    def say(self, line: str) -> None:
        if self.ranks.lead:
            tqdm.write(line)

    def bad_sample(self, path: str, reason: str) -> None:
        """Name a bad picture once; the next `log` writes it down."""
        if path not in self.known_bad:
            self.known_bad.add(path)
            self.found_bad.append((path, reason))
            self.say(f"bad picture {path}: {reason}")

    def rewind(self, step: int) -> None:
        """Forget what was logged after the step that the run continues from."""
        path = self.out / "metrics.jsonl"

        def rewrite() -> None:
            kept = [line for line in path.read_text().splitlines() if json_step(line) <= step]
            aside = path.with_name(".metrics.jsonl.incomplete")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.replace(path)

        self._lead_writes(lambda: rewrite() if path.exists() else None)

    def log(self, row: dict) -> None:
        """Write a row; all processes call this."""
        own, *others = self.ranks.gather(self.found_bad)
        self.found_bad = []
        if self.ranks.lead:
            self.found_bad = own
            for path, reason in itertools.chain(*others):
                self.bad_sample(path, reason)
        self._lead_writes(lambda: self._log(row))
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

    def sample(self, pipeline: SemanticaPipeline, batch: dict, step: int) -> None:
        """A grid: each condition (or several), its target, its variations. All processes make it: a sharded network
        needs them all."""
        few = torch.arange(min(SAMPLE_CONDITIONS, len(batch["target"])))
        conditions, targets = take(batch["condition"], few), batch["target"][few]
        pictures = batch.get("shown", batch["condition"])[few]
        pipeline.set_progress_bar_config(disable=True)
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
        self._lead_writes(lambda: self._save_grid(columns, targets, made, step))

    def _save_grid(self, columns: Tensor, targets: Tensor, made: Tensor, step: int) -> None:
        """Conditions `[B, K, 3, C, C]`, targets `[B, 3, S, S]` and variations `[B n, 3, S, S]`, those in [0, 1]."""
        size = targets.shape[-1]
        shown = torch.nn.functional.interpolate(columns.flatten(0, 1), (size, size), mode="bilinear", antialias=True)
        shown = to_uint8(shown).reshape(*columns.shape[:2], size, size, 3)
        made = to_uint8(made * 2 - 1).reshape(len(targets), SAMPLE_VARIATIONS, size, size, 3)
        rows = [[*c, t, *m] for c, t, m in zip(shown, to_uint8(targets), made, strict=True)]
        (self.out / "samples").mkdir(exist_ok=True)
        save_png(grid(rows, apart=1), self.out / "samples" / f"step-{step:08d}.png")

    def publish(self, make: Callable[[], SemanticaPipeline]) -> None:
        """Write the pipeline that the first process makes; its index, which makes the folder usable, comes last. All
        processes call this."""
        self._lead_writes(lambda: self._publish(make()))

    def _publish(self, pipeline: SemanticaPipeline) -> None:
        index = self.out / "model_index.json"
        index.unlink(missing_ok=True)

        def fill(folder: Path) -> None:
            pipeline.save_pretrained(folder, safe_serialization=True)

        aside = self.out / "pipeline"
        checkpoint.write_aside(aside, fill)
        for part in sorted(aside.iterdir(), key=lambda p: p.name == index.name):
            target = self.out / part.name
            shutil.rmtree(target, ignore_errors=True)
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
