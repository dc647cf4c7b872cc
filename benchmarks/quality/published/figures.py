"""A figure of a benchmark: a mean over pictures, its interval over what they depend on, and how both are shown."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from semantica.benchmarks.quality.metrics.bootstrap import Units, interval, means
from semantica.errors import UserError
from semantica.files import write_json

# endings of pictures that are looked for, in this order
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
Figure = dict[str, float | int | None]


def summed(values: Mapping[str, np.ndarray], of: np.ndarray, replicates: int, seed: int) -> dict[str, Figure]:
    """The mean of each figure's values `[N]`, nan where a picture has none; `of [N]` numbers what is drawn again.

    A figure that no picture has is not there; one unit says nothing of its spread.
    """
    found = {}
    for name, each in values.items():
        known = ~np.isnan(each)
        if not known.any():
            continue
        # units without a value would be drawn for nothing
        numbers = np.unique(of[known], return_inverse=True)[1]
        value, low, high = float(each[known].mean()), None, None
        if (units := Units(numbers)).count > 1:
            low, high = interval(value, means(each[known], units.draws(replicates, seed)))
        found[name] = {"value": value, "low": low, "high": high, "pictures": int(known.sum())}
    return found


def shown(figure: Figure | None, scale: float = 1.0) -> str:
    """With its interval, in four digits at most."""
    if figure is None:
        return ""
    value, low, high = (None if x is None else f"{scale * x:.4g}" for x in map(figure.get, ("value", "low", "high")))
    return value if low is None else f"{value} [{low}, {high}]"


def picture_at(stem: Path) -> Path | None:
    """The picture of that name, whatever its ending."""
    places = (stem.with_name(stem.name + ending) for ending in ENDINGS)
    return next((place for place in places if place.is_file()), None)


def store(path: Path, content: dict) -> None:
    """Write a file of figures. Raises `UserError` where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}): choose another file") from error
