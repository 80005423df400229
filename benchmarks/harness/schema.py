"""Checks a result file against schema.json; supports the part of JSON Schema that this file uses."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


@lru_cache
def schema() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


def problems(value: Any, rule: dict[str, Any] | None = None, where: str = "results") -> list[str]:
    """A line for each error; empty if the file is valid."""
    rule = schema() if rule is None else rule
    if "enum" in rule and value not in rule["enum"]:
        return [f"{where}: {value!r} is none of {rule['enum']}"]
    if "type" in rule and not _is(value, rule["type"]):
        return [f"{where}: expected {rule['type']}, got {value!r:.60}"]
    found = []
    if isinstance(value, dict):
        found += [f"{where}: no {name!r}" for name in rule.get("required", ()) if name not in value]
        known = rule.get("properties", {})
        for name, item in value.items():
            inner = known.get(name, rule.get("additionalProperties"))
            if isinstance(inner, dict):
                found += problems(item, inner, f"{where}.{name}")
    if isinstance(value, list) and "items" in rule:
        for n, item in enumerate(value):
            found += problems(item, rule["items"], f"{where}[{n}]")
    return found


def _is(value: Any, names: str | list[str]) -> bool:
    names = [names] if isinstance(names, str) else names
    # bool is an int to Python, and not to JSON
    return any(isinstance(value, TYPES[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names)
