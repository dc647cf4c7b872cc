"""What is kept from process to process: by all that it depends on, whole or not at all, and never needed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from semantica import cache
from semantica.engines.trt_context import Plan, Session


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


KEY = {"card": "NVIDIA H200", "capability": "9.0", "driver": "580.65.06", "library": "tensorrt 11.0", "engine": "ab"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_every_part_of_the_key_has_a_file_of_its_own(home, monkeypatch):
    place = cache.path("timings", KEY)
    assert place.parent == home / "semantica" / "timings" and place.parent.stat().st_mode & 0o777 == 0o700
    cache.write(place, b"kernels")
    assert cache.read(cache.path("timings", dict(reversed(KEY.items())))) == b"kernels"
    for name in KEY:
        assert cache.read(cache.path("timings", KEY | {name: "other"})) == b"", name
    # a relative folder is none, by XDG's rules
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(home))
    assert cache.path("timings", KEY).parent == home / ".cache" / "semantica" / "timings"


def test_processes_write_at_once_and_readers_see_one_of_them_whole(home):
    place = cache.path("timings", KEY)
    code = (
        "import sys; from pathlib import Path; from semantica import cache\n"
        "for i in range(40): cache.write(Path(sys.argv[1]), bytes([int(sys.argv[2])]) * 200_000)"
    )
    command = [sys.executable, "-P", "-c", code, str(place)]
    writers = [subprocess.Popen([*command, str(i)], env={**os.environ}) for i in (1, 2, 3)]
    while any(writer.poll() is None for writer in writers):
        seen = cache.read(place)
        assert seen == b"" or len(seen) == 200_000 and len(set(seen)) == 1
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_old_files_make_room_and_a_folder_that_cannot_be_written_is_no_error(home, monkeypatch):
    for i in range(cache.MOST + 3):
        place = cache.path("timings", KEY | {"engine": i})
        cache.write(place, b"x")
        os.utime(place, (i, i))
    cache.write(cache.path("timings", KEY), b"new")
    kept = list(cache.folder("timings").iterdir())
    assert len(kept) == cache.MOST and cache.read(cache.path("timings", KEY)) == b"new"
    (home / "taken").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "taken"))
    cache.write(cache.path("timings", KEY), b"lost")
    assert cache.read(cache.path("timings", KEY)) == b""


def test_the_drivers_version_is_read_where_the_system_says_it(tmp_path):
    said = tmp_path / "version"
    said.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC version: 12.2.0")
    assert cache.driver(said) == "580.65.06" and cache.driver(tmp_path / "none") == "unknown"


def test_compiled_code_outlives_the_temporary_folder_unless_told_otherwise(home, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    cache.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cache.keep_compiled()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == cache.folder("inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


class RuntimeCache:
    """As TensorRT-RTX's: refuses what another environment has written, grows by what is compiled."""

    def __init__(self):
        self.content = b"v1"

    def deserialize(self, content):
        if not content.startswith(b"v1"):
            return False
        self.content = content
        return True

    def serialize(self):
        return self.content


def plan(tmp_path) -> Plan:
    """An engine whose contexts compile a kernel unless it is known."""
    trt = SimpleNamespace(DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"))
    (tmp_path / "engine").write_bytes(b"")
    compiled = []

    def context(config):
        if not config.kept.content.endswith(b"kernel"):
            config.kept.content += b"kernel"
            compiled.append(config.dynamic_shapes_kernel_specialization_strategy)
        return SimpleNamespace(execute_async_v3=lambda stream: True)

    config = SimpleNamespace(create_runtime_cache=RuntimeCache)
    config.set_runtime_cache = lambda made: setattr(config, "kept", made)
    engine = SimpleNamespace(num_io_tensors=0, create_runtime_config=lambda: config, create_execution_context=context)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda blob: engine)
    made = Plan(trt, runtime, tmp_path / "engine", torch.device("cpu"), KEY)
    made.dtypes, made.compiled = {"z": torch.float32}, compiled
    made.ready = lambda name, tensor: tensor
    return made


def test_kernels_are_compiled_once_for_all_processes_and_a_stale_cache_is_made_again(home, tmp_path):
    for process, compiled in enumerate((["eager"], [], ["eager"])):
        if process == 2:
            cache.write(cache.path("tensorrt-rtx", KEY), b"v0 of another driver")
        made = plan(tmp_path)
        session = Session(made)
        session.contexts[1], session.fresh = made.context(), True
        session.rest()
        assert made.compiled == compiled, process
        assert cache.read(cache.path("tensorrt-rtx", KEY)) == b"v1kernel"
