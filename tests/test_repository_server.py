"""A model repository in a real Triton Inference Server, asked by its own client.

The server comes in the package nvidia-pytriton, with the Python backend alone; `triton_onnxruntime.py` stands for the
other one. It is installed for these tests, into a folder of theirs, with the numpy that its backend was built for.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from semantica.cli import main
from semantica.engines import load_engine
from semantica.pipelines.bundle import BundlePipeline
from semantica.solvers import noise

grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STORED = HERE / "stored" / "bundle"
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
KINDS = {"uint8": "UINT8", "int64": "INT64", "float32": "FP32"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The server's binary, its Python backend, and the stand-in for that of ONNX Runtime: a folder `backends`."""
    folder, stub = tmp_path_factory.mktemp("tritonserver"), f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-P", "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip(f"{' and '.join(PACKAGES)} cannot be installed here")
    server, python = folder / "pytriton" / "tritonserver", folder / "backends" / "python"
    shutil.copytree(server / "backends", folder / "backends")
    shutil.copy(server / "python_backend_stubs" / stub / "triton_python_backend_stub", python)
    for path in (server / "bin" / "tritonserver", python / "triton_python_backend_stub"):
        path.chmod(0o755)
    # the backend runs its Python apart from any environment, and looks for modules beside itself
    for name in ("numpy", "numpy.libs"):
        (python / name).symlink_to(folder / name)
    (folder / "backends" / "onnxruntime").mkdir()
    shutil.copy(HERE / "triton_onnxruntime.py", folder / "backends" / "onnxruntime" / "model.py")
    packages = Path(onnxruntime.__file__).parents[1]
    (folder / "backends" / "onnxruntime" / "packages").write_text(str(packages))
    return folder


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def client(installed, tmp_path_factory):
    """A client of a server that has loaded the repository, as the verb wrote it."""
    folder = tmp_path_factory.mktemp("repository")
    assert main(["export", "--model", str(STORED), "--triton", str(folder / "models")]) == 0
    port, log = free_port(), (folder / "log").open("w")
    server = subprocess.Popen(
        [
            str(installed / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={folder / 'models'}", f"--backend-directory={installed / 'backends'}",
            f"--grpc-port={port}", "--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false",
            "--strict-readiness=true", "--exit-timeout-secs=5", "--disable-auto-complete-config",
        ],
        env=os.environ | {"LD_LIBRARY_PATH": str(installed / "nvidia_pytriton.libs")}, stdout=log, stderr=log,
    )  # fmt: skip
    made = grpc.InferenceServerClient(f"127.0.0.1:{port}")
    end = time.monotonic() + 90
    while not ready(made):
        said = Path(log.name).read_text()
        assert server.poll() is None and time.monotonic() < end, said
        time.sleep(0.2)
    yield made
    made.close()
    server.terminate()
    server.wait(30)


def ready(client) -> bool:
    try:
        return client.is_server_ready()
    except Exception:
        return False


@pytest.fixture(scope="module")
def pipeline() -> BundlePipeline:
    return BundlePipeline(load_engine(STORED, "onnxruntime", "cpu"))


def ask(client, model: str, **arrays: np.ndarray) -> np.ndarray:
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpc.InferInput(name, list(array.shape), KINDS[str(array.dtype)]))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs, client_timeout=60).as_numpy("images")


def settings(rows: int, steps: int, guidance: float, seed: int) -> dict[str, np.ndarray]:
    values = {"steps": (steps, np.int64), "guidance": (guidance, np.float32), "seed": (seed, np.int64)}
    return {name: np.full((rows, 1), value, kind) for name, (value, kind) in values.items()}


def expected(pipeline, picture: np.ndarray, count: int, steps: int, guidance: float, seed: int, **more) -> np.ndarray:
    made = pipeline(
        Image.fromarray(picture), num_images_per_prompt=count, num_inference_steps=steps, guidance_scale=guidance,
        seed=seed, **more,
    ).images  # fmt: skip
    return np.stack([np.asarray(image) for image in made])


def apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


def asked(client) -> int:
    """Rows that the denoiser was asked for so far."""
    told = client.get_inference_statistics("variations_denoise", as_json=True)["model_stats"][0]
    return int(told["inference_count"])


def test_many_clients_get_the_pipelines_images(client, pipeline):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    cases = [(2 + i % 3, (1.0, 2.5)[i % 2], i) for i in range(len(pictures))]

    def one(i: int) -> np.ndarray:
        return ask(client, "variations", image=np.repeat(pictures[i : i + 1], 2, 0), **settings(2, *cases[i]))

    # warming up has asked for some
    before = asked(client)
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(3):
            for i, made in enumerate(pool.map(one, range(len(cases)))):
                # batches differ from time to time, and round otherwise
                assert apart(made, expected(pipeline, pictures[i], 2, *cases[i])) <= 1
    rows = sum(2 * steps * (2 if guidance != 1 else 1) for steps, guidance, _ in cases)
    assert asked(client) - before == 3 * rows


def test_the_one_file_gives_them_too(client, pipeline):
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    drawn = np.stack([noise(5, (3, 32, 32), 0, j) for j in range(2)])
    numbers = {"steps": np.array([4], np.int64), "guidance": np.array([1.5], np.float32)}
    made = ask(client, "variations_one_file", image=np.stack([picture] * 2), noise=drawn, **numbers)
    assert apart(made, expected(pipeline, picture, 2, 4, 1.5, 5)) <= 1
    loop = ask(client, "variations", image=np.stack([picture] * 2), **settings(2, 4, 1.5, 5))
    assert apart(made, loop) <= 1


def test_what_a_client_does_wrong_it_is_told(client):
    from tritonclient.utils import InferenceServerException

    picture = np.zeros((1, 32, 32, 3), np.uint8)
    for change, says in (
        ({"steps": np.zeros((1, 1), np.int64)}, "number of sampling steps 0 must be at least 1"),
        ({"guidance": np.full((1, 1), np.nan, np.float32)}, "guidance scale nan must be a number"),
        ({"noise": np.zeros((1, 3, 32, 31), np.float32)}, "unexpected shape for input 'noise'"),
        ({"image": np.zeros((17, 32, 32, 3), np.uint8)}, "request batch-size must be <= 16"),
    ):
        with pytest.raises(InferenceServerException, match=says) as caught:
            ask(client, "variations", **{"image": picture, **change})
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert ask(client, "variations", image=picture).shape == (1, 32, 32, 3)
