"""`semantica bench train --models`: accelerated steps are those of stock diffusers, wrong ones are caught."""

import numpy as np
import pytest
import torch

from semantica.benchmarks.finetuning import contenders, suite, worker
from semantica.benchmarks.finetuning.contenders import CONTENDERS, Problem, Switches, Tuner, errors, operations
from semantica.benchmarks.finetuning.table import KIND
from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.harness.sources import stale
from semantica.benchmarks.harness.suite import run
from semantica.benchmarks.harness.table import as_markdown
from semantica.benchmarks.training import command
from semantica.cli import main


@pytest.fixture(scope="module")
def folder(foreign, tmp_path_factory):
    return foreign.write(tmp_path_factory.mktemp("tuned") / "tiny", "xl")


@pytest.fixture(params=["full", "lora"])
def problem(request, folder):
    if request.param == "lora":
        pytest.importorskip("peft")
    return Problem(folder, str(folder), request.param, 8, 2, "cpu")


def examined(name: str, problem: Problem) -> tuple[dict[str, np.ndarray], list[float]]:
    tuner = Tuner(name, problem)
    return tuner.examine(), [float(tuner.step(tuner.batch())) for _ in range(2)]


def test_accelerated_steps_are_those_of_stock_diffusers(problem, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "recomputed", Switches(checkpointing=True, fused=True))
    truth, *others = (examined(name, problem) for name in ("plain", "accelerate-fp32", "recomputed"))
    for found in others:
        made = suite.TuningBench.errors_of(found, truth)
        suite.judge(made, suite.limits_of("fp32", made))
        assert max(made.values()) < 2e-5, made
    # every weight, or both halves of each adapter
    count = sum(p.numel() > 0 for p in Tuner("plain", problem).parameters)
    assert len(truth[0]) == 2 + count and (problem.way == "full" or all("lora" in n for n in list(truth[0])[2:]))
    assert truth[1][0] != truth[1][1] and abs(truth[1][0] - truth[0]["loss"]) < 1e-6


def test_bf16_is_held_to_stock_diffusers_in_bf16(problem, monkeypatch):
    def half(name: str):
        """Whether or not this processor has instructions for it."""
        with monkeypatch.context() as changed:
            changed.setattr(contenders, "pick_precision", lambda *_: torch.bfloat16)
            return examined(name, problem)

    truth = examined("plain", problem)
    stock, ours = (suite.TuningBench.errors_of(half(name), truth) for name in ("plain-half", "accelerate"))
    assert 1e-3 < stock["gradient"] < 0.3
    suite.judge(ours, suite.limits_of("bf16", stock))


