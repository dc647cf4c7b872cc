"""One guided step of self-guidance at full size, beside the way that stores attention maps: time, memory, gradient.

    python -P -m semantica.benchmarks.unets.steering --model sd-1.5

Each way runs in a process of its own, so that its peak is its own; in rounds, on noise that no call had before. The
gradient of every way is held against that through stored maps.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness.process import Process, Wrong
from semantica.benchmarks.unets.models import Content, contents, folder_of
from semantica.benchmarks.unets.steered import PLAIN, WAYS
from semantica.benchmarks.unets.suite import distance
from semantica.files import write_json

# largest relative error of a gradient, as in the tests
LIMIT = 1e-3
TRUTH = "stored maps"


def measured(way: str, folder: Path, asked: list[Content], place: Path) -> tuple[dict, list[np.ndarray]]:
    """Seconds of each step and the peak of a way's process, the weights in it; and its gradients."""
    process = Process("semantica.benchmarks.unets.steered", way, place)
    try:
        built = process.ask("build", way=way, model=str(folder))
        answers, made = [], []
        for content in asked:
            np.savez(process.folder / "content.npz", **content)
            answers.append(process.ask("run"))
            made.append(np.load(process.folder / "made.npy"))
    finally:
        process.close()
    # the first call allocates
    seconds = [answer["seconds"] for answer in answers[1:]]
    return {"seconds": seconds, "peak_bytes": answers[-1]["peak_bytes"], "built_bytes": built["resident_bytes"]}, made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd-1.5", help="a public model by name (drawn weights), or its folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--out", type=Path, help="a .json for the figures")
    given = parser.parse_args()
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = folder_of(given.model, Path(place))
        asked = [contents(given.model, "unet", seed, 0, 1) for seed in range(given.rounds + 1)]
        # gradients to compare with come first
        order, truth = sorted(given.only, key=lambda way: way != TRUTH), None
        for way in order:
            try:
                row, made = measured(way, folder, asked, Path(place))
            except Wrong as error:
                print(f"{way}: {error}")
                continue
            truth = made if way == TRUTH else truth
            if truth is not None and way not in PLAIN:
                row["gradient_error"] = max(distance(a, b) for a, b in zip(made, truth, strict=True))
            found[way] = row
            error = row.get("gradient_error")
            print(
                f"{way:28} {statistics.median(row['seconds']):8.2f} s  peak {row['peak_bytes'] / 2**20:8.0f} MiB, "
                f"{(row['peak_bytes'] - row['built_bytes']) / 2**20:8.0f} above the loaded model"
                + ("" if error is None else f"  gradient error {error:.1e}"),
                flush=True,
            )
    if given.out:
        write_json(given.out, {"model": given.model, **found})
    wrong = [way for way, row in found.items() if row.get("gradient_error", 0.0) > LIMIT]
    if wrong:
        print(f"gradients differ: {', '.join(wrong)}")
    return 1 if wrong or set(found) != set(given.only) else 0


if __name__ == "__main__":
    raise SystemExit(main())
