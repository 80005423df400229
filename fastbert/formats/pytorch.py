"""PyTorch's checkpoints: transformers' folders, and the archives of its predecessor pytorch-pretrained-bert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import PICKLE, load_state_dict
from ..storage import read_json
from .sentence_folder import TRANSFORMER_SETTINGS, encoder_in, files_of_modules, home_of_encoder
from .source import Source, find_case, find_words
from .variable import Variable

_OLD_CONFIG = "bert_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip


def is_old(folder: Path) -> bool:
    """Whether pytorch-pretrained-bert wrote a folder: it has a config under Google's name, and a pickle."""
    return (folder / _OLD_CONFIG).is_file() and (folder / PICKLE).is_file() and not (folder / "config.json").is_file()


def read_old(folder: Path) -> Source:
    """A folder or an unpacked archive of pytorch-pretrained-bert. Raises CheckpointError."""
    return _source(folder, "pytorch-pretrained-bert's folder", _OLD_CONFIG)


def read_transformers(folder: Path) -> Source:
    """A folder of any version of transformers, or of sentence-transformers with its modules.

    Raises: CheckpointError.
    """
    inside, beside = encoder_in(folder), files_of_modules(folder)
    names = (*_TOKENIZER_FILES, *TRANSFORMER_SETTINGS) if beside else _TOKENIZER_FILES
    files = {name: inside / name for name in names if (inside / name).is_file()}
    home = home_of_encoder(folder)
    return _source(inside, "transformers' folder", "config.json", files=files, home=home, beside=beside)


def _source(folder: Path, title: str, config: str, **others: Any) -> Source:
    """config: the name of its file; others: fields of the Source."""

    def load() -> dict[str, Variable]:
        return {name: Variable.of_tensor(name, t) for name, t in load_state_dict(folder).items()}

    said, words, lower_case = read_json(folder / config), find_words(folder), find_case(folder)
    return Source(folder, title, "gelu", said, load, lambda _: None, words, lower_case, **others)
