"""Messages in protobuf's text format, which Triton's `config.pbtxt` is written in."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Name(str):
    """A value of an enumeration: written without quotes."""


def pbtxt(message: Mapping[str, Any]) -> str:
    """A message as text, by the names of its fields: numbers, texts, messages, and lists where a field is repeated."""
    return "\n".join(lines(message)) + "\n"


def mapped(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A field that is a map, as the repeated message of key and value that it is on the wire."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def lines(message: Mapping[str, Any]) -> Iterator[str]:
    for field, value in message.items():
        several = isinstance(value, list)
        if several and not any(isinstance(one, Mapping) for one in value):
            yield f"{field}: [ {', '.join(map(literal, value))} ]"
            continue
        for one in value if several else [value]:
            if not isinstance(one, Mapping):
                yield f"{field}: {literal(one)}"
                continue
            yield f"{field} {{"
            yield from (f"  {line}" for line in lines(one))
            yield "}"


def literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, Name) else json.dumps(value)
