"""TensorRT engines from a bundle's graphs, for the GPU of this machine."""

from pathlib import Path
from typing import Any

from semantica import cache
from semantica.engines import BACKENDS, Bundle, Engine, load_engine
from semantica.engines.built import FORMAT, VERSION, engine_folder
from semantica.engines.bundle import DECODE, DENOISE, MANIFEST, read_manifest
from semantica.errors import ArtifactError, UserError
from semantica.export.builders import Builder, _process

# what does the work; its results must be in the bundle's type
COMPUTE = ("CONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "ATTENTION_OUTPUT")
TYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}


class TensorRTBuilder(Builder):
    """backend: its name; its first package has TensorRT's interface."""

    backend, refits = "tensorrt", True

    @property
    def module(self) -> str:
        return BACKENDS[self.backend].packages[0]

    def architecture(self, asked: str) -> str:
        here = present_gpu()
        arch = here if asked == "auto" else asked
        if here is None or arch != here:
            raise UserError(f"tensorrt builds on the GPU that it is for, {arch or 'any'} is not here: build there")
        return arch

    def check(self, bundle: Bundle) -> None:
        attention = bundle.manifest["graphs"][DENOISE]["nodes"].get("Attention", 0)
        if bundle.precision == "fp32" and attention:
            raise UserError(f"{bundle.folder} is fp32, for which {self.backend} has no attention: export fp16 or bf16")

    def build(
        self, bundle: Bundle, arch: str, batches: tuple[int, int, int], folder: Path, refittable: bool = False
    ) -> dict[str, Any]:
        """An engine of each graph, in a process of its own; the record holds the layers of the parsed networks."""
        profile = dict(zip(("min", "opt", "max"), batches))
        record: dict[str, Any] = {"profile": profile, "refittable": refittable, "layers": {}}
        here = present_gpu() == arch
        if here:
            import torch

            record["card"] = torch.cuda.get_device_name()
        for name in bundle.graphs:
            request = {
                "module": self.module,
                "onnx": str((bundle.folder / name).resolve()),
                # latents are decoded one at a time
                "profile": dict.fromkeys(profile, 1) if name == DECODE else profile,
                "engine": str(folder / name.replace(".onnx", ".engine")),
                "layers": str(folder / name.replace(".onnx", ".layers.json")) if here else None,
                "refittable": refittable,
                **self.options(arch),
            }
            made = run_worker(request, folder / "request.json", self.backend, name)
            check_types(made["layers"], bundle.precision_of(name), name)
            record["layers"][name], record["backend_version"] = made["layers"], made["backend_version"]
        return record

    def refit(self, bundle: Bundle, old: Bundle, folder: Path) -> dict[str, Any]:
        """The engines of another bundle of the same network, with this one's weights: seconds, and no build.

        Raises `UserError` and `ArtifactError` as `TensorRTEngine.refit`, and where there is no such engine.
        """
        from semantica.engines.trt import FILES

        engine = load_engine(old, self.backend)
        record = read_manifest(engine_folder(old, self.backend, present_gpu()) / MANIFEST, FORMAT, VERSION)
        engine.refit(bundle)
        for name, content in engine.serialized().items():
            (folder / FILES[name]).write_bytes(content)
        names = ("profile", "refittable", "layers", "backend_version", "card")
        return {name: record[name] for name in names if name in record}

    def options(self, arch: str) -> dict[str, Any]:
        """What the worker is told besides: the GPU that is here, and where the times of its kernels are kept."""
        import torch

        from semantica.engines.trt import module_of

        version = module_of(self.backend).__version__
        key = {**cache.card(torch.device("cuda")), "library": f"{self.backend} {version}", "arch": arch}
        # not in the bundle, which may come from others: the builder would read what they wrote
        return {"arch": None, "timings": str(cache.path("timings", key))}

    def load(self, bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> Engine | None:
        if present_gpu() != manifest["arch"]:
            return None
        from semantica.device import pick_device
        from semantica.engines.trt import TensorRTEngine

        return TensorRTEngine(bundle, folder, manifest, pick_device("cuda"))


def present_gpu() -> str | None:
    """Architecture of the GPU that is here, such as "sm_89"."""
    import torch

    from semantica.kernels.launch import architecture

    return architecture(torch.device("cuda")) if torch.cuda.is_available() else None


def run_worker(request: dict[str, Any], place: Path, backend: str, name: str) -> dict[str, Any]:
    """Run the builder's process; raises `ArtifactError` as `_process.run_worker`."""
    return _process.run_worker("semantica.export.builders._tensorrt_worker", request, place, backend, name)


def check_types(layers: dict[str, dict[str, int]], precision: str, name: str) -> None:
    """Raises `ArtifactError` where the parsed network computes in another type than the bundle's."""
    for kind in COMPUTE:
        strangers = {dtype: count for dtype, count in layers.get(kind, {}).items() if dtype != TYPES[precision]}
        if strangers:
            said = ", ".join(f"{count} in {dtype}" for dtype, count in strangers.items())
            raise ArtifactError(f"{name} is {precision}, but of its {kind} layers {said}; nothing is kept")


BUILDER = TensorRTBuilder()
