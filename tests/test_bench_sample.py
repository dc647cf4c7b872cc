"""`semantica bench sample`: cheating is caught, the rungs make the pipeline's images, mistakes are one line."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from semantica import SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder
from semantica.benchmarks import bench
from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness import sources, store, table
from semantica.benchmarks.harness.process import Process, Wrong
from semantica.benchmarks.kernels import command as bench_kernels
from semantica.benchmarks.sampling import models as sample_models
from semantica.benchmarks.sampling import suite
from semantica.benchmarks.sampling.contenders import CONTENDERS, Build, Contender, builder_of, ladder_names
from semantica.benchmarks.sampling.race import BOUND, GUIDANCE, ModelRace, judge, psnr
from semantica.benchmarks.sampling.worker import Server
from semantica.cli import main
from semantica.engines import BACKENDS

FEW = timing.Protocol(warmup=1, least=4, most=4, seconds=0.0)


def test_psnr_is_that_of_images_between_minus_one_and_one():
    a = np.zeros((2, 3, 4, 4), np.float32)
    assert psnr(a + 0.2, a) == pytest.approx(20.0, abs=1e-4)
    # beyond the range of images nothing is visible
    assert psnr(a + 5, a + 1) > 150
    for bad, reason in ((a[:1], "shape"), (np.full_like(a, np.nan), "NaN"), (a + 0.1, "26.0 dB")):
        with pytest.raises(Wrong, match=reason):
            judge(bad, a, "it")
    assert judge(a + 0.03, a, "it") > BOUND


def honest(images, noise, steps):
    return np.tanh(noise * 0.5 + images.mean((2, 3), keepdims=True))


def cached():
    kept = []

    def call(*inputs):
        kept.append(honest(*inputs))
        return kept[0]

    return call


def late_cached():
    """Honest while it is being checked, then the same images for ever."""
    kept, number = [], itertools.count()

    def call(*inputs):
        if next(number) < 3:
            kept[:] = [honest(*inputs)]
        return kept[0]

    return call


def constant_condition(images, noise, steps):
    return honest(np.zeros_like(images), noise, steps)


def constant_noise(images, noise, steps):
    return honest(images, np.zeros_like(noise), steps)


def broken(images, noise, steps):
    raise Wrong("ValueError: no such kernel")


CHEATS = {
    "honest": (lambda: honest, ""),
    "close": (lambda: lambda *inputs: honest(*inputs) + 0.005, ""),
    "cached": (cached, "second call"),
    "late_cached": (late_cached, "timed call"),
    "constant_condition": (lambda: constant_condition, "first call"),
    "constant_noise": (lambda: constant_noise, "first call"),
    "nan": (lambda: lambda *inputs: honest(*inputs) * np.nan, "NaN"),
    "part": (lambda: lambda *inputs: honest(*inputs)[:1], "shape"),
    "broken": (lambda: broken, "no such kernel"),
}


class InProcess:
    """As `Sampler`, without a process."""

    calls = {"reference": lambda: honest, **{name: made for name, (made, _) in CHEATS.items()}}

    def __init__(self, name, place):
        self.call = self.calls[name]()

    def build(self, *_):
        return {"seconds": 0.5, "arithmetic": "fp32"}

    def sample(self, content, steps):
        return {"seconds": [0.001], "peak_bytes": 7}, self.call(*content, steps)

    def close(self):
        pass


@pytest.fixture
def model(tmp_path):
    for part, size in (("unet", 8), ("encoder", 16)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"image_size": size}))
    return tmp_path


@pytest.mark.parametrize("order", [1, -1])
def test_cheats_are_caught_and_not_timed(model, order):
    race = ModelRace(model, list(CHEATS)[::order], model, "cpu", True, {}, {}, InProcess)
    results, ceilings = race.race(2, 3, FEW)
    for name, (_, reason) in CHEATS.items():
        found = results[name].reason
        assert reason in found if reason else not found, (name, found)
    assert len(results["honest"].times.device) == 4 and results["honest"].psnr > 100
    # 10 log10(4 / 0.005^2)
    assert results["close"].psnr == pytest.approx(52.04, abs=0.1)
    assert all(rate > 0 for rate in ceilings.values())


def test_a_cheat_among_cheats_is_caught_too(model):
    """No honest contender to compare with: the round that is examined afterwards has to do it."""
    race = ModelRace(model, ["late_cached"], model, "cpu", True, {}, {}, InProcess)
    protocol = timing.Protocol(warmup=4, least=3, most=3, seconds=0.0)
    results, _ = race.race(1, 3, protocol)
    assert "timed call" in results["late_cached"].reason


def test_a_model_that_ignores_its_condition_proves_nothing(model, monkeypatch):
    monkeypatch.setitem(InProcess.calls, "reference", lambda: constant_condition)
    results, _ = ModelRace(model, ["honest"], model, "cpu", True, {}, {}, InProcess).race(1, 3, FEW)
    assert "ignores its condition" in results["honest"].reason and not results["honest"].times.device


def test_who_has_no_bundle_does_not_start(model):
    race = ModelRace(model, ["honest", "engine"], model, "cpu", True, {}, {"engine": "export failed"}, InProcess)
    results, _ = race.race(1, 3, FEW)
    assert results["engine"].reason == "export failed" and not results["honest"].reason
    assert set(race.samplers) == {"reference", "honest"}


def test_engines_are_built_for_the_batches_that_are_raced(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(suite, "semantica", lambda *arguments: asked.append(arguments))
    bench = suite.SamplingBench(("tiny",), (1, 8), (4,), ("inductor",), "cpu")
    bench.folder = tmp_path / "model"
    assert set(bench.export(tmp_path / "race")[0]) == {"inductor"}
    # guidance doubles them
    assert asked[-1][0] == "build" and asked[-1][-4:] == ("--batches", 1, 2, 16)
    bench.closing.close()


def test_no_two_calls_have_the_same_inputs(model, monkeypatch):
    seen = []

    def remember(images, noise, steps):
        seen.append((images.tobytes(), noise.tobytes()))
        return honest(images, noise, steps)

    monkeypatch.setitem(InProcess.calls, "honest", lambda: remember)
    ModelRace(model, ["honest"], model, "cpu", True, {}, {}, InProcess).race(1, 3, FEW)
    assert len(set(seen)) == len(seen) == 6


def test_a_process_that_ends_or_raises_is_wrong_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(
        "import os, sys\nfrom semantica.benchmarks.harness.process import serve\n"
        "def leave():\n    print('out of memory', file=sys.stderr, flush=True)\n    os._exit(3)\n"
        "def fail():\n    print('noise among the answers')\n    raise ValueError('two\\nlines')\n"
        "serve({'leave': leave, 'fail': fail})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, Path(store.__file__).parents[1]))))
    process = Process("bad", "bad one: +1", tmp_path)
    with pytest.raises(Wrong, match="^ValueError: two lines$"):
        process.ask("fail")
    with pytest.raises(Wrong, match="ended with code 3: out of memory"):
        process.ask("leave")
    process.close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
        streams={"image": encoder.token_dim},
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("run") / "model"
    SemanticaPipeline(unet, encoder, SemanticaScheduler(image_size=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [n for n in ladder_names("cpu") if "compile" not in n and "rearr" not in n][:4])
def test_rungs_make_the_pipelines_images(run_folder, name):
    """Up to bf16 and compiling, which change the images or take long, the rungs are exact."""
    build = Build(run_folder, "cpu", True)
    reference, _ = builder_of("reference")(build)
    content = sample_models.contents(3, 2, 16, 16)
    expected = reference(*content, 4, GUIDANCE)
    actual, arithmetic = builder_of(name)(build)
    assert arithmetic == "fp32"
    np.testing.assert_allclose(actual(*content, 4, GUIDANCE), expected.clip(-1, 1), rtol=0, atol=1e-4)
    assert np.abs(expected - reference(content[0], content[1], 4, 1.0)).max() > 1e-3, "guidance must matter here"


def test_half_precision_rungs_and_ours_are_close(run_folder):
    build = Build(run_folder, "cpu", True)
    content = sample_models.contents(3, 2, 16, 16)
    expected = builder_of("reference")(build)[0](*content, 4, GUIDANCE)
    for name in ("+ bf16", "torch-eager"):
        call, arithmetic = builder_of(name)(build)
        assert arithmetic == "bf16" and BOUND < psnr(call(*content, 4, GUIDANCE), expected) < 100


def test_contents_are_pictures_and_noise():
    images, noise = sample_models.contents(1, 4, 8, 32)
    assert images.shape == (4, 3, 32, 32) and images.dtype == noise.dtype == np.float32
    assert np.abs(images).max() <= 1 and 0.8 < noise.std() < 1.2
    # squares of 8 x 8 pixels
    assert (images[:, :, ::8, ::8].repeat(8, 2).repeat(8, 3) == images).all()
    other, _ = sample_models.contents(2, 4, 8, 32)
    assert not np.array_equal(images, other)


@pytest.mark.slow
def test_from_the_command_line(run_folder, tmp_path, capsys):
    rows, page, picture = (tmp_path / name for name in ("rows.json", "page.html", "rows.png"))
    options = ["--models", str(run_folder), "--only", "plain,torch-eager", "--quick", "--batch", "1", "2"]
    files = ["--json", str(rows), "--html", str(page), "--png", str(picture)]
    assert main(["bench", "sample", *options, "--steps", "3", *files]) == 0
    said = capsys.readouterr().out
    assert "torch-eager" in said and "against plain" in said
    stored = store.rows(rows)
    assert [(row["impl"], row["layout"]) for row in stored] == [
        ("plain", "SingleStream"), ("torch-eager", "SingleStream"), ("plain", "Offline"), ("torch-eager", "Offline"),
    ]  # fmt: skip
    for row in stored:
        assert row["psnr_db"] > BOUND and row["images_per_s"] > 0 and row["peak_bytes"] > 1e8
        assert row["median_us"] <= row["p95_us"] <= row["p99_us"] and not sources.stale(row)
    assert "model batch 1, 3 steps" in page.read_text() and picture.stat().st_size > 1000
    assert main(["bench", "table", str(rows)]) == 0
    assert "| model batch 2, 3 steps | Offline |" in capsys.readouterr().out
    assert main(["bench", "compare", str(rows), str(rows)]) == 0 and "4 rows in common" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--models", "nonsense"), "neither one of"),
        (("--batch", "0"), "at least 1"),
        (("--only", "plain,fast"), "--only fast: choose some of"),
        (("--impl", "no_such_module:f"), "cannot be imported"),
        (("--json", "no/such/folder/a.json"), "is not a folder"),
        (("--rounds", "0"), "--rounds 0"),
    ],
)
def test_mistakes_are_one_line(options, reason, capsys):
    assert main(["bench", "sample", "--quick", *options]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_every_kind_of_row_has_a_table():
    # the others are no races: their verbs print them
    assert {*bench.KINDS, "scaling", "loading", "sustained"} == set(sources.SOURCES)
    for kind in (bench_kernels.KIND, *bench.KINDS.values()):
        shown = [column.head for column in kind.columns if not column.detail]
        assert len(shown) < len(kind.columns) and "implementation" in shown


def test_every_backend_is_raced_on_every_device_that_runs_it():
    # the network itself races as "plain" and in the ladder
    for backend in (backend for name, backend in BACKENDS.items() if name != "torch"):
        for device, precisions in backend.precisions.items():
            names = {backend.name, f"{backend.name}-{device}"} & CONTENDERS.keys()
            raced = [row for name in names if (row := CONTENDERS[name]).device in ("", device) and row.raced]
            assert raced and all(row.bundle in ("", *precisions) for row in raced), (backend.name, device)


def test_the_memory_of_who_allocates_past_torch_is_not_made_up(tmp_path, monkeypatch):
    assert {name for name, contender in CONTENDERS.items() if contender.outside} == {
        name for name, contender in CONTENDERS.items() if contender.bundle and contender.device == "cuda"
    }
    for name, array in zip(("images", "noise"), sample_models.contents(0, 1, 32, 32)):
        np.save(tmp_path / f"{name}.npy", array)
    for outside in (False, True):
        stub = Contender(lambda build: (lambda *inputs: inputs[1], "fp16"), outside=outside)
        monkeypatch.setitem(CONTENDERS, "stub", stub)
        server = Server(tmp_path)
        server.build("stub", "nowhere", "cpu", True, None, False)
        answer = server.sample(1, 1.0)
        assert (answer["peak_bytes"] is None) == outside
        assert bool(table.mebibytes("peak", "peak_bytes").cell(answer, [])) != outside
