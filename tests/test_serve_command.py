"""`semantica serve` as a process: what it refuses to start with, how it starts, and how it ends."""

import errno
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from semantica.cli import main
from semantica.lock import locked
from semantica.serving import command
from semantica.train.run.folder import LOCK

pytest.importorskip("fastapi")
STORED = Path(__file__).parent / "stored"
BUNDLE, PICTURE = STORED / "bundle", STORED / "images" / "condition-0.png"


@pytest.mark.parametrize(
    "options, words",
    [
        (("--port", "-1"), "--port is -1: give 0 to 65535"),
        (("--port", "65536"), "--port is 65536: give 0 to 65535"),
        (("--max-batch", "0"), "--max-batch is 0: give at least 1"),
        (("--max-batch", "1000"), "--max-batch 1000: this engine makes at most 64 images at once"),
        (("--queue", "-5"), "--queue is -5: give at least 1"),
        (("--steps", "0"), "--steps is 0: give at least 1"),
        (("--steps", "101"), "--steps is 101, above --max-steps 100"),
        (("--max-n", "0"), "--max-n is 0: give at least 1"),
        (("--max-upload", "0"), "--max-upload is 0: give at least 1"),
        (("--max-pixels", "-1"), "--max-pixels is -1: give at least 1"),
        (("--connections", "0"), "--connections is 0: give at least 1"),
        (("--deadline", "nan"), "--deadline is nan: give seconds above 0"),
        (("--grace", "inf"), "--grace is inf: give seconds above 0"),
        (("--patience", "0"), "--patience is 0.0: give seconds above 0"),
        (("--max-wait", "-1"), "--max-wait is -1.0: give milliseconds, 0 or more"),
        (("--guidance", "nan"), "--guidance is nan: give a number from -100 to 100"),
        (("--api-key", "short"), "API key 1 cannot be used: give at least 8"),
        (("--api-key", "a key with spaces"), "API key 1 cannot be used"),
        (("--api-key-file", "/nowhere"), "--api-key-file /nowhere cannot be read (No such file"),
        (("--api-key-file", os.devnull), "has no key: give one in a line"),
        (("--tls-cert", "a.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"), "--tls-cert /nowhere.pem is not a file"),
        (("--tls-cert", __file__, "--tls-key", __file__), "cannot be used ([SSL]"),
        (("--host", "203.0.113.1"), "cannot listen on 203.0.113.1 port 0"),
        (("--workers", "0"), "--workers"),
        (("--engine", "ray", "--replicas", "0", "1"), "--replicas is 0 1: give the fewest and the most"),
        (("--engine", "ray", "--replicas", "3", "2"), "--replicas is 3 2: give the fewest and the most"),
        (("--engine", "ray", "--ongoing", "0"), "--ongoing is 0: give at least 1"),
        (("--engine", "ray", "--device", "cuda:1"), "--device cuda:1: Ray gives each replica a GPU"),
        (("--replicas", "2", "2"), "--replicas is nothing without --engine ray"),
        (("--replica-engine", "torch"), "--replica-engine is nothing without --engine ray"),
        (("--engine", "tensorrt"), "engine 'tensorrt'"),
    ],
)
def test_what_it_does_not_start_with(options, words, capsys):
    assert main(["serve", "--model", str(BUNDLE), "--port", "0", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err


def test_replicas_need_ray_serve(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "smart_open" else name)
    assert main(["serve", "--model", str(BUNDLE), "--port", "0", "--engine", "ray"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and 'pip install "semantica-diffusion[serve-ray]"' in said.err


def test_models_that_it_does_not_serve(tmp_path, capsys):
    changed, training = tmp_path / "changed", tmp_path / "training"
    shutil.copytree(BUNDLE, changed)
    with (changed / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    shutil.copytree(STORED / "run", training)
    with locked(training / LOCK, "taken"), socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for model, port, words in (
            (changed, 0, "weights.safetensors is not the file that was written"),
            (training, 0, f"{training} is still being trained: wait for that"),
            (tmp_path / "nowhere", 0, "nowhere is not a folder"),
            (BUNDLE, taken, f"cannot listen on 127.0.0.1 port {taken} (Address already in use): choose another --port"),
        ):
            assert main(["serve", "--model", str(model), "--port", str(port)]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err.count("\n") == 1 and words in said.err
    # the lock is looked at and left alone, and a free one is no reason to refuse
    assert not (training / LOCK).exists()


# what the process has imported is said when it ends
PROGRAM = """
import sys
from semantica.cli import main
code = main(["serve", *sys.argv[1:]])
print("torch" in sys.modules, code)
sys.exit(code)
"""


@contextmanager
def started(*options: str, model: Path = BUNDLE):
    """A process that serves, and its address; it is killed at the end if it still runs."""
    command = [sys.executable, "-P", "-c", PROGRAM, "--model", str(model), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            yield process, re.search(r"https?://[\w.:\[\]]+", line)[0]
        finally:
            process.kill()


def test_a_bundle_is_served_without_torch_and_sigterm_ends_it(served):
    with started("--steps", "3", "--name", "tiny", "--max-batch", "2") as (process, url):
        made = served.HTTP.post(f"{url}/v1/images/variations", files={"image": PICTURE.read_bytes()}, data={"n": 3})
        assert made.status_code == 200 and len(made.json()["data"]) == 3
        assert served.HTTP.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "False 0\n")
    assert re.fullmatch(r"stopping: \d requests to finish, within 30 s\n", err)


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_a_second_one_does_not_harm(served):
    import threading

    answers = []

    def ask(url: str, steps: int) -> None:
        picture = {"image": PICTURE.read_bytes()}
        answers.append(served.HTTP.post(f"{url}/v1/images/variations", files=picture, data={"n": 4, "steps": steps}))

    with started("--max-steps", "20000", "--max-batch", "1") as (process, url):
        asking = [threading.Thread(target=ask, args=(url, steps)) for steps in (300, 301)]
        for thread in asking:
            thread.start()
        figures = f"{url}/metrics"
        served.until(lambda: "semantica_queue_images 0.0" not in served.HTTP.get(figures).text)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        for thread in asking:
            thread.join()
    assert [answer.status_code for answer in answers] == [200, 200] and process.returncode == 0
    assert re.search(r"stopping: [23] requests", err)


@pytest.mark.slow
def test_memory_does_not_grow(served):
    import psutil

    with started("--steps", "1") as (process, url):
        memory, picture = psutil.Process(process.pid), PICTURE.read_bytes()

        def ask(count: int) -> None:
            for i in range(count):
                # right ones, and wrong ones of several kinds
                content = picture[: 100 * (i % 4)] if i % 5 == 0 else picture
                made = served.HTTP.post(f"{url}/v1/images/variations", files={"image": content}, data={"n": 1 + i % 4})
                assert made.status_code == (400 if i % 5 == 0 else 200)

        ask(100)
        before = memory.memory_info().rss
        ask(400)
        assert memory.memory_info().rss < before + (4 << 20)


@pytest.mark.slow
def test_runs_and_keys_and_tls(served, tmp_path):
    import httpx

    certificate, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 -subj /CN=localhost"
    request += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(["openssl", *request.split()], check=True, capture_output=True)
    keys.write_text("\nkey-of-the-file\n\n")
    options = ("--tls-cert", str(certificate), "--tls-key", str(key), "--api-key-file", str(keys))
    with started(*options, "--api-key", "key-of-the-line", model=STORED / "run") as (process, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        for given, status in (("key-of-the-file", 200), ("key-of-the-line", 200), ("neither", 401)):
            made = httpx.post(
                f"{url}/v1/images/variations", files={"image": PICTURE.read_bytes()}, data={"steps": 2},
                headers={"Authorization": f"Bearer {given}"}, verify=context, timeout=60,
            )  # fmt: skip
            assert made.status_code == status
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "True 0\n") and "Traceback" not in err


def test_a_bundle_of_another_user_is_one_line(monkeypatch, capsys):
    # whoever is root may read everything
    def refuses(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("semantica.pipelines.sample.load_engine", refuses)
    assert main(["serve", "--model", str(BUNDLE), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said == f"semantica: {BUNDLE} may not be used by this user (Permission denied): see its owner and mode\n"
