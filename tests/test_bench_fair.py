"""No contender of a bench is handicapped by accident, no fault costs others their rows, no figure is made up."""

import io
import json
import os
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from semantica.benchmarks.harness import process, store
from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.arithmetic import exact_fp32
from semantica.benchmarks.harness.suite import run as run_suite
from semantica.benchmarks.kernels import implementations as raced
from semantica.benchmarks.kernels import suite
from semantica.benchmarks.kernels.problems import Problem, problems
from semantica.benchmarks.kernels.verify import Answers, Wrong, evaluate
from semantica.benchmarks.sampling.command import SamplingConfig, contenders
from semantica.benchmarks.sampling.contenders import openvino_settings
from semantica.benchmarks.sampling.models import build
from semantica.benchmarks.sampling.race import ModelRace
from semantica.benchmarks.sampling.suite import operations
from semantica.benchmarks.unets import suite as unets
from semantica.benchmarks.unets import worker
from semantica.benchmarks.unets.engines import ENGINES
from semantica.cli import main
from semantica.condition import Stream
from semantica.engines import ort_session
from semantica.errors import ArtifactError, UserError
from semantica.kernels import OPERATORS
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.model.cost import on_meta

FEW = timing.Protocol(warmup=1, least=3, most=3, seconds=0.0)
NORM = OPERATORS["group_norm"].reference


@pytest.mark.parametrize("last", [True, False])
def test_the_compiler_is_given_what_pytorch_offers_for_a_layout(last, monkeypatch):
    """The reference copies to the contiguous layout first, which nobody would compile for channels-last tensors."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(function) or function)
    case = GroupNormCase((2, 16, 8, 8), 4, channels_last=last)
    inputs = case.inputs(torch.float64)
    found = {i.name: i.load()(**inputs) for i in raced.implementations("group_norm") if i.name in ("eager", "compile")}
    assert given == [raced.group_norm_native]
    assert found["compile"].stride() == inputs["x"].stride()
    assert torch.allclose(found["compile"], found["eager"], rtol=0, atol=1e-12)


def test_six_digits_of_a_rival_are_not_wrong():
    """What Inductor's and channels-last sums differ by in fp32; it cost rivals their rows, and means their shapes."""
    problem = Problem("group_norm", GroupNormCase((2, 16, 8, 8), 4), torch.float32, "cpu")

    def off(by: float):
        def function(**arguments):
            out = NORM(**arguments)
            return out + by * out.abs().max()

        return function

    six, five = 3e-6, 3e-5
    entrants = [raced.rival(name, "group_norm", lambda by=by: off(by)) for name, by in (("six", six), ("five", five))]
    entrants.append(raced.Implementation("own", "group_norm", lambda: off(six)))
    race = suite.ProblemRace(problem, entrants, ("forward",))
    for name in race.entrants:
        race.check(name, "forward")
    assert {name for name, _ in race.wrong} == {"five", "own"}
    # in 16 bits a unit in the last place is more
    half = Problem("group_norm", problem.case, torch.bfloat16, "cpu")
    for implementation in raced.implementations("group_norm"):
        assert implementation.least < torch.finfo(half.dtype).eps / 100
        assert (implementation.least == 0) is (implementation.name in store.OURS)


READERS = ("attention_moments", "attention_columns")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in READERS for name in OPERATORS[op].cases])
def test_readers_of_a_stored_map_are_the_operators(op, name):
    """What is raced beside the reference, which widens its input and holds a chunk of the map at a time."""
    inputs = OPERATORS[op].cases[name].inputs(torch.float64)
    cotangent = torch.randn(OPERATORS[op].reference(**inputs).shape, dtype=torch.float64)
    ours, stored = (evaluate(f, inputs, cotangent) for f in (OPERATORS[op].reference, raced.NATIVE[op]))
    assert set(ours) == set(stored)
    for part, expected in ours.items():
        assert torch.allclose(stored[part], expected, rtol=1e-10, atol=1e-10), part


