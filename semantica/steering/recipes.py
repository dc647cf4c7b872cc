"""Common edits as terms of an energy (Epstein et al., arXiv 2306.00986, section 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

from semantica.errors import UserError
from semantica.steering.terms import ORIGINAL, Change, Fixed, Term

# weights that an open implementation quotes as the paper's; they depend on the model, so try others
WEIGHTS: Mapping[str, float] = {"position": 4.0, "size": 0.7, "shape": 6.0, "appearance": 12.0}


def move(
    objects: Sequence[str],
    shift: Any = None,
    to: Any = None,
    others: Sequence[str] = (),
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[Term, ...]:
    """Objects at another place, with the size and appearance they have; shapes of the others as they are.

    Args:
        shift: to the right and down, as shares of the picture. to: x, y from 0 to 1 instead.

    Raises:
        UserError: neither or both of `shift` and `to`.
    """
    if (shift is None) == (to is None):
        raise UserError("move needs either a shift, or the place to move to")
    target = Fixed(to) if shift is None else Change(shift=shift)
    wanted = {"position": (objects, target), "size": (objects, Change())}
    return terms(wanted | kept(objects, others), weights)


def resize(
    objects: Sequence[str], factor: Any, others: Sequence[str] = (), weights: Mapping[str, float] = WEIGHTS
) -> tuple[Term, ...]:
    """Objects with another area at the same place; `factor` 2 is twice the area."""
    target = Change(factor=factor)
    wanted = {"size": (objects, target), "position": (objects, Change())}
    # their own shape, grown, and that of the others as it is
    own = (Term("shape", weights["shape"], tuple(objects), target),) if weights.get("shape") else ()
    return (*terms(wanted | kept(objects, others), weights), *own)


def copy_layout(
    source: str = ORIGINAL, objects: Sequence[str] = (), weights: Mapping[str, float] = WEIGHTS
) -> tuple[Term, ...]:
    """Shapes of objects, of all by default, as a source shows them."""
    return terms({"shape": (objects, Change(source))}, weights)


def copy_appearance(
    source: str = ORIGINAL, objects: Sequence[str] = (), weights: Mapping[str, float] = WEIGHTS
) -> tuple[Term, ...]:
    """What objects look like, all by default, as a source shows them."""
    return terms({"appearance": (objects, Change(source))}, weights)


def compose(
    layout: Mapping[str, str], appearance: Mapping[str, str], weights: Mapping[str, float] = WEIGHTS
) -> tuple[Term, ...]:
    """Each object with the shape and the appearance of a source of its own: `{object: source}` of both."""
    made = [Term("shape", weights["shape"], (name,), Change(source)) for name, source in layout.items()]
    made += [Term("appearance", weights["appearance"], (name,), Change(source)) for name, source in appearance.items()]
    return tuple(made)


def kept(objects: Sequence[str], others: Sequence[str]) -> dict[str, tuple[Sequence[str], Change]]:
    """What stays in the original: the appearance of all, and the shapes of others where there are any.

    Raises:
        UserError: an object that is one of the others too.
    """
    for name in sorted(set(objects) & set(others)):
        raise UserError(f"{name!r} is to change, and one of the others that stay: choose")
    appearance = {"appearance": ((*objects, *others), Change())}
    return appearance | ({"shape": (others, Change())} if others else {})


def terms(wanted: Mapping[str, tuple[Sequence[str], Change | Fixed]], weights: Mapping[str, float]) -> tuple[Term, ...]:
    """Terms of the properties that have a weight."""
    return tuple(
        Term(what, weights[what], tuple(objects), target)
        for what, (objects, target) in wanted.items()
        if weights.get(what)
    )
