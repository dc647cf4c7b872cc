"""Checks of what a JSON file holds; each raises `UserError` in one line that names the member."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semantica.errors import UserError


def members(given: Any, where: str, must: Sequence[str], may: Sequence[str] | None) -> Mapping[str, Any]:
    """An object with the members that it must have, and others that it may have (any for None)."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {shown(given)}: expected an object")
    unknown = [] if may is None else [name for name in given if name not in (*must, *may)]
    if unknown:
        raise UserError(f"{where} has the unknown member {unknown[0]!r}: known are {', '.join((*must, *may))}")
    missing = [name for name in must if name not in given]
    if missing:
        raise UserError(f"{where} has no {missing[0]!r}: it must be there")
    return given


def shown(given: Any) -> str:
    return repr(given) if len(repr(given)) < 40 else f"a {type(given).__name__}"


def listed(given: Mapping[str, Any], name: str) -> list:
    if not isinstance(given.get(name, []), list):
        raise UserError(f"{name} is {shown(given[name])}: expected a list")
    return given.get(name, [])


def table(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return members(given.get(name, {}), name, (), None)


def text(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given:
        raise UserError(f"{where} is {shown(given)}: expected text")
    return given


def named(given: Any, where: str) -> list[str]:
    if not texts(given, where):
        raise UserError(f"{where} is empty: name at least one")
    return given


def texts(given: Any, where: str) -> list[str]:
    if not isinstance(given, list):
        raise UserError(f"{where} is {shown(given)}: expected a list of names")
    return [text(each, where) for each in given]


def optional(given: Mapping[str, Any], name: str, read: Callable[[Any, str], str]) -> str | None:
    return read(given[name], name) if name in given else None


def number(given: Any, where: str) -> float:
    # so compared, whole numbers of any length are
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= sys.float_info.max:
        raise UserError(f"{where} is {shown(given)}: expected a number")
    return float(given)


def positive(given: Any, where: str) -> float:
    if number(given, where) <= 0:
        raise UserError(f"{where} is {given}: expected more than 0")
    return float(given)


def share(given: Any, where: str) -> float:
    if not 0 <= number(given, where) <= 1:
        raise UserError(f"{where} is {given}: expected a share of the picture, 0 to 1")
    return float(given)


def whole(given: Any, where: str) -> int:
    if type(given) is not int or given < 0:
        raise UserError(f"{where} is {shown(given)}: expected a whole number, 0 or more")
    return given


def numbers(given: Any, where: str) -> list[float]:
    if not isinstance(given, list | tuple):
        raise UserError(f"{where} is {shown(given)}: expected a list of numbers")
    return [number(each, where) for each in given]


def pair(given: Any, where: str) -> tuple[float, float]:
    found = numbers(given, where)
    if len(found) != 2:
        raise UserError(f"{where} has {len(found)} numbers: expected x and y")
    return found[0], found[1]


def choice(given: Any, where: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    if not isinstance(given, str) or given not in known:
        raise UserError(f"{where} is {shown(given)}: expected one of {', '.join(known)}")
    return given
