"""`semantica bench train`: rungs train alike, wrong ones are caught, a step's time is told apart by kind of work."""

import io
import math
import os
import subprocess
import types
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from semantica.benchmarks.harness import sources, store
from semantica.benchmarks.harness import suite as harness_suite
from semantica.benchmarks.harness.arithmetic import tf32
from semantica.benchmarks.harness.process import Entrant, Process, Wrong, serve
from semantica.benchmarks.harness.suite import run
from semantica.benchmarks.harness.table import cells, page
from semantica.benchmarks.quality.web import draw_web
from semantica.benchmarks.training import scaling, suite, tables
from semantica.benchmarks.training.command import chosen
from semantica.benchmarks.training.suite import TrainingBench, compare_losses
from semantica.benchmarks.training.worker import Switches, Trainer, group_of, rungs, seconds_by_name
from semantica.cli import main
from semantica.errors import ArtifactError, UserError


def test_rungs_are_cumulative_and_the_last_has_everything():
    assert rungs("cpu").keys() ^ rungs("cuda").keys() == {"+ kept memory", "+ recorded"}
    ladder = rungs("cuda")
    assert vars(ladder.pop("strong")) == vars(Switches(compile=True, bf16=True, whole_network=True))
    switches = [[on for name, on in vars(s).items() if name != "kept_memory"] for s in ladder.values()]
    assert not any(switches[0]) and all(switches[-1])
    assert all(sum(b) == sum(a) + 1 for a, b in zip(switches, switches[1:]))


def test_only_some_rungs_are_raced_with_the_plain_loop():
    ladder = tuple(rungs("cuda"))
    assert chosen("", ladder) == ladder
    assert (
        chosen(" + recorded, strong,", ladder)
        == ("plain", "strong", "+ recorded")
        == chosen("plain,strong,+ recorded", ladder)
    )


@pytest.mark.parametrize(
    ("losses", "arithmetic", "reason"),
    [
        ([1.0, 0.9], "fp32", ""),
        ([1.0, 0.92], "bf16", ""),
        ([1.0, 0.92], "fp32", "loss 0.92 in step 2, the plain loop's is 0.9"),
        ([math.nan, 0.9], "bf16", "loss nan in step 1"),
    ],
)
def test_another_loss_is_wrong(losses, arithmetic, reason):
    expected = pytest.raises(Wrong, match=reason) if reason else nullcontext()
    with expected:
        compare_losses(losses, [1.0, 0.9], arithmetic)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("semantica::group_norm_backward", "group_norm"),
        ("aten::native_group_norm", "group_norm"),
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("semantica::cross_attention", "attention"),
        ("aten::_fused_adamw_", "optimizer and averages"),
        ("aten::_foreach_lerp_", "optimizer and averages"),
        ("triton_poi_fused_add_mul_3", "compiled, fused"),
        ("aten::copy_", "the rest"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("resident_backward_kernel", "group_norm"),
        ("dkv_kernel", "attention"),
        ("void semantica::forward_kernel<__nv_bfloat16, 8, true>(semantica::Problem, semantica::Plan)", "group_norm"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "optimizer and averages",
        ),
        ("Memcpy DtoD (Device -> Device)", "the rest"),
        ("aten::comm_thing", "the rest"),
    ],
)
def test_operators_are_told_apart(name, kind):
    assert group_of(name) == kind


def test_a_gpu_s_time_is_counted_once():
    """The profiler has a kernel's time in its own row and in that of the operator that launched it."""

    def event(key: str, where, cpu: float, device: float, annotated: bool = False):
        return types.SimpleNamespace(
            key=key, device_type=where, self_cpu_time_total=cpu, self_device_time_total=device, count=2,
            is_user_annotation=annotated,
        )  # fmt: skip

    host, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        event("aten::mm", host, 7e3, 3e6),
        event("nvjet_hsh", gpu, 0, 3e6),
        event("ProfilerStep", gpu, 0, 5e6, annotated=True),
        event("dq_kernel", gpu, 0, 1e6),
    ]
    assert [*seconds_by_name(events, cuda=True)] == [("nvjet_hsh", 3.0, 2), ("dq_kernel", 1.0, 2)]
    assert [*seconds_by_name(events, cuda=False)] == [("aten::mm", 7e-3, 2)]


