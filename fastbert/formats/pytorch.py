"""PyTorch's checkpoints: transformers' folders, and the archives of pytorch-pretrained-bert before it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint import PICKLE, CheckpointError, load_state_dict, read_json
from .source import Source, find_case, find_words, parse_json
from .variable import Variable

MODULES = "modules.json"  # of sentence-transformers
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
    """A folder as transformers writes it, of whatever age, or sentence-transformers. Raises CheckpointError."""
    names = (*_TOKENIZER_FILES, *_sentence_files(folder))
    files = {name: folder / name for name in names if (folder / name).is_file()}
    config, words = read_json(folder / "config.json"), find_words(folder)
    return _source(folder, "transformers' folder", config, words, find_case(folder), files)


def _sentence_files(folder: Path) -> list[str]:
    """What tells sentence-transformers how to make vectors; empty where there is no modules.json.

    Raises: CheckpointError for a module with weights of its own, or one that is not known, and for old folders, whose
        encoder lies in a folder of its own.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    names = [MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"]
    modules = parse_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    texts = ("type", "path")
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in texts) for module in modules
    ):
        raise CheckpointError(f"{path} must be a list of modules, each with a type and a path")
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        inside = PurePosixPath(module["path"])
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise CheckpointError(f"{path}: the module {kind!r} is not converted; Pooling and Normalize are")
        if inside.is_absolute() or ".." in inside.parts or bool(inside.parts) == (kind == "Transformer"):
            raise CheckpointError(f"{path}: {kind} lies in {module['path']!r}, from where it is not converted")
        if kind == "Pooling":
            names.append(str(inside / "config.json"))
    return names


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
