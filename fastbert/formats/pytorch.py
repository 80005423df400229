"""PyTorch's checkpoints: transformers' folders, and the archives of pytorch-pretrained-bert before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import PICKLE, load_state_dict, read_json
from .sentence_folder import encoder_in, files_of_modules
from .source import Source, find_case, find_words
from .variable import Variable

_OLD_CONFIG = "bert_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip


def is_old(folder: Path) -> bool:
    """Whether a folder is what pytorch-pretrained-bert wrote: a config under Google's name, and a pickle."""
    return (folder / _OLD_CONFIG).is_file() and (folder / PICKLE).is_file() and not (folder / "config.json").is_file()


def read_old(folder: Path) -> Source:
    """A folder or an unpacked archive of pytorch-pretrained-bert. Raises CheckpointError."""
    config = read_json(folder / _OLD_CONFIG)
    return _source(folder, "pytorch-pretrained-bert's folder", config, find_words(folder), find_case(folder), {})


def read_transformers(folder: Path) -> Source:
    """A folder as transformers writes it, of whatever age, or sentence-transformers with what it computes after BERT.

    Raises: CheckpointError.
    """
    home = encoder_in(folder)
    files = {name: home / name for name in _TOKENIZER_FILES if (home / name).is_file()} | files_of_modules(folder)
    return _source(
        home, "transformers' folder", read_json(home / "config.json"), find_words(home), find_case(home), files
    )


def _source(
    folder: Path,
    title: str,
    config: dict[str, Any],
    words: list[str],
    lower_case: bool | None,
    files: dict[str, Path],
) -> Source:
    def load() -> dict[str, Variable]:
        return {name: Variable.of_tensor(name, t) for name, t in load_state_dict(folder).items()}

    return Source(folder, title, "gelu", config, load, lambda _: None, words, lower_case, files)
