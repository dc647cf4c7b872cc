"""What every engine has in common: a denoiser whose inputs are checked before anything is launched."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from semantica.condition import Condition, concatenate
from semantica.engines.bundle import Bundle
from semantica.engines.embedding import noise_embedding
from semantica.errors import UserError
from semantica.inputs import by_name, samples_in
from semantica.sampling.loop import Velocity, like

Array = Any  # numpy.ndarray or torch.Tensor


def heads_first(array: Array) -> Array:
    """`[B, M, H, D]` as exported graphs read it, contiguous `[B, H, M, D]`."""
    swapped = array.swapaxes(1, 2)
    return np.ascontiguousarray(swapped) if isinstance(swapped, np.ndarray) else swapped.contiguous()


class Engine(ABC):
    """The denoiser and the condition encoder of a bundle, run by one backend; a `semantica.sampling.loop.Denoiser`.

    backend: its name. arithmetic: what it really computes in, in words. device: where.
    max_batch: the largest batch of one call (both branches of guidance count), None for any.
    array: "numpy" or "torch", the kind of arrays that it takes and gives.
    """

    backend: str
    arithmetic: str
    array: str
    device: str = "cpu"
    max_batch: int | None = None
    joins = True

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    @property
    def manifest(self) -> dict[str, Any]:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def dtype(self) -> str:
        """The bundle's precision: "fp32", "fp16" or "bf16"."""
        return self.bundle.precision

    @property
    def refuses(self) -> Mapping[str, str]:
        """No gradients, and no module that guiders could change."""
        name = f"engine {self.backend!r}"
        return {
            "module": f"{name} takes no guider that changes the network: use another one, or the engine 'torch'",
            "gradients": f"{name} gives no gradients: sample the run folder that it was exported from",
        }

    def condition(self, inputs: Array | Mapping[str, Array]) -> Condition:
        """Keys, values and embedding of prepared pictures, and of what else the bundle's encoders take.

        inputs: float32 `[B, 3, S, S]` in [-1, 1], S the bundle's image size; `{name: array}` where there are several,
        see `Bundle.inputs`. Raises `UserError` for another shape or name, or a batch outside the profile.
        """
        inputs = by_name(inputs, self.bundle.inputs)
        for name, array in inputs.items():
            self.check(name, array, samples_in(inputs))
        return self.encode(inputs)

    def __call__(self, z: Array, logsnr: Array, condition: Condition) -> Array:
        """Predict v `[B, 3, R, R]` float32 from z `[B, 3, R, R]` and log-SNR `[B]`, both float32.

        Raises `UserError` for another shape, or a batch outside the profile; nothing is launched then.
        """
        return self.bind(condition)(z, logsnr)

    def bind(self, condition: Condition) -> Velocity:
        """The engine for one condition, brought into the layout of its graph once. Raises as calling the engine."""
        batch = len(condition.emb)
        self.check("emb", condition.emb, batch)
        if condition.sizes != self.bundle.sizes or condition.lengths is not None:
            raise UserError(
                f"condition has stream sizes {condition.sizes}: this bundle's streams are fixed at {self.bundle.sizes}"
            )
        for arrays in (condition.keys, condition.values):
            for i, array in enumerate(arrays):
                self.check(f"k.{i}", array.swapaxes(1, 2), batch)
        inputs = self.inputs(condition)

        def predict(z: Array, logsnr: Array) -> Array:
            for name, array in (("z", z), ("logsnr", logsnr), ("emb", condition.emb)):
                self.check(name, array, len(z))
            return self.predict(z, logsnr, inputs)

        return predict

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
    def encode(self, inputs: Mapping[str, Array]) -> Condition: ...

    def inputs(self, condition: Condition) -> Any:
        """A condition in the layout that every step reads: made once by `bind`, the same object in all calls since.

        What is bound once is known again by that object, never by an address, which may belong to another by then.
        """
        return condition

    @abstractmethod
    def predict(self, z: Array, logsnr: Array, inputs: Any) -> Array:
        """v; inputs: what `inputs` made of the condition."""


class GraphEngine(Engine):
    """An engine over the bundle's two graphs.

    encoder, denoiser: `{input: array} -> {output: array}`, each. null_arrays: what null.safetensors holds.
    decoder: the same of latents, where the network samples these.
    """

    encoder: Callable[[Mapping[str, Array]], dict[str, Array]]
    denoiser: Callable[[Mapping[str, Array]], dict[str, Array]]
    null_arrays: dict[str, Array]
    decoder: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None

    def null(self, batch: int) -> Condition:
        sizes = self.bundle.sizes
        # one token that stands for a stream, or all those of the empty prompt
        whole = bool(sizes) and self.null_arrays["k.0"].shape[2] == sum(sizes)
        null = self.as_condition(self.null_arrays, sizes if whole else (1,) * len(sizes))
        return null.fill(sizes).repeat(batch)

    def encode(self, inputs: Mapping[str, Array]) -> Condition:
        return self.as_condition(self.encoder(inputs), self.bundle.sizes)

    def decode(self, latents: Array) -> Array:
        """Images `[B, 3, R, R]` around [-1, 1] of latents `[B, C, S, S]`, both float32, one at a time.

        Raises:
            UserError: latents of another shape.
        """
        self.check("latents", latents, len(latents))
        return concatenate([self.decoder({"latents": latents[i : i + 1]})["images"] for i in range(len(latents))])

    def embedding(self, logsnr: Array) -> Array:
        """Embeddings `[N, E]` float32 of noise levels `[N]`, to which a condition's is added."""
        wide = logsnr if isinstance(logsnr, np.ndarray) else logsnr.cpu().numpy()
        return like(noise_embedding(self.bundle, wide, "np" if self.array == "numpy" else "pt"), logsnr)

    def as_condition(self, outputs: dict[str, Array], sizes: tuple[int, ...]) -> Condition:
        """Named arrays k.i, v.i `[B, H, M, D]` and emb as a `Condition`, without a copy."""
        blocks = range(self.bundle.shapes["blocks"])
        keys, values = (tuple(outputs[f"{kind}.{i}"].swapaxes(1, 2) for i in blocks) for kind in "kv")
        return Condition(keys, values, outputs["emb"], None, sizes)

    def inputs(self, condition: Condition) -> dict[str, Array]:
        named = {"emb": condition.emb}
        for i, pair in enumerate(zip(condition.keys, condition.values)):
            named[f"k.{i}"], named[f"v.{i}"] = map(heads_first, pair)
        return named

    def predict(self, z: Array, logsnr: Array, inputs: dict[str, Array]) -> Array:
        return self.denoiser({"z": z, "logsnr": logsnr, **inputs})["v"]
