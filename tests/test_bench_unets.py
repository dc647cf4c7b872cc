"""`semantica bench sample` on public models: the results are those of stock diffusers, mistakes are one line."""

import numpy as np
import pytest

from semantica.benchmarks.harness.process import Entrant
from semantica.benchmarks.harness.sources import stale
from semantica.benchmarks.kernels.public import split
from semantica.benchmarks.sampling import command
from semantica.benchmarks.unets import suite
from semantica.benchmarks.unets.contenders import CONTENDERS, Build, builder_of, rungs
from semantica.benchmarks.unets.models import contents, operations
from semantica.cli import main


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
    assert bench.quick and bench.code(race, "plain") == {}
    code = {"impl": "denoiser", **bench.code(race, "denoiser")}
    assert not stale(code) and stale(code | {"kernel_hash": "of another version"})
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