class Products(TorchDispatchMode):
    """Types of the factors of every matrix product."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::bmm", "aten::mm", "aten::baddbmm"):
            self.types |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", READERS)
def test_rivals_multiply_in_16_bits_and_are_as_right_as_that_allows(op):
    """Widened to fp32, products miss the matrix units of every processor that has them."""
    for case in [case for case in OPERATORS[op].cases.values() if case.spread == 1]:
        problem = Problem(op, case, torch.bfloat16, "cpu")
        entrants = [i for i in raced.implementations(op) if i.name in ("fused", "eager", "native")]
        race = suite.ProblemRace(problem, entrants, ("forward", "backward"))
        with Products() as seen:
            evaluate(raced.NATIVE[op], race.answers.inputs[0], race.answers.cotangents[0])
        assert seen.types == {torch.bfloat16}
        for name in race.entrants:
            race.check(name, "backward")
        assert not race.wrong, (case, race.wrong)
        found = race.accuracy["native", True]
        assert found.error > race.accuracy["eager", True].error / 2


def test_a_unit_in_the_last_place_is_one_of_the_type_that_is_given():
    """Results in fp32 of 16-bit input: matrix units take 16-bit factors, which the tests' rule allows, too."""
    case = next(iter(OPERATORS["attention_moments"].cases.values()))
    answers = Answers.of(Problem("attention_moments", case, torch.float16, "cpu"), gradients=False)
    exact = answers.truth[0]["out"]
    for share, right in ((0.9, True), (1.1, False)):
        off = (exact + share * torch.finfo(torch.float16).eps * exact.abs().max()).float()
        if right:
            assert answers.judge(0, {"out": off}, 0.0).error > 0
        else:
            with pytest.raises(Wrong, match="out is wrong"):
                answers.judge(0, {"out": off}, 0.0)


def test_keys_and_values_of_a_run_are_counted_once(tmp_path):
    pipe = build("tiny")
    pipe.save_pretrained(tmp_path / "tiny", safe_serialization=True)
    counted = {steps: operations(tmp_path / "tiny", 2, steps) for steps in (1, 3)}
    unet, side = on_meta(pipe.unet), pipe.unet.config.image_size
    picture = torch.empty(2, 3, pipe.encoder.image_size, pipe.encoder.image_size, device="meta")
    tokens, width = on_meta(pipe.encoder)(picture).tokens.shape[1], unet.config.streams["image"]
    made = unet.condition({"image": Stream(*(torch.empty(2, *s, width, device="meta") for s in ((tokens,), ())))})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.empty(2, 3, side, side, device="meta"), torch.empty(2, device="meta"), made)
    # two steps more are four evaluations more, of keys and values that are there
    assert counted[3] - counted[1] == 4 * counter.get_total_flops()


def limited(count: int):
    """eager, until its memory is gone."""
    left = iter(range(count))

    def function(**arguments):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return NORM(**arguments)

    return function


