"""The pytest-benchmark suite of sampling: one test a row, all implementations of a model and shape raced together.

Run by `semantica bench sample`. As in `suite_kernels`, a race is run once, by the first of its tests, and the clock
that pytest-benchmark reads replays its samples.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.store import Replay, environment, source_hash
from semantica.benchmarks.sampling.contenders import BUNDLED, OURS
from semantica.benchmarks.sampling.models import folder_of
from semantica.benchmarks.sampling.race import GUIDANCE, Field, Result

PLUGIN = "semantica-bench-sample"
QUICK = timing.Protocol(warmup=0, least=2, most=5, seconds=1.0)


def protocol(rounds: int, seconds: float) -> timing.Protocol:
    """The first call of each implementation was before: one more round of all is warm-up enough for whole runs."""
    return timing.Protocol(warmup=1, least=rounds, most=max(rounds, 200), seconds=seconds)


@dataclass
class Plan:
    """What to run, and, as a plugin of pytest, what came of it."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    names: tuple[str, ...]
    device: str
    op: str = "sample"
    quick: bool = False
    protocol: timing.Protocol = QUICK
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[dict] = field(default_factory=list)

    def rows(self) -> list[tuple[str, int, int, str]]:
        return [(m, b, s, n) for m in self.models for b in self.batches for s in self.steps for n in self.names]

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["semantica"] = {"wrong": self.wrong, "absent": self.absent}
        output_json["machine_info"].get("cpu", {}).pop("flags", None)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            print(f"{'timed' if report.passed else 'WRONG'}  {name}", file=sys.__stderr__, flush=True)


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


def describe(plan: Plan, problem: tuple, name: str, result: Result, ceilings: dict, flops: int) -> dict:
    """The fields of a row."""
    model, batch, steps = problem
    times = result.times
    median = times.quantile(0.5)
    where = environment(plan.device)
    rate = ceilings["matrix_tflops" if result.arithmetic == "bf16" else "matrix_tflops_fp32"]
    ours = name in OURS or plan.op == "sample_ladder"
    return {
        "op": plan.op, "impl": name, "shape": problem_name(*problem),
        "layout": "SingleStream" if batch == 1 else "Offline",
        "dtype": result.arithmetic, "direction": f"guidance {GUIDANCE}", "uses": name,
        "median_us": median * 1e6, "p20_us": times.quantile(0.2) * 1e6, "p80_us": times.quantile(0.8) * 1e6,
        "p95_us": times.quantile(0.95) * 1e6, "p99_us": times.quantile(0.99) * 1e6, "rounds": len(times.device),
        # the mean: in the long run, slow calls count
        "images_per_s": batch * len(times.device) / sum(times.device),
        "build_s": result.build_seconds, "first_s": result.first_seconds, "peak_bytes": result.peak_bytes,
        "psnr_db": result.psnr, "flops": flops, "tflops": flops / median / 1e12, "share_of_matrix_rate":
        flops / median / 1e12 / rate, **ceilings, **where,
        "kernel_hash": source_hash(plan.op) if ours else None,
    }  # fmt: skip


replay = Replay()


def pytest_generate_tests(metafunc):
    plan = metafunc.config.pluginmanager.get_plugin(PLUGIN)
    rows = plan.rows()
    ids = [f"{problem_name(m, b, s)} {name}".replace(" ", "-").replace(",", "") for m, b, s, name in rows]
    metafunc.parametrize(("model", "batch", "steps", "impl"), rows, ids=ids)


def semantica(*arguments) -> None:
    """A verb, in a process of its own: what it imports and keeps is nobody's here. Raises `Wrong` where it fails."""
    command = [sys.executable, "-P", "-m", "semantica.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Wrong(f"semantica {arguments[0]} failed: {lines[-1][:300]}")


class Races:
    """The fields of a plan, one at a time: a model's processes end when the next model's start."""

    def __init__(self, plan: Plan, place: Path):
        self.plan, self.place = plan, place
        self.model, self.field, self.done = None, None, {}

    def race(self, model: str, batch: int, steps: int) -> tuple[dict[str, Result], dict[str, float], int]:
        if model != self.model:
            self.close()
            self.model, self.done = model, {}
            self.folder = folder_of(model, self.place / "models")
            where = self.place / f"field-{Path(model).name}"
            bundles, failed = self.export(where)
            names, device, quick = list(self.plan.names), self.plan.device, self.plan.quick
            self.field = Field(self.folder, names, where, device, quick, bundles, failed)
        if (batch, steps) not in self.done:
            found = self.field.race(batch, steps, self.plan.protocol)
            self.done[batch, steps] = *found, operations(self.folder, batch, steps)
        return self.done[batch, steps]

    def export(self, where: Path) -> tuple[dict[str, Path], dict[str, str]]:
        """Bundles of the model for those that run one, engines built; and why some have none, by name."""
        where.mkdir(parents=True)
        found: dict[str, Path] = {}
        failed: dict[str, str] = {}
        for name in self.plan.names:
            if name not in BUNDLED:
                continue
            bundle = where / f"bundle-{BUNDLED[name]}"
            try:
                if not bundle.exists():
                    options = ("--precision", BUNDLED[name], "--levels", 4, "--steps", 4)
                    semantica("export", "--model", self.folder, "--out", bundle, *options)
                if name == "inductor":
                    semantica("build", bundle, "--backend", name)
                found[name] = bundle
            except Wrong as error:
                failed[name] = str(error)
        return found, failed

    def close(self) -> None:
        if self.field is not None:
            self.field.close()


@pytest.fixture(scope="module")
def races(request):
    plan = request.config.pluginmanager.get_plugin(PLUGIN)
    with tempfile.TemporaryDirectory() as place:
        found = Races(plan, Path(place))
        yield found
        found.close()


@pytest.mark.benchmark(timer=replay)
def test_sampling(model, batch, steps, impl, races, benchmark, request):
    plan = request.config.pluginmanager.get_plugin(PLUGIN)
    results, ceilings, flops = races.race(model, batch, steps)
    result, problem = results[impl], (model, batch, steps)
    if result.reason:
        plan.wrong.append({"problem": problem_name(*problem), "impl": impl, "reason": result.reason})
        pytest.fail(f"{impl}: {result.reason}", pytrace=False)
    benchmark.group = problem_name(*problem)
    replay.play(benchmark, result.times.device)
    benchmark.extra_info.update(describe(plan, problem, impl, result, ceilings, flops))