def test_rungs_train_alike(tmp_path):
    """Without compiling, which takes long: same weights, samples and noise, so the same losses."""
    draw_web(tmp_path / "web", groups=4, images_per_group=4)
    found = {}
    for rung in ("plain", "+ channels last", "+ fused group norm", "+ fused attention"):
        trainer = Trainer()
        built = trainer.build(rung, str(tmp_path / "web" / "train"), "tiny", 2, "cpu", 0)
        found[rung] = trainer.steps(2)
        assert built["arithmetic"] == "fp32" and built["flops_per_image"] > 1e9
    for rung, answer in found.items():
        compare_losses(answer["losses"], found["plain"]["losses"], "fp32")
        assert len(answer["seconds"]) == len(answer["waits"]) == 2, rung
        assert all(0 <= wait < seconds for wait, seconds in zip(answer["waits"], answer["seconds"]))
    assert found["plain"]["losses"][0] != found["plain"]["losses"][1]
    weights = {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}
    assert trainer.park() == {"parked_bytes": 0}
    networks = [trainer.objective, *trainer.state.ema.values()]
    assert sum(p.untyped_storage().nbytes() for network in networks for p in network.parameters()) == 0
    assert not trainer.state.optimizer.state and all(p.grad is None for p in trainer.objective.parameters())
    steps, trainer.steps = trainer.steps, lambda count: None
    trainer.wake()
    assert all(torch.equal(p, weights[name]) for name, p in trainer.objective.named_parameters())
    assert all(p.stride() == weights[name].stride() for name, p in trainer.objective.named_parameters())
    trainer.steps = steps
    assert all(math.isfinite(loss) for loss in trainer.steps(1)["losses"])
    shares = trainer.shares(1)
    assert {"convolution", "matrix products", "group_norm"} <= set(shares["kinds"])
    assert sum(seconds for _, seconds, _ in shares["operators"]) <= sum(shares["kinds"].values()) * 1.001
    assert tables.shares(shares)[0][2].endswith("%")


@pytest.mark.parametrize(("device", "parks"), [("cuda", True), ("cpu", False)])
def test_a_gpu_holds_one_contender_at_a_time(device, parks, tmp_path, monkeypatch):
    """Every rung's memory is that of one: from its start, through its turns, and where it fails."""
    assert TrainingBench("tiny", 2, 10, device, 0, ("plain",)).parks == parks
    resident, most = set(), []

    class Fake:
        def __init__(self, module, name, place):
            self.name, self.turns = name, 0

        def ask(self, what, **arguments):
            if what == "park":
                resident.discard(self.name)
                return {"parked_bytes": 7}
            resident.add(self.name)
            most.append(len(resident))
            if what == "steps":
                self.turns += 1
                if self.name == "third" and self.turns == 3:
                    raise Wrong("out of memory")
            count = arguments.get("count", 0)
            values = {"seconds": [1.0] * count, "waits": [0.0] * count, "losses": [1.0] * count, "peak_bytes": 1}
            return {**values, "arithmetic": "fp32", "flops_per_image": 1, "kinds": {}, "operators": []}

        def close(self):
            resident.discard(self.name)

    monkeypatch.setattr(suite, "Process", Fake)
    # the ceilings are this machine's own
    plan = TrainingBench("tiny", 2, 6, "cpu", 0, ("plain", "second", "third"), parks=parks)
    outcomes = plan.run(("tiny batch 2",), "race")
    assert max(most) == (1 if parks else 3) and outcomes["third"] == "out of memory"
    assert len(outcomes["second"][0]) == 6 and outcomes["second"][1]["parked"] == parks
    assert outcomes["plain"][1]["parked_bytes"] == (7 if parks else 0)


def test_every_bench_computes_fp32_in_fp32(monkeypatch):
    """In the process that measures and in those of contenders; PyTorch starts with TF32 on in convolutions."""
    answers = []
    for use in (lambda: next(suite_bench(types.SimpleNamespace(config=None, module=None))), serve_one):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        assert tf32()
        monkeypatch.setattr(harness_suite, "bench_of", lambda *_: TrainingBench("tiny", 1, 1, "cpu", 0, ()))
        use()
        answers.append(tf32())
    assert answers == [False, False]


def test_a_contender_that_was_killed_is_closed_like_any_other(tmp_path):
    contender = Process("this", "gone", tmp_path)
    contender.process.wait()
    contender.process.stdout.read()
    with pytest.raises(Wrong, match="its process ended with code 0"):
        contender.ask("steps", count=1)
    # twice, as in a race: when it fails, and when all are closed
    contender.close()
    contender.close()


def suite_bench(request):
    return harness_suite.bench.__wrapped__(request)


def serve_one():
    seen = []
    with (
        patch("sys.stdin", io.StringIO('["ask", {}]\n')),
        patch("os.dup2"),
        patch("os.dup", lambda _: os.open(os.devnull, os.O_WRONLY)),
    ):
        serve({"ask": lambda: seen.append(tf32()) or {}})
    assert seen == [False]


