"""A bundle: the folder that `semantica export` writes. Everything is checked before anything is deserialised.

numpy, JSON and hashes only: no torch, so that an exported model can be sampled where torch is not installed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from semantica.errors import UserError
from semantica.files import sha256
from semantica.tokens import FILES as TOKENIZER
from semantica.tokens import SETTINGS

FORMAT, VERSION = "semantica-bundle", 1
MANIFEST = "manifest.json"
CONDITION, DENOISE, WEIGHTS, NULL = "condition.onnx", "denoise.onnx", "weights.safetensors", "null.safetensors"
FILES = (CONDITION, DENOISE, WEIGHTS, NULL)
# from latents to images, where the network samples latents
DECODE = "decode.onnx"
# the same graphs in the operators that ONNX Runtime has kernels for; where one needs no other form there is none
FOR_ONNX_RUNTIME = {name: name.replace(".onnx", ".ort.onnx") for name in (CONDITION, DENOISE, DECODE)}
# what the fp32 network answered to the inputs that engines are compared on; sampling does not read it
REFERENCE = "reference.safetensors"
PRECISIONS = ("fp32", "fp16", "bf16")
# what the denoiser's products may be quantised to
MODES = ("int8",)
# a manifest is a few kilobytes; a file of another kind under its name is not read into memory
MANIFEST_LIMIT = 1 << 24
REQUIRED = {
    "precision": str, "opset": int, "streams": dict, "shapes": dict, "model": dict, "parity": dict, "files": dict,
}  # fmt: skip
SHAPES = ("image", "latent", "channels", "blocks", "heads", "head_dim", "emb")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read and whose files have the hashes that it names.

    folder: where it is. manifest: the parsed manifest.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def precision(self) -> str:
        """What weights, keys, values and embedding are stored in: "fp32", "fp16" or "bf16"."""
        return self.manifest["precision"]

    @property
    def quantised(self) -> str:
        """What the denoiser's graph was quantised to, "int8"; "" where it was not."""
        return self.manifest.get("quantisation", {}).get("mode", "")

    def computed(self, arithmetic: str) -> str:
        """What an engine over the graphs computes in, in words: what they are typed as, and what is quantised."""
        what = self.manifest.get("quantisation", {}).get("what", "")
        return f"{self.quantised} in {what}, else {arithmetic}" if self.quantised else arithmetic

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each stream, in order; empty without cross-attention."""
        return tuple(self.manifest["streams"].values())

    @property
    def shapes(self) -> dict[str, int]:
        """image: side of condition pictures; latent: side of what is sampled; channels, blocks, heads, ..."""
        return self.manifest["shapes"]

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of one value of each input of the encoders, in order: pictures alone, or what the manifest says."""
        side = self.shapes["image"]
        return {name: tuple(shape) for name, shape in self.manifest.get("inputs", {"image": (3, side, side)}).items()}

    def for_onnx_runtime(self, name: str) -> Path:
        """Where the form of a graph is that ONNX Runtime takes: its own, where the manifest names one."""
        own = FOR_ONNX_RUNTIME[name]
        return self.folder / (own if own in self.manifest["files"] else name)

    def shape_of(self, name: str, batch: int) -> tuple[int, ...]:
        """Shape of a named input or output of the two graphs."""
        s = self.shapes
        if name in ("z", "v"):
            return (batch, s["channels"], s["latent"], s["latent"])
        if name in self.inputs:
            return (batch, *self.inputs[name])
        if name in ("latents", "images"):
            side = self.manifest["decode"]
            return self.shape_of("z", batch) if name == "latents" else (batch, 3, side, side)
        fixed = {"logsnr": (batch,), "emb": (batch, s["emb"])}
        # heads and their width may differ from block to block
        heads = self.manifest.get("attention") or [(s["heads"], s["head_dim"])]
        if name in fixed:
            return fixed[name]
        count, width = heads[min(int(name.partition(".")[2]), len(heads) - 1)]
        return batch, count, sum(self.sizes), width

    @property
    def graphs(self) -> tuple[str, ...]:
        """Its graphs by name: of conditions, of the denoiser, and of a decoder where latents are sampled."""
        return (CONDITION, DENOISE, *((DECODE,) if DECODE in self.manifest["files"] else ()))

    def precision_of(self, name: str) -> str:
        """What a graph computes in: the bundle's precision; fp32 for decoders whose activations fp16 does not hold."""
        if name != DECODE:
            return self.precision
        # bundles of an older version do not say it
        wide = self.precision == "fp16" and self.manifest["model"]["vae"].get("force_upcast")
        return self.manifest.get("decoder", {}).get("precision", "fp32" if wide else self.precision)

    @property
    def tokenizers(self) -> dict[str, list[str]]:
        """Folders of the tokenizers of each input that takes text."""
        return self.manifest.get("tokenizers", {})


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a bundle, whole or broken, and not like a run folder."""
    return (folder / MANIFEST).is_file() or (folder / DENOISE).is_file()


def open_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle: the manifest, then every file that it names, by size and hash.

    Raises:
        UserError: not a bundle, half written, made by a newer version, or a file is missing, altered, a link, or
            outside the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a bundle made by 'semantica export'")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} has no {MANIFEST}: not a bundle, or half written; make it with 'semantica export'")
    manifest = read_manifest(folder / MANIFEST, FORMAT, VERSION)
    for key, kind in REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{folder / MANIFEST} has no usable {key!r}: export the bundle again")
    if manifest["precision"] not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UserError(f"{folder / MANIFEST} has precision {manifest['precision']!r}: expected one of {known}")
    quantisation = manifest.get("quantisation", {"mode": MODES[0]})
    if not isinstance(quantisation, dict) or quantisation.get("mode") not in MODES:
        raise UserError(f"{folder / MANIFEST} has an unknown quantisation: expected one of {', '.join(MODES)}")
    numbers = [manifest["shapes"].get(name) for name in SHAPES] + list(manifest["streams"].values())
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(f"{folder / MANIFEST} has impossible shapes or streams: export the bundle again")
    inputs = manifest.get("inputs", {"image": []})
    if not isinstance(inputs, dict) or not all(
        isinstance(shape, list) and all(type(number) is int and number > 0 for number in shape)
        for shape in inputs.values()
    ):
        raise UserError(f"{folder / MANIFEST} has impossible inputs: export the bundle again")
    check_parts(folder / MANIFEST, manifest)
    missing = [name for name in FILES if name not in manifest["files"]]
    if missing:
        raise UserError(f"{folder / MANIFEST} does not name {', '.join(missing)}: export the bundle again")
    check_files(folder, manifest["files"])
    for name in (name for names in manifest.get("tokenizers", {}).values() for name in names):
        # a tokenizer reads what it finds
        for path in (folder / name / file for file in TOKENIZER):
            if f"{name}/{path.name}" not in manifest["files"] and (path.exists() or path.is_symlink()):
                raise UserError(f"{path} has no hash in {MANIFEST}: remove it, or make the folder again")
    return Bundle(folder, manifest)


def check_parts(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `UserError` for impossible heads, tokenizers or decoders, of which a manifest need not have any."""
    heads, blocks = manifest.get("attention", []), manifest["shapes"]["blocks"]
    pairs = isinstance(heads, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in heads)
    if not pairs or not all(type(n) is int and n > 0 for pair in heads for n in pair) or len(heads) not in (0, blocks):
        raise UserError(f"{path} has impossible heads: export the bundle again")
    texts = manifest.get("tokenizers", {})
    if not isinstance(texts, dict) or not all(
        isinstance(names, list) and names and all(f"{name}/{SETTINGS}" in manifest["files"] for name in names)
        for names in texts.values()
    ):
        raise UserError(f"{path} has tokenizers that are not there: export the bundle again")
    if DECODE in manifest["files"]:
        if not (type(manifest.get("decode")) is int and manifest["decode"] > 0):
            raise UserError(f"{path} has a decoder of no size: export the bundle again")
        if not isinstance(manifest["model"].get("vae"), dict):
            raise UserError(f"{path} says nothing of its decoder: export the bundle again")
        said = manifest.get("decoder", {})
        if not isinstance(said, dict) or said.get("precision", "fp32") not in PRECISIONS:
            raise UserError(f"{path} has a decoder of an unknown precision: export the bundle again")


