"""`benchmarks/gpu.sh` without a GPU: its order, its time, what it skips and what a failure costs; and what it packs.

Every program that it starts is a small script which writes down how it was called.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from semantica.benchmarks import pack
from semantica.errors import ArtifactError, UserError
from semantica.kernels import OPERATORS
from semantica.train.run import folder

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/bash
echo "python ${*//$'\\n'/ }" >> "$CALLS"
case "$*" in
  *get_device_name*) echo card ;;
  *get_device_capability*) echo sm_90 ;;
  *"-c import semantica, sys"*) echo here ;;
  *"print(lacks) ${LACKS:-nothing}"*) echo "missing a package" ;;
  *"print(lacks)"*) ;;
  *"${REFUSES:-nothing refuses}"*) exit 2 ;;
  *"${FAILS:-nothing fails}"*) exit 3 ;;
  *"train --data"*) mkdir -p "$OUT/.run/run"; echo losses > "$OUT/.run/run/metrics.jsonl" ;;
  *"${HANGS:-nothing hangs}"*) exit 124 ;;
esac
"""
OTHER = """#!/bin/bash
echo "$(basename "$0") ${*//$'\\n'/ }" >> "$CALLS"
"""


@pytest.fixture
def machine(tmp_path):
    """A function that runs the script where python and the tools of a GPU only say how they were called."""
    for name in ("nvidia-smi", "compute-sanitizer", "torchrun"):
        (tmp_path / name).write_text(OTHER)
    (tmp_path / "python").write_text(PYTHON)
    for path in tmp_path.iterdir():
        path.chmod(0o755)

    def run(*arguments: str, out: str = "out", **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
            "CALLS": str(calls), "OUT": str(tmp_path / out), **env,
        }  # fmt: skip
        done = subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return run


def table() -> dict[str, dict[str, int]]:
    """Seconds by slice by command, as the script lists them."""
    found: dict[str, dict[str, int]] = {}
    command = ""
    for line in subprocess.run(["bash", str(SCRIPT), "list"], capture_output=True, text=True).stdout.splitlines():
        if line.startswith("  "):
            name, seconds = re.match(r"  (\S+) +(\d+) s", line).groups()
            found[command][name] = int(seconds)
        elif head := re.match(r"(first|second|third|more)\b(?!.*machine)", line):
            command = head[1]
            found[command] = {}
    return found


def test_a_loan_is_enough():
    slices = table()
    install, start = 75, 120
    loan = [install + sum(slices[command].values()) for command in ("first", "second", "third")]
    assert max(loan) <= 600 - 10 and sum(loan) + start <= 1800
    # of what takes longer, each by itself
    assert max(slices["more"].values()) < 600
    listing = subprocess.run(["bash", str(SCRIPT), "list"], capture_output=True, text=True).stdout
    assert f"{sum(loan) + start} of 1800 s" in listing
    # correctness comes before any figure
    assert list(slices["first"])[:4] == ["doctor", "tests", "memcheck", "racecheck"]


def slices_run(done: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"^== ([\w-]+)$", done.stdout, re.MULTILINE)


def test_slices_run_in_order_once_and_a_failure_costs_only_itself(machine):
    done, calls = machine("first", "second", FAILS="--op group_norm", HANGS="bench sample")
    every = [*table()["first"], *table()["second"]]
    assert slices_run(done) == every and done.returncode == 1
    assert re.search(r"== norm: \d of 140 s, exit code 3", done.stdout) and "out of time" in done.stdout
    assert done.stderr.strip().endswith("gpu.sh: not done: norm sample")
    words = ("pip install", "-m pytest", "compute-sanitizer", "cli bench")
    what = [line for line in calls if any(word in line for word in words)]
    order = ["pip install", "-m gpu", "-m gpu", "--tool memcheck", "--tool racecheck", "--compile-only --arch sm_90",
             "--op group_norm", "--op cross_attention", "bench sample"]  # fmt: skip
    assert len(what) == len(order) and all(word in line for word, line in zip(order, what)), what
    # what libraries ask of a driver in vain is no fault of a kernel
    assert all("--error-exitcode 9 --report-api-errors no --tool" in line for line in what[3:5])
    # of two operators in one slice, too
    done, calls = machine("maps", FAILS="--op attention_moments", out="maps")
    assert done.returncode == 1 and sum("--op attention_columns" in line for line in calls) == 1
    assert re.search(r"== maps: \d+ of 400 s, exit code 3", done.stdout)
    # many processes at once compile faster, and none is beside what is timed
    assert "-n 8" in what[1] and "-n 8" not in what[2] and what[2].endswith(" tests/test_bench_harness.py")
    assert "test_bench_harness" not in what[1] and "tests/test_kernels.py" in what[1]
    assert all("--resume" in line and "--device cuda" in line for line in what[6:])
    # a second call does what is left, and installs nothing
    done, calls = machine("first", "second")
    assert slices_run(done) == ["norm", "sample"] and done.returncode == 0
    assert done.stdout.count("done before") == len(every) - 2 and not [line for line in calls if "pip install" in line]
    done, calls = machine("second", "--again")
    assert done.returncode == 2
    done, calls = machine("--again", "second")
    assert slices_run(done) == list(table()["second"]) and not [line for line in calls if "--resume" in line]


