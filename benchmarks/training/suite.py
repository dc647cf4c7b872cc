"""The pytest-benchmark suite of training: the ladder from a plain loop to the trainer, raced step by step.

Run by `semantica bench train`. Accuracy first: each rung trains from the same weights on the same samples and noise, so
that its first losses must be those of the plain loop, within what the precision costs.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.process import Ceilings, Process, Wrong
from semantica.benchmarks.harness.store import Replay, environment, source_hash
from semantica.benchmarks.training.scaling import Scaled

PLUGIN = "semantica-bench-train"
# steps before the clock: compiled, allocated and cached by then; their losses are compared
WARMUP = 3
# steps of a rung before the next has its turn
TURN = 2
# largest relative difference of a loss from the plain loop's
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


@dataclass
class Plan:
    """What to run, and, as a plugin of pytest, what came of it."""

    preset: str
    batch: int
    steps: int
    device: str
    workers: int
    rungs: tuple[str, ...]
    shares: dict = field(default_factory=dict)
    scaling: list[Scaled] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[dict] = field(default_factory=list)

    @property
    def problem(self) -> str:
        return f"{self.preset} batch {self.batch}"

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        scaling = [asdict(row) for row in self.scaling]
        output_json["semantica"] = {"wrong": self.wrong, "shares": self.shares, "scaling": scaling}
        output_json["machine_info"].get("cpu", {}).pop("flags", None)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            print(f"{'timed' if report.passed else 'WRONG'}  {name}", file=sys.__stderr__, flush=True)


@dataclass
class Result:
    """What a race found of one rung; `reason` says why it was not timed."""

    built: dict = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    times: timing.Times = field(default_factory=timing.Times)
    first_seconds: float = 0.0
    peak_bytes: int = 0
    reason: str = ""


def compare_losses(losses: list[float], plain: list[float], arithmetic: str) -> None:
    """Raises `Wrong` where a loss is not the plain loop's."""
    for i, (loss, expected) in enumerate(zip(losses, plain, strict=True)):
        # written so that NaN fails
        if not abs(loss - expected) <= TOLERANCE[arithmetic] * abs(expected):
            raise Wrong(f"loss {loss:.6g} in step {i + 1}, the plain loop's is {expected:.6g}")


def race(plan: Plan, place: Path) -> tuple[dict[str, Result], dict[str, float]]:
    """Results by rung, and the ceilings in the same rounds; the shares of the last rung's operators go to the plan."""
    from semantica.benchmarks.quality.web import draw_web

    draw_web(place / "web", groups=16, images_per_group=16)
    arguments = dict(
        data=str(place / "web" / "train"), preset=plan.preset, batch=plan.batch, device=plan.device,
        workers=plan.workers,
    )  # fmt: skip
    results = {rung: Result() for rung in plan.rungs}
    processes = {rung: Process("semantica.benchmarks.training.worker", rung, place) for rung in plan.rungs}
    ceilings = Ceilings(plan.device)
    try:
        for rung, result in results.items():
            try:
                result.built = processes[rung].ask("build", rung=rung, **arguments)
                answer = processes[rung].ask("steps", count=WARMUP)
                result.losses, result.first_seconds = answer["losses"], answer["seconds"][0]
                compare_losses(result.losses, results[plan.rungs[0]].losses, result.built["arithmetic"])
            except Wrong as error:
                result.reason = str(error)
        for _ in range(-(-plan.steps // TURN)):
            for rung, result in results.items():
                if result.reason:
                    continue
                try:
                    answer = processes[rung].ask("steps", count=TURN)
                except Wrong as error:
                    result.reason = str(error)
                    continue
                result.times.device += answer["seconds"]
                result.waits += answer["waits"]
                result.peak_bytes = answer["peak_bytes"]
            ceilings.measure()
        last = plan.rungs[-1]
        if not results[last].reason:
            plan.shares = {"rung": last, **processes[last].ask("shares", count=TURN)}
    finally:
        for process in processes.values():
            process.close()
    return results, ceilings.rates()


def describe(plan: Plan, rung: str, result: Result, ceilings: dict[str, float]) -> dict:
    """The fields of a row. Images per second and MFU are of all timed steps, waiting for data included."""
    times, arithmetic = result.times, result.built["arithmetic"]
    total, where = sum(times.device), environment(plan.device)
    rate = plan.batch * len(times.device) / total
    peak = ceilings["matrix_tflops" if arithmetic == "bf16" else "matrix_tflops_fp32"]
    flops = result.built["flops_per_image"]
    return {
        "op": "train", "impl": rung, "shape": plan.problem, "layout": "step", "dtype": arithmetic,
        "direction": "both", "uses": rung,
        "median_us": times.quantile(0.5) * 1e6, "p20_us": times.quantile(0.2) * 1e6,
        "p80_us": times.quantile(0.8) * 1e6, "rounds": len(times.device),
        "images_per_s": rate, "mfu": rate * flops / 1e12 / peak, "flops": flops * plan.batch,
        "tflops": rate * flops / 1e12, "data_wait": sum(result.waits) / total, "first_s": result.first_seconds,
        "peak_bytes": result.peak_bytes, "loss": result.losses[-1], **ceilings, **where,
        "kernel_hash": source_hash("train"),
    }  # fmt: skip


replay = Replay()


def pytest_generate_tests(metafunc):
    plan = metafunc.config.pluginmanager.get_plugin(PLUGIN)
    metafunc.parametrize("rung", plan.rungs, ids=[rung.replace(" ", "-") for rung in plan.rungs])


@pytest.fixture(scope="module")
def raced(request) -> Iterator[tuple[dict[str, Result], dict[str, float]]]:
    with tempfile.TemporaryDirectory() as place:
        yield race(request.config.pluginmanager.get_plugin(PLUGIN), Path(place))


@pytest.mark.benchmark(timer=replay)
def test_training(rung, raced, benchmark, request):
    plan = request.config.pluginmanager.get_plugin(PLUGIN)
    results, ceilings = raced
    if results[rung].reason:
        plan.wrong.append({"problem": plan.problem, "impl": rung, "reason": results[rung].reason})
        pytest.fail(f"{rung}: {results[rung].reason}", pytrace=False)
    benchmark.group = plan.problem
    replay.play(benchmark, results[rung].times.device)
    benchmark.extra_info.update(describe(plan, rung, results[rung], ceilings))
