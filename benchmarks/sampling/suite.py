"""The rows of sampling: all implementations of a model and shape raced together.

Run by `semantica bench sample`, or by plain pytest: the smallest model, PyTorch alone.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.progress import phase
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.store import measured
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.sampling import GUIDANCE
from semantica.benchmarks.sampling.contenders import CONTENDERS
from semantica.benchmarks.sampling.models import folder_of
from semantica.benchmarks.sampling.race import ModelRace, Sampled

__all__ = ["bench", "pytest_generate_tests", "test_row"]
QUICK = Protocol(warmup=0, least=2, most=5, seconds=1.0)
# a model, a batch and a number of steps
Run = tuple[str, int, int]


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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = on_meta(pipeline.encoder)(torch.empty(batch, 3, size, size, device="meta")).tokens.shape[1]
    return counter.get_total_flops() + 2 * steps * cost(pipeline.unet, tokens, batch)["flops_forward"]


def semantica(*arguments) -> None:
    """A verb, in a process of its own: what it imports and keeps is nobody's here. Raises `Wrong` where it fails."""
    command = [sys.executable, "-P", "-m", "semantica.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Wrong(f"semantica {arguments[0]} failed: {lines[-1][:300]}")


class SamplingBench(Bench):
    """Races of whole runs: a model, a batch and a number of steps each."""

    def __init__(
        self,
        models: Sequence[str],
        batches: Sequence[int],
        steps: Sequence[int],
        names: Sequence[str],
        device: str,
        op: str = "sample",
        quick: bool = False,
        protocol: Protocol = QUICK,
        absent: dict[str, str] | None = None,
    ):
        super().__init__()
        self.models, self.batches, self.steps, self.names = models, batches, steps, list(names)
        self.device, self.op, self.quick, self.protocol = device, op, quick, protocol
        self.absent = absent or {}
        self.model: str | None = None
        self.current: ModelRace | None = None
        self.place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.closing.callback(self.leave)

    def races(self) -> dict[Run, list[str]]:
        return {(m, b, s): self.names for m in self.models for b in self.batches for s in self.steps}

    def label(self, race: Run) -> dict[str, str]:
        return {"problem": problem_name(*race)}

    def run(self, race: Run, what: str) -> dict[str, Outcome]:
        model, batch, steps = race
        if model != self.model:
            # a model's processes end when the next model's start
            self.leave()
            self.model, self.folder = model, folder_of(model, self.place / "models")
            where = self.place / f"race-{Path(model).name}"
            bundles, failed = self.export(where)
            self.current = ModelRace(self.folder, self.names, where, self.device, self.quick, bundles, failed)
        found, ceilings = self.current.race(batch, steps, self.protocol, what)
        flops = operations(self.folder, batch, steps)
        return {name: self.outcome_of(race, name, entrant, ceilings, flops) for name, entrant in found.items()}

    def outcome_of(self, race: Run, name: str, entrant: Sampled, ceilings: dict, flops: int) -> Outcome:
        if entrant.reason:
            return Outcome(reason=entrant.reason)
        times, batch, arithmetic = entrant.times, race[1], entrant.built["arithmetic"]
        seconds, row = times.quantile(0.5), measured(times, self.device)
        rate = ceilings["matrix_tflops" if arithmetic == "bf16" else "matrix_tflops_fp32"]
        ours = self.op == "sample_ladder" or (name in CONTENDERS and CONTENDERS[name].ours)
        fields = {
            "op": self.op,
            "impl": name,
            "shape": problem_name(*race),
            "layout": "SingleStream" if batch == 1 else "Offline",
            "dtype": arithmetic,
            "direction": f"guidance {GUIDANCE}",
            "uses": name,
            "p95_us": times.quantile(0.95) * 1e6,
            "p99_us": times.quantile(0.99) * 1e6,
            # the mean: in the long run, slow calls count
            "images_per_s": batch * len(times.device) / sum(times.device),
            "build_s": entrant.built["seconds"],
            "first_s": entrant.first["seconds"][0],
            "peak_bytes": entrant.last["peak_bytes"],
            "psnr_db": entrant.psnr,
            "flops": flops,
            "tflops": flops / seconds / 1e12,
            "share_of_matrix_rate": flops / seconds / 1e12 / rate,
            "kernel_hash": source_hash(self.op, row["arch"]) if ours else None,
        }
        return Outcome(seconds=times.device, row={**fields, **ceilings, **row})

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
                    if CONTENDERS[name].engine:
                        semantica("build", bundle, "--backend", name)
                    found[name] = bundle
                except Wrong as error:
                    failed[name] = str(error)
                done.update()
        return found, failed

    def leave(self) -> None:
        """End the processes of the current model."""
        if self.current is not None:
            self.current.close()
        self.current = None


def DEFAULT() -> SamplingBench:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SamplingBench(("tiny",), (1,), (4,), ("plain", "torch-eager"), device, quick=True)
