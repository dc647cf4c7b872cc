"""`semantica bench sample` on public models: the results are those of stock diffusers, mistakes are one line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from semantica.benchmarks.harness.process import Entrant, Wrong
from semantica.benchmarks.harness.sources import IN_TORCH, stale
from semantica.benchmarks.harness.table import as_markdown, cells
from semantica.benchmarks.kernels.public import split
from semantica.benchmarks.sampling import command
from semantica.benchmarks.unets import steering, suite, table, worker
from semantica.benchmarks.unets.bundles import make, pipeline_of, rows_of, schedule_of
from semantica.benchmarks.unets.contenders import CONTENDERS, Build, builder_of, rungs, stock_of
from semantica.benchmarks.unets.engines import ENGINES
from semantica.benchmarks.unets.models import contents, operations
from semantica.cli import main
from semantica.engines import Bundle
from semantica.engines.bundle import REFERENCE, WEIGHTS
from semantica.export.config import ExportConfig
from semantica.export.foreign import describe
from semantica.export.onnx import write_weights
from semantica.export.program import Encode, capture
from semantica.export.rebuild import rebuilt
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling


@pytest.fixture(scope="module")
def folder(foreign, tmp_path_factory):
    return foreign.write(tmp_path_factory.mktemp("public") / "tiny", "sd")


@pytest.mark.parametrize("name", ["accelerate-fp32", "denoiser-eager"])
def test_each_way_makes_the_latents_of_stock_diffusers(folder, name):
    build = Build(folder, "unet", "", "cpu")
    content = contents(str(folder), "unet", 3, 1, 2)
    expected = builder_of("plain")(build)[0](content, 2, 7.5)
    call, arithmetic = builder_of(name)(build)
    error = suite.distance(call(content, 2, 7.5), expected)
    assert error < (1e-4 if arithmetic == "fp32" else 0.1), (arithmetic, error)
    other = contents(str(folder), "unet", 3, 2, 2)
    assert (other["z"] == content["z"]).all() and suite.distance(call(other, 2, 7.5), expected) > 0.2


def test_the_decoder_and_its_rungs(folder):
    build, content = Build(folder, "decoder", "", "cpu"), contents(str(folder), "decoder", 3, 0, 1)
    made = [builder_of(name)(build)[0](content, 1, 0.0) for name in ("plain", "+ channels last", "accelerate-fp32")]
    assert made[0].shape == (1, 3, 64, 64)
    assert all(suite.distance(pictures, made[0]) < 1e-5 for pictures in made[1:])
    assert list(rungs("unet"))[-2:] == ["+ fused", "+ condition once"] and list(rungs("decoder"))[-1] == "+ fused"


@pytest.mark.parametrize("kind, adapter", [("sd", ""), ("sd", "ip-adapter"), ("xl", "")])
def test_what_is_exported_computes_the_same_from_tokens(folder, foreign, tmp_path, kind, adapter):
    """A bundle's encoders hand on what a content holds: tokens, what is pooled, and an adapter's pictures."""
    path = folder if kind == "sd" else foreign.write(tmp_path / "model", kind)
    content = contents(str(path), "unet", 3, 1, 2) | (contents(f"{path}+{adapter}", "unet", 3, 1, 2) if adapter else {})
    expected = builder_of("plain")(Build(path, "unet", adapter, "cpu"))[0](content, 2, 7.5)
    pipe = pipeline_of(path, f"{path}+{adapter}" if adapter else str(path), adapter)
    rows = {name: torch.from_numpy(array) for name, array in rows_of(content).items()}
    assert set(rows) == set(pipe.unet.stream_names) == set(pipe.encoder.encoders)
    with torch.no_grad():
        condition = pipe.unet.condition(pipe.encoder(rows))
        schedule = schedule_of(path, 8)
        settings = Sampling.of(schedule.config, steps=2, guidance=7.5, solver="ddim")
        made = sample(pipe.unet, torch.from_numpy(content["z"]), condition, None, schedule, settings)
    assert suite.distance(made.numpy(), expected) < 1e-4


@torch.no_grad()
def test_what_is_compiled_for_a_race_comes_from_its_bundle(folder, tmp_path):
    pipe = pipeline_of(folder, f"{folder}+ip-adapter", "ip-adapter")
    manifest = describe(ExportConfig(folder, tmp_path), pipe, SimpleNamespace(sizes=pipe.unet.null(1).sizes))
    write_weights({"unet": pipe.unet, "encoder": pipe.encoder, "vae": pipe.vae}, tmp_path / WEIGHTS)
    parts = pipe.encoder.encoders
    save_file({f"input.{name}": part.example for name, part in parts.items()}, tmp_path / REFERENCE)
    again = rebuilt(Bundle(tmp_path, json.loads(json.dumps(manifest | {"files": {}}))))
    assert again.encoder.encoders.keys() == parts.keys() == {"text", "image"}
    inputs = [part.examples(2) for part in parts.values()]
    # weights mapped from a file lie in it as they may, and products round by that
    made = [tree_leaves(Encode(p.unet, p.encoder)(*inputs)) for p in (pipe.aligned(), again.aligned())]
    assert len(made[0]) > 4 and all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_an_adapters_cost_is_the_difference_to_the_same_unet_without_it(folder, tmp_path):
    server = worker.Server(tmp_path)
    server.build("accelerate-fp32", str(folder), "unet", "ip-adapter", "cpu", None)
    content = contents(f"{folder}+ip-adapter", "unet", 3, 1, 1)
    np.savez(tmp_path / "content.npz", **content)
    answers = [server.run(2, 7.5), server.run_without(2, 7.5), server.run(2, 7.5)]
    assert all(len(answer["seconds"]) == 1 and answer["seconds"][0] > 0 for answer in answers)
    # memory is that of one model
    assert answers[2]["peak_bytes"] == server.peak
    plain = builder_of("plain")(Build(folder, "unet", "", "cpu"))[0]
    without = {name: array for name, array in content.items() if "image" not in name}
    assert suite.distance(server.without(without, 2, 7.5), plain(without, 2, 7.5)) < 1e-4
    assert suite.distance(np.load(tmp_path / "made.npy"), plain(without, 2, 7.5)) > 1e-2
    assert [stock_of(name, "unet") for name in ("denoiser", "accelerate-fp32", "plain", "onnxruntime")] == [
        "strong", "plain", "plain", "",
    ]  # fmt: skip
    stock = dict(op="unet", shape="a+ip-adapter", device="here", impl="plain", stock="plain", added_us=4e3)
    rows = [stock, stock | dict(impl="accelerate-fp32", added_us=1.5e3), dict(op="unet", impl="onnxruntime")]
    columns = [
        column for column in table.KIND.columns if column.head in ("implementation", "adapter's ms", "of stock's")
    ]
    assert cells(columns, rows) == [
        ("plain", "4.0", "100%"), ("accelerate-fp32", "1.5", "38%"), ("onnxruntime", "", ""),
    ]  # fmt: skip
    # a stock whose cost is within its noise is nothing to compare with
    for error, share in ((1.9e3, "38%"), (2e3, "lost in noise")):
        noisy = [stock | dict(added_error_us=error), rows[1] | dict(added_error_us=1e2)]
        assert cells(columns[1:], noisy)[1] == ("1.5 ± 0.1", share)
    # columns that say nothing are left out
    assert "of stock's" not in as_markdown(columns, rows[2:], lambda row: False)


@pytest.mark.slow
def test_engines_make_the_latents_and_pictures_of_stock_diffusers(foreign, tmp_path):
    flat = dict(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), attention_head_dim=2)
    flat |= dict(up_block_types=("CrossAttnUpBlock2D",), vae={"block_out_channels": (16,)})
    path, out = foreign.write(tmp_path / "model", "sd", **flat), tmp_path / "bundle"
    request = dict(folder=str(path), name=f"{path}+ip-adapter", adapter="ip-adapter", out=str(out), precision="fp32")
    make(request | dict(backend="", batches=[1, 2, 2]))
    before = sorted(out.rglob("*"))
    make(request | dict(backend="", batches=[1, 2, 2]))
    assert sorted(out.rglob("*")) == before
    for stage, steps in (("unet", 2), ("decoder", 1)):
        build = Build(path, stage, "ip-adapter", "cpu", out)
        content = contents(f"{path}+ip-adapter", stage, 3, 1, 1)
        expected = builder_of("plain")(build)[0](content, steps, 7.5)
        for name in ("onnxruntime", "openvino"):
            if not ENGINES[name].why_not("cpu"):
                call, arithmetic = builder_of(name)(build)
                assert arithmetic == "fp32" and suite.distance(call(content, steps, 7.5), expected) < 1e-4, name
    # what is compiled ahead of time reads its inputs in the strides of the examples: those that engines give
    pipe = pipeline_of(path, request["name"], "ip-adapter")
    examples = capture(pipe.unet, pipe.encoder, "fp32").denoise.example_inputs
    assert all(array.is_contiguous() for array in tree_leaves(examples))


@pytest.mark.slow
def test_a_bundle_that_cannot_be_made_is_one_line(folder, tmp_path):
    bench = suite.UNetBench((str(folder),), (1,), (1,), ("plain", "onnxruntime"), "cpu")
    with bench.closing:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        shutil.rmtree(broken / "vae")
        with pytest.raises(Wrong, match="no bundle: .*vae has no safetensors weights"):
            bench.bundle("onnxruntime", str(broken))
        failed = bench.without_bundle(["plain", "onnxruntime"], str(broken), "race")
        assert list(failed) == ["onnxruntime"] and "\n" not in failed["onnxruntime"]


def test_operations_are_twice_for_twice_the_pictures(folder):
    for stage in ("unet", "decoder"):
        assert operations(str(folder), stage, 2) == 2 * operations(str(folder), stage, 1) > 1e6
    assert split("sd-1.5+ip-adapter") == ("sd-1.5", "ip-adapter") and split("a+b") == ("a+b", "")


def test_heats_hold_what_memory_holds():
    assert suite.heats({"a": 3, "b": 3, "c": 5, "d": 9, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert suite.heats({}, 8) == []


def test_what_is_too_far_from_the_truth_is_refused():
    expected = np.ones((1, 4, 2, 2), np.float32)
    for made, reason in (
        (expected * 1.0005, ""), (expected * 1.01, "0.01"), (expected * np.nan, "inf"), (expected[:, :1], "inf"),
    ):  # fmt: skip
        entrant = suite.Raced(Entrant(None))
        entrant.judge(made, expected, "first call")
        assert reason in entrant.reason and bool(reason) == bool(entrant.reason), entrant.reason


def test_races_of_a_folder(folder):
    bench = suite.UNetBench((str(folder),), (1, 2), (1, 4), tuple(CONTENDERS), "cpu")
    names = {race[0]: found for race, found in bench.races.items()}
    assert list(names) == [
        "tiny UNet 8x8, 1 steps batch 1", "tiny UNet 8x8, 4 steps batch 1", "tiny UNet 8x8, 1 steps batch 2",
        "tiny UNet 8x8, 4 steps batch 2", "tiny decoder 8x8 batch 1", "tiny decoder 8x8 batch 2",
    ]  # fmt: skip
    assert "denoiser" in names["tiny UNet 8x8, 1 steps batch 1"] and "denoiser" not in names["tiny decoder 8x8 batch 1"]
    bench.closing.close()


def test_what_is_kept_says_how_it_was_measured_and_of_which_code(folder, monkeypatch):
    made = []
    monkeypatch.setattr(command, "measure", lambda config, bench, kind: made.append(bench))
    assert main(["bench", "sample", "--models", str(folder), "--quick"]) == 0
    (bench,) = made
    race = next(iter(bench.races))
    # of the stock ones nothing is ours, so that what was wrong stays so
    assert bench.quick and bench.code(race, "plain") == bench.code(race, "openvino") == {}
    assert {"onnxruntime", "inductor", *ENGINES} - {*bench.absent} <= {*bench.races[race]}
    assert bench.absent["tensorrt"] == "runs on the GPU only" and bench.code(race, "onnxruntime")["op"] == "unet"
    codes = {name: {"impl": name, **bench.code(race, name)} for name in ("denoiser", "accelerate", "onnxruntime")}
    for code in codes.values():
        assert not stale(code) and stale(code | {"kernel_hash": "of another version"})
    hashes = [code["kernel_hash"] for code in codes.values()]
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(IN_TORCH) == {name for name, contender in CONTENDERS.items() if contender.switches.fused}
    assert not set(IN_TORCH) & set(ENGINES)
    bench.closing.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--models", "sd-1.5,tiny"), "by themselves"),
        (("--models", "sd-1.5", "--only", "fast"), "--only fast: choose"),
        (("--models", "sd-1.5,elsewhere/sd-1.5"), "two are called alike"),
        (("--models", "sd-1.5", "--only", "denoiser", "--stages", "decoder"), "none of these runs such a stage"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys):
    assert main(["bench", "sample", "--quick", *options]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_the_error_of_a_median_is_that_of_repeated_medians():
    drawn = np.random.default_rng(0).normal(5, 3, (2000, 101))
    found = np.mean([suite.error_of_median(list(row)) for row in drawn])
    assert found == pytest.approx(np.median(drawn, 1).std(), rel=0.05)


def test_a_guided_step_without_a_gradient_is_wrong(monkeypatch, capsys):
    """A way that does nothing is fast, and must not be shown as right."""
    truth, row = np.ones((1, 4, 2, 2)), {"seconds": [1.0], "peak_bytes": 2, "built_bytes": 1}
    made = {"stored maps": [truth, truth], "steered": [0 * truth] * 2, "unguided": [0 * truth] * 2}
    monkeypatch.setattr(steering, "folder_of", lambda *_: None)
    monkeypatch.setattr(steering, "contents", lambda *_: {})
    monkeypatch.setattr(steering, "measured", lambda way, *_: (dict(row), made[way]))
    monkeypatch.setattr("sys.argv", ["steering", "--rounds", "1", "--only", *made])
    assert steering.main() == 1
    said = capsys.readouterr().out
    assert "gradients differ: steered\n" in said and said.count("gradient error") == 2