def read_manifest(path: Path, kind: str, version: int) -> dict[str, Any]:
    """A JSON object that says which format and version it is.

    Raises:
        UserError: unreadable, a link, of another format, or of a newer version than this package knows.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link: copy the file in its place")
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise UserError(f"{path} has {path.stat().st_size} bytes: that is no manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}): restore or remake it") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise UserError(f"{path} is not the manifest of a {kind}: give a folder made by this package")
    found = manifest.get("version")
    if type(found) is not int or found < 1:
        raise UserError(f"{path} has version {found!r}: expected a whole number; remake the folder")
    if found > version:
        raise UserError(f"{path} has version {found}, this semantica reads up to {version}: install a newer semantica")
    return manifest


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Compare every named file with its recorded size and SHA-256.

    Raises:
        UserError: a name leads outside the folder, or a file is missing, a link, or altered.
    """
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not re.fullmatch(r"[A-Za-z0-9_.\-/]+", name) or not parts or ".." in parts or name.startswith("/"):
            raise UserError(f"{folder / MANIFEST} names {name!r}, outside the folder: do not use this bundle")
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise UserError(f"{folder / MANIFEST} has no hash for {name}: remake the folder")
        path = folder
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise UserError(f"{path} is a symbolic link: copy the file in its place")
        if not path.is_file():
            raise UserError(f"{path} is missing: the folder is incomplete, copy or make it again")
        if path.stat().st_size != entry.get("bytes") or sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is not the file that was written (size or SHA-256 differs): make the folder again")
