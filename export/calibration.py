"""What quantisation is calibrated on: inputs of the denoiser from whole sampling runs, at all noise levels."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantica import solvers
from semantica.condition import Condition
from semantica.engines import Bundle, Engine
from semantica.errors import UserError
from semantica.export import parity
from semantica.images import FORMATS, fit, load_image, to_planes
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

# pictures of the runs, at most, and their steps
PICTURES, STEPS = 16, 20
# apart from the seeds of the gate's own pictures
DRAWN = 1000
SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".jpg", ".tif"}


@dataclass(frozen=True)
class Calibration:
    """Inputs of `denoise.onnx`, N samples of one, in random order.

    z: float32 `[N, 3, R, R]`. logsnr: float32 `[N]`. rows: `[N]`, which row of `fixed` conditions each sample.
    fixed: the graph's other inputs by name, `[P + 1, ...]`: one row for each picture, the last one unconditional.
    """

    z: np.ndarray
    logsnr: np.ndarray
    rows: np.ndarray
    fixed: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.z)

    def feeds(self, samples: slice | np.ndarray) -> dict[str, np.ndarray]:
        """The graph's inputs for some samples, as one batch."""
        rows = self.rows[samples]
        return {"z": self.z[samples], "logsnr": self.logsnr[samples], **{k: a[rows] for k, a in self.fixed.items()}}

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, for a file."""
        return {"z": self.z, "logsnr": self.logsnr, "rows": self.rows, **self.fixed}

    def spread(self, count: int) -> np.ndarray:
        """Numbers of so many samples, evenly spread over the noise levels that there are."""
        order = np.argsort(self.logsnr, kind="stable")
        return order[np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)]

    def sha256(self) -> str:
        """Of all values."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


class Recorder:
    """An engine that keeps what its branches of guidance are called with: `calls`, (z, log-SNR, whether null)."""

    joins = False

    def __init__(self, engine: Engine, condition: Condition):
        self.engine, self.given, self.array, self.null = engine, condition, engine.array, engine.null
        self.calls: list[tuple[np.ndarray, float, bool]] = []

    def __call__(self, z: np.ndarray, logsnr: np.ndarray, condition: Condition) -> np.ndarray:
        self.calls.append((z.copy(), float(logsnr[0]), condition is not self.given))
        return self.engine(z, logsnr, condition)


def draw(bundle: Bundle, engine: Engine, images: Path | None, samples: int, seed: int) -> Calibration:
    """Record guided runs of an engine and draw samples from them, the same number at every noise level.

    Args:
        engine: of the bundle, on numpy arrays.
        images: a folder of pictures to condition on, looked through with its sub-folders; None for drawn fields.
        seed: of noise and draws; results are a function of it, the bundle and the pictures.

    Raises:
        UserError: no pictures there, or one that cannot be read.
    """
    inputs = condition_inputs(bundle, images, seed)
    condition = engine.condition(inputs)
    pictures, schedule = len(condition.emb), solvers.Schedule.of(bundle.manifest["model"]["scheduler"])
    recorder = Recorder(engine, condition)
    noise = solvers.noise(seed, bundle.shape_of("z", pictures))
    sample(recorder, noise, condition, None, schedule, Sampling.of(bundle.manifest["model"]["scheduler"], steps=STEPS))
    rng = np.random.default_rng(seed)
    # evenly over the calls, which are in the order of the noise levels
    calls = rng.permutation(np.arange(samples) * len(recorder.calls) // samples)
    chosen = [(recorder.calls[call], int(rng.integers(pictures))) for call in calls]
    arrays = [engine.inputs(part) for part in (condition, engine.null(1))]
    return Calibration(
        z=np.stack([call[0][i] for call, i in chosen]),
        logsnr=np.array([call[1] for call, _ in chosen], np.float32),
        rows=np.array([pictures if call[2] else i for call, i in chosen]),
        fixed={name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]},
    )


def condition_inputs(bundle: Bundle, images: Path | None, seed: int) -> dict[str, Any]:
    """Prepared inputs of the encoders: pictures as given or drawn, anything else as the gate has it, in turn."""
    shapes = bundle.inputs
    pictures = {name for name, shape in shapes.items() if len(shape) == 3}
    files = [] if images is None else pictures_in(images)
    count = len(files) or PICTURES
    given = parity.load_problem(bundle).inputs
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name not in pictures:
            made[name] = given[name].numpy()[np.arange(count) % len(given[name])]
        elif files:
            made[name] = to_planes([fit(load_image(file), shape[-1]) for file in files])
        else:
            made[name] = parity.pictures(count, shape[-1], DRAWN + seed + i).numpy()
    return made


def pictures_in(folder: Path) -> list[Path]:
    """At most `PICTURES` files of a folder and those inside it, evenly spread over their order by name.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder: give one that holds pictures")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"--images {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}): give another folder")
    spread = np.linspace(0, len(files) - 1, min(PICTURES, len(files))).round().astype(int)
    return [files[i] for i in spread]


def batches(calibration: Calibration, chosen: np.ndarray, size: int = 4) -> Iterator[dict[str, np.ndarray]]:
    """The graph's inputs for chosen samples, a few at a time."""
    for start in range(0, len(chosen), size):
        yield calibration.feeds(chosen[start : start + size])
