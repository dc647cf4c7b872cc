"""What compares two versions of this package: each is run as it is, and only what it computed is compared."""

import json
from types import SimpleNamespace

from semantica.benchmarks import same_bits


def test_each_version_is_the_one_of_its_environment(monkeypatch, tmp_path):
    """A path in PYTHONPATH would stand before both, and a version be the same as itself."""
    called = []
    monkeypatch.setenv("PYTHONPATH", "/of/one/version")
    monkeypatch.setattr(
        same_bits.subprocess, "run", lambda *given, env, **_: called.append(env) or SimpleNamespace(returncode=0)
    )
    same_bits.semantica(tmp_path / "python", tmp_path, "doctor")
    assert not called[0]["PYTHONPATH"] and called[0]["OMP_NUM_THREADS"] == "1"


def test_what_was_measured_or_says_of_sources_is_left_out():
    row = {"loss": 0.25, "images_per_s": 3.0, "metrics": {"judge_identity": "ab", "rows": [{"fd": 1.0, "seconds": 2}]}}
    assert json.dumps(same_bits.computed(row)) == '{"loss": 0.25, "metrics": {"rows": [{"fd": 1.0}]}}'
