"""The report of what is installed: every fact against another source, every warning against a planted fault."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest
import torch

import semantica
from semantica import doctor, kernels, native
from semantica.model.presets import PRESETS

ROOT = Path(__file__).parents[1]


def values(facts: list[doctor.Fact], section: str) -> dict[str, str]:
    return {fact.name: fact.value for fact in facts if fact.section == section}


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """A function that makes a distribution appear installed, before all others."""

    def plant(name: str, version: str, top_level: str = ""):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "top_level.txt").write_text(top_level)
        monkeypatch.syspath_prepend(str(tmp_path))

    return plant


def test_facts_of_this_machine():
    facts = doctor.collect()
    assert [fact for fact in facts if fact.status == "problem"] == []
    versions = values(facts, "versions")
    assert versions["torch"] == torch.__version__
    assert versions["python"].startswith(platform.python_version())
    assert versions["semantica-diffusion"].startswith(semantica.__version__)
    devices = values(facts, "devices")
    assert f"{os.cpu_count()} cores" in devices["cpu"]
    assert f"{psutil.virtual_memory().total / 2**30:.1f} GiB" in devices["cpu"]
    assert ("cuda:0" in devices) == torch.cuda.is_available() == ("cuda" not in devices)
    found = values(facts, "operators")
    assert set(found) == {f"{name}, {on}" for name in kernels.OPERATORS for on in ("cpu", "cuda")}
    for name, on in kernels.implementations().items():
        assert all(found[f"{name}, {device}"] == f"{used} ({why})" for device, (used, why) in on.items())
    (backend,) = values(facts, "self-attention").values()
    assert backend.endswith(")") and " (" in backend
    assert {"train", "export", "bench", "tensorrt-rtx"} <= set(values(facts, "optional packages"))


def test_compiled_part_agrees_with_the_system():
    module, reason = native.load()
    assert module is not None, reason
    assert module.build_info()["cxx_standard"] == 17
    # what is loaded was built from the sources that lie here
    sources = sorted(p for p in (Path(__file__).parents[1] / "csrc").iterdir() if p.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()
    assert module.build_info()["sources"] == "h" + digest[:16]
    flags = Path("/proc/cpuinfo")
    if flags.exists() and platform.machine() == "x86_64":
        system = set(next(line for line in flags.read_text().splitlines() if line.startswith("flags")).split())
        names = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        assert module.cpu_features() == {name: name in system for name in names}
    code = "import semantica._C as c; i = c.build_info(); print(i['threads'] == (3 if i['openmp'] else 1))"
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.check_output(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "3"}).strip() == "True"


@pytest.mark.parametrize("case", ["loadable", "other python", "no compiler", "no headers", "not built"])
def test_why_the_compiled_part_is_missing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setenv("CXX", "/nonexistent/c++" if case == "no compiler" else sys.executable)
    (tmp_path / "Python.h").touch()
    headers = tmp_path / "nowhere" if case == "no headers" else tmp_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    if case == "loadable":
        (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    if case == "other python":
        (tmp_path / "_C.cpython-39-other.so").touch()
    expected = {
        "loadable": "it is there but does not load (no symbol)",
        "other python": "it was built for another Python (_C.cpython-39-other.so)",
        "no compiler": "there is no C++ compiler ('/nonexistent/c++' is not found)",
        "no headers": f"Python.h is not in {headers}",
        "not built": "not built when semantica was installed",
    }
    text = native.explain(ImportError("no symbol"))
    assert expected[case] in text and "install" in text and "\n" not in text


@pytest.mark.parametrize("case", ["whole", "no compiler", "no headers"])
def test_a_gpu_where_triton_builds_nothing_is_a_problem(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "installed", lambda name: "3.5.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if case == "no compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    if case != "no headers":
        (tmp_path / "Python.h").touch()
    found = [value for name, value, status in doctor.operators() if name == "triton" and status == "problem"]
    what = {"no compiler": "there is no C compiler: install gcc", "no headers": "Python.h is not in"}
    assert [what[case] in value for value in found] == [True] if case in what else not found


def test_warns_of_another_owner_of_the_name(plant):
    assert list(doctor.environment()) == []
    plant("semantica", "0.9.1", "semantica\n")
    ((name, value, status),) = doctor.environment()
    assert (name, status) == ("import semantica", "problem")
    assert "pip uninstall semantica semantica-diffusion" in value


def test_warns_of_two_onnxruntimes(plant):
    plant("onnxruntime", "1.31.0")
    plant("onnxruntime-gpu", "1.31.0")
    ((name, value, status),) = doctor.environment()
    assert (name, status) == ("onnxruntime", "warning") and "pip uninstall both" in value


def test_warns_when_the_checkout_shadows_kernels(plant, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    ((name, value, status),) = doctor.environment()
    assert (name, status) == ("import kernels", "warning") and str(ROOT) in value and "python -P" in value
    # with the real library installed, whoever imports from it gets ours
    plant("kernels", "0.20.0")
    assert [status for _, _, status in doctor.environment()] == ["problem"]


def test_a_dependency_too_old_is_a_problem(plant, capsys):
    plant("diffusers", "0.1.0")
    (fact,) = (fact for fact in doctor.collect() if fact.status == "problem")
    assert fact.name == "diffusers" and fact.value.startswith("0.1.0, but >=") and "pip install" in fact.value
    assert doctor.run(doctor.DoctorConfig()) == 1
    assert "PROBLEM  diffusers" in capsys.readouterr().out


def test_a_missing_dependency_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "tyro" else "99.0")
    found = {name: (value, status) for name, value, status in doctor.versions()}
    assert found["tyro"][1] == "problem" and found["tyro"][0].startswith('missing: pip install "tyro>=')
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert [name for name, _, status in doctor.versions() if status == "problem"] == ["semantica-diffusion"]


def test_a_missing_extra_names_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("onnx", "flash-attn") else "99.0")
    found = {name: (value, status) for name, value, status in doctor.optional()}
    assert found["export"] == (
        "ml_dtypes 99.0, onnx-ir 99.0, onnxscript 99.0, onnxruntime 99.0; "
        'missing onnx: pip install "semantica-diffusion[export]"',
        "note",
    )
    assert 'pip install --no-build-isolation "semantica-diffusion[flash]"' in found["flash"][0]
    assert found["bench"] == ("jinja2 99.0, matplotlib 99.0, peft 99.0, pytest-benchmark 99.0", "ok")


def test_a_check_that_breaks_is_a_fact(monkeypatch, capsys):
    def broken():
        raise RuntimeError("driver\n  too old")

    monkeypatch.setattr(kernels, "implementations", broken)
    facts = doctor.collect()
    assert [f.value for f in facts if f.section == "operators"] == ["RuntimeError: driver too old"]
    assert values(facts, "self-attention")
    assert doctor.run(doctor.DoctorConfig()) == 1


def test_rows_of_the_tables_are_facts(monkeypatch):
    from semantica.engines import BACKENDS, Backend
    from semantica.model.encoders import ENCODERS

    class Ear:
        """Hears."""

    absent = Backend("abacus", lambda *_: None, ("no_such_package",), "", {"cpu": ("fp32",)}, "a desk")
    monkeypatch.setitem(BACKENDS, "abacus", absent)
    monkeypatch.setitem(ENCODERS, "Ear", Ear)
    facts = doctor.collect()
    assert set(values(facts, "engines")) == set(BACKENDS) and set(values(facts, "encoders")) == set(ENCODERS)
    assert "missing no_such_package" in values(facts, "engines")["abacus"]
    assert values(facts, "encoders")["Ear"] == "Hears"


def test_one_line_per_fact(capsys):
    assert doctor.run(doctor.DoctorConfig()) == 0
    facts = doctor.collect()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(facts) + len({fact.section for fact in facts}) + 1
    assert lines[-1] == "0 problem(s), 0 warning(s)"
    for fact in facts:
        assert any(fact.name in line and line.rstrip().endswith(fact.value) for line in lines)


def test_presets_are_listed(capsys):
    assert doctor.run(doctor.DoctorConfig(presets=True)) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