def test_figures_follow_from_the_samples():
    answers = [{"seconds": [1.0], "waits": [0.1]}, {"seconds": [3.0], "waits": [0.3]}]
    entrant = Entrant(
        None,
        built={"arithmetic": "bf16", "flops_per_image": 10**9},
        first={"seconds": [2.0], "losses": [1.0]},
        last={"peak_bytes": 5},
        answers=answers,
    )
    ceilings = {"copy_gbps": 1.0, "matrix_tflops": 0.1, "matrix_tflops_fp32": 0.05}
    bench = TrainingBench("tiny", 8, 2, "cpu", 0, ("plain",))
    row = bench.row(("tiny batch 8",), "plain", entrant, ceilings)
    assert bench.races == {(row["shape"],): ["plain"]}
    # 16 images in 4 s, 1 GFLOP each, against 100 GFLOP/s
    assert row["images_per_s"] == 4 and row["mfu"] == pytest.approx(0.04) and row["data_wait"] == pytest.approx(0.1)
    assert row["median_us"] == 2e6 and row["first_s"] == 2 and row["peak_bytes"] == 5 and row["loss"] == 1
    assert set(store.IDENTITY) <= set(row)


def test_speed_up_is_against_the_first_number_of_processes():
    one = {"processes": 1, "threads": 2, "batch": 8, "images_per_s": [90.0, 100.0, 130.0], "data_wait": [0.01] * 3}
    four = {"processes": 4, "threads": 2, "batch": 32, "images_per_s": [300.0, 310.0, 200.0], "data_wait": [0.5] * 3}
    assert cells(tables.SCALED, [one, four]) == [
        ("1", "2", "8", "100.0", "90.0 - 130.0", "1.00x", "100%", "1.0%"),
        ("4", "2", "32", "300.0", "200.0 - 310.0", "3.00x", "75%", "50.0%"),
    ]


@pytest.mark.parametrize(
    ("stderr", "error", "words"),
    [
        ("semantica: process 1 is lost\n  exitcode  : -9 (pid: 7)\n  exitcode  : 1 (pid: 8)", ArtifactError, "is lost"),
        ("semantica: --batch is 0\n  exitcode  : 2 (pid: 7)", UserError, "failed: --batch is 0"),
        ("[rank1]: torch.OutOfMemoryError: 2 GiB\n  exitcode  : 1 (pid: 7)", ArtifactError, "broke: torch.OutOfMem"),
    ],
)
def test_a_lost_process_is_no_mistake_of_the_users(stderr, error, words, tmp_path, monkeypatch):
    """The command line exits with 2 for a `UserError`, with 1 for an `ArtifactError`."""
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error, match=words):
        scaling.run(2, 1, [], tmp_path)


@pytest.mark.slow
def test_scaling_is_read_from_the_log_of_runs(tmp_path, monkeypatch):
    logs = []

    def run(*arguments):
        logs.append(read(*arguments))
        return logs[-1]

    read = scaling.run
    monkeypatch.setattr(scaling, "run", run)
    one, two = scaling.measure((1, 2), "tiny", 2, 5, "cpu", 1, tmp_path, rounds=1)
    assert not sources.stale(one) and sources.stale({**one, "kernel_hash": "0" * 16})
    assert [(row["processes"], row["batch"]) for row in (one, two)] == [(1, 2), (2, 4)] and one["threads"] == two[
        "threads"
    ]
    # five steps are two rows of four, after the first
    assert [[row["step"] for row in rows] for rows in logs] == [[4, 8, 12]] * 2
    speeds = [row["images_per_s"] for row in logs[1][1:]]
    assert two["images_per_s"] == [pytest.approx(sum(speeds) / 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["web"]
    with pytest.raises(UserError, match="training in 2 processes failed: --batch is 0"):
        scaling.run(2, 1, [f"--data={tmp_path / 'web' / 'train'}", "--batch=0"], tmp_path / "never")


@pytest.mark.slow
def test_a_race_of_two_rungs(tmp_path):
    plan = TrainingBench("tiny", 2, 3, "cpu", 0, ("plain", "strong", "+ channels last"), parks=True)
    content = run(plan)
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    assert [row["impl"] for row in rows] == ["plain", "strong", "+ channels last"] and not plan.wrong
    # whole turns of two steps
    assert all(row["rounds"] == 4 and 0 < row["mfu"] < 1 and not sources.stale(row) for row in rows)
    assert content["semantica"]["shares"]["rung"] == "+ channels last"
    page(tmp_path / "page.html", tables.KIND, rows, plan)
    assert "all convolution" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--batch", "0"), "--batch is 0"),
        (("--workers", "-1"), "--workers is -1"),
        (("--preset", "huge"), "huge"),
        (("--processes", "1", "0"), "--processes is 1 0"),
        (("--device", "cpu", "--only", "strong,faster"), "--only faster: choose some of plain, strong, + channels"),
        (("--sustained", "2", "--only", "strong"), "--only says nothing to --sustained"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys):
    assert main(["bench", "train", *options]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
