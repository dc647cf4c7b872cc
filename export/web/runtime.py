"""ONNX Runtime Web: the files that the page needs of one version of its npm package, known by their hashes."""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from semantica import cache
from semantica.errors import UserError, first_line

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# of the package's tarball, as npm itself writes it into lock files
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# by what a session runs on: the module that the page imports, and what that compiles
FILES = {
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
}
# of these files, for a package that was unpacked before
HASHES = {
    "ort.webgpu.bundle.min.mjs": "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
HOW = f"give its folder or tarball (npm pack {PACKAGE}@{VERSION}) with --runtime"
MINUTES = 10


def contents(runtime: Path | None = None) -> dict[str, bytes]:
    """The files by name, their hashes checked.

    runtime: the package's folder or its tarball; None for what was fetched before, or is fetched now by npm.

    Raises:
        UserError: neither is to be had, or it is another version or altered.
    """
    if runtime is None:
        return unpacked(kept() or packed(), f"{PACKAGE} from npm")
    if runtime.is_file():
        return unpacked(runtime.read_bytes(), str(runtime))
    found = {}
    for name, expected in HASHES.items():
        path = next((p for p in (runtime / "dist" / name, runtime / name) if p.is_file()), None)
        if path is None:
            raise UserError(f"--runtime {runtime} has no {name}: give {PACKAGE} {VERSION}, its folder or tarball")
        found[name] = path.read_bytes()
        if hashlib.sha256(found[name]).hexdigest() != expected:
            raise UserError(f"{path} is not that of {PACKAGE} {VERSION} (SHA-256 differs): {HOW}")
    return found


def integrity(content: bytes) -> str:
    """As npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def unpacked(content: bytes, what: str) -> dict[str, bytes]:
    """The files in the package's tarball. Raises `UserError` for any other."""
    if integrity(content) != INTEGRITY:
        raise UserError(f"{what} is not {PACKAGE} {VERSION} (SHA-512 differs): {HOW}")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {name: tar.extractfile(f"package/dist/{name}").read() for name in HASHES}


def kept() -> bytes:
    """The tarball in the user's cache; empty where it is not there, or not whole."""
    content = cache.read(place())
    return content if integrity(content) == INTEGRITY else b""


def place() -> Path:
    return cache.path(PACKAGE, {"version": VERSION})


def packed() -> bytes:
    """The tarball by npm, from whatever registry it is set to, and kept. Raises `UserError` where there is none."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page needs {PACKAGE} {VERSION}, and there is no npm to fetch it: install npm, or {HOW}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
            failure = "" if done.returncode == 0 else done.stderr or done.stdout
        except subprocess.TimeoutExpired:
            failure = f"no answer within {MINUTES} minutes"
        found = sorted(Path(folder).glob("*.tgz"))
        if failure or not found:
            why = first_line(RuntimeError(failure or "it wrote no tarball"))
            raise UserError(f"npm cannot fetch {PACKAGE} {VERSION}: {why}; or {HOW}")
        content = found[0].read_bytes()
    if integrity(content) == INTEGRITY:
        cache.write(place(), content)
    return content
