"""Two versions of this package side by side: does the new one compute the same bits as the old one?

Run as `python -m semantica.benchmarks.same_bits OLD_PYTHON NEW_PYTHON [--demo]`, each the interpreter of an environment
that holds one version. Only the command line and what it writes are looked at, so that any two versions can be
compared: ten training steps (losses, weights, checkpoints), images of every solver in a run folder, in ONNX Runtime and
in torch, and of torch-compile, the outputs of exported graphs and, with `--demo`, every figure of the demo. One thread,
so that sums have one order. Prints a line for each comparison; the exit code is 1 where any differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SOLVERS = ("dpmpp_2m", "ddim", "ddpm")
# figures of the log that are measured, not computed; and what says of which sources a judge is, comments included
MEASURED = {
    "images_per_s", "data_wait", "peak_memory_bytes", "mfu", "peak_flops", "peak_flops_source", "seconds",
    "judge_identity",
}  # fmt: skip


def semantica(python: Path, place: Path, *arguments: object) -> None:
    """A verb of the version that an interpreter holds. Raises `SystemExit` with its last line where it fails."""
    command = [str(python), "-P", "-m", "semantica.cli", *map(str, arguments)]
    # an environment's own version, not one that a path puts before both
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def draw_photos(folder: Path, labels: int = 8, pictures: int = 4) -> None:
    """Label folders of smooth random pictures of 48 pixels: data that belongs to no version."""
    rng = np.random.default_rng(0)
    for label in range(labels):
        (folder / f"{label}").mkdir(parents=True)
        for number in range(pictures):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{label}" / f"{number}.png")


def run_version(python: Path, place: Path, photos: Path, demo: bool) -> None:
    """Everything that is compared, made by one version in a folder of its own."""
    place.mkdir()
    semantica(
        python, place, "train", "--data", photos, "--out", "run", "--steps", 10, "--batch", 8, "--accumulate", 2,
        "--warmup", 2, "--conditioning", "both", "--precision", "fp32", "--workers", 0, "--save-every", 5,
        "--log-every", 1, "--eval-every", 5, "--held-out", 0.25, "--align", 0.05, "--attention", "native", "--device",
        "cpu",
    )  # fmt: skip
    semantica(python, place, "export", "--model", "run", "--out", "bundle", "--levels", 2, "--steps", 2)
    images = sorted(photos.glob("*/0.png"))[:2]
    common = ("--image", *images, "--n", 2, "--steps", 5, "--seed", 3, "--device", "cpu")
    for solver in SOLVERS:
        semantica(python, place, "sample", "--model", "run", "--solver", solver, "--out", f"run-{solver}", *common)
        for engine in ("onnxruntime", "torch"):
            options = ("--engine", engine, "--solver", solver, "--out", f"{engine}-{solver}")
            semantica(python, place, "sample", "--model", "bundle", *options, *common)
    semantica(python, place, "sample", "--model", "run", "--engine", "torch-compile", "--out", "compiled", *common)
    if demo:
        semantica(python, place, "demo", "--out", "demo")


def graph_outputs(bundle: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of what each graph of a bundle makes of fixed inputs."""
    import onnxruntime

    for name in ("condition.onnx", "denoise.onnx"):
        session = onnxruntime.InferenceSession(bundle / name, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        feeds = {}
        for entry in session.get_inputs():
            shape = [2 if not isinstance(side, int) else side for side in entry.shape]
            feeds[entry.name] = rng.standard_normal(shape, dtype=np.float32)
        for output, array in zip(session.get_outputs(), session.run(None, feeds)):
            yield f"{name} {output.name}", hashlib.sha256(array.tobytes()).hexdigest()


def computed(value: object) -> object:
    """A JSON value without what was measured."""
    if isinstance(value, dict):
        return {key: computed(item) for key, item in value.items() if key not in MEASURED}
    return [computed(item) for item in value] if isinstance(value, list) else value


def findings(place: Path) -> dict[str, str]:
    """What one version made, as text by name."""
    found = {}
    for line in (place / "run" / "metrics.jsonl").read_text().splitlines():
        row = computed(json.loads(line))
        found[f"log, step {row['step']}, {', '.join(sorted(row))}"] = json.dumps(row, sort_keys=True)
    for path in sorted(place.glob("**/*")):
        kept = path.suffix == ".png" or (path.suffix == ".safetensors" and "run" in path.parts)
        if path.is_file() and kept:
            found[str(path.relative_to(place))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found |= graph_outputs(place / "bundle")
    figures = place / "demo" / "metrics.json"
    if figures.exists():
        found["demo/metrics.json"] = json.dumps(computed(json.loads(figures.read_text())), sort_keys=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="interpreter of the environment with the old version")
    parser.add_argument("new", type=Path, help="interpreter of the environment with the new version")
    parser.add_argument("--demo", action="store_true", help="the demo's figures too, which take minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, sides = Path(folder), []
        draw_photos(root / "photos")
        for name, python in (("old", options.old), ("new", options.new)):
            # one place for both: what is written may hold its path
            run_version(python.absolute(), root / "place", root / "photos", options.demo)
            sides.append(findings(root / "place"))
            (root / "place").rename(root / name)
    old, new = sides
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in sorted(old.keys() | new.keys()):
        print(f"{'DIFFERS' if name in different else 'same   '}  {name}")
    print(f"{len(old.keys() | new.keys()) - len(different)} the same, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
