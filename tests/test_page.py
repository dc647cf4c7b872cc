"""`semantica export --web`: what is written, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from semantica.cli import main
from semantica.engines.bundle import open_bundle
from semantica.errors import UserError
from semantica.export.web import PAGE, runtime, write

HERE = Path(__file__).parent
BUNDLE = HERE / "stored" / "bundle"


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the npm package, with files of its own."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    hashes = {}
    for name in runtime.HASHES:
        (folder / "dist" / name).write_text(name)
        hashes[name] = runtime.hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(runtime, "HASHES", hashes)
    return folder


def bundle_like(folder: Path, **changes) -> Path:
    """The stored bundle with another manifest."""
    shutil.copytree(BUNDLE, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def test_what_the_page_holds(pretended, tmp_path, capsys):
    out = tmp_path / "new" / "page"
    assert main(["export", "--model", str(BUNDLE), "--web", str(out), "--runtime", str(pretended)]) == 0
    assert f"python3 -m http.server -d {out}" in capsys.readouterr().out
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    page = {path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file()}
    model = ("condition.onnx", "denoise.onnx", "weights.safetensors", "null.safetensors", "model.json")
    # not every server knows what .mjs is
    names = {name.replace(".mjs", ".js") for name in runtime.HASHES}
    assert files == page | {f"model/{name}" for name in model} | {f"runtime/{name}" for name in names}
    facts = json.loads((out / "model" / "model.json").read_text())
    assert facts["sample"] == [3, 32, 32] and facts["streams"] == [256] and facts["guidance"] == 1.5
    for room, entries in (("model", [*facts["graphs"].values(), facts["weights"], facts["empty"]]),
                          ("runtime", [e for kind in facts["runtime"].values() for e in kind.values()])):  # fmt: skip
        assert all((out / room / entry["file"]).stat().st_size == entry["bytes"] for entry in entries)
    assert main(["export", "--model", str(BUNDLE), "--web", str(out), "--runtime", str(pretended)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_file_server_may_read_the_weights_of_a_bundle_that_is_its_owners_alone(pretended, tmp_path):
    bundle = shutil.copytree(BUNDLE, tmp_path / "bundle")
    for path in bundle.iterdir():
        path.chmod(0o600)
    out = write(open_bundle(bundle), tmp_path / "page", pretended)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (out / "model").iterdir()}
    assert set(modes.values()) == {modes["model.json"]}, modes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"precision": "bf16"}, "bf16, which browsers do not compute: export fp16 or fp32"),
        ({"inputs": {"text": [77]}}, "reads text: a web page takes pictures alone"),
        ({"inputs": {"image": [3, 32, 32], "text": [77]}}, "reads image and text: a web page takes pictures alone"),
    ],
)
def test_bundles_that_no_browser_samples(changes, line, pretended, tmp_path):
    bundle = open_bundle(bundle_like(tmp_path / "bundle", **changes))
    with pytest.raises(UserError, match=line):
        write(bundle, tmp_path / "page", pretended)
    assert not (tmp_path / "page").exists()


def test_weights_that_no_browser_holds(pretended, tmp_path, monkeypatch):
    monkeypatch.setattr("semantica.export.web.MOST_BYTES", 300_000)
    with pytest.raises(UserError, match="weights.safetensors has 301536 bytes, a browser holds 300000: export fp16"):
        write(open_bundle(BUNDLE), tmp_path / "page", pretended)


def test_another_runtime_is_refused(pretended, tmp_path):
    bundle, out = open_bundle(BUNDLE), tmp_path / "page"
    name = next(iter(runtime.HASHES))
    (pretended / "dist" / name).write_text("altered")
    with pytest.raises(UserError, match=rf"{name} is not that of onnxruntime-web {runtime.VERSION} \(SHA-256"):
        write(bundle, out, pretended)
    (pretended / "dist" / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}: give onnxruntime-web {runtime.VERSION}"):
        write(bundle, out, pretended)
    (tmp_path / "package.tgz").write_bytes(b"no tarball")
    with pytest.raises(UserError, match=rf"package.tgz is not onnxruntime-web {runtime.VERSION} \(SHA-512 differs\)"):
        write(bundle, out, tmp_path / "package.tgz")
    assert not out.exists() and not list(tmp_path.glob(".page*"))


def test_the_runtime_is_asked_for_before_a_bundle_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("semantica.export.products.export", lambda config: pytest.fail("it exports"))
    out = tmp_path / "page"
    arguments = ["export", "--model", str(HERE / "stored" / "run"), "--web", str(out), "--runtime", str(tmp_path)]
    assert main(arguments) == 2 and not out.exists()
    assert "has no ort.webgpu.bundle.min.mjs: give onnxruntime-web" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("npm", "line"),
    [
        (None, "there is no npm to fetch it: install npm, or give its folder or tarball"),
        ("echo 'npm error code E404' >&2; exit 1", "npm cannot fetch onnxruntime-web .*: npm error code E404; or give"),
        ("exit 0", "npm cannot fetch onnxruntime-web .*: it wrote no tarball; or give"),
        ("echo other > \"$5/x.tgz\"", "onnxruntime-web from npm is not onnxruntime-web"),
    ],
)  # fmt: skip
def test_without_the_package(npm, line, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if npm is not None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "bin" / "npm").chmod(0o755)
    with pytest.raises(UserError, match=line):
        runtime.contents()