def test_wrong_gradients_are_caught():
    rng = np.random.default_rng(0)
    truth = {"loss": np.float32(1.0), "prediction": rng.normal(size=9), "a": rng.normal(size=50)}
    truth |= {"b": 1e-2 * rng.normal(size=9), "nothing": 1e-9 * rng.normal(size=9)}
    assert max(errors(truth, truth).values()) == 0
    # of a small parameter as of a large one, but not of what is nothing beside all others
    assert errors(truth | {"b": 2 * truth["b"]}, truth)["gradient"] == pytest.approx(1 / 3**0.5)
    assert errors(truth | {"nothing": 2 * truth["nothing"]}, truth)["gradient"] < 1e-3
    for broken in ({**truth, "a": truth["a"] * np.nan}, {name: truth[name] for name in ("loss", "prediction", "a")}):
        found = errors(broken, truth)
        assert set(found.values()) == {np.inf}
        with pytest.raises(Wrong, match="loss: relative error inf"):
            suite.judge(found, suite.limits_of("fp32", found))
    half = {"loss": 1e-6, "prediction": 0.01, "gradient": 0.1, "losses": 0.02}
    assert suite.limits_of("bf16", half) == pytest.approx(
        {"loss": 1.5 / 256, "prediction": 0.015, "gradient": 0.15, "losses": 0.03}
    )
    with pytest.raises(Wrong, match="losses: relative error nan, the limit is 0.0001"):
        suite.judge({"losses": np.nan}, suite.limits_of("fp32", half))
    assert suite.apart([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)


def test_operations_of_a_step(folder):
    pytest.importorskip("peft")
    full, lora, twice = (operations(str(folder), way, 8, b) for way, b in (("full", 1), ("lora", 1), ("full", 2)))
    # frozen weights have no gradient of their own: two products of three
    assert twice == 2 * full and 0.6 < lora / full < 0.75


def test_races_of_a_folder_and_what_a_row_stands_for(folder, monkeypatch):
    made = []
    monkeypatch.setattr(command, "measure", lambda config, bench, kind: made.append(bench))
    monkeypatch.setattr(command, "need", lambda *packages: None)
    options = ["--size", "32", "--only", "plain,accelerate", "--steps", "3"]
    assert main(["bench", "train", "--models", str(folder), *options]) == 0
    (bench,) = made
    bench.closing.close()
    assert list(bench.races) == [("tiny lora, 4x4 batch 1",), ("tiny full, 4x4 batch 1",)]
    assert set(map(tuple, bench.races.values())) == {("plain", "accelerate")}
    race = next(iter(bench.races))
    row = {"shape": race[0], **bench.which(race)}
    assert bench.serves({**row, "rounds": 3}) and not bench.serves({**row, "rounds": 4})
    code = {"impl": "accelerate", **bench.code(race, "accelerate")}
    assert bench.code(race, "plain") == {} and not stale(code) and stale(code | {"kernel_hash": "of another version"})
    # weights, gradients and two moments in fp32; or weights alone
    size = suite.parameters(str(folder), "unet")
    assert bench.need("plain", ("tiny full, 4x4 batch 1",)) - bench.need("plain", race) == 12 * size


def test_no_clock_runs_while_a_batch_is_drawn(folder, tmp_path, monkeypatch):
    """Milliseconds of the host, the same for all: of a GPU's short steps they would be a share."""
    now, made = [0.0], contenders.drawn

    def slowly(*arguments):
        now[0] += 1.0
        return made(*arguments)

    monkeypatch.setattr(contenders, "drawn", slowly)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    server = worker.Server(tmp_path)
    server.build("plain", str(folder), name=str(folder), way="full", side=8, batch=1, device="cpu")
    assert server.steps(2)["seconds"] == [0.0, 0.0] and now == [2.0]


@pytest.mark.slow
def test_a_race_of_a_folder(foreign, tmp_path):
    flat = dict(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), attention_head_dim=2)
    folder = foreign.write(tmp_path / "flat", "sd", up_block_types=("CrossAttnUpBlock2D",), **flat)
    names = ("accelerate-compile",)
    bench = suite.TuningBench({str(folder): 8}, ("full",), 1, 2, names, "cpu")
    rows = [benchmark["extra_info"] for benchmark in run(bench)["benchmarks"]]
    assert [row["impl"] for row in rows] == list(names) and not bench.wrong, bench.wrong
    assert all(row["rounds"] == 2 and row["gradient_error"] <= 1.5 * row["half_gradient_error"] for row in rows)
    assert "accelerate-compile" in as_markdown(KIND.columns, rows, stale)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--models", "sd-9"), "--models sd-9: neither one of sd-1.5"),
        (("--models", "sd-1.5+ip-adapter"), "IP-Adapters are not fine-tuned here, give sd-1.5"),
        (("--models", "sd-1.5", "--size", "500"), "--size 500: sd-1.5 takes multiples of 64"),
        (("--models", "sd-1.5", "--only", "fast"), "--only fast: choose some of plain, accelerate-fp32"),
        (("--models", "sd-1.5", "--processes", "2"), "--processes says nothing to --models"),
        (("--size", "64"), "--size is for --models"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys, monkeypatch):
    monkeypatch.setattr(command, "need", lambda *packages: None)
    assert main(["bench", "train", *options]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
