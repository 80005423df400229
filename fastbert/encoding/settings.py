"""The settings of a module in its file: each is taken and honoured, or known to change nothing, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REQUIRED = object()
ANY = object()


class Settings:
    """What a file says, less what has been taken.

        settings = Settings(path, {"in_features": 8, "idx": 3})
        width = settings.take("in_features", int)
        settings.expect_empty()     # ValueError: ... the setting 'idx' = 3 is not supported

    Args:
        file: what messages name.
    """

    def __init__(self, file: Path | str, values: Mapping[str, Any]):
        self.file, self.values = file, dict(values)

    def take(self, names: str | tuple[str, ...], kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The value under one of these names, which mean the same.

        Raises: ValueError where there is none and no default, two that differ, or a value of another kind.
        """
        names = (names,) if isinstance(names, str) else names
        found = [(name, self.values.pop(name)) for name in names if name in self.values]
        if not found:
            if default is _REQUIRED:
                raise ValueError(f"{self.file}: the setting {names[0]!r} is missing")
            return default
        name, value = found[0]
        for other, different in found[1:]:
            if different != value:
                raise ValueError(f"{self.file}: the settings {name!r} and {other!r} say different things")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # True is an int to Python
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{self.file}: the setting {name!r} must be {wanted}, got {value!r}")
        return value

    def take_part(self, names: str | tuple[str, ...]) -> Settings:
        """The settings under a name, which are in a dict or null; empty where there is none."""
        name = names if isinstance(names, str) else next((n for n in names if n in self.values), names[0])
        return Settings(f"{self.file}: {name}", self.take(names, (dict, type(None)), None) or {})

    def drop(self, harmless: Mapping[str, Any]) -> None:
        """Takes those of these settings that change no vector: with any value (ANY), or one of a few."""
        for name, values in harmless.items():
            if name in self.values and (values is ANY or self.values[name] in values):
                del self.values[name]

    def drop_all(self, harmless: Mapping[str, Any]) -> None:
        """As `drop`, where no other setting may be left."""
        self.drop(harmless)
        self.expect_empty()

    def refusal(self, name: str, value: Any, why: str) -> ValueError:
        """The error for a setting that is known and cannot be honoured."""
        return ValueError(f"{self.file}: the setting {name!r} = {value!r} is not supported: {why}")

    def expect_empty(self) -> None:
        """Raises ValueError for the first setting that was not taken."""
        for name, value in self.values.items():
            raise ValueError(f"{self.file}: the setting {name!r} = {_short(value)} is not supported")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
