"""Graphs and engines of a bundle as Triton's backends load them, and what goes into and out of each."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from semantica.engines.built import FORMAT, VERSION, open_built
from semantica.engines.bundle import MANIFEST, Bundle, read_manifest
from semantica.errors import UserError

TENSORRT = "tensorrt"
TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "INT64",
    ir.DataType.INT32: "INT32",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.BOOL: "BOOL",
}


@dataclass(frozen=True)
class Port:
    """An input or output of a model. type: as Triton names it, such as "FP32". dims: -1 where any number may stand."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Ports:
    """What a graph takes and gives, in its order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def without_batch(self) -> "Ports":
        """As Triton counts dimensions of models that batch. Raises `UserError` where the first one is fixed."""
        for port in (*self.inputs, *self.outputs):
            if port.dims[:1] != (-1,):
                raise UserError(f"{port.name} is {list(port.dims)}: a graph that takes no batch, export again")
        parts = (tuple(Port(p.name, p.type, p.dims[1:]) for p in some) for some in (self.inputs, self.outputs))
        return Ports(*parts)


def ports_of(path: Path) -> Ports:
    """Those of an ONNX file; weights are not read."""
    graph = ir.load(path).graph

    def port(value: ir.Value) -> Port:
        return Port(value.name, TYPES[value.dtype], tuple(d if isinstance(d, int) else -1 for d in value.shape))

    return Ports(tuple(map(port, graph.inputs)), tuple(map(port, graph.outputs)))


@dataclass(frozen=True)
class Plans:
    """TensorRT engines of one graph or more, by the architecture that they run on.

    folders: by architecture, such as "sm_90". versions: of TensorRT, which the server has to have. most: the largest
    batch that all of them take.
    """

    folders: dict[str, Path]
    versions: tuple[str, ...]
    most: int

    def copy(self, graph: str, place: Path) -> dict[str, str]:
        """The engines of a graph into a folder; returns their files by compute capability, such as "9.0"."""
        names = {}
        for arch, folder in self.folders.items():
            number = int(arch.removeprefix("sm_"))
            names[f"{number // 10}.{number % 10}"] = f"{arch}.plan"
            shutil.copyfile(folder / graph.replace(".onnx", ".engine"), place / f"{arch}.plan")
        return names


def plans_of(bundle: Bundle) -> Plans | None:
    """The engines that `semantica build --backend tensorrt` put into a bundle; None where there are none.

    Engines of TensorRT-RTX are not loaded by Triton's backend.

    Raises:
        UserError: one is not what its manifest says, or takes no batch of 1.
    """
    folders, versions, most = {}, set(), []
    for folder in sorted((bundle.folder / "engines").glob(f"{TENSORRT}-sm_*")):
        arch = folder.name.removeprefix(f"{TENSORRT}-")
        version = read_manifest(folder / MANIFEST, FORMAT, VERSION).get("backend_version")
        folders[arch], manifest = open_built(bundle, TENSORRT, arch, version)
        profile = manifest["profile"]
        if profile.get("min", 1) != 1 or profile["max"] < 2:
            raise UserError(
                f"{folder} was built for batches {profile.get('min')} to {profile['max']}: a server needs 1 to 2 or "
                "more, guidance takes two for each image; build it again"
            )
        versions.add(version)
        most.append(profile["max"])
    return Plans(folders, tuple(sorted(versions)), min(most)) if folders else None
