"""Terms of an energy: which property of which objects, and what it shall be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.errors import UserError
from semantica.steering import energies
from semantica.steering.energies import DISTANCES
from semantica.steering.objects import Objects
from semantica.steering.taps import APPEARANCE, MAPS, MOMENTS, Seen

# what each property is computed from; a shape that is moved needs its centre too
PROPERTIES = {
    "position": (MOMENTS,),
    "size": (MAPS,),
    "shape": (MAPS, MOMENTS),
    "appearance": (APPEARANCE,),
}
# what of a `Change` says something to a property
CHANGES = {"position": ("shift",), "size": ("factor",), "shape": ("shift", "factor", "angle"), "appearance": ()}
ORIGINAL = "original"


def same(value: Any, idle: Any) -> bool:
    return not isinstance(value, Tensor) and (tuple(value) if isinstance(idle, tuple) else value) == idle


@dataclass(frozen=True, eq=False)
class Change:
    """A target that a source shows at the same step, changed.

    source: its name. objects: what they are called there, if otherwise than here; as many.
    shift: of position and shape to the right and down, as shares of the picture: two numbers, or a tensor `[B, 2]`.
    factor: of the area, for size and shape. angle: by which a shape is turned about its centre, anticlockwise in
        degrees. Numbers, or tensors `[B]`.
    """

    source: str = ORIGINAL
    objects: tuple[str, ...] = ()
    shift: Any = (0.0, 0.0)
    factor: Any = 1.0
    angle: Any = 0.0

    @property
    def moves(self) -> set[str]:
        """Names of what differs from the source; a tensor counts as different."""
        none = {"shift": (0.0, 0.0), "factor": 1.0, "angle": 0.0}
        return {name for name, idle in none.items() if not same(getattr(self, name), idle)}


@dataclass(frozen=True, eq=False)
class Fixed:
    """A target that is given: x, y from 0 to 1 of a position, the share of the picture of a size, the mask `[h, w]` of
    a shape (any grid); or tensors that broadcast to `[B, S, 2]`, `[B, S]` and `[B, S, h, w]` for S objects."""

    value: Any


@dataclass(frozen=True, eq=False)
class Term:
    """A property of objects, and its target.

    what: "position", "size", "shape" or "appearance". weight: of this term in the energy. objects: names, or none for
    all. target: see `Change` and `Fixed`. distance: "l1" or "l2", see `energies.distance`.

    Raises:
        UserError: an unknown name, or a target that there is none of for this property.
    """

    what: str
    weight: float = 1.0
    objects: tuple[str, ...] = ()
    target: Change | Fixed | None = Change()
    distance: str = "l1"

    def __post_init__(self):
        if self.what not in PROPERTIES:
            raise UserError(f"no energy is called {self.what!r}: there are {', '.join(PROPERTIES)}")
        if self.distance not in DISTANCES:
            raise UserError(f"distance {self.distance!r}: expected one of {', '.join(DISTANCES)}")
        if self.target is None:
            raise UserError(f"the energy {self.what!r} has no target: give a value, or a source and its change")
        if isinstance(self.target, Change):
            for name in self.target.moves - set(CHANGES[self.what]):
                raise UserError(f"the energy {self.what!r} knows nothing of a change of {name}: leave it out")
        if isinstance(self.target, Fixed) and self.what == "appearance":
            raise UserError("the energy 'appearance' has no value that could be given: name a source")

    @property
    def reads(self) -> tuple[str, ...]:
        """The statistics of what is steered that it needs."""
        return PROPERTIES[self.what][:1]

    @property
    def asks(self) -> tuple[str, ...]:
        """The statistics of its source that it needs."""
        return PROPERTIES[self.what] if isinstance(self.target, Change) else ()


def observed(what: str, seen: Seen, rows: Sequence[int]) -> dict[str, Tensor]:
    """A property of some objects, by layer."""
    rows = list(rows)
    if what == "position":
        return {name: energies.centroid(a[:, rows]) for name, a in seen.moments.items()}
    if what == "size":
        return {name: energies.size(a[:, rows]) for name, a in seen.maps.items()}
    if what == "shape":
        return {name: energies.shape(a[:, rows]) for name, a in seen.maps.items()}
    return {"activations": seen.appearance[:, rows]}


def changed(term: Term, seen: Seen, rows: Sequence[int]) -> dict[str, Tensor]:
    """Targets of a `Change` by layer, from what its source showed."""
    change, found = term.target, observed(term.what, seen, rows)
    some = next(iter(found.values()))
    numbers, like = (change.shift, change.factor, change.angle), {"dtype": some.dtype, "device": some.device}
    given = (torch.as_tensor(a, **like) for a in numbers)
    # one for all samples, or each its own
    shift, factor, angle = (a if a.ndim > alone else a[None] for a, alone in zip(given, (1, 0, 0)))
    batch = max(len(a) for a in (some, shift, factor, angle))
    shift, factor, angle = shift.expand(batch, 2), factor.expand(batch), angle.expand(batch)
    if term.what == "position":
        return {name: a + shift[:, None] for name, a in found.items()}
    if term.what == "size":
        return {name: a * factor[:, None] for name, a in found.items()}
    if term.what == "shape":
        centres = observed("position", seen, rows)
        made = {}
        for name, a in found.items():
            a, middle = (b.expand(batch, *b.shape[1:]) for b in (a, centres[name]))
            made[name] = energies.mask(energies.transformed(a, middle, shift, factor, angle))
        return made
    return found


def fixed(term: Term, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Targets of a `Fixed` by layer, for observations of these shapes."""
    made = {}
    for name, a in found.items():
        value = torch.as_tensor(term.target.value, dtype=a.dtype, device=a.device)
        if term.what == "shape":
            value = value.reshape(*[1] * (4 - value.ndim), *value.shape)
            # by area: a mask has more places than a layer, and all of them count
            value = energies.mask(F.adaptive_avg_pool2d(value, a.shape[-2:]))
        made[name] = value
    return made


def energy(terms: Sequence[Term], seen: Seen, objects: Objects, sources: Mapping[str, tuple[Seen, Objects]]) -> Tensor:
    """Weighted sum of the terms, each the mean over layers, objects and channels, fp32 `[B]`.

    Args:
        seen, objects: of what is steered.
        sources: of each source that a term names, what it shows and its objects.

    Raises:
        UserError: a source or an object is missing, or numbers of them differ.
    """
    total: Tensor | None = None
    for term in terms:
        rows = objects.rows(term.objects)
        found = observed(term.what, seen, rows)
        if isinstance(term.target, Fixed):
            targets = fixed(term, found)
        else:
            shown, theirs = sources[term.target.source]
            chosen = theirs.rows(term.target.objects or tuple(objects.names[row] for row in rows))
            if len(chosen) not in (1, len(rows)):
                raise UserError(f"the energy {term.what!r} is of {len(rows)} objects, its target of {len(chosen)}")
            targets = changed(term, shown, chosen)
        parts = [energies.distance(a, targets[name], term.distance) for name, a in found.items()]
        part = term.weight * torch.stack(parts).mean(0)
        total = part if total is None else total + part
    return total
