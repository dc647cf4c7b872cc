"""AOTInductor packages from a bundle's weights: compiled for this machine's CPU, model code not needed to run them."""

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from semantica.engines import Bundle, network
from semantica.engines.bundle import DECODE
from semantica.engines.inductor import PACKAGES, InductorEngine, architecture
from semantica.errors import ArtifactError, UserError
from semantica.export.builders import Builder
from semantica.export.program import MAX_BATCH, capture, capture_decoder, quiet


class InductorBuilder(Builder):
    def programs(self, bundle: Bundle) -> dict[str, ExportedProgram]:
        """What is compiled, by the names of `PACKAGES`: the bundle's networks as programs. Raises `UserError`."""
        if DECODE not in bundle.graphs:
            captured = capture(*network.build(bundle, torch.device("cpu")), bundle.precision)
            return {"encode": captured.encode, "denoise": captured.denoise}
        # here, as bundles of this package's own models need none of diffusers' pipelines
        from semantica.export.rebuild import rebuilt
        from semantica.pipelines.unets import decode

        pipe = rebuilt(bundle)
        captured = capture(pipe.unet, pipe.encoder, bundle.precision)
        _, decoder = capture_decoder(pipe.vae, decode, pipe.sample_shape, bundle.precision_of(DECODE))
        return {"encode": captured.encode, "denoise": captured.denoise, "decode": decoder}

    def architecture(self, asked: str) -> str:
        here = architecture()
        if asked not in ("auto", here):
            raise UserError(f"--arch {asked}: inductor compiles for this machine, {here}; leave --arch out")
        return here

    def check(self, bundle: Bundle) -> None:
        if bundle.precision == "fp16":
            raise UserError(f"{bundle.folder} is fp16, for which a CPU has no fast arithmetic: export fp32 or bf16")

    def build(self, bundle: Bundle, arch: str, batches: tuple[int, int, int], folder: Path) -> dict[str, Any]:
        most = MAX_BATCH
        for name, program in self.programs(bundle).items():
            file = PACKAGES[name]
            most = min(most, *(limit.upper for limit in program.range_constraints.values()))
            try:
                with quiet(), torch.no_grad():
                    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / file))
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise ArtifactError(f"inductor cannot compile {file} ({type(error).__name__}: {reason})") from error
        # a package takes any batch, whatever the usual one
        return {"profile": {"min": 1, "opt": 2, "max": int(most)}, "backend_version": torch.__version__}

    def load(self, bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> InductorEngine:
        return InductorEngine(bundle, folder, manifest)


BUILDER = InductorBuilder()
