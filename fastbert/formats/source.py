"""A checkpoint as a format's reader returns it, before its names are translated."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage import CheckpointError, read_json
from .names import Family
from .variable import Variable

# Two of Google's models that lower-case, although their names do not say so.
_LOWER_CASED = ("chinese_l-12_h-768_a-12", "multilingual_l-12_h-768_a-12")


@dataclass(frozen=True)
class Source:
    """A checkpoint that a reader has found.

    Attributes:
        path: the folder, file, or prefix of files; its name in messages.
        title: the format's name in messages.
        activation: what "gelu" means in this format, in transformers' words: "gelu" (by erf) or "gelu_new" (by tanh).
        config: the config under transformers' keys; empty if there is none.
        load: returns the variables by their names. `variables` caches the result.
        family: returns the table that translates the names, or None if they are transformers'. It is called after the
            variables are loaded.
        words: the vocabulary, in the order of the ids; empty if there is none.
        lower_case: whether the tokenizer lower-cases; None if unknown.
        files: other files of the tokenizer and the encoder: name in transformers' folder -> path.
        home: that folder, relative to a sentence-transformers folder around it; empty if there is none.
        beside: files of that outer folder and of its modules: name in it -> path.
        pooling: how token vectors become a text's vector, "mean" or "cls"; None if unknown.
    """

    path: Path
    title: str
    activation: str
    config: dict[str, Any]
    load: Callable[[], dict[str, Variable]]
    family: Callable[[dict[str, Variable]], Family | None]
    words: list[str] = field(default_factory=list)
    lower_case: bool | None = None
    files: dict[str, Path] = field(default_factory=dict)
    home: str = ""
    beside: dict[str, Path] = field(default_factory=dict)
    pooling: str | None = None

    @functools.cached_property
    def variables(self) -> dict[str, Variable]:
        return self.load()


def told_of(path: Path, error: CheckpointError) -> CheckpointError:
    """The error with the path at its beginning, if it is not there yet."""
    said = str(error)
    return CheckpointError(said if said.startswith(str(path)) else f"{path}: {said}")


def read_words(path: Path) -> list[str]:
    """The tokens of a vocab.txt, one a line. Raises CheckpointError."""
    try:
        # Not splitlines, which would also split at characters that are tokens here.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path} as a vocabulary ({error})") from error
    if lines and lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def find_words(folder: Path) -> list[str]:
    """The vocabulary in a folder: vocab.txt, or the only *vocab*.txt; empty if there is none."""
    found = [folder / "vocab.txt"] if (folder / "vocab.txt").is_file() else sorted(folder.glob("*vocab*.txt"))
    if len(found) > 1:
        raise CheckpointError(f"{folder} has several vocabularies: {', '.join(path.name for path in found)}")
    return read_words(found[0]) if found else []


def find_config(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The content of the first of these files that exists; empty if there is none."""
    for name in names:
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def find_case(folder: Path) -> bool | None:
    """Whether a model lower-cases, from tokenizer_config.json or the folder's name; None if neither tells."""
    if (folder / "tokenizer_config.json").is_file():
        said = read_json(folder / "tokenizer_config.json").get("do_lower_case")
        if isinstance(said, bool):
            return said
    return case_of_name(folder.resolve().name)


def case_of_name(name: str) -> bool | None:
    """Whether a model's name says "uncased" (True) or "cased" (False, also "multi_cased"); None if neither."""
    name = name.lower()
    if "uncased" in name or name in _LOWER_CASED:
        return True
    return False if re.search(r"(^|[^a-z])cased", name) else None


def parse_json(text: str, what: str) -> Any:
    """Parses JSON. Raises CheckpointError that names `what`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
