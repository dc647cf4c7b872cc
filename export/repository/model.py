"""Triton's Python backend: variations of pictures by the sampling loop, over the models that stand beside this one.

Runs in the server, with numpy and the modules that were written beside this file, which are those of the package that
the repository was written with. On a GPU, where torch is installed too, tensors stay there from step to step.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# before whatever other version the server's Python may have
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import triton_python_backend_utils as pb_utils

from semantica import solvers
from semantica.condition import Condition
from semantica.discrete import schedule_of
from semantica.errors import UserError
from semantica.pixels import to_planes, to_uint8
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

Array = Any  # numpy.ndarray or torch.Tensor
HERE = Path(__file__).parent
# a run at once for each pair of settings in a batch; the steps of them meet in the denoiser's own queue
RUNS = 4


class Cancelled(Exception):
    """Nobody waits for the images of a run any more."""


class Host:
    """Arrays of numpy, in the memory of the host."""

    def __init__(self):
        self.memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def sent(self, array: np.ndarray, kind: str = "") -> np.ndarray:
        return array.astype({"FP16": np.float16, "FP32": np.float32}[kind]) if kind else array

    def tensor(self, name: str, array: np.ndarray) -> Any:
        return pb_utils.Tensor(name, np.ascontiguousarray(array))

    def read(self, tensor: Any) -> np.ndarray:
        return tensor.as_numpy()


class Device:
    """Tensors of torch, which go from model to model through DLPack without a copy to the host."""

    def __init__(self, place: str):
        import torch

        self.torch, self.place = torch, torch.device(place)
        kind = pb_utils.TRITONSERVER_MEMORY_GPU if self.place.type == "cuda" else pb_utils.TRITONSERVER_MEMORY_CPU
        self.memory = pb_utils.PreferredMemory(kind, self.place.index or 0)
        self.kinds = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}

    def sent(self, array: np.ndarray, kind: str = "") -> Array:
        return self.torch.as_tensor(array).to(self.place, self.kinds.get(kind))

    def tensor(self, name: str, array: Array) -> Any:
        return pb_utils.Tensor.from_dlpack(name, array.contiguous())

    def read(self, tensor: Any) -> Array:
        return self.torch.from_dlpack(tensor).to(self.place)


class Served:
    """The repository's models as a `semantica.sampling.loop.Denoiser`.

    Keys and values stay as graphs read them, `[B, H, M, D]`: what the loop does with a condition is along the batch.
    """

    max_batch, joins, refuses = None, True, {}

    def __init__(self, arrays: Host | Device, models: dict[str, str], facts: dict[str, Any]):
        self.arrays, self.models, self.facts = arrays, models, facts
        self.kinds = facts["types"]
        self.pairs = [tuple(f"{kind}.{i}" for kind in "kv") for i in range(facts["blocks"])]
        self.arrays_of_null = {
            name: arrays.sent(array, self.kinds[name]) for name, array in read_null(HERE / "null.safetensors").items()
        }

    def call(self, model: str, tensors: Sequence[Any], outputs: Sequence[str]) -> dict[str, Array]:
        """Outputs of a model by name. Raises `TritonModelException` with what it said where it failed."""
        request = pb_utils.InferenceRequest(
            model_name=self.models[model],
            requested_output_names=list(outputs),
            inputs=list(tensors),
            preferred_memory=self.arrays.memory,
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{self.models[model]}: {response.error().message()}")
        return {tensor.name(): self.arrays.read(tensor) for tensor in response.output_tensors()}

    def as_condition(self, arrays: dict[str, Array]) -> Condition:
        keys, values = (tuple(arrays[pair[i]] for pair in self.pairs) for i in (0, 1))
        return Condition(keys, values, arrays["emb"], None, tuple(self.facts["sizes"]))

    def condition(self, inputs: dict[str, np.ndarray]) -> Condition:
        tensors = [self.arrays.tensor(name, self.arrays.sent(array)) for name, array in inputs.items()]
        names = [name for pair in self.pairs for name in pair]
        return self.as_condition(self.call("condition", tensors, [*names, "emb"]))

    def null(self, batch: int) -> Condition:
        return self.as_condition(self.arrays_of_null).repeat(batch)

    def bind(self, condition: Condition) -> Callable[[Array, Array], Array]:
        # one tensor object for all steps: those of the host reach the memory that is shared with the server once
        bound = [self.arrays.tensor("emb", condition.emb)]
        for pair in zip(self.pairs, zip(condition.keys, condition.values)):
            bound += map(self.arrays.tensor, *pair)

        def predict(z: Array, logsnr: Array) -> Array:
            own = [self.arrays.tensor("z", z), self.arrays.tensor("logsnr", logsnr.reshape(-1, 1))]
            return self.call("denoise", [*own, *bound], ["v"])["v"]

        return predict

    def decode(self, z: Array) -> np.ndarray:
        """Images uint8 `[B, S, S, 3]`; of latents one at a time, whose activations are large."""
        if not self.facts["decodes"]:
            return to_uint8(z)
        parts = (self.arrays.tensor("latents", z[i : i + 1]) for i in range(len(z)))
        return np.concatenate([to_uint8(self.call("decode", [part], ["images"])["images"]) for part in parts])


@dataclass
class Job:
    """A request: what it asks for, by rows, and what becomes of it.

    inputs: prepared arrays `[B, ...]` by name. noise: float32 `[B, C, H, W]`. settings: (steps, guidance) of each row.
    """

    request: Any
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    noise: np.ndarray | None = None
    seeds: Sequence[int] = ()
    settings: Sequence[tuple[int, float]] = ()
    images: dict[int, np.ndarray] = field(default_factory=dict)
    error: Any = None

    def response(self) -> Any:
        if self.error is not None:
            return pb_utils.InferenceResponse(output_tensors=[], error=self.error)
        images = np.ascontiguousarray([self.images[row] for row in range(len(self.settings))])
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", images)])


class TritonPythonModel:
    """What Triton calls. Rows of all requests of a batch that share steps and guidance are one run."""

    def initialize(self, args: dict[str, str]) -> None:
        self.facts = facts = json.loads((HERE / "variations.json").read_text())
        config = json.loads(args["model_config"])
        told = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.most_steps = int(told["max_steps"])
        on_gpu = args["model_instance_kind"] == "GPU"
        if on_gpu and not torch_has_gpus():
            pb_utils.Logger.log_warn(
                "variations: no torch for GPUs in this Python, so tensors go through the host's memory"
            )
            on_gpu = False
        if not on_gpu and "BF16" in facts["types"].values():
            raise pb_utils.TritonModelException(
                "bf16 needs a GPU, and torch for GPUs in this Python: numpy has no such type"
            )
        arrays = Device(f"cuda:{args['model_instance_device_id']}") if on_gpu else Host()
        self.denoiser = Served(arrays, told, facts)
        self.schedule = schedule_of(facts["scheduler"])
        self.pool = ThreadPoolExecutor(RUNS)

    def finalize(self) -> None:
        self.pool.shutdown()

    def execute(self, requests: list[Any]) -> list[Any]:
        jobs = [self.read(request) for request in requests]
        groups: dict[tuple[int, float], list[tuple[Job, int]]] = {}
        for job in jobs:
            for row, settings in enumerate(job.settings):
                groups.setdefault(settings, []).append((job, row))
        # runs spend their time waiting for models, which join the steps of several
        each = self.pool.map if len(groups) > 1 else map
        list(each(self.make, groups, groups.values()))
        return [job.response() for job in jobs]

    def read(self, request: Any) -> Job:
        """A request's rows; what cannot be sampled has an error at once."""
        job = Job(request)
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            for name, fact in self.facts["inputs"].items():
                array = given[fact["given"]]
                job.inputs[name] = to_planes(array) if fact["picture"] else array
            rows = len(next(iter(job.inputs.values())))

            def column(name: str, default: float) -> list:
                return given[name].reshape(rows).tolist() if name in given else [default] * rows

            job.seeds, shape = column("seed", 0), tuple(self.facts["sample"])
            # read later too, by solvers that add noise, when others would be refused along
            if min(job.seeds) < 0:
                raise UserError(f"seed {min(job.seeds)} must be 0 or more")
            # as a pipeline: the variations of one picture by one seed
            drawn = given.get("noise")
            job.noise = (
                np.stack([solvers.noise(seed, shape, 0, row) for row, seed in enumerate(job.seeds)])
                if drawn is None
                else drawn
            )
            if not np.isfinite(job.noise).all():
                raise UserError("noise holds numbers that are not finite")
            settings = list(zip(column("steps", self.facts["steps"]), column("guidance", self.facts["guidance"])))
            for steps, guidance in {*settings}:
                if steps > self.most_steps:
                    raise UserError(f"steps is {steps}: give 1 to {self.most_steps}")
                self.sampling(steps, guidance).plan(self.schedule)
            job.settings = settings
        except UserError as error:
            job.error = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        return job

    def sampling(self, steps: int, guidance: float) -> Sampling:
        return Sampling.of(self.facts["scheduler"], steps=steps, guidance=guidance)

    def make(self, settings: tuple[int, float], members: list[tuple[Job, int]]) -> None:
        """Run the rows of some jobs that share their settings; each gets its image, or all of them the error."""
        jobs = list({id(job): job for job, _ in members}.values())

        def on_step(_: int, z: Array) -> Array:
            if all(job.request.is_cancelled() for job in jobs):
                raise Cancelled
            return z

        def fresh(step: int) -> Array:
            shape = tuple(self.facts["sample"])
            return arrays.sent(np.stack([solvers.noise(j.seeds[row], shape, 0, row, step + 1) for j, row in members]))

        arrays = self.denoiser.arrays
        try:
            condition = self.condition([{n: a[row] for n, a in job.inputs.items()} for job, row in members])
            z = arrays.sent(np.stack([job.noise[row] for job, row in members]))
            run = self.sampling(*settings)
            z = sample(self.denoiser, z, condition, None, self.schedule, run, fresh, on_step=on_step)
            for (job, row), image in zip(members, self.denoiser.decode(z)):
                job.images[row] = image
        except Cancelled:
            self.fail(jobs, "cancelled by the client", pb_utils.TritonError.CANCELLED)
        # whatever a model says, the other runs of the batch go on
        except Exception as error:
            pb_utils.Logger.log_error(f"variations: {error}")
            self.fail(jobs, str(error), pb_utils.TritonError.INTERNAL)

    @staticmethod
    def fail(jobs: list[Job], message: str, code: int) -> None:
        for job in jobs:
            job.error = pb_utils.TritonError(message, code)

    def condition(self, rows: list[dict[str, np.ndarray]]) -> Condition:
        """The condition of some rows; equal ones, such as the variations of a picture, are encoded once."""
        places: dict[bytes, int] = {}
        chosen = [places.setdefault(b"".join(a.tobytes() for a in row.values()), len(places)) for row in rows]
        first = [rows[chosen.index(place)] for place in range(len(places))]
        made = self.denoiser.condition({name: np.stack([row[name] for row in first]) for name in rows[0]})
        return made if len(first) == len(rows) else made.map(lambda array: array[chosen])


def torch_has_gpus() -> bool:
    """Whether torch is here, and made for GPUs."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def read_null(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file that holds float32 alone."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    made = {}
    for name, fact in header.items():
        first, last = fact["data_offsets"]
        made[name] = np.frombuffer(data[start + first : start + last], "<f4").reshape(fact["shape"]).copy()
    return made
