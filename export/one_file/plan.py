"""Every coefficient of a sampling run, computed in the graph from the number of steps: in float64, as on the host."""

import math

import numpy as np

from semantica.discrete import DARK, DiscreteSchedule
from semantica.export.one_file.traced import BOOL, DOUBLE, FLOAT, INTEGER, Traced, compared, count, joined, where
from semantica.solvers import SOLVERS, Schedule, Steps, alpha_sigma

# columns of the table of a run, in this order
COLUMNS = ("alpha", "sigma", "z_scale", "x_scale", "x_previous_scale")


def plan(schedule: Schedule | DiscreteSchedule, solver: str, steps: Traced) -> tuple[Traced, Traced]:
    """Log-SNRs of a run's steps, float32 `[steps]`, and its coefficients, float32 `[steps, len(COLUMNS)]`, as
    `semantica.solvers.make_plan` has them.

    steps: integer scalar. The scales are what the solver's own function makes of arrays of the graph.
    """
    levels = grid(schedule, steps)
    alpha, sigma = alpha_sigma(levels)
    made = {"alpha": alpha[:-1], "sigma": sigma[:-1]}
    made |= SOLVERS[solver](Steps(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], levels[1:] - levels[:-1]))
    blank = np.zeros_like(made["alpha"])
    columns = [made.get(name, blank).cast(FLOAT).reshape(-1, 1) for name in COLUMNS]
    return levels[:-1].cast(FLOAT), joined(*columns, axis=1)


def most(schedule: Schedule | DiscreteSchedule) -> int | None:
    """The largest number of steps; None where there is none."""
    return (schedule.count - 1) // 2 if isinstance(schedule, DiscreteSchedule) else None


def grid(schedule: Schedule | DiscreteSchedule, steps: Traced) -> Traced:
    """Log-SNRs of a run of n steps, float64 `[n + 1]`, as `grid` of either schedule has them."""
    if isinstance(schedule, DiscreteSchedule):
        return discrete(schedule, steps)
    # as `numpy.linspace` from 1 to 0 rounds
    t = count(steps, DOUBLE) * (-1 / steps.cast(DOUBLE)) + 1.0
    shift = 2 * math.log(schedule.reference / schedule.image_size)
    start = math.atan(math.exp((shift - schedule.logsnr_max) / 2))
    end = math.atan(math.exp((shift - schedule.logsnr_min) / 2))
    levels = shift - 2 * (start + t * (end - start)).tan().log()
    return joined(levels, levels.trace.constant([np.inf], DOUBLE))


def discrete(schedule: DiscreteSchedule, steps: Traced) -> Traced:
    trace = steps.trace
    visited, multistep = timesteps(schedule, steps), schedule.solver == "dpmpp_2m"
    table = trace.constant(schedule.levels, DOUBLE, "levels")
    levels = trace.add("Gather", table, visited, axis=0)
    first, last = levels.part(0, 1), levels.part(steps - 1, steps)
    if schedule.zero_snr and not multistep:
        dark = compared("Equal", visited.part(0, 1), schedule.count - 1)
        levels = joined(where(dark, first.like(DARK), first), levels[1:])
    # a step from the last timestep to itself would be none
    end = trace.constant([np.inf], DOUBLE)
    if not (schedule.clean or multistep):
        zero = table.part(0, 1)
        end = where(compared("Greater", zero, last), zero, end)
    return joined(levels, end)


def timesteps(schedule: DiscreteSchedule, steps: Traced) -> Traced:
    """Those that a run visits, falling integers `[steps]`, rounded as `DiscreteSchedule.timesteps` does."""
    multistep, last = schedule.solver == "dpmpp_2m", schedule.count - 1
    points = steps + 1 if multistep else steps
    spacing = schedule.spacing or ("linspace" if multistep else "leading")
    index = count(steps, INTEGER)
    # places counted from the noisiest
    place = points - 1 - index
    if spacing == "leading":
        found = place * (steps.like(schedule.count) / points) + schedule.offset
        return found._with("Min", last)
    if spacing == "trailing":
        stride = schedule.count / steps.cast(DOUBLE)
        # the difference of the first two, as `numpy.arange` adds it up
        found = index.cast(DOUBLE) * (schedule.count - stride - schedule.count) + schedule.count
        return found.round().cast(INTEGER) - 1
    # of one point alone there is no distance, and numpy sets the last point to where it should be
    gaps = (points - 1).cast(DOUBLE).clip(1.0)
    found = (place.cast(DOUBLE) * (last / gaps)).round().cast(INTEGER)
    end = where(compared("Greater", points, 1), points.like(last), points.like(0))
    return where(compared("Equal", place, points - 1), end, found)


def check(test: Traced, name: str) -> None:
    """Stop a run that a test says no to: an index out of range fails in every runtime's CPU kernels, and the message
    names the node."""
    assert test.dtype == BOOL
    trace = test.trace
    index = where(test, trace.constant(0, INTEGER), trace.constant(2, INTEGER))
    return trace.add("Gather", trace.constant([0], INTEGER), index, dtype=INTEGER, name=name, axis=0)
