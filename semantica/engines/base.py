"""What every engine has in common: a callable whose inputs are checked before anything is launched."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from semantica.condition import Condition
from semantica.engines.bundle import Bundle
from semantica.errors import UserError
from semantica.sampling import loop as sampler
from semantica.solvers import Plan

Array = Any  # numpy.ndarray or torch.Tensor


class Engine(ABC):
    """The denoiser and the condition encoder of a bundle, run by one backend.

    backend: its name. arithmetic: what it really computes in, in words. device: where.
    max_batch: the largest batch of one call (both branches of guidance count), None for any.
    array: "numpy" or "torch", the kind of arrays that it takes and gives. axis: of the tokens in keys and values.
    """

    backend: str
    arithmetic: str
    array: str
    device: str = "cpu"
    max_batch: int | None = None
    axis: int = 2

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    @property
    def manifest(self) -> dict[str, Any]:
        """The bundle's manifest."""
        return self.bundle.manifest

    def condition(self, images: Array) -> Condition:
        """Keys, values and embedding of condition pictures, in the layout that every step reads.

        images: float32 `[B, 3, S, S]` in [-1, 1], S the bundle's image size. Raises `UserError` for another shape, or
        a batch outside the profile.
        """
        self.check("image", images, len(images))
        return self.encode(images)

    def __call__(self, z: Array, logsnr: Array, condition: Condition) -> Array:
        """Predict v `[B, 3, R, R]` float32 from z `[B, 3, R, R]` and log-SNR `[B]`, both float32.

        Raises `UserError` for another shape, or a batch outside the profile; nothing is launched then.
        """
        batch = len(z)
        self.check("z", z, batch)
        self.check("logsnr", logsnr, batch)
        self.check("emb", condition.emb, batch)
        if condition.sizes != self.bundle.sizes or condition.lengths is not None:
            raise UserError(
                f"condition has stream sizes {condition.sizes}: this bundle's streams are fixed at {self.bundle.sizes}"
            )
        for keys in (*condition.keys, *condition.values):
            self.check("k.0", keys if self.axis == 2 else keys.swapaxes(1, 2), batch)
        return self.predict(z, logsnr, condition)

    def sample(
        self,
        z: Array,
        condition: Condition,
        plan: Plan,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        thresholding: str = "clip",
        clip_range: float = 1.0,
        ratio: float = 0.995,
        noise: Callable[[int], Array] | None = None,
    ) -> Array:
        """A whole run from noise z to images, against the engine's own null condition.

        Arguments, result and errors as `semantica.sampling.loop.sample`; the engine's own errors as calling it.
        """
        null = self.null(len(z)) if guidance != 1 else None
        return self.run(z, condition, null, plan, guidance, interval, thresholding, clip_range, ratio, noise)

    def run(self, z: Array, condition: Condition, null: Condition | None, *settings: Any) -> Array:
        """The loop: everything that `semantica.sampling.loop.sample` takes after the denoiser."""
        return sampler.sample(self, z, condition, null, *settings)

    def check(self, name: str, array: Array, batch: int) -> None:
        expected = self.bundle.shape_of(name, batch)
        if tuple(array.shape) != expected:
            raise UserError(f"{name} has shape {tuple(array.shape)}: this bundle takes {expected}")
        if batch < 1 or (self.max_batch is not None and batch > self.max_batch):
            raise UserError(
                f"a batch of {batch} is outside the profile 1 to {self.max_batch} of this {self.backend} engine "
                "(both branches of guidance count): use fewer images at a time, or build for a larger batch"
            )

    @abstractmethod
    def null(self, batch: int) -> Condition:
        """The unconditional branch `[batch, ...]`, filled up to the streams' sizes."""

    @abstractmethod
    def encode(self, images: Array) -> Condition: ...

    @abstractmethod
    def predict(self, z: Array, logsnr: Array, condition: Condition) -> Array: ...

    def as_condition(self, outputs: dict[str, Array], sizes: tuple[int, ...]) -> Condition:
        """Named arrays k.i, v.i `[B, H, M, D]` and emb as a `Condition`."""
        blocks = range(self.bundle.shapes["blocks"])
        keys, values = (tuple(outputs[f"{kind}.{i}"] for i in blocks) for kind in "kv")
        return Condition(keys, values, outputs["emb"], None, sizes, axis=2)

    def feeds(self, z: Array, logsnr: Array, condition: Condition) -> dict[str, Array]:
        """The inputs of `denoise.onnx` by name."""
        feeds = {"z": z, "logsnr": logsnr, "emb": condition.emb}
        for i, (key, value) in enumerate(zip(condition.keys, condition.values)):
            feeds[f"k.{i}"], feeds[f"v.{i}"] = key, value
        return feeds

    def null_from(self, arrays: dict[str, Array], batch: int) -> Condition:
        """`null.safetensors`, one token per stream and batch 1, at the bundle's sizes and another batch."""
        sizes = self.bundle.sizes
        return self.as_condition(arrays, (1,) * len(sizes)).fill(sizes).repeat(batch)
