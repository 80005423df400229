"""What the reader of a format finds at a path, before the names are understood."""

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

# Whether a model lower-cases is known of these two of Google's models, though their names do not say it.
_LOWER_CASED = ("chinese_l-12_h-768_a-12", "multilingual_l-12_h-768_a-12")


@dataclass(frozen=True)
class Source:
    """Somebody's model, found.

    Attributes:
        path: what messages call it: a folder, or a file, or a prefix of files.
        title: the format, for people.
        activation: what "gelu" means there, in transformers' words: "gelu" (by erf) or "gelu_new" (by tanh).
        config: its config under transformers' keys; empty where its files have none.
        load: the variables, by their names. `variables` keeps what it gives.
        family: how to understand the names; None where they are transformers' own. It is asked for once the
            variables are known.
        words: the vocabulary, in the order of the ids; empty where there is none.
        lower_case: whether the tokenizer lower-cases; None where the source does not say.
        files: other files of the tokenizer and the encoder: their name in transformers' folder -> where they are.
        home: that folder, relative to the folder of sentence-transformers around it; empty where there is none.
        beside: files of that outer folder, and of its modules: their name in it -> where they are.
        pooling: how a text's vector is made of its tokens', "mean" or "cls"; None where the source does not say.
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
    """The error with the path in front, where it does not begin with that."""
    said = str(error)
    return CheckpointError(said if said.startswith(str(path)) else f"{path}: {said}")


def read_words(path: Path) -> list[str]:
    """The tokens of a vocab.txt, one a line. Raises CheckpointError."""
    try:
        # not splitlines: some tokens are what it takes for the end of a line
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path} as a vocabulary ({error})") from error
    if lines and lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def find_words(folder: Path) -> list[str]:
    """The vocabulary in a folder: vocab.txt, or the one file that is called so in part; empty where there is none."""
    found = [folder / "vocab.txt"] if (folder / "vocab.txt").is_file() else sorted(folder.glob("*vocab*.txt"))
    if len(found) > 1:
        raise CheckpointError(f"{folder} has several vocabularies: {', '.join(path.name for path in found)}")
    return read_words(found[0]) if found else []


def find_config(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The first of the files that is there, as a dict; empty where there is none."""
    for name in names:
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def find_case(folder: Path) -> bool | None:
    """Whether a model lower-cases: as tokenizer_config.json says, or the folder's name; None where neither does."""
    if (folder / "tokenizer_config.json").is_file():
        said = read_json(folder / "tokenizer_config.json").get("do_lower_case")
        if isinstance(said, bool):
            return said
    return case_of_name(folder.resolve().name)


def case_of_name(name: str) -> bool | None:
    """What the name of a model says of lower-casing: "uncased", "cased" ("multi_cased"), or nothing."""
    name = name.lower()
    if "uncased" in name or name in _LOWER_CASED:
        return True
    return False if re.search(r"(^|[^a-z])cased", name) else None


def parse_json(text: str, what: str) -> Any:
    """JSON out of a text. Raises CheckpointError that says what was read."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
