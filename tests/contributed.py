"""One of each thing that can be added, through the public interface alone; `python contributed.py VERB ...` is
`semantica VERB ...` with all of them. `test_contributing.py` uses each as a user would."""

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from PIL import Image
from torch import Tensor, nn

from semantica import Stream, register_encoder
from semantica.cli import main, register_verb
from semantica.engines import Backend, register_backend
from semantica.engines.network import TorchEngine
from semantica.kernels.registry import Case, Operator, normal, register_operator
from semantica.model.presets import PRESETS
from semantica.solvers import Steps, register_solver
from semantica.train.data.draws import PAIR, Pair, View, generator
from semantica.train.data.open import register_source
from semantica.train.data.source import MARK, Source, Stamp, around, parted

# an operator, with what its benchmark and its tests need


@torch.library.custom_op("contributed::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return torch.relu(x).square()


squared_relu.register_fake(torch.empty_like)
squared_relu.register_autograd(
    lambda ctx, dy: 2 * torch.relu(ctx.saved_tensors[0]) * dy,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@dataclass(frozen=True)
class SquaredReluCase(Case):
    rows: int
    width: int

    @property
    def description(self) -> str:
        return f"({self.rows}, {self.width})"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        return {"x": normal((self.rows, self.width), torch.Generator().manual_seed(seed), dtype, device)}

    def flops(self, direction: str) -> int:
        return {"forward": 2, "backward": 3, "both": 5}[direction] * self.rows * self.width


register_operator(
    Operator(
        name="squared_relu",
        function=squared_relu,
        reference=lambda x: torch.relu(x) ** 2,
        cases={"small": SquaredReluCase(64, 256)},
    )
)

# an engine, a solver, a size


class TracedEngine(TorchEngine):
    """The network, which says when it begins."""

    backend = "traced"

    def encode(self, inputs):
        print("traced engine")
        return super().encode(inputs)


register_backend(
    Backend(
        "traced",
        lambda bundle, name, device: TracedEngine(bundle, torch.device("cpu")),
        packages=("torch",),
        extra="",
        precisions={"cpu": ("fp32",)},
        place="the CPU",
    )
)


def euler(steps: Steps) -> dict[str, np.ndarray]:
    """Euler's method on the probability flow in sigma / alpha, which DDIM is too: the same numbers by another way."""
    ratio, ratio_next = steps.sigma / steps.alpha, steps.sigma_next / steps.alpha_next
    # d(z / alpha) = eps d(sigma / alpha), eps = (z - alpha x) / sigma
    slope = (ratio_next - ratio) / ratio
    return {"z_scale": steps.alpha_next / steps.alpha * (1 + slope), "x_scale": -steps.alpha_next * slope}


register_solver("euler", euler)
PRESETS["micro"] = dict(
    image_size=32, patch_size=4, channels=(16,), depths=(1,), width=32, depth=1, heads=1, emb_dim=32,
    encoder=dict(width=32, depth=1, heads=1, grid=16),
)  # fmt: skip

# an encoder of texts, and so a text stream


@register_encoder
class Letters(ModelMixin, ConfigMixin):
    """One vector for each of the first words of a text, by its hash."""

    trainable, input_dtype, input_shape = True, torch.int64, (4,)

    @register_to_config
    def __init__(self, width: int = 24):
        super().__init__()
        self.embedding = nn.Embedding(97, width)

    @property
    def token_dim(self) -> int:
        return self.config.width

    def prepare(self, texts: list[str]) -> Tensor:
        rows = [[1 + zlib.crc32(word.encode()) % 96 for word in text.split()][:4] for text in texts]
        return torch.tensor([row + [0] * (4 - len(row)) for row in rows])

    def forward(self, ids: Tensor) -> Stream:
        tokens = self.embedding(ids)
        return Stream(tokens, tokens.mean(1))


# a source of training data


@dataclass(frozen=True)
class ArrayData(Source):
    """A uint8 array [groups, pictures, S, S, 3] in a file; a picture is referred to by its number in the whole array.

    groups: the numbers of those in use.
    """

    root: str
    mode: str
    pictures: np.ndarray
    groups: tuple[int, ...]
    bad: tuple[tuple[str, str], ...] = ()
    tokens: Any = None
    kind: ClassVar[str] = "array"

    def of(self, group: int) -> list[int]:
        """The pictures of a group."""
        count = self.pictures.shape[1]
        return list(range(group * count, (group + 1) * count))

    def __len__(self) -> int:
        return len(self.refs())

    def describe(self) -> str:
        return f"{len(self)} pictures in an array"

    def digest(self) -> str:
        return f"{zlib.crc32(self.pictures.tobytes() + bytes(self.groups)):016x}"

    def split(self, fraction: float, seed: int) -> tuple["ArrayData", "ArrayData"]:
        return tuple(
            replace(self, groups=tuple(self.groups[i] for i in side))
            for side in parted(len(self.groups), fraction, seed, "groups")
        )

    def draw(self, seed: int, index: int, conditions: int = 1) -> Pair:
        rng, group = generator(seed, PAIR, index), self.groups[index % len(self.groups)]
        refs = rng.permutation(self.of(group))[: 1 + conditions].tolist()
        target, *others = (View(ref, bool(rng.integers(2)), tuple(rng.random(3).tolist())) for ref in refs)
        return Pair(group, target, tuple(others))

    def target_candidates(self, group: int, start: int) -> Iterator[int]:
        return around(self.of(group), start)

    def condition_candidates(self, group: int, target: int, start: int) -> Iterator[int]:
        return (ref for ref in around(self.of(group), start) if ref != target)

    def load(self, ref: int, near: int) -> Image.Image:
        return Image.fromarray(self.pictures[divmod(ref, self.pictures.shape[1])])

    def refs(self) -> list[int]:
        return [ref for group in self.groups for ref in self.of(group)]

    def picture_bytes(self) -> int:
        return self.pictures.nbytes

    def stamp(self, ref: int) -> Stamp:
        return Stamp(sha256(self.load(ref, 0).tobytes()).digest()[:MARK])


def open_array(root: str, mode: str, low: float | None, high: float | None) -> ArrayData:
    pictures = np.load(root, allow_pickle=False)
    return ArrayData(root, mode, pictures, tuple(range(len(pictures))))


register_source(ArrayData.kind, lambda root: root.endswith(".npy"), "folders", open_array)

# a guider


class Averaged(ClassifierFreeGuidance):
    """The mean of both predictions: classifier-free guidance of scale 1/2, by another way."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        return GuiderOutput((pred_cond + pred_uncond) / 2, pred_cond, pred_uncond)


# a verb


@dataclass(frozen=True)
class CountConfig:
    """Count the pictures of a folder."""

    folder: Path


def count(config: CountConfig) -> None:
    print(f"{len(list(config.folder.glob('*.png')))} pictures")


register_verb("count", "count the pictures of a folder", f"{__name__}:count", f"{__name__}:CountConfig")

if __name__ == "__main__":
    sys.exit(main())
