import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples on every machine, and no example fails because a machine is slow
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def interpreted():
    """A function that runs pytest on a file of this folder where Triton interprets its kernels: none may be skipped.

    Triton reads the switch when it is imported, hence a process of its own.
    """

    def interpreted(path: str, *options: str) -> None:
        here = Path(__file__).parent
        # -P: the root of the repository must not be on sys.path
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / path), *options]
        done = subprocess.run(
            command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        assert done.returncode == 0 and " passed" in summary and "skipped" not in summary, done.stdout + done.stderr

    return interpreted


@pytest.fixture(scope="session")
def crawl():
    """The module `crawl.py` of this folder, which makes crawls."""
    pytest.importorskip("warcio")
    spec = importlib.util.spec_from_file_location("crawl", Path(__file__).parent / "crawl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
