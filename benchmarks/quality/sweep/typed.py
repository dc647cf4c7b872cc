"""JSON values as the options of a dataclass: each of the type that its field asks for, or one line that says not."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from semantica.errors import UserError

Config = TypeVar("Config")
NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


class Unfit(Exception):
    """A value that is not of a type."""


def fitted(value: Any, hint: Any) -> Any:
    """A JSON value as a type: lists as tuples, text as paths, whole numbers as numbers. Raises `Unfit`."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for each in inner:
            try:
                return fitted(value, each)
            except Unfit:
                continue
    elif kind is Literal:
        if any(value == each and type(value) is type(each) for each in inner):
            return value
    elif kind is tuple and isinstance(value, list):
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) == len(value):
            return tuple(fitted(one, of) for one, of in zip(value, each))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is Path and isinstance(value, str) and value:
        return Path(value)
    # a bool is no whole number
    elif type(value) is hint:
        return value
    raise Unfit


def words(hint: Any) -> str:
    """What a type asks for, in words."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(words, inner))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind is tuple:
        many = inner[-1] is Ellipsis
        return f"a list, each {words(inner[0])}" if many else f"a list of {len(inner)}, each {words(inner[0])}"
    return NAMES.get(hint, str(hint))


@functools.cache
def hints(config: type) -> Mapping[str, Any]:
    """The type of each option."""
    return typing.get_type_hints(config)


def option(config: type, name: str, value: Any, place: str) -> Any:
    """The value of an option. Raises `UserError`, naming the place, for one that does not fit."""
    try:
        return fitted(value, hints(config)[name])
    except Unfit as error:
        raise UserError(f"{place} is {value!r}: give {words(hints(config)[name])}") from error


def known(name: str, names: typing.Iterable[str], place: str, what: str) -> None:
    """Raises `UserError` for a name that is none of them."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        advice = f"did you mean {near[0]!r}?" if near else "remove it"
        raise UserError(f"{place} is no {what}: {advice}")


def built(config: type[Config], options: Mapping[str, Any]) -> Config:
    """A configuration of JSON values that are known to fit, such as those of its record."""
    return config(**{name: fitted(value, hints(config)[name]) for name, value in options.items()})


def required(config: type) -> list[str]:
    """Options without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(config) if f.default is missing and f.default_factory is missing]


def plain(value: Any) -> Any:
    """An option as a JSON value."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