def test_what_is_not_installed_is_left_out_and_what_refuses_is_a_failure(machine, tmp_path):
    done, calls = machine("export", "build", LACKS="onnxruntime")
    assert done.returncode == 0
    asked = [re.search(r"--engine (\S+) --device (\S+)", line) for line in calls if "cli sample" in line]
    # an engine for processors is not asked to run on the card
    assert [match.groups() for match in asked] == [
        ("torch", "cuda"), ("torch-compile", "cuda"), ("inductor", "cpu"), ("tensorrt", "cuda"),
    ]  # fmt: skip
    assert (tmp_path / "out" / "left-out.txt").read_text() == "left out: onnxruntime (missing a package)\n"
    # exit code 2 is a refusal, whatever for
    done, calls = machine("export", "build", out="other", REFUSES="--engine torch-compile")
    assert done.returncode == 1 and done.stderr.strip().endswith("not done: export")
    assert len([line for line in calls if "cli sample" in line]) == 5
    done, calls = machine("build", out="third", REFUSES="--backend inductor")
    assert done.returncode == 1 and ["inductor" in line for line in calls if "cli sample" in line] == [False]
    # what was built before the time was over is built once
    (tmp_path / "third" / ".bundle" / "engines" / "inductor-here").mkdir(parents=True)
    (tmp_path / "third" / ".bundle" / "manifest.json").touch()
    done, calls = machine("build", out="third", REFUSES="--backend inductor")
    assert done.returncode == 0 and len([line for line in calls if "cli sample" in line]) == 2


def test_every_operator_is_timed_and_its_launch_tables_tuned(machine):
    done, calls = machine("norm", "attention", "maps", *(name for name in table()["more"] if name.startswith("tune-")))
    assert done.returncode == 0
    for name, operator in OPERATORS.items():
        timed, *tuned = [line for line in calls if f"--op {name}" in line]
        assert "bench kernels" in timed and all("bench tune" in line for line in tuned)
        # fp32 is not timed on a GPU
        asked = {kernel for line in tuned for kernel in re.search("--kernel (.*) --out", line)[1].split()}
        ladders = json.loads(operator.file.with_name("ladder.json").read_text())
        assert asked == {kernel for kernel in ladders if not kernel.endswith("_fp32")}


def test_results_go_on_from_an_archive_on_another_machine(machine, tmp_path):
    archive = tmp_path / "results.tgz"
    machine("--archive", str(archive), "doctor", "norm", FAILS="--op group_norm")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert "./done/doctor" in names and "./done/norm" not in names and "./doctor.txt" in names
    # one that was ended while it wrote leaves what there was
    whole, tar = archive.read_bytes(), tmp_path / "tar"
    tar.write_text(f'#!/bin/bash\n[[ $1 == -x* ]] && exec {shutil.which("tar")} "$@"\necho half > "$2"\nexit 1\n')
    tar.chmod(0o755)
    done, _ = machine("--archive", str(archive), "compiled", out="elsewhere")
    assert done.returncode == 1 and archive.read_bytes() == whole
    tar.unlink()
    done, _ = machine("--archive", str(archive), "doctor", "norm", out="elsewhere")
    assert slices_run(done) == ["norm"] and done.returncode == 0
    # and what is there and newer is not written over
    (tmp_path / "elsewhere" / "doctor.txt").write_text("since then")
    archive.write_bytes(whole)
    done, _ = machine("--archive", str(archive), "doctor", out="elsewhere")
    assert (tmp_path / "elsewhere" / "doctor.txt").read_text() == "since then" and not done.stderr


