"""A ladder of optimisations, each turned on in addition to those before it."""

import dataclasses
from typing import Any


def cumulative(switches: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """ "plain", then each field of a dataclass of switches turned on in turn, in their order."""
    names = [field.name for field in dataclasses.fields(switches) if field.name not in without]
    ladder = {"plain": switches()}
    for i, name in enumerate(names):
        ladder[f"+ {name.replace('_', ' ')}"] = switches(**dict.fromkeys(names[: i + 1], True))
    return ladder
