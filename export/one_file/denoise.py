"""The denoiser in a step of the loop, and before the loop all of the denoiser that does not depend on z.

The modulations of a network are functions of the noise level and the condition's embedding, and the levels of a run are
known before it starts. So they are computed for all steps at once, and a step reads its own: one product with many rows
in place of many products with a few, each of which would read all of the weights again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from semantica.engines.bundle import DENOISE, Bundle
from semantica.export.one_file.parts import Part
from semantica.export.one_file.traced import Trace, Traced, joined

# what the batch of the denoiser's calls is called, both branches of guidance or one; and that of all steps' calls
ROWS, ALL_ROWS = "rows", "steps*rows"
# what a value depends on; of several the largest
NOTHING, CONDITION, LEVEL, SAMPLE = range(4)
LEVELS, Z = "logsnr", "z"


@dataclass(frozen=True)
class Run:
    """What a loop is given beside its arrays, scalars each. branches: of guidance, 1 or 2."""

    steps: Traced
    branches: Traced
    batch: Traced
    guidance: Traced

    @property
    def rows(self) -> Traced:
        """The batch of the denoiser's calls."""
        return self.branches * self.batch


def denoise(
    bundle: Bundle, condition: dict[str, Traced], levels: Traced, run: Run, body: Trace, i: Traced, z: Traced
) -> Traced:
    """v `[rows, ...]` in the graph of a step.

    condition: of all rows. levels: log-SNRs `[steps]`. Both are of the graph around the loop; i, z: of the step, its
    number and what it denoises.
    """
    trace, part = levels.trace, Part(bundle, DENOISE)
    depends = dependence(part.nodes, part.inputs)
    early, stepwise, late = parted(part.nodes, depends)
    counts = joined(run.steps.reshape(1), run.rows.reshape(1))

    def of_all_steps(array: Traced, rest: Sequence[int]) -> Traced:
        """Rows `[rows, ...]`, or levels `[steps, 1]`, as those of all calls `[steps * rows, ...]`."""
        sides = joined(counts, trace.constant(np.array(rest, np.int64)))
        return trace.add("Expand", array, sides).reshape(-1, *rest)

    def of_one_step(array: ir.Value, rest: Sequence[int]) -> Traced:
        """Rows of a step, of those of all calls."""
        sides = joined(counts, trace.constant(np.array(rest, np.int64)))
        split = trace.add("Reshape", array, sides)
        return body.add("Gather", split, i, axis=0)

    known = {part.inputs[name]: array for name, array in condition.items()}
    part.place(trace, early, known, ROWS, "prepare")
    repeated = {part.inputs[LEVELS]: of_all_steps(levels.reshape(-1, 1), ())}
    for value in read(stepwise, depends, CONDITION):
        repeated[value] = of_all_steps(known.get(value, Traced(trace, value)), value.shape[1:])
    part.place(trace, stepwise, repeated, ALL_ROWS, "levels")
    own = {value: body.outer(array) for value, array in known.items()} | {part.inputs[Z]: z}
    for value in read(late, depends, LEVEL):
        made = repeated[value].value if value in repeated else value
        own[value] = of_one_step(made, value.shape[1:])
    part.place(body, late, own, ROWS)
    return part.traced(body, "v")


def dependence(nodes: Sequence[ir.Node], inputs: Mapping[str, ir.Value]) -> dict[ir.Value, int]:
    """What each value of the denoiser depends on, as far as that shall be computed apart.

    What is computed for all steps at once has to have one row for each sample and level, where it comes in and where it
    goes out; nodes of which that is not known stay in the step.
    """
    start = {value: {Z: SAMPLE, LEVELS: LEVEL}.get(name, CONDITION) for name, value in inputs.items()}
    kept: set[ir.Node] = set()
    while True:
        found = dict(start)
        for node in nodes:
            level = max((found.get(value, NOTHING) for value in node.inputs), default=NOTHING)
            found.update(dict.fromkeys(node.outputs, SAMPLE if node in kept else level))
        unfit = set()
        for node in (node for node in nodes if found[node.outputs[0]] == LEVEL):
            coming = [value for value in node.inputs if found.get(value) == CONDITION]
            going = [v for v in node.outputs if any(found[user.outputs[0]] == SAMPLE for user, _ in v.uses())]
            if not all(map(by_rows, coming + going)):
                unfit.add(node)
        if not unfit:
            return found
        kept |= unfit


def by_rows(value: ir.Value) -> bool:
    """Whether its first dimension, and no other, is the batch."""
    sides = tuple(value.shape or ())
    return bool(sides) and isinstance(sides[0], ir.SymbolicDim) and all(isinstance(side, int) for side in sides[1:])


def parted(nodes: Sequence[ir.Node], depends: Mapping[ir.Value, int]) -> tuple[list[ir.Node], ...]:
    """Nodes for before the loop, of the condition and of all steps' levels, and for the step, in their order."""
    place = {}
    for node in reversed(nodes):
        users = {place[user] for value in node.outputs for user, _ in value.uses()}
        level = depends[node.outputs[0]]
        # constants lie in the step, unless something before it reads them
        place[node] = level or (CONDITION if users & {CONDITION, LEVEL} else SAMPLE)
    return tuple([node for node in nodes if place[node] == each] for each in (CONDITION, LEVEL, SAMPLE))


def read(nodes: Sequence[ir.Node], depends: Mapping[ir.Value, int], level: int) -> list[ir.Value]:
    """Values of a kind that nodes read and do not make themselves."""
    made = {value for node in nodes for value in node.outputs}
    wanted = dict.fromkeys(value for node in nodes for value in node.inputs if depends.get(value) == level)
    return [value for value in wanted if value not in made]
