"""What is not timed costs nobody else a row, is stored and shown with its reason, and asked again if that may pass."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.table import UNMEASURED, cells, heads
from semantica.benchmarks.harness.verb import Outputs, measure, measured
from semantica.benchmarks.kernels import command as bench_kernels
from semantica.benchmarks.kernels import suite
from semantica.benchmarks.sampling import command as bench_sample
from semantica.benchmarks.unets import suite as unets
from semantica.benchmarks.unets.table import KIND
from semantica.cli import main
from semantica.errors import ArtifactError, UserError

FEW = timing.Protocol(warmup=1, least=3, most=3, seconds=0.0)
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.fixture
def norms(monkeypatch):
    """A quick bench of eager norms, forward."""
    monkeypatch.setattr(timing, "QUICK", FEW)

    def make(names=("eager",), quick=True):
        bench = suite.KernelBench(ops=("group_norm",), device="cpu", quick=quick, directions=("forward",))
        problem = next(iter(bench.races))
        bench.races = {problem: list(names)}
        return bench, problem

    return make


def without(name: str, when: str, monkeypatch) -> None:
    """A ceiling that has no memory when it is made, or called."""

    def ceiling(*arguments):
        def call():
            raise MEMORY

        if when == "made":
            raise MEMORY
        return lambda number: call, 1

    monkeypatch.setattr(timing, f"{name}_contender", ceiling)


@pytest.mark.parametrize("when", ["made", "called"])
@pytest.mark.parametrize("name", ["copy", "matrix"])
def test_a_ceiling_that_runs_out_of_memory_costs_no_row(name, when, norms, monkeypatch):
    without(name, when, monkeypatch)
    bench, problem = norms()
    _, row = bench.run(problem, "")["eager"]
    fields = {"copy": ("copy_gbps", "effective_share_of_copy"), "matrix": ("matrix_tflops", "share_of_matrix_rate")}
    assert [row[field] for field in fields.pop(name)] == [None, None]
    assert row["median_us"] > 0 and all(row[field] > 0 for field in fields.popitem()[1])
    # nothing to hold the machine against
    (ratio,) = store.compare([row], [row])
    assert ratio["machine"] == (None if name == "copy" else 1.0)


def test_tables_and_pictures_say_what_was_not_measured(norms, monkeypatch, tmp_path, capsys):
    without("copy", "called", monkeypatch)
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    measure(Outputs(json=path, html=tmp_path / "rows.html", png=picture), norms()[0], bench_kernels.KIND)
    (row,) = store.rows(path)
    told = dict(zip(heads(bench_kernels.KIND.columns), *cells(bench_kernels.KIND.columns, [row])))
    assert told["of copy"] == UNMEASURED in (tmp_path / "rows.html").read_text() and picture.stat().st_size
    capsys.readouterr()
    assert main(["bench", "compare", str(path), str(path)]) == main(["bench", "table", str(path)]) == 0
    assert UNMEASURED in capsys.readouterr().out


def test_a_gpu_that_a_ceiling_lost_ends_the_bench(norms, monkeypatch):
    def ceiling(*arguments):
        def call():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        return lambda number: call, 1

    def usable(name, device):
        raise ArtifactError(f"{name} has left the GPU unusable (CUDA error: out of memory)")

    monkeypatch.setattr(timing, "copy_contender", ceiling)
    monkeypatch.setattr(suite, "usable", usable)
    bench, problem = norms()
    with pytest.raises(ArtifactError, match="^the ceiling copy has left the GPU unusable"):
        bench.run(problem, "")


def test_a_whole_run_without_ceilings_is_a_row_that_says_so():
    times = timing.Times([1e-3] * 3)
    row = store.row(("sample", "plain", "a", "Offline", "fp32", "guidance 4"), times, "cpu", 10, {})
    assert row["copy_gbps"] is row["matrix_tflops"] is row["share_of_matrix_rate"] is None
    more = dict(p95_us=1.0, p99_us=1.0, images_per_s=1.0, psnr_db=50.0, build_s=1.0, first_s=1.0, peak_bytes=None)
    assert cells(bench_sample.KIND.columns, [row | more])[0][-1] == UNMEASURED
    assert bench_sample.KIND.figure([row | more]).axes


def test_a_processor_without_memory_refuses_a_race_and_the_bench_goes_on(norms, monkeypatch):
    """There torch raises no `OutOfMemoryError`."""

    def full(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    bench, problem = norms()
    monkeypatch.setattr(suite, "ProblemRace", full)
    assert "the race does not fit: [enforce fail" in bench.run(problem, "")["eager"]


@pytest.mark.parametrize(
    ("reason", "change", "kept"),
    [
        ("out is wrong: error 0.1", {}, True),
        ("out is wrong: error 0.1", {"quick": True}, False),
        # by a version that did not say so
        ("out is wrong: error 0.1", {"quick": None}, False),
        ("out is wrong: error 0.1", {"device": "another card"}, False),
        ("while it was timed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", {}, False),
        ("the race does not fit: DefaultCPUAllocator: can't allocate memory: you tried", {}, False),
        ("its process ended with code -9: it said nothing", {}, False),
        ("its process ended with code 1: no module", {}, True),
        ("semantica build failed: [Errno 28] No space left on device", {}, False),
    ],
)
def test_what_was_refused_is_asked_again_where_that_may_pass(reason, change, kept, norms, tmp_path):
    bench, race = norms(quick=False)
    path = tmp_path / "rows.json"
    wrong = bench.refusal(race, "eager", reason) | change
    path.write_text(json.dumps({"benchmarks": [], "semantica": {"wrong": [wrong]}}))
    stands, others, again = measured(path, bench)
    assert (stands["semantica"]["wrong"] == [wrong]) is kept and (race not in bench.races) is kept
    # until it is run, it stays in the file
    assert others["semantica"]["wrong"] == [] and [of["semantica"]["wrong"] for of in again.values()] == [[wrong]] * (
        not kept
    )


def test_a_quick_look_does_not_replace_what_took_hours(norms, tmp_path):
    path = tmp_path / "rows.json"
    bench, race = norms()
    measure(Outputs(json=path), bench, bench_kernels.KIND)
    content = json.loads(path.read_text())
    assert content["benchmarks"][0]["extra_info"].pop("quick")
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds rows that a quick look would replace: give another file"):
        measure(Outputs(json=path, resume=True), norms()[0], bench_kernels.KIND)


def test_rows_of_a_race_stay_in_the_file_until_it_was_run_again(norms, tmp_path, monkeypatch):
    """One more contender was asked for; the bench was killed before its race."""
    path = tmp_path / "rows.json"
    bench, race = norms()
    measure(Outputs(json=path), bench, bench_kernels.KIND)
    kept = store.rows(path)
    bench, _ = norms(names=("eager", "compile"))
    first = next(
        other for other in suite.KernelBench(ops=("group_norm",), device="cpu", quick=True).races if other != race
    )
    bench.races = {first: ["eager"], race: ["eager", "compile"]}

    def run(asked, what):
        if asked == race:
            raise KeyboardInterrupt
        return {"eager": "it is wrong"}

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        measure(Outputs(json=path, resume=True), bench, bench_kernels.KIND)
    assert store.rows(path) == kept and [w["problem"] for w in store.refused(store.read(path))] == [first[0]]


def test_who_is_installed_by_now_is_absent_no_more(norms, tmp_path):
    path = tmp_path / "rows.json"
    bench, _ = norms()
    bench.absent = {"eager": "not yet", "liger": "ModuleNotFoundError"}
    measure(Outputs(json=path), bench, bench_kernels.KIND)
    content = json.loads(path.read_text())
    content["benchmarks"] = []
    path.write_text(json.dumps(content))
    bench, _ = norms()
    bench.absent = {}
    measure(Outputs(json=path, resume=True), bench, bench_kernels.KIND)
    assert store.read(path)["semantica"]["absent"] == {"liger": "ModuleNotFoundError"}


class Stand:
    """A process of a public UNet: stock diffusers, an engine that is wrong, and ours."""

    def __init__(self, name, place):
        self.name = name

    def ask(self, what, **arguments):
        return {"arithmetic": "fp32" if self.name == "plain" else "bf16", "seconds": 1.0}

    def run(self, content, steps):
        made = np.asarray(content["made"]) * (1 + {"plain-half": 0.04, "openvino-bf16": 0.2}.get(self.name, 0.0))
        return {"seconds": [0.5], "peak_bytes": 1}, made

    def close(self):
        pass


def test_who_is_refused_before_the_timing_is_found_in_the_file_and_in_the_tables(monkeypatch, tmp_path, capsys):
    """A wrong first call, and a bundle that could not be made."""

    def bundle(self, name, model):
        if name == "onnxruntime":
            raise Wrong("semantica export failed: no opset")
        return tmp_path

    draw = lambda model, stage, seed, text, batch: {"made": np.random.default_rng(7 * seed + text).normal(size=9)}  # noqa: E731
    ceilings = SimpleNamespace(measure=lambda: None, rates=lambda: {"copy_gbps": 1.0, "matrix_tflops": 1.0})
    monkeypatch.setattr(timing, "Ceilings", lambda device: ceilings)
    for name, stand in (("Runner", Stand), ("contents", draw), ("memory", lambda device: 1 << 50)):
        monkeypatch.setattr(unets, name, stand)
    for name in ("operations", "parameters"):
        monkeypatch.setattr(unets, name, lambda *rest: 10)
    monkeypatch.setattr(unets, "folder_of", lambda model, place: place)
    monkeypatch.setattr(unets.UNetBench, "bundle", bundle)
    path, names = tmp_path / "rows.json", ("plain-half", "openvino-bf16", "onnxruntime")
    bench = unets.UNetBench(("sd-1.5",), (1,), (1,), names, "cpu", stages=("unet",))
    (race,) = bench.races
    measure(Outputs(json=path), bench, KIND)
    assert [row["impl"] for row in store.rows(path)] == ["plain-half"]
    told = {row["impl"]: row for row in store.refused(store.read(path))}
    assert {row["problem"] for row in told.values()} == set(race) and list(told) == ["openvino-bf16", "onnxruntime"]
    assert told["openvino-bf16"]["reason"] == "first call: relative error 0.2, the limit is 0.06"
    assert told["onnxruntime"]["reason"] == "semantica export failed: no opset"
    assert capsys.readouterr().out.count("WRONG, not timed") == 2
    assert main(["bench", "table", str(path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "openvino-bf16" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *race, "", "openvino-bf16", "first call: relative error 0.2, the limit is 0.06"
    ]  # fmt: skip
