"""The rows of sampling: all implementations of a model and shape raced together.

Run by `semantica bench sample`, or by plain pytest: the smallest model, PyTorch alone.
"""

import functools
import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.sampling import GUIDANCE
from semantica.benchmarks.sampling.contenders import CONTENDERS
from semantica.benchmarks.sampling.models import NAMES, folder_of
from semantica.benchmarks.sampling.race import ModelRace, Sampled, Sampler
from semantica.progress import phase

__all__ = ["bench", "pytest_generate_tests", "test_row"]
QUICK = Protocol(warmup=0, least=2, most=5, seconds=1.0)


def protocol(rounds: int, seconds: float) -> Protocol:
    """The first call of each implementation was before: one more round of all is warm-up enough for whole runs."""
    return Protocol(warmup=1, least=rounds, most=max(rounds, 200), seconds=seconds)


def problem_name(model: str, batch: int, steps: int) -> str:
    return f"{Path(model).name} batch {batch}, {steps} steps"


def operations(model: Path, batch: int, steps: int) -> int:
    """Of a whole run as the plain pipeline does it with keys and values computed once: encoder and both branches."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from semantica.model.cost import cost, on_meta
    from semantica.pipelines.variations import SemanticaPipeline

    pipeline = SemanticaPipeline.from_pretrained(model)
    size = pipeline.encoder.image_size
    unet = on_meta(pipeline.unet)
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        stream = on_meta(pipeline.encoder)(torch.empty(batch, 3, size, size, device="meta"))
    with FlopCounterMode(display=False) as keys, torch.no_grad():
        unet.condition(dict.fromkeys(unet.stream_names, stream))
    # an evaluation's keys and values are in its cost, and are made once for each branch
    once = keys.get_total_flops()
    evaluation = cost(pipeline.unet, stream.tokens.shape[1], batch)["flops_forward"] - once
    return encoding.get_total_flops() + 2 * once + 2 * steps * evaluation


def semantica(*arguments) -> None:
    """A verb, in a process of its own: what it imports and keeps is nobody's here. Raises `Wrong` where it fails."""
    command = [sys.executable, "-P", "-m", "semantica.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Wrong(f"semantica {arguments[0]} failed: {lines[-1][:300]}")


@dataclass(eq=False)
class SamplingBench(Bench):
    """Races of whole runs: a model, a batch and a number of steps each."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    names: tuple[str, ...]
    device: str
    op: str = "sample"
    quick: bool = False
    nvtx: bool = False
    protocol: Protocol = QUICK

    def __post_init__(self):
        every = itertools.product(self.models, self.batches, self.steps)
        self.runs = {(problem_name(*run),): run for run in every}
        self.races = dict.fromkeys(self.runs, list(self.names))
        self.place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        # a model's processes end when the next model's start
        self.closing.callback(lambda: self.current and self.current.close())
        self.current: ModelRace | None = None
        self.model = ""

    def which(self, race: tuple[str]) -> dict:
        name, *_ = self.runs[race]
        return {} if name in NAMES else {"model": store.configured(Path(name))}

    def serves(self, row: dict) -> bool:
        return row["rounds"] >= self.protocol.least and super().serves(row)

    def run(self, race: tuple[str], what: str) -> dict[str, Outcome]:
        model, batch, steps = self.runs[race]
        if model != self.model:
            if self.current:
                self.current.close()
            self.model, self.folder = model, folder_of(model, self.place / "models")
            where = self.place / f"race-{Path(model).name}"
            bundles, failed = self.export(where)
            make = functools.partial(Sampler, nvtx=self.nvtx)
            self.current = ModelRace(self.folder, self.names, where, self.device, self.quick, bundles, failed, make)
        found, ceilings = self.current.race(batch, steps, self.protocol, what)
        flops = operations(self.folder, batch, steps)
        return {
            name: entrant.reason or (entrant.all("seconds"), self.row(race, name, entrant, ceilings, flops))
            for name, entrant in found.items()
        }

    def row(self, race: tuple[str], name: str, entrant: Sampled, ceilings: dict[str, float], flops: int) -> dict:
        batch, times = self.runs[race][1], entrant.times
        scenario = "SingleStream" if batch == 1 else "Offline"
        named = (self.op, name, *race, scenario, entrant.built["arithmetic"], f"guidance {GUIDANCE}")
        row = store.row(named, times, self.device, flops, ceilings)
        row |= {"p95_us": times.quantile(0.95) * 1e6, "p99_us": times.quantile(0.99) * 1e6}
        # the mean: in the long run, slow calls count
        row |= {"images_per_s": batch * len(times.device) / sum(times.device), "psnr_db": entrant.psnr}
        row |= {"build_s": entrant.built["seconds"], **entrant.facts}
        row |= {"quick": True} if self.quick else {}
        return row | self.which(race) | {"kernel_hash": None, **self.code(race, name)}

    def code(self, race: tuple[str], name: str) -> dict:
        ours, arch = name in CONTENDERS and CONTENDERS[name].ours, store.environment(self.device)["arch"]
        if not ours and self.op != "sample_ladder":
            return {}
        return {"op": self.op, "arch": arch, "kernel_hash": source_hash(self.op, arch, name)}

    def export(self, where: Path) -> tuple[dict[str, Path], dict[str, str]]:
        """Bundles of the model for those that run one, engines built; and why some have none, by name."""
        where.mkdir(parents=True)
        wanted = {n: CONTENDERS[n].bundle for n in self.names if n in CONTENDERS and CONTENDERS[n].bundle}
        found: dict[str, Path] = {}
        failed: dict[str, str] = {}
        with phase(f"{self.folder.name}: export {', '.join(wanted)}", len(wanted)) as done:
            for name, precision in wanted.items():
                bundle = where / f"bundle-{precision}"
                try:
                    if not bundle.exists():
                        options = ("--precision", precision, "--levels", 4, "--steps", 4)
                        semantica("export", "--model", self.folder, "--out", bundle, *options)
                    if CONTENDERS[name].built:
                        # both branches of guidance count, in the smallest and the largest batch
                        sizes = (1, 2 * min(self.batches), 2 * max(self.batches))
                        semantica("build", bundle, "--backend", name, "--batches", *sizes)
                    found[name] = bundle
                except Wrong as error:
                    failed[name] = str(error)
                done.update()
        return found, failed


DEFAULT = functools.partial(SamplingBench, ("tiny",), (1,), (4,), ("plain", "torch-eager"), "cpu", quick=True)
