"""The graph of a whole sampling run, from pictures and noise to pictures, over the graphs of a bundle."""

import json

import numpy as np
import onnx_ir as ir

from semantica import __version__
from semantica.discrete import schedule_of
from semantica.engines.bundle import CONDITION, DECODE, Bundle
from semantica.errors import UserError
from semantica.export.one_file import plan as coefficients
from semantica.export.one_file.denoise import Run, denoise
from semantica.export.one_file.parts import inline, null
from semantica.export.one_file.traced import BOOL, FLOAT, INTEGER, SAME, Trace, Traced, compared, joined, where
from semantica.inputs import TEXT
from semantica.sampling.settings import Sampling
from semantica.solvers import guide, x_from_v

UINT8 = ir.DataType.UINT8
BATCH = "batch"
TOKENS = "input_ids"


def compose(bundle: Bundle, solver: str, guidance: float, most_steps: int | None = None) -> ir.Model:
    """A model of `image, noise, steps, guidance -> images`; its weights are still those of the bundle's file.

    guidance: what the model's properties name as usual. most_steps: of a run, where the schedule has more or no end.
    """
    config = {**bundle.manifest["model"]["scheduler"], "solver": solver}
    schedule, settings = schedule_of(config), Sampling.of(config)
    most = min(filter(None, (coefficients.most(schedule), most_steps)), default=None)
    trace, shape = Trace("run"), bundle.shape_of("z", 1)[1:]
    encoded = inputs(trace, bundle)
    noise = trace.input("noise", FLOAT, (BATCH, *shape))
    steps, scale = trace.input("steps", INTEGER, ()), trace.input("guidance", FLOAT, ())
    steps, batch = checked(trace, most, noise, steps, scale, [*encoded.values()][0])

    own = inline(trace, bundle, CONDITION, encoded, BATCH)
    other = null(trace, bundle, batch)
    unguided = compared("Equal", scale, 1.0)
    branches = where(unguided, trace.constant(1, INTEGER), trace.constant(2, INTEGER))
    condition = {name: joined(own[name], other[name]).part(0, branches * batch) for name in own}
    levels, table = coefficients.plan(schedule, solver, steps)
    run = Run(steps, branches, batch, scale)
    made = loop(bundle, settings, noise, condition, levels, table, run)
    images = decoded(trace, bundle, made) if DECODE in bundle.graphs else made
    side = images.shape[-1]
    # the rounding of `semantica.pixels.to_uint8`
    pixels = ((images + 1) * 127.5).round().clip(0, 255)
    pixels = trace.add("Transpose", pixels, perm=[0, 2, 3, 1]).cast(UINT8)
    trace.output(pixels, "images", UINT8, (BATCH, side, side, 3))

    opset = bundle.manifest["opset"]
    trace.graph.opset_imports[""] = opset
    model = ir.Model(trace.graph, ir_version=10, producer_name="semantica", producer_version=__version__)
    model.doc_string = "One call is a whole sampling run; images are uint8, noise is standard normal."
    model.metadata_props.update(described(bundle, config, guidance, side, most))
    return model


def described(bundle: Bundle, config: dict, guidance: float, side: int, most: int | None) -> dict[str, str]:
    """What the model says of itself: texts, as ONNX has them."""
    own = [name for name in bundle.graphs if bundle.for_onnx_runtime(name) != bundle.folder / name]
    said = {
        "semantica": __version__,
        "solver": config["solver"],
        "precision": bundle.precision,
        "quantisation": bundle.quantised,
        "guidance": guidance,
        "image_size": bundle.shapes["image"],
        "sample_shape": list(bundle.shape_of("z", 1)[1:]),
        "output_size": side,
        "most_steps": most,
        "scheduler": config,
        "graphs": {name: "ONNX Runtime's operators" if name in own else "ONNX's operators" for name in bundle.graphs},
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}


def inputs(trace: Trace, bundle: Bundle) -> dict[str, Traced]:
    """The model's inputs for the encoders, and what is made of them: what the encoders' graph takes.

    Raises:
        UserError: an encoder that takes neither pictures nor tokens of a text.
    """
    made = {}
    for name, shape in bundle.inputs.items():
        if name in bundle.tokenizers:
            made[name] = trace.input(*tokens_of(name, shape)).reshape(SAME, *shape)
        elif len(shape) == 3 and shape[0] == 3:
            pixels = trace.input(name, UINT8, (BATCH, *shape[1:], 3))
            planes = trace.add("Transpose", pixels, perm=[0, 3, 1, 2]).cast(FLOAT)
            # as `semantica.pixels.to_planes`
            made[name] = planes / 127.5 - 1.0
        else:
            raise UserError(f"{bundle.folder} takes {name} {list(shape)}: one file takes pictures and texts alone")
    return made


