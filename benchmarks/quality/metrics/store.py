"""Features that were made once: found again by the judge's identity and each picture's content."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from semantica.benchmarks.quality.metrics.judges import Judge
from semantica.errors import UserError
from semantica.files import write_bytes

# of the files below; another version's are not looked at
VERSION = 1
# pictures of a file, so that what is interrupted loses at most so many
PART = 512


class Store:
    """Features in CACHE/v1-IDENTITY/CONTENT.safetensors: `features [n, F]` and the pictures' hashes `[n, 32]`.

    Those of another encoder, other weights or another version lie in folders of other names: they are neither used
    nor in the way. A file that is broken is made again. Several processes may share a folder. Without a folder nothing
    is kept.
    """

    def __init__(self, judge: Judge, folder: Path | None):
        self.judge, self.folder, self.rows = judge, None, {}
        self.made = 0
        if folder is None:
            return
        self.folder = folder / f"v{VERSION}-{judge.identity[:16]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder} cannot be written ({error.strerror}): choose another folder") from error
        for file in sorted(self.folder.glob("*.safetensors")):
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "numpy") as content:
                if (content.metadata() or {}).get("identity") != self.judge.identity:
                    return
                described, names = content.get_tensor("features"), content.get_tensor("pictures")
        except (OSError, SafetensorError):
            return
        if described.ndim == 2 and names.shape == (len(described), 32):
            self.rows.update({name.tobytes(): row for name, row in zip(names, described, strict=True)})

    def describe(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, F]` of pictures uint8 `[N, S, S, 3]`; what is new is written, part after part.

        Raises:
            UserError: the folder cannot be written.
        """
        names = [picture_name(picture) for picture in pictures]
        new = [i for name, i in {name: i for i, name in enumerate(names)}.items() if name not in self.rows]
        parts = range(0, len(new), PART)
        # one part is soon done
        for start in tqdm(parts, "describing pictures", disable=None if len(parts) > 1 else True):
            part = new[start : start + PART]
            described = self.judge.describe(pictures[part])
            self.made += len(part)
            self.rows.update({names[i]: row for i, row in zip(part, described, strict=True)})
            if self.folder:
                self._write([names[i] for i in part], described)
        return np.stack([self.rows[name] for name in names])

    def _write(self, names: list[bytes], described: np.ndarray) -> None:
        content = hashlib.sha256(b"".join(names)).hexdigest()[:32]
        tensors = {"features": described, "pictures": np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32)}
        try:
            write_bytes(self.folder / f"{content}.safetensors", save(tensors, {"identity": self.judge.identity}), True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): choose another --cache") from error


def picture_name(picture: np.ndarray) -> bytes:
    """32 bytes over a picture's size and pixels, as it is judged: whatever file it came from."""
    return hashlib.sha256(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).digest()
