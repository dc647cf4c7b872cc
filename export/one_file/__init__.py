"""One ONNX file that samples: encoder, sampling loop and decoder of a bundle in a single graph."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from semantica.discrete import CLASS
from semantica.engines.bundle import Bundle
from semantica.errors import UserError
from semantica.files import aside_of, full, move_in, remove, sync
from semantica.lock import locked
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.kinds import usual_guidance

SOLVERS = ("ddim", "dpmpp_2m")
# a protobuf message has at most 2^31 - 1 bytes, and a graph needs some itself
INSIDE = 2**31 - 2**26


def write(bundle: Bundle, out: Path, solver: str = "ddim", most_steps: int | None = None) -> Path:
    """Write the model `image, noise, steps, guidance -> images`, once its images are those of the bundle's pipeline.

    Inputs: `image` uint8 `[B, S, S, 3]` (RGB), of models that read text `input_ids` int64 in its place or beside it;
    `noise` float32 `[B, C, R, R]`, standard normal; `steps` int64 and `guidance` float32, scalars. Output: `images`
    uint8 `[B, H, W, 3]`. Weights above 2 GB lie in a second file beside it, `<out>.data`. Its metadata say the rest.

    Args:
        bundle: opened, its hashes checked. solver: one of `SOLVERS`; those that add noise would need more of it.
        most_steps: more fail before anything is computed, as memory grows with the steps; None for any number that the
            schedule has.

    Raises:
        UserError: an unknown solver, a place that is taken or cannot be written to, or an encoder that takes neither
            pictures nor text.
        ArtifactError: its images are not those of the pipeline; nothing is kept.
    """
    from semantica.export.one_file.compare import compare, plan_of
    from semantica.export.one_file.compose import compose

    if solver not in SOLVERS:
        raise UserError(f"solver {solver!r} of one file: choose {' or '.join(SOLVERS)}")
    model, began = bundle.manifest["model"], time.perf_counter()
    latent = model["scheduler"].get("class") == CLASS
    guidance = usual_guidance(model["unet"]) if latent else VariationPipeline.guidance
    with new_files(out) as folder:
        runs = plan_of(bundle, guidance)
        made = compose(bundle, solver, guidance, most_steps)
        made.metadata_props.update(runs.described)
        save(made, folder / out.name)
        if bundle.precision == "bf16":
            import onnx

            onnx.checker.check_model(folder / out.name, full_check=True)
            twin = twin_of(bundle, folder / "twin")
            save(compose(twin, solver, guidance, most_steps), folder / "twin.onnx")
            worst = compare(twin, folder / "twin.onnx", solver, runs)
        else:
            worst = compare(bundle, folder / out.name, solver, runs)
    seconds = time.perf_counter() - began
    print(f"{out}: {solver}, {runs.words}: images {worst:.1f} dB from the pipeline's at worst, {seconds:.1f} s")
    return out


def save(model, path: Path) -> None:
    """A model in one file, or, where it is too large for one, with its weights in a second one."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values())
    if size > INSIDE:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.save(ir.external_data.load_to_model(model), path)


def twin_of(bundle: Bundle, folder: Path) -> Bundle:
    """A bf16 bundle with its numbers in fp32: ONNX Runtime has no kernels for bf16 on a CPU."""
    from semantica.export.gate import write_twin

    write_twin(bundle.folder, folder)
    for name in (name for names in bundle.tokenizers.values() for name in names):
        shutil.copytree(bundle.folder / name, folder / name)
    return replace(bundle, folder=folder, manifest=bundle.manifest | {"precision": "fp32"})


@contextmanager
def new_files(out: Path) -> Iterator[Path]:
    """An empty folder; what has the name of `out` in it at the end, and the data beside that, take their places.

    Raises:
        UserError: the place is taken, by now or from the start, or cannot be written to.
    """
    names = out.name, f"{out.name}.data"
    folder = aside_of(out)

    def refuse_taken() -> None:
        for name in names:
            if os.path.lexists(out.with_name(name)):
                raise UserError(f"{out.with_name(name)} exists: choose another name")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(aside_of(out, "lock"), f"another process makes {out}: wait for it, or choose another name"):
            refuse_taken()
            try:
                remove(folder)
                folder.mkdir()
                yield folder
                refuse_taken()
                # the data first: a model without them would be of no use
                for name in (name for name in reversed(names) if (folder / name).exists()):
                    sync(folder / name)
                    move_in(folder / name, out.with_name(name))
            finally:
                remove(folder)
    except OSError as error:
        problem = full(out, error, "nothing of it is kept, and what was there before is")
        said = f"cannot write {out}: {error.strerror or error}; give a place with room"
        raise problem or UserError(said) from error
