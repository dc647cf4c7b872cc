"""`semantica bench train`: rungs train alike, wrong ones are caught, a step's time is told apart by kind of work."""

import math
from contextlib import nullcontext

import pytest

from semantica import UserError
from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.suite import run_suite
from semantica.benchmarks.quality.web import draw_web
from semantica.benchmarks.training import command as bench_train
from semantica.benchmarks.training import scaling
from semantica.benchmarks.training import suite as suite_train
from semantica.benchmarks.training.scaling import Scaled
from semantica.benchmarks.training.suite import Plan, Result, compare_losses, describe
from semantica.benchmarks.training.worker import Switches, Trainer, group_of, rungs
from semantica.cli import main


def test_rungs_are_cumulative_and_the_last_has_everything():
    assert rungs("cpu").keys() - rungs("cuda").keys() == {"+ kept memory"}
    ladder = rungs("cpu")
    assert vars(ladder.pop("strong")) == vars(Switches(compile=True, bf16=True, whole_network=True))
    switches = [list(vars(s).values()) for s in ladder.values()]
    assert not any(switches[0]) and all(switches[-1])
    assert all(sum(b) == sum(a) + 1 for a, b in zip(switches, switches[1:]))


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
        ("aten::comm_thing", "the rest"),
    ],
)
def test_operators_are_told_apart(name, kind):
    assert group_of(name) == kind


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
    shares = trainer.shares(1)
    assert {"convolution", "matrix products", "group_norm"} <= set(shares["kinds"])
    assert sum(seconds for _, seconds, _ in shares["operators"]) <= sum(shares["kinds"].values()) * 1.001
    assert bench_train.shares(shares)[0][2].endswith("%")


def test_figures_follow_from_the_samples(monkeypatch):
    monkeypatch.setattr(suite_train, "environment", lambda device: {"device": "it"})
    built = {"arithmetic": "bf16", "flops_per_image": 10**9}
    result = Result(built, [1.0], [0.1, 0.3], first_seconds=2.0, peak_bytes=5)
    result.times.device = [1.0, 3.0]
    ceilings = {"copy_gbps": 1.0, "matrix_tflops": 0.1, "matrix_tflops_fp32": 0.05}
    row = describe(Plan("tiny", 8, 2, "cpu", 0, ("plain",)), "plain", result, ceilings)
    # 16 images in 4 s, 1 GFLOP each, against 100 GFLOP/s
    assert row["images_per_s"] == 4 and row["mfu"] == pytest.approx(0.04) and row["data_wait"] == pytest.approx(0.1)
    assert row["median_us"] == 2e6 and set(store.IDENTITY) <= set(row)


def test_speed_up_is_against_the_first_number_of_processes():
    scaled = [Scaled(1, 2, 8, (90.0, 100.0, 130.0), (0.01,) * 3), Scaled(4, 2, 32, (300.0, 310.0, 200.0), (0.5,) * 3)]
    assert scaling.cells(scaled) == [
        ("1", "2", "8", "100.0", "90.0 - 130.0", "1.00x", "100%", "1.0%"),
        ("4", "2", "32", "300.0", "200.0 - 310.0", "3.00x", "75%", "50.0%"),
    ]


@pytest.mark.slow
def test_scaling_is_read_from_the_log_of_runs(tmp_path, monkeypatch):
    logs = []

    def run(*arguments):
        logs.append(read(*arguments))
        return logs[-1]

    read = scaling.run
    monkeypatch.setattr(scaling, "run", run)
    one, two = scaling.measure((1, 2), "tiny", 2, 5, "cpu", 1, tmp_path, rounds=1)
    assert (one.processes, one.batch, two.processes, two.batch) == (1, 2, 2, 4) and one.threads == two.threads
    # five steps are two rows of four, after the first
    assert [[row["step"] for row in rows] for rows in logs] == [[4, 8, 12]] * 2
    speeds = [row["images_per_s"] for row in logs[1][1:]]
    assert two.images_per_s == (pytest.approx(sum(speeds) / 2),)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["web"]
    with pytest.raises(UserError, match="training in 2 processes failed: --batch is 0"):
        scaling.run(2, 1, [f"--data={tmp_path / 'web' / 'train'}", "--batch=0"], tmp_path / "never")


@pytest.mark.slow
def test_a_race_of_two_rungs(tmp_path):
    plan = Plan("tiny", 2, 3, "cpu", 0, ("plain", "strong", "+ channels last"))
    content = run_suite(plan, suite_train)
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    assert [row["impl"] for row in rows] == ["plain", "strong", "+ channels last"] and not plan.wrong
    # whole turns of two steps
    assert all(row["rounds"] == 4 and 0 < row["mfu"] < 1 and not store.stale(row) for row in rows)
    assert content["semantica"]["shares"]["rung"] == "+ channels last"
    bench_train.page(tmp_path / "page.html", rows, plan)
    assert "all convolution" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--batch", "0"), "--batch is 0"),
        (("--workers", "-1"), "--workers is -1"),
        (("--preset", "huge"), "huge"),
        (("--processes", "1", "0"), "--processes is 1 0"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys):
    assert main(["bench", "train", *options]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
