"""Reads and checks fields of a request's body; errors name the field. null counts as absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ServiceError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list",
          dict: "an object"}  # fmt: skip


def take(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """The value of a field, or `default`. Raises ServiceError if it has another type."""
    value = body.get(name)
    if value is None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ServiceError("invalid", f"{name} must be {_WORDS[kind]}", param=name)
    return value


def needed(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """Like `take`, for a required field."""
    value = take(body, name, kind)
    if value is None:
        raise ServiceError("invalid", f"the field {name} is missing", param=name)
    return value


def count(body: Mapping[str, Any], *names: str) -> int | None:
    """A positive number under one of these names; None if absent or 0."""
    for name in names:
        value = take(body, name, int)
        if value is not None and value < 0:
            raise ServiceError("invalid", f"{name} must not be negative", param=name)
        if value:
            return value
    return None


def choice(body: Mapping[str, Any], name: str, among: Sequence[str]) -> str | None:
    """One of several words, in any case; None if absent."""
    value = take(body, name, str)
    if value is None:
        return None
    if value.lower() not in among:
        raise ServiceError("invalid", f"{name} must be one of {', '.join(among)}", param=name)
    return value.lower()


def cutting(body: Mapping[str, Any], default: bool) -> dict[str, Any]:
    """How long texts are cut, as `prepare` of the work takes it: `truncate` as true or false, or as START, END or NONE;
    Voyage's `truncation`; `truncation_direction`; vLLM's `truncate_prompt_tokens`, where -1 stands for the model's
    limit, and `truncation_side`. default: whether they are cut if the request does not say."""
    sides = [choice(body, name, ("right", "left")) for name in ("truncation_direction", "truncation_side")]
    side, limit = sides[0] or sides[1], take(body, "truncate_prompt_tokens", int) or None
    if limit is not None:
        default = True
        if limit < -1:
            raise ServiceError("invalid", "truncate_prompt_tokens must be -1 or more", param="truncate_prompt_tokens")
    cut = {"side": side, "limit": None if limit == -1 else limit}
    if not isinstance(body.get("truncate"), str):
        return cut | {"truncate": take(body, "truncate", bool, take(body, "truncation", bool, default))}
    word = choice(body, "truncate", ("none", "start", "end"))
    return cut | {"truncate": word != "none", "side": side or {"start": "left", "end": "right"}.get(word)}


def texts(value: Any, name: str) -> list[str]:
    """A text, or a list of texts, as a list. Raises ServiceError for anything else, and for an empty list."""
    if isinstance(value, str):
        return [value]
    if value is None:
        raise ServiceError("invalid", f"the field {name} is missing", param=name)
    if not isinstance(value, list) or set(map(type, value)) - {str}:
        raise ServiceError("invalid", f"{name} must be a string or a list of strings", param=name)
    if not value:
        raise ServiceError("empty", f"`{name}` cannot be empty", param=name)
    return value


def texts_or_ids(value: Any, name: str) -> list[str] | list[list[int]]:
    """A text, texts, a list of ids, or several lists of ids, as a list of texts or of lists of ids. Texts may be
    objects with a `text`, as in Jina's API."""
    if isinstance(value, list) and value:
        kinds = set(map(type, value))  # of millions of ids in half the time of a loop
        if kinds == {dict}:
            return documents(value, name)
        if kinds == {int}:
            return [value]
        if kinds == {list} and all(set(map(type, item)) == {int} for item in value):
            return value
        if kinds != {str}:
            raise ServiceError(
                "invalid", f"{name} must be a string, strings, token ids, or lists of token ids", param=name
            )
    return texts(value, name)


def documents(value: Any, name: str, fields: Sequence[str] = ("text",)) -> list[str]:
    """Documents as strings, or as objects whose fields of these names are joined by line ends."""
    if not isinstance(value, list):
        raise ServiceError("invalid", f"{name} must be a list of strings or of objects with a text", param=name)
    found = []
    for item in value:
        if isinstance(item, dict):
            parts = [item[field] for field in fields if isinstance(item.get(field), str)]
            item = "\n".join(parts) if parts else None
        if not isinstance(item, str):
            raise ServiceError("invalid", f"{name} must be a list of strings or of objects with a text", param=name)
        found.append(item)
    return found