def tokens_of(name: str, shape: tuple[int, ...]) -> tuple[str, ir.DataType, tuple]:
    """The input of a text's tokens, of one tower without an axis of towers: its name, type and shape."""
    whole = shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
    return TOKENS if name == TEXT else f"{name}_{TOKENS}", INTEGER, (BATCH, *whole)


def checked(
    trace: Trace, most: int | None, noise: Traced, steps: Traced, scale: Traced, first: Traced
) -> tuple[Traced, Traced]:
    """Steps and batch, once a run has found that its inputs are possible."""
    batch, given = (extents(one).part(0, 1).reshape() for one in (noise, first))
    few = trace.add("And", compared("Greater", steps, 0), compared("LessOrEqual", steps, most or 2**31), dtype=BOOL)
    said = f"steps_must_be_1_to_{most}" if most else "steps_must_be_1_or_more"
    finite = trace.add("Not", trace.add("IsNaN", scale - scale, dtype=BOOL), dtype=BOOL)
    alike = trace.add("Equal", batch, given, dtype=BOOL)
    # zeros, where there is something to check
    steps = steps + coefficients.check(few, said) + coefficients.check(finite, "guidance_must_be_finite")
    return steps, batch + coefficients.check(alike, "there_must_be_one_noise_for_each_sample")


def extents(array: Traced) -> Traced:
    return array.trace.add("Shape", array, dtype=INTEGER)


def loop(
    bundle: Bundle,
    settings: Sampling,
    noise: Traced,
    condition: dict[str, Traced],
    levels: Traced,
    table: Traced,
    run: Run,
) -> Traced:
    """`semantica.sampling.loop.sample` as one node.

    condition: of `branches * batch` rows, the branches one after the other. levels, table: see `coefficients.plan`.
    """
    trace, body, shape = noise.trace, Trace("step"), noise.shape
    i, again = body.input("step/i", INTEGER, ()), body.input("step/again", BOOL, ())
    z = body.input("step/z", FLOAT, (BATCH, *shape[1:]))
    batch, rows = body.outer(run.batch), body.outer(run.rows)
    row = body.add("Gather", body.outer(table), i, axis=0)
    column = dict(zip(coefficients.COLUMNS, split(row)))
    many = joined(body.outer(run.branches).reshape(1), batch.reshape(1), body.constant(np.array(shape[1:], np.int64)))
    both = body.add("Expand", z, many).reshape(-1, *shape[1:])
    v = denoise(bundle, condition, levels, run, body, i, both)
    # of one branch alone they are the same, and guidance of 1 is exactly that
    v = guide(v.part(0, batch), v.part(rows - batch, rows), body.outer(run.guidance))
    x = settings.threshold(shaped(x_from_v(z, v, column["alpha"], column["sigma"]), shape))
    z_next, states = column["z_scale"] * z + column["x_scale"] * x, {"z": noise}
    # read by DPM-Solver++ alone
    if settings.solver == "dpmpp_2m":
        x_previous = body.input("step/x_previous", FLOAT, (BATCH, *shape[1:]))
        z_next = z_next + column["x_previous_scale"] * x_previous
        states["x"] = trace.add("Expand", trace.constant(np.float32(0)), extents(noise), dtype=FLOAT)
    body.output(again, "step/continue", BOOL, ())
    for name, array in zip(states, (z_next, x)):
        body.output(array, f"step/next_{name}", FLOAT, (BATCH, *shape[1:]))
    made = trace.values(
        "Loop", run.steps, None, *states.values(), outputs=len(states), name="sampling", body=body.graph
    )
    made[0].dtype = FLOAT
    return Traced(trace, made[0], shape)


def shaped(array: Traced, shape: tuple[int, ...]) -> Traced:
    return Traced(array.trace, array.value, shape)


def split(row: Traced) -> list[Traced]:
    """The entries of a row of the table, `[1]` each."""
    names = coefficients.COLUMNS
    values = row.trace.values("Split", row, outputs=len(names), axis=0, num_outputs=len(names))
    for value in values:
        value.dtype = FLOAT
    return [Traced(row.trace, value) for value in values]


def decoded(trace: Trace, bundle: Bundle, latents: Traced) -> Traced:
    """Images `[B, 3, R, R]` of latents, one at a time, as engines decode them: a decoder's activations are large."""
    body, shape = Trace("decoding"), latents.shape
    i, again = body.input("decoding/i", INTEGER, ()), body.input("decoding/again", BOOL, ())
    one = Traced(body, latents.value, shape).part(i, i + 1)
    images = inline(body, bundle, DECODE, {"latents": one}, "one")["images"]
    body.output(again, "decoding/continue", BOOL, ())
    body.output(images.reshape(*images.shape[1:]), "decoding/image", FLOAT, images.shape[1:])
    batch = extents(latents).part(0, 1).reshape()
    (made,) = trace.values("Loop", batch, None, name="decoding", body=body.graph)
    made.dtype = FLOAT
    return Traced(trace, made, (SAME, *images.shape[1:]))
