"""The command line as a user meets it: help, unknown options, one-line errors with exit code 2."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica import cli
from semantica.cli import main
from semantica.options import parse
from semantica.train.data.config import TokensConfig
from semantica.train.pages.command import PairsConfig
from semantica.train.pages.config import MineConfig, ReportConfig, UrlsConfig

VERBS = ("doctor", "demo", "pairs", "train", "sample", "evaluate", "export", "build", "sweep")
RESULTS = sorted(map(str, (Path(__file__).parents[1] / "benchmarks" / "results").glob("*/group_norm*.json")))


def run(*arguments, **options):
    command = [sys.executable, "-P", "-m", "semantica.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_names_that_are_no_text_end_no_command(monkeypatch):
    """As where standard output is strict UTF-8, which it is in most locales."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8"))
    monkeypatch.setitem(cli.VERBS, "say", lambda name, rest: print(*rest) or 0)
    assert main(["say", "bad picture g0/\udcff.png"]) == 0
    assert written.getvalue() == b"bad picture g0/\\udcff.png\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small untrained pipeline on disk."""
    from semantica import SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder

    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=32, depth=1, heads=1, emb_dim=32, streams={"image": 32}
    )
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    folder = tmp_path_factory.mktemp("model") / "run"
    SemanticaPipeline(unet, encoder, SemanticaScheduler(image_size=16)).save_pretrained(folder)
    return folder


def test_sampling_a_run_folder_imports_what_its_networks_need(tmp_path, data, model):
    code = "import sys; from semantica.cli import main; main(sys.argv[1:]); print(*sys.modules, sep='\\n')"
    options = ["--model", model, "--image", data / "a" / "0.png", "-n", "1", "--steps", "1"]
    options += ["--out", tmp_path / "x.png"]
    command = [sys.executable, "-P", "-c", code, "sample", *map(str, options)]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    assert {"torch", "semantica.model.uvit", "diffusers.models.modeling_utils"} <= loaded
    heavy = {"diffusers.pipelines.pipeline_utils", "diffusers.models.autoencoders", "diffusers.guiders"}
    heavy |= {"diffusers.loaders.lora_base", "matplotlib", "onnxruntime", "semantica.train.loop"}
    # diffusers imports peft where that is installed, and peft asks for scipy
    heavy |= set() if "peft" in loaded else {"scipy"}
    assert not loaded & heavy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for group in ("a", "b", "c"):
        (root / group).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / group / f"{i}.png")
    return root


