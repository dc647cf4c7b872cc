"""Who judges: a classical feature space, an encoder, or FID's Inception network; pictures in, features out."""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantica import features

CLASSICAL = "colour-and-shape"
BATCH = 64
# what an encoder's configuration says of its past
RECORDS = ("source", "revision", "_diffusers_version", "_name_or_path")


@dataclass(frozen=True)
class Judge:
    """A feature space.

    name: as the user gave it.
    identity: 64 hex digits over the weights and the preprocessing: equal ones describe a picture alike.
    describe: pictures uint8 `[N, S, S, 3]` to features float32 `[N, F]`.
    unit: whether directions alone are compared, where single pictures are.
    distance: what the Frechet distance is called in it.
    """

    name: str
    identity: str
    describe: Callable[[np.ndarray], np.ndarray]
    unit: bool
    distance: str = "fd"

    def compared(self, described: np.ndarray) -> np.ndarray:
        """Features as single pictures are compared by them: of length 1 where the judge is an encoder."""
        import torch

        if not self.unit:
            return described
        return torch.nn.functional.normalize(torch.from_numpy(described), dim=-1).numpy()


def judge(source: str, device) -> Judge:
    """A judge by name.

    Args:
        source: "colour-and-shape"; a `.safetensors` file of FID's Inception network; else an encoder of pictures as
            `frozen_encoder` takes it: hub name, folder, or run folder.

    Raises:
        UserError: nothing can be loaded from there.
    """
    if source == CLASSICAL:
        code = hashlib.sha256(inspect.getsource(features).encode()).hexdigest()
        return Judge(source, code, features.colour_and_shape, unit=False)
    import torch

    from semantica.model.encoders import frozen_encoder, weights_sha256

    if Path(source).suffix == ".safetensors":
        from semantica.benchmarks.quality.metrics.inception import load_inception

        network = load_inception(Path(source)).to(device)
        identity = hashlib.sha256(f"inception {weights_sha256(network)}".encode()).hexdigest()
        return Judge(source, identity, batched(network, device, whole=True), unit=False, distance="fid")
    encoder = frozen_encoder(source).to(device)
    said = {k: v for k, v in encoder.config.items() if k not in RECORDS}
    said = json.dumps(said, sort_keys=True, default=str) + weights_sha256(encoder)

    def pooled(x):
        if x.shape[-1] != encoder.image_size:
            x = torch.nn.functional.interpolate(x, (encoder.image_size,) * 2, mode="bicubic", antialias=True).clamp(
                -1, 1
            )
        return encoder(x).pooled

    described = batched(pooled, device)
    return Judge(source, hashlib.sha256(said.encode()).hexdigest(), described, unit=True)


def batched(network: Callable, device, whole: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Describes pictures some at a time, as numbers in [-1, 1], or as they are where `whole`."""
    import torch

    from semantica.images import to_tensor

    def describe(pictures: np.ndarray) -> np.ndarray:
        made = []
        with torch.no_grad():
            for start in range(0, len(pictures), BATCH):
                some = pictures[start : start + BATCH]
                x = torch.from_numpy(some).permute(0, 3, 1, 2) if whole else to_tensor(some)
                made.append(network(x.to(device)).float().cpu().numpy())
        return np.concatenate(made)

    return describe
