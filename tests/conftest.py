import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# the cores are shared between the processes of a run, and between what each of these starts
if several := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // several))
    # a bench that a test starts is no part of the run: pytest-benchmark would time nothing
    os.environ.pop("PYTEST_XDIST_WORKER", None)

# the same examples on every machine, and no example fails because a machine is slow
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def interpreted():
    """A function that runs pytest on a file of this folder where Triton interprets its kernels: none may be skipped or
    fail. It gives how many there were.

    Triton reads the switch when it is imported, hence a process of its own.
    """

    def interpreted(path: str, *options: str) -> int:
        here = Path(__file__).parent
        # -P: the root of the repository must not be on sys.path
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / path), *options]
        done = subprocess.run(
            command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        assert done.returncode == 0 and " passed" in summary and "skipped" not in summary, done.stdout + done.stderr
        return int(re.search(r"(\d+) passed", summary)[1])

    return interpreted


@pytest.fixture(scope="session")
def torchrun():
    """A function that starts a command in several processes on this machine: (arguments, processes, options)."""

    def start(*arguments: str, processes: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen:
        # -P: the root of the repository must not be on sys.path
        launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, *options, "--no-python", sys.executable, "-P", *arguments]
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def side_by_side():
    """A function that starts one process of a group for each command, as Slurm does: no torchrun ends any of them."""

    started = []

    def start(*commands: list[str], world: int | None = None, first: int = 0) -> list[subprocess.Popen]:
        """world: more processes than are started; first: the rank of the first command."""
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        size = str(world or len(commands))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", *command],
                env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, command in enumerate(commands, first)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 small pictures in six groups, each of a colour of its own; to be copied before anything is changed in them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for group in range(6):
        (root / f"g{group}").mkdir()
        base = rng.integers(0, 256, 3)
        for i in range(4):
            noise = rng.integers(-30, 30, (36, 36, 3))
            Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(root / f"g{group}" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def crawl():
    """The module `crawl.py` of this folder, which makes crawls."""
    pytest.importorskip("warcio")
    spec = importlib.util.spec_from_file_location("crawl", Path(__file__).parent / "crawl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pretend():
    """The module `pretend.py` of this folder, which pretends CUDA devices."""
    spec = importlib.util.spec_from_file_location("pretend", Path(__file__).parent / "pretend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def foreign():
    """The module `foreign.py` of this folder, which writes folders of diffusers' pipelines."""
    spec = importlib.util.spec_from_file_location("foreign", Path(__file__).parent / "foreign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def served():
    """The module `served.py` of this folder, which runs servers in threads."""
    pytest.importorskip("fastapi")
    spec = importlib.util.spec_from_file_location("served", Path(__file__).parent / "served.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda(pretend, monkeypatch):
    """Two CUDA devices that are not there, in place of torch's: see `pretend.py`."""
    return pretend.PretendedCuda().install(monkeypatch)


@pytest.fixture(scope="session")
def save_tower():
    """A function that writes a small random DINOv2, CLIP or SigLIP in transformers' format, and returns it."""

    def save(folder: Path, kind: str):
        import torch
        import transformers

        torch.manual_seed(0)
        tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        if kind == "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(**tiny, patch_size=14, image_size=70))
        elif kind == "clip":
            vision = dict(**tiny, patch_size=16, image_size=64)
            text = dict(tiny, vocab_size=50, max_position_embeddings=8)
            model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
        else:
            vision = transformers.SiglipVisionConfig(**tiny, patch_size=16, image_size=64)
            model = transformers.SiglipVisionModel(vision)
        model.save_pretrained(folder)
        settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return model.eval()

    return save


@pytest.fixture(scope="session")
def make_run():
    """A function that writes a small run folder whose network is random throughout."""

    def make(folder: Path, streams: tuple[str, ...] = ("image",), conditioning: str = "both", encoder=None) -> Path:
        import torch

        from semantica import SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder

        torch.manual_seed(0)
        encoder = encoder or ViTEncoder(image_size=16, patch_size=4, width=64, depth=1, heads=2)
        unet = UViT(
            image_size=16, patch_size=2, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
            streams=dict.fromkeys(streams, encoder.token_dim), conditioning=conditioning,
        )  # fmt: skip
        with torch.no_grad():
            # layers that start as zeros would hide what comes before them
            for p in unet.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        SemanticaPipeline(unet, encoder, SemanticaScheduler(16, reference=16)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def small_run(make_run, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def bundles(small_run, tmp_path_factory) -> dict[str, Path]:
    """The small run's bundles by precision, made by the command; to be copied before anything is changed in them."""
    from semantica.cli import main

    folder = tmp_path_factory.mktemp("bundles")
    stale = folder / ".fp32.incomplete"
    stale.mkdir()
    (stale / "left.onnx").write_bytes(b"by an export that was killed")
    made = {precision: folder / precision for precision in ("fp32", "fp16", "bf16")}
    for precision, out in made.items():
        options = ["--precision", precision, "--levels", "4", "--steps", "3"]
        assert main(["export", "--model", str(small_run), "--out", str(out), *options]) == 0
    assert {p.name for p in folder.iterdir()} == set(made) and not (made["fp32"] / "left.onnx").exists()
    return made


@pytest.fixture
def picture(tmp_path) -> Path:
    """A small picture of smooth patches."""
    patches = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(patches.repeat(8, 0).repeat(8, 1)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a random DINOv2 for 28 px, `dino`, and pictures of six groups, `photos`."""
    import torch
    import transformers

    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    tower = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(tower).save_pretrained(home / "dino")
    rng = np.random.default_rng(0)
    for group in range(6):
        (home / "photos" / f"g{group}").mkdir(parents=True)
        for i in range(7):
            pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
            Image.fromarray(pixels).save(home / "photos" / f"g{group}" / f"{i}.png")
    return home


@pytest.fixture(scope="session")
def stored(home, tmp_path_factory) -> Path:
    """Tokens of `home`'s pictures."""
    from semantica.cli import main

    out = tmp_path_factory.mktemp("stored") / "tokens"
    options = ["--encoder", home / "dino", "--encoder-size", 28, "--precision", "fp32", "--processes", 1]
    assert main([str(a) for a in ("pairs", "--tokens", home / "photos", "--out", out, *options)]) == 0
    return out