def test_help_needs_no_torch():
    code = "import sys; from semantica.cli import main; main(['--help']); print({'torch', 'numpy'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("set()")
    assert all(f"\n  {verb} " in out for verb in (*VERBS, "bench"))
    assert main(["--version"]) == 0 and main([]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_refuses_unknown_options(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0 and f"semantica {verb}" in capsys.readouterr().out
    needed = {"build": ["bundle"], "sweep": ["sweep.json"]}.get(verb, [])
    assert main([verb, *needed, "--colour", "blue"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("semantica: ") and "--colour" in error and "\n" not in error


def test_impossible_values_are_one_line(capsys):
    for arguments, words in (
        (["train", "--data", "x", "--out", "y", "--preset", "huge"], ("preset", "tiny")),
        (["train", "--data", "x", "--out", "y", "--steps", "many"], ("steps", "many")),
        (["train", "--data", "x"], ("--out",)),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert all(word in error for word in words) and "\n" not in error and "│" not in error, error


def test_a_registered_verb_is_one_of_them(monkeypatch, capsys):
    monkeypatch.setattr(cli, "VERBS", dict(cli.VERBS))
    cli.register_verb("presets", "sizes of models", "semantica.doctor:run", "semantica.doctor:DoctorConfig")
    assert main(["presets", "--presets"]) == 0 and "tiny" in capsys.readouterr().out
    assert main(["--help"]) == 0 and re.search(r"\n  presets +sizes of models\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["in.warc", "--out", "shards", "--engine", "ray"], MineConfig),
        (["in.warc", "--out", "shards", "--on", "ray"], MineConfig),
        (["in.warc", "--out", "urls.parquet", "--urls-only"], UrlsConfig),
        (["--report", "shards", "--low", "0.3"], ReportConfig),
        (["--tokens", "photos", "--encoder", "dino"], TokensConfig),
    ],
)
def test_pairs_is_four_commands_in_one(arguments, kind):
    chosen = parse(PairsConfig, "pairs", arguments).chosen()
    assert type(chosen) is kind
    assert getattr(chosen, "on", "ray") == "ray" and getattr(chosen, "low", 0.3) == 0.3


def test_unknown_verbs_and_mistakes_are_one_line(capsys, tmp_path, data, model):
    taken = tmp_path / "taken"
    taken.mkdir()
    picture = data / "a" / "0.png"
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for arguments, message in (
        (["paint"], "unknown verb 'paint'"),
        (["pairs"], "nothing to do: give crawls"),
        (["pairs", picture, "--out", tmp_path / "run", "--low", "0.1"], "--low and --high belong to --report"),
        (["pairs", "--report", data, "--out", tmp_path / "run"], "--report takes one folder"),
        (["pairs", "--tokens", data, "--urls-only"], "--tokens takes no crawl"),
        (["pairs", "--tokens", data, "--processes", "0"], "--processes is 0"),
        (["pairs", "--tokens", data, "--min-side", "32"], "--min-side says nothing to --tokens: leave it out"),
        (["pairs", picture, "--out", taken, "--encoder-size", "98"], "--encoder-size says nothing to mining"),
        (["pairs", data, "--resize", "64", "--device", "cpu"], "--device says nothing to --resize"),
        (["pairs", "--report", data, "--processes", "2"], "--processes says nothing to --report"),
        (["pairs", data, "--out", "a.parquet", "--urls-only", "--compile"], "--compile says nothing to --urls-only"),
        (["train", "--data", tmp_path / "no", "--out", tmp_path / "run"], "does not exist"),
        (["train", "--data", data, "--out", tmp_path / "run", "--steps", "0"], "--steps is 0"),
        (["sample", "--model", tmp_path / "no", "--image", picture], "is not a folder"),
        (["sample", "--model", data, "--image", picture], "has no model_index.json"),
        (["sample", "--model", model, "--image", tmp_path / "no.png"], "no.png"),
        (["sample", "--model", model, "--image", text], "text.jpg"),
        (["sample", "--model", model, "--image", picture, "-n", "0"], "--n is 0"),
        (["sample", "--model", model, "--image", picture, "--ip-scale", "2"], "--ip-scale is nothing without"),
        (["sample", "--model", model, "--image", picture, "--out", taken], "exists: choose another folder"),
        (["sample", "--model", model, "--image", picture, "--device", "abacus"], "device 'abacus'"),
        (["evaluate", "--data", data], "give either --model or --images"),
        (["evaluate", "--data", data, "--model", model, "--n", "1"], "--n is 1"),
        (["evaluate", "--data", data, "--images", taken], "taken"),
    ):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("semantica: ") and message in error and "\n" not in error, error
    assert list(taken.iterdir()) == [] and not (tmp_path / "run").exists()


def test_sampling_writes_a_grid_or_single_pictures_and_is_repeatable(tmp_path, data, model):
    pictures = [data / "a" / "0.png", data / "b" / "1.png"]
    options = ["--model", model, "--image", *pictures, "-n", "3", "--steps", "2", "--seed", "5"]
    done = run("sample", *options, "--out", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height == 2 * 18 + 2 and grid.width >= 4 * 18
        first = np.asarray(grid)
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["seed"] == 5 and record["guidance"] == 1.5 and record["model"] == str(model)
    assert main([str(a) for a in ("sample", *options, "--out", tmp_path / "again.png")]) == 0
    assert np.array_equal(first, np.asarray(Image.open(tmp_path / "again.png")))
    assert main([str(a) for a in ("sample", *options, "--out", tmp_path / "single")]) == 0
    names = sorted(p.name for p in (tmp_path / "single").iterdir())
    assert names == [*(f"{i:03d}-{s}-{j}.png" for i, s in enumerate("01") for j in range(3)), "config.json"]
    # the picture does not depend on what else is made with it
    one = ["--image", pictures[0], "-n", "1", "--steps", "2", "--seed", "5", "--out", tmp_path / "one"]
    assert main([str(a) for a in ("sample", "--model", model, *one)]) == 0
    alone, among = (np.asarray(Image.open(tmp_path / f / "000-0-0.png")).astype(int) for f in ("one", "single"))
    assert np.abs(alone - among).max() <= 1


def test_doctor_answers(capsys):
    assert main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    assert "group_norm" in out and "cross_attention" in out and "torch" in out


@pytest.mark.parametrize("arguments, code", [(["doctor"], 1), (["bench", "table", *RESULTS], 141)])
def test_a_reader_that_leaves_early_gets_no_traceback(arguments, code):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "semantica.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")