def test_who_runs_out_of_memory_in_a_race_costs_nobody_else_the_rows():
    problem = problems("cpu", quick=True)[0]
    entrants = [raced.Implementation(n, "group_norm", lambda f=f: f) for n, f in (("a", NORM), ("b", limited(5)))]
    race = suite.ProblemRace(problem, entrants, ("forward",))
    times, ceilings = race.race("forward", timing.CpuClock(), FEW)
    assert set(times) == {"a", "copy", "matrix"} and len(times["a"].device) == 3 and ceilings["copy_gbps"] > 0
    assert race.wrong == {
        ("b", "forward"): "while it was timed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    }


def test_a_race_that_does_not_fit_is_named_and_the_next_goes_on(monkeypatch):
    bench = suite.KernelBench(ops=("group_norm",), device="cpu", quick=True, directions=("forward",))
    bench.races = {race: ["eager"] for race in bench.races}
    first, second = bench.races
    made = suite.ProblemRace

    def small(problem, *rest):
        if problem.name == first[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return made(problem, *rest)

    monkeypatch.setattr(suite, "ProblemRace", small)
    monkeypatch.setattr(timing, "QUICK", FEW)
    content = run_suite(bench)
    assert [(w["problem"], w["reason"]) for w in bench.wrong] == [
        (first[0], "the race does not fit: CUDA out of memory. Tried")
    ]
    assert [row["extra_info"]["shape"] for row in content["benchmarks"]] == [bench.problems[second[0]][0].shape]


@pytest.mark.parametrize(("place", "kind"), [("run", UserError), ("keep", ArtifactError)])
def test_what_is_meant_for_the_user_ends_a_bench_as_it_is(kind, place, monkeypatch):
    bench = suite.KernelBench(ops=("group_norm",), device="cpu", quick=True)
    monkeypatch.setattr(bench, "run", lambda race, what: dict.fromkeys(bench.races[race], "it is wrong"))

    def refuse(*arguments):
        raise kind("no space left to write rows.json")

    monkeypatch.setattr(bench, place, refuse)
    with pytest.raises(kind, match=r"^no space left to write rows.json$"):
        run_suite(bench)


def test_a_row_that_is_missing_is_no_wrong_row(monkeypatch):
    bench = suite.KernelBench(ops=("group_norm",), device="cpu", quick=True)
    first, *_ = bench.races

    def faulty(race, what):
        if race != first:
            raise AttributeError("a fault of the bench")
        return dict.fromkeys(bench.races[race], "it is wrong")

    monkeypatch.setattr(bench, "run", faulty)
    with pytest.raises(RuntimeError, match="the suite broke(.|\n)*a fault of the bench"):
        run_suite(bench)


def test_rows_say_what_they_were_computed_in(monkeypatch):
    """Not what was set when somebody asked for the machine's name, as --resume does before anything runs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert store.environment("cpu")["tf32"]
    exact_fp32()
    assert not store.environment("cpu")["tf32"]


def test_whoever_is_next_waits_until_others_have_stopped_to_spin(monkeypatch):
    """Contenders and ceilings alike: what a figure is a share of is no figure of a busy processor."""
    happened = []
    ceilings = SimpleNamespace(measure=lambda: happened.append("ceilings"), rates=dict)
    monkeypatch.setattr(timing, "Ceilings", lambda device: ceilings)
    monkeypatch.setattr(process.time, "sleep", lambda seconds: happened.append(seconds))

    def run(entrant, content):
        happened.append("run")
        return {"seconds": [1.0]}

    process.race("it", [process.Entrant(None) for _ in range(2)], FEW, "cpu", dict, run)
    assert len(happened) == 2 * (4 * 2 + 3) and set(happened[::2]) == {process.QUIET}
    assert happened[1::2] == ["run", "run", *["run", "run", "ceilings"] * 3]


def test_a_contender_that_failed_gives_its_memory_back(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("back"))

    def ask(large: bool) -> dict:
        if large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    asked = "".join(json.dumps(["ask", {"large": large}]) + "\n" for large in (False, True, False))
    null = os.open(os.devnull, os.O_WRONLY)
    with patch("sys.stdin", io.StringIO(asked)), patch("os.dup2"), patch("os.dup", lambda _: null):
        process.serve({"ask": ask})
    assert given == ["back"]


def test_memory_for_heats_is_less_that_of_the_ceilings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    # two buffers of 1 GiB; two factors and a product, 8192 x 8192, in fp32 and in bf16
    assert unets.memory("cuda") == (80 << 30) - (2 << 30) - 3 * 6 * 8192**2
    held = timing.Ceilings("cpu").runners["copy"][1]
    assert held < timing.Ceilings.bytes("cpu") < 1.1 * held


@pytest.mark.parametrize(("name", "counted"), [("onnxruntime", True), ("tensorrt", False), ("onnxruntime-cuda", False)])
def test_memory_that_torch_does_not_know_is_not_made_up(name, counted, tmp_path, monkeypatch):
    made = lambda where: (lambda content, steps, guidance: content["z"], "fp16")  # noqa: E731
    monkeypatch.setattr(worker, "builder_of", lambda name: made)
    np.savez(tmp_path / "content.npz", z=np.zeros(3, np.float32))
    server = worker.Server(tmp_path)
    server.build(name, "model", "unet", "", ENGINES[name].device, None)
    assert (server.run(1, 7.5)["peak_bytes"] is not None) is counted


def test_openvino_has_as_many_threads_as_torch_is_kept_to(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert openvino_settings("bf16") == {
        "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "3",
    }  # fmt: skip
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "INFERENCE_NUM_THREADS" not in openvino_settings("f32")


@pytest.mark.parametrize(
    ("told", "mine", "threads"),
    [("3", 8, 3), ("2,1", 8, 2), ("", 4, 4), ("many", 4, 4), ("0", 8, 0), ("", 8, 0)],
    ids=["told", "told by level", "kept to some", "told nonsense", "zero", "all"],
)
def test_onnx_runtime_has_as_many_threads_as_the_process_is_kept_to(monkeypatch, told, mine, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(mine)), raising=False)
    assert ort_session.options().intra_op_num_threads == threads


def test_a_name_that_is_given_twice_is_raced_once(monkeypatch, tmp_path):
    names, _ = contenders(SamplingConfig(only="plain, plain,reference", impl=("os:getcwd", "os:getcwd")), "cpu")
    assert names == ("plain", "reference", "os:getcwd")
    started = []

    def sampler(name, place):
        started.append(name)
        return SimpleNamespace(
            build=lambda *rest: {}, sample=lambda content, steps: ({}, content[0]), close=lambda: None
        )

    monkeypatch.setattr("semantica.benchmarks.sampling.race.sizes", lambda model: (8, 8))
    race = ModelRace(tmp_path, names, tmp_path, "cpu", True, {}, {}, sampler)
    # the reference is built once, whether it is raced as well or not
    assert started == ["reference", "plain", "os:getcwd"] and not race.failed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("kernels --compile-only --png a.png", "--png says nothing to --compile-only: leave it out"),
        ("kernels --compile-only --host-cost", "--host-cost says nothing to --compile-only"),
        ("kernels --host-cost --html a.html", "--html says nothing to --host-cost"),
        ("kernels --host-cost --quick", "--quick says nothing to --host-cost"),
        ("kernels --workers 2", "--workers is for --compile-only"),
        ("kernels --arch sm_90", "--arch is for --compile-only"),
        ("kernels --json .", ". cannot be written: it is a folder"),
        ("kernels --png a.eps2", "--png a.eps2: give a name that ends in .png"),
        ("sample --ladder --only plain", "--only says nothing to --ladder"),
        ("sample --stages unet", "--stages is for public models"),
        ("sample --models sd-1.5 --nvtx", "--nvtx marks ranges of presets and of run folders"),
        ("train --tune lora", "--tune is for --models: leave it out"),
        ("train --models sd-1.5 --preset small", "--preset says nothing to --models"),
        ("train --sustained 5 --steps 7", "--steps says nothing to --sustained"),
        ("train --sustained 5 --json a.json --resume", "--resume says nothing to --sustained"),
        ("table STORED --summary", "--summary is of operators' rows, and there are none"),
    ],
)
def test_options_that_would_do_nothing_are_one_line(options, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("semantica.benchmarks.sampling.command.nvtx", lambda: None)
    row = dict.fromkeys(store.IDENTITY, "x") | {"op": "sample"}
    (tmp_path / "rows.json").write_text(json.dumps({"benchmarks": [{"extra_info": row}]}))
    assert main(["bench", *options.replace("STORED", str(tmp_path / "rows.json")).split()]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_ceilings_are_the_highest_rates_of_warm_calls(monkeypatch):
    monkeypatch.setattr(timing, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1 << 16})
    called, seconds = [], iter([4.0, 2.0, 8.0] * 3)
    found = timing.Ceilings("cpu")
    work = {name: amount for name, (_, amount) in found.runners.items()}
    found.runners = {name: (lambda _, n=name: lambda: called.append(n), work[name]) for name in work}
    found.clock = SimpleNamespace(time=lambda call, kind: (next(seconds), call()))
    assert found.rates() == {}
    found.measure()
    assert called == ["copy"] * 4 + ["fp32"] * 4 + ["bf16"] * 4
    product = 2 * 64**3 / 2.0 / 1e12
    assert found.rates() == {
        "copy_gbps": 2 * (1 << 16) / 2.0 / 1e9,
        "matrix_tflops": product,
        "matrix_tflops_fp32": product,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ceiling_of_a_processor_multiplies_matrices(monkeypatch, dtype):
    monkeypatch.setattr(timing, "MATRIX_SIDE", {"cpu": 64})
    torch.manual_seed(0)
    contender, operations = timing.matrix_contender("cpu", dtype)
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64).to(dtype) for _ in range(2))
    made = contender(0)()
    assert operations == 2 * 64**3 and made.dtype == dtype
    # sums of 64 products in another order, rounded once
    torch.testing.assert_close(made[0, :, 0], b @ a.T, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
