"""Checkpoints of TensorFlow: Google's BERT, ALBERT and ELECTRA, the Model Garden's, and TF-Hub's SavedModels."""

from __future__ import annotations

import re
from pathlib import Path

from ..storage import CheckpointError
from .families import tensorflow_family
from .object_graph import with_names
from .source import Source, find_case, find_config, find_words, told_of
from .tensorflow_bundle import read_bundle

_CONFIGS = ("bert_config.json", "albert_config.json", "electra_config.json", "config.json")
_SENTENCEPIECE = "spiece.model"  # transformers' name


def prefix_in(folder: Path) -> Path | None:
    """The prefix of the checkpoint in a folder, or in its SavedModel; None if there is none.

    If there are several, the file `checkpoint` names the latest. Raises CheckpointError if it does not.
    """
    if (folder / "variables" / "variables.index").is_file():
        return folder / "variables" / "variables"
    found = {path.name.removesuffix(".index") for path in folder.glob("*.index")}
    if len(found) > 1 and (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
        if (latest := re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)) is not None:
            found &= {latest[1].rsplit("/", 1)[-1]}
    if len(found) > 1:
        raise CheckpointError(f"{folder} has several checkpoints: name one of {', '.join(sorted(found))}")
    return folder / found.pop() if found else None


def is_v1(path: Path) -> bool:
    """Whether a file is a checkpoint of TensorFlow's first format, one table with the arrays in it."""
    if not path.is_file() or path.stat().st_size < 48:
        return False
    with open(path, "rb") as file:
        file.seek(-8, 2)
        return file.read() == bytes.fromhex("57fb808b247547db")


def read(prefix: Path) -> Source:
    """The checkpoint of this prefix, with the config and the vocabulary beside it. Raises CheckpointError."""
    variables = read_bundle(prefix)
    try:
        variables = with_names(variables)
        family = tensorflow_family(variables)
    except CheckpointError as error:
        raise told_of(prefix, error) from None
    in_saved_model = prefix.name == "variables" and prefix.parent.name == "variables"
    folder = prefix.parent.parent if in_saved_model else prefix.parent
    words = find_words(folder / "assets" if in_saved_model else folder)
    pieces = sorted((folder / "assets" if in_saved_model else folder).glob("*.model"))

    lower_case = find_case(folder)
    for name, variable in variables.items():  # TF-Hub's modules store the setting of lower-casing as a variable
        if re.search(r"(^|/)do_lower_case/", name):
            lower_case = bool(variable.read())
    return Source(
        prefix,
        family.title,
        family.activation,
        find_config(folder, _CONFIGS),
        lambda: variables,
        lambda _: family,
        words,
        lower_case,
        {_SENTENCEPIECE: pieces[0]} if pieces else {},
    )
