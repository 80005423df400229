"""The libraries to compare with, one file for each, found here. `benchmarks/harness/peer.py` describes such a file."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

FIRST = ("fastbert", "floor")  # then all others by name


def names() -> list[str]:
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [*FIRST, *(name for name in found if name not in FIRST)]


def rows(table: str) -> list[Any]:
    """The rows that all files have in the table of this name."""
    return [row for name in names() for row in getattr(import_module(f"{__name__}.{name}"), table, ())]


def operators(operator: str) -> list[Any]:
    tables = (getattr(import_module(f"{__name__}.{name}"), "OPERATORS", {}) for name in names())
    return [row for table in tables for row in table.get(operator, ())]
