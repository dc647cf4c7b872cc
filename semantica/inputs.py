"""What conditions some samples, as a user gives it, made ready on the host: pictures, texts, arrays, streams.

Arrays are numpy's or torch's; this module imports numpy only, as `semantica.condition` does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semantica.condition import Array, Stream
from semantica.errors import UserError

# the input of the one encoder that fills every stream
SINGLE = "image"
# the input of texts beside it, or alone; further encoders of the same texts have text_2, text_3, ...
TEXT = "text"


def is_text(name: str) -> bool:
    """Whether it names an input of texts."""
    return name == TEXT or name.startswith(f"{TEXT}_")


def text_names(count: int) -> tuple[str, ...]:
    """Inputs of so many encoders of texts."""
    return tuple(TEXT if number == 1 else f"{TEXT}_{number}" for number in range(1, count + 1))


@dataclass(frozen=True)
class Several:
    """Values that condition a sample together, in a number that differs from sample to sample.

    values: `[sum(counts), ...]`, those of one sample after another.
    """

    values: Array
    counts: tuple[int, ...]

    def map(self, function: Callable[[Array], Array]) -> "Several":
        """Apply a function to the values, as for moving or casting them."""
        return Several(function(self.values), self.counts)


# one input of B samples: an array `[B, ...]`, or `[B, K, ...]` for K values in each; or what was encoded before
Prepared = Array | Several | Stream


def prepare_inputs(makers: Mapping[str, Callable[[list], Array]], inputs: Any) -> dict[str, Prepared]:
    """Values as a user gives them to what encoders take.

    Args:
        makers: for each input, what makes an array `[B, ...]` of a list of B values.
        inputs: `{name: values}`, or the values alone where the only input is `image`. Values are one value (a picture,
            a text), a list of values (one sample each; a nested list is several values for one sample), an array that
            was prepared before (`[B, 3, S, S]` in [-1, 1] for pictures, `[B, K, 3, S, S]` for K of them in each
            sample), a `Stream` that was encoded before, or None for an input that is absent.

    Raises:
        UserError: an input is missing or unknown, has no values, or another number of samples than the others.
    """
    values = by_name(inputs, makers)
    prepared = {n: None if values[n] is None else prepare_one(make, values[n], n) for n, make in makers.items()}
    there = {name: samples_in(value) for name, value in prepared.items() if value is not None}
    if not there:
        raise UserError(f"the condition has no {' and no '.join(makers)}: give at least one")
    if len({*there.values()}) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in there.items())
        raise UserError(f"condition has {said}: give as many samples of each")
    return prepared


def by_name(inputs: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """Inputs by name; alone they are those of `image`, where that is the only one. Raises `UserError` for others."""
    names = list(names)
    given = inputs if isinstance(inputs, Mapping) else {SINGLE: inputs} if names == [SINGLE] else {}
    if set(given) != set(names):
        what = f"holds {sorted(given)}" if isinstance(inputs, Mapping) else "comes alone"
        raise UserError(f"condition {what}: expected {{{', '.join(f'{name!r}: ...' for name in names)}}}")
    return given


def prepare_one(make: Callable[[list], Array], values: Any, name: str) -> Prepared:
    ready = isinstance(values, Stream | Several) or hasattr(values, "ndim")
    samples = [] if ready else [[s] if alone(s) else list(s) for s in ([values] if alone(values) else values)]
    if not (samples_in(values) if ready else samples and all(samples)):
        what = "picture" if name == SINGLE else name
        raise UserError(f"{name} is empty: give a {what}, or a list of them, one for each sample")
    if ready:
        return values
    flat = make([value for sample in samples for value in sample])
    counts = tuple(map(len, samples))
    return flat if max(counts) == 1 else Several(flat, counts)


def alone(value: Any) -> bool:
    """Whether it is one value, not a sequence of them."""
    return isinstance(value, str) or not isinstance(value, Sequence)


def samples_in(value: Prepared | Mapping[str, Prepared]) -> int:
    """Samples of one prepared input, or of all of them."""
    if isinstance(value, Mapping):
        return samples_in(next(each for each in value.values() if each is not None))
    if isinstance(value, Several):
        return len(value.counts)
    return len(value.tokens if isinstance(value, Stream) else value)


def rows_of(value: Prepared | None, start: int, stop: int) -> Prepared | None:
    """Some samples of one prepared input, one after another; None of an absent one."""
    if value is None:
        return None
    if isinstance(value, Several):
        first, last = sum(value.counts[:start]), sum(value.counts[:stop])
        return Several(value.values[first:last], value.counts[start:stop])
    return value.map(lambda array: array[start:stop]) if isinstance(value, Stream) else value[start:stop]


def part_of(inputs: Mapping[str, Prepared], start: int, stop: int) -> dict[str, Prepared]:
    """Some samples of all prepared inputs."""
    return {name: rows_of(value, start, stop) for name, value in inputs.items()}
