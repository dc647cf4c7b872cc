"""TensorRT-RTX engines: TensorRT's interface in another package, which builds for consumer cards that are not here."""

from typing import Any

from semantica.errors import UserError
from semantica.export.builders.tensorrt import TensorRTBuilder, present_gpu


class TensorRTRTXBuilder(TensorRTBuilder):
    # its builder takes that flag only where the GPU is, and builds for cards that are not here
    backend, refits = "tensorrt-rtx", False

    def architecture(self, asked: str) -> str:
        arch = present_gpu() if asked == "auto" else asked
        from semantica.engines.trt import module_of

        names = [name for name in dir(module_of(self.backend).ComputeCapability) if name.startswith("SM")]
        known = sorted((name.replace("SM", "sm_") for name in names), key=lambda name: int(name[3:]))
        if arch is None:
            raise UserError(f"there is no GPU here: give --arch, one of {', '.join(known)}")
        if arch not in known:
            here = ", ".join(known)
            raise UserError(f"--arch {arch}: TensorRT-RTX builds for {here}; elsewhere use tensorrt or torch")
        return arch

    def options(self, arch: str) -> dict[str, Any]:
        # it finishes its kernels where they run, and keeps no times of them
        return {"arch": arch, "timings": None}


BUILDER = TensorRTRTXBuilder()