def test_it_refuses_what_it_does_not_know_in_one_line(machine, tmp_path):
    for arguments, words in (
        (["nothing"], "unknown slice 'nothing'"),
        (["--fast", "doctor"], "unknown option --fast"),
        (["--wheels", str(tmp_path / "none"), "doctor"], "there are no wheels in it"),
    ):
        done, calls = machine(*arguments)
        assert done.returncode == 2 and words in done.stderr and calls == [] and done.stderr.count("\n") == 1


def test_a_rehearsal_asks_no_card_and_runs_small(machine):
    done, calls = machine("rehearse", "first", "second", "third")
    assert slices_run(done) == [name for command in ("first", "second", "third") for name in table()[command]]
    assert not [line for line in calls if "get_device" in line or "cuda" in line.split("cuda_host")[0].split()]
    assert not [line for line in calls if line.startswith(("nvidia-smi", "compute-sanitizer")) or "pip install" in line]
    assert len([line for line in calls if "--quick" in line and "--device cpu" in line]) == 3
    # the export's model is not there, since nothing has really run
    assert done.returncode == 0, done.stdout + done.stderr


def wheel(folder: Path, name: str, version: str, *needs: str, size: int = 0) -> None:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        head = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\n" + "\n".join(head) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"{name.replace('-', '_')}.bin", os.urandom(size))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for the whole index, and a package whose needs are given."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder)), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    here = ["torch>=2.11", "big>=2; extra == 'train'", "old>=3"]
    elsewhere = ["never; extra == 'ray'", "mac; sys_platform == 'darwin'"]
    monkeypatch.setattr(pack.metadata, "requires", lambda name: here + elsewhere)
    (tmp_path / "constraints.txt").write_text("# tested together\nbig==2.0\n")
    (tmp_path / "image.txt").write_text("python==3.12.3\ntorch==2.11.0+cu130\nold==2.5\nloose\n")
    return folder


def test_what_is_missing_is_packed_and_the_rest_left_alone(index, tmp_path, capsys):
    wheel(index, "big", "2.0", "small>1; python_version >= '3.12'", "loose>=9", "not-there; python_version < '3.12'")
    wheel(index, "big", "3.0")
    wheel(index, "small", "1.5", "old<4")
    wheel(index, "old", "3.1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left-1.0-py3-none-any.whl").touch()
    assert pack.pack(pack.PackConfig(tmp_path / "out", tmp_path / "image.txt", more=())) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "big-2.0-py3-none-any.whl", "old-3.1-py3-none-any.whl", "small-1.5-py3-none-any.whl",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "every requirement is met" in said and "in place of 2.5" in said and "loose>=9 of big 2.0" in said


def test_what_cannot_be_met_or_carried_is_said(index, tmp_path, monkeypatch, capsys):
    wheel(index, "big", "2.0", "old<3", size=2_000_000)
    wheel(index, "old", "3.1")
    with pytest.raises(ArtifactError, match=r"2\.0 MB of wheels are more than 1"):
        pack.pack(pack.PackConfig(tmp_path / "out", tmp_path / "image.txt", limit_mb=1, more=()))
    assert "unmet: big 2.0 needs old<3, 3.1 is packed" in capsys.readouterr().out
    monkeypatch.setattr(pack.metadata, "requires", lambda name: ["absent"])
    with pytest.raises(ArtifactError, match="absent cannot be packed for Python 3.12.3"):
        pack.pack(pack.PackConfig(tmp_path / "out", tmp_path / "image.txt", more=()))
    (tmp_path / "image.txt").write_text("torch==2.11.0\n")
    with pytest.raises(UserError, match="which Python it is of"):
        pack.pack(pack.PackConfig(tmp_path / "out", tmp_path / "image.txt"))


def test_the_list_of_the_stock_image_reads():
    there, python = pack.listed(SCRIPT.with_name("gpu-image.txt"))
    assert python == "3.12.3" and there["torch"] == "2.11.0" and there["triton"] == "3.6.0"
    assert len(there) > 190 and "diffusers" not in there and "tyro" not in there
    frozen = SCRIPT.parent / "none.txt"
    with pytest.raises(UserError, match="cannot be read"):
        pack.listed(frozen)


def test_losses_under_nccl_are_kept(machine, tmp_path):
    """DDP's steps and those of FSDP after them; where a run writes them is `semantica.train.run.folder`'s to say."""
    assert machine("nccl")[0].returncode == 0
    assert (tmp_path / "out" / "nccl.jsonl").read_text() == "losses\n"
    assert "metrics.jsonl" in Path(folder.__file__).read_text()
