"""The job of `fastbert convert`: any model that opens here, written as transformers or as TensorFlow has it."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .checkpoint import SAFETENSORS
from .formats import opened
from .formats.detect import find_source
from .formats.google import write_google
from .formats.model import Model, understand
from .formats.pytorch import read_transformers
from .formats.safetensors_file import total_size, write_safetensors
from .formats.sentence_folder import MODULES, put_encoder_at_root
from .formats.source import Source
from .storage import CheckpointError, new_folder, read_json, write_json
from .text.tokenizer import Tokenizer

TARGETS = ("safetensors", "tensorflow")
_NAMES_SHOWN = 3
_OWN_TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}  # where either is, transformers' tokenizer is whole
_SENTENCEPIECE = "spiece.model"
_SMALL_FILES = 16 << 20  # room for what is written beside the weights: the tokenizer and the config


def convert(
    id_or_path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    to: str = "safetensors",
    activation: str | None = None,
    lower_case: bool | None = None,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Reads a model of any format that opens here and writes it into a new folder, whole or not at all.

    One tensor is in memory at a time, as far as the source's format allows.

    Args:
        id_or_path: a folder, a TensorFlow checkpoint's prefix, a file, an archive, or a hub id.
        folder: must not exist, or be empty.
        to: "safetensors", a folder as transformers reads it; "tensorflow", one as google-research/bert reads it.
        activation: what "gelu" means in the source, "gelu" (by erf) or "gelu_new" (by tanh); None takes what the
            source's framework computes.
        lower_case: whether the tokenizer lower-cases, where the source does not say.
        verify: also compare the weights' bytes with the source's checksums.
        say: a function that gets lines of text: what was used, what was skipped and why, and what was decided.

    Raises: CheckpointError, in one line; nothing has been written then.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    with opened(id_or_path) as path:
        model = understand(_source(path), activation=activation)
        words, lower_case = _tokenizer_of(path, model.source, lower_case)
        for line in describe(model, id_or_path):
            say(line)
        if verify:
            say(_verify(model))
        with new_folder(Path(os.path.abspath(Path(folder).expanduser())), _size(model)) as temporary:
            if to == "tensorflow":
                for note in write_google(model, temporary, words or _words_of_tokenizer(model.source)):
                    say(note)
                if MODULES in model.source.beside:
                    say(f"What {MODULES} says is not written: TensorFlow's format has no place for it.")
            else:
                _write_transformers(model, temporary, words, lower_case)
    say(f"Written: {folder}")


def _source(path: Path) -> Source:
    return find_source(path) or read_transformers(path)


def _tokenizer_of(path: Path, source: Source, lower_case: bool | None) -> tuple[list[str], bool | None]:
    """(the vocabulary, whether the tokenizer lower-cases). Raises CheckpointError where that is not known."""
    if _OWN_TOKENIZER & source.files.keys():
        if lower_case is not None:
            raise CheckpointError(f"{path} has a tokenizer that says whether it lower-cases; change it there")
        return source.words, None
    if lower_case is None:
        lower_case = source.lower_case
    if lower_case is None and (source.words or _SENTENCEPIECE in source.files):
        raise CheckpointError(
            f"{path} does not say whether its tokenizer lower-cases: give --lower-case or --no-lower-case"
        )
    return source.words, lower_case


def _words_of_tokenizer(source: Source) -> list[str]:
    """The vocabulary in a tokenizer.json, where there is no vocab.txt; empty where there is none.

    Raises: CheckpointError where it is not of word pieces, or an id has no token.
    """
    if "tokenizer.json" not in source.files:
        return []
    path = source.files["tokenizer.json"]
    model = read_json(path).get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") != "WordPiece" or sorted(vocab.values()) != list(range(len(vocab))):
        raise CheckpointError(f"{path} is not a WordPiece vocabulary that a vocab.txt can hold")
    return sorted(vocab, key=vocab.__getitem__)


# ---- what is said ----------------------------------------------------------------------------------------


def describe(model: Model, name: str | os.PathLike) -> Iterator[str]:
    """What a model is, which of its variables are used, and which are not and why: lines for people."""
    config = model.config
    yield (
        f"{name}: {model.source.title}; {config['model_type']} of {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, {config['vocab_size']} words, {', '.join(config['architectures'])}"
    )
    by_reason = defaultdict(list)
    for variable, reason in model.skipped.items():
        by_reason[reason].append(variable)
    yield f"{len(model.used)} variables used, {len(model.skipped)} skipped"
    for reason, variables in by_reason.items():
        more = len(variables) - _NAMES_SHOWN
        shown = ", ".join(variables[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield f"  skipped, {reason}: {shown}"
    yield from model.notes
    if not model.source.words and not {"tokenizer.json", _SENTENCEPIECE} & model.source.files.keys():
        yield "The source has no vocabulary, so there is no tokenizer."


def listing(id_or_path: str | os.PathLike, *, activation: str | None = None) -> Iterator[str]:
    """Every variable of a source with its kind, its shape and what becomes of it; at the end, the description.

    Raises: CheckpointError, once all variables are listed, where a conversion would raise it.
    """
    with opened(id_or_path) as path:
        source = _source(path)
        try:
            model, error = understand(source, activation=activation), None
        except CheckpointError as problem:
            model, error = None, problem
        width = max(map(len, source.variables), default=0)
        for name, variable in source.variables.items():
            fate = ""
            if model is not None:
                fate = f"-> {model.used[name]}" if name in model.used else f"skipped: {model.skipped[name]}"
            yield f"{name:<{width}}  {variable.kind} {list(variable.shape)}  {fate}".rstrip()
        if error is not None:
            raise error
        yield from describe(model, id_or_path)


def _verify(model: Model) -> str:
    """Compares all used variables with their checksums, and reports that."""
    used = [model.source.variables[name] for name in model.used]
    checked = [variable for variable in used if variable.verify is not None]
    for variable in checked:
        variable.verify()
    if not checked:
        return f"{model.source.title} has no checksums to verify."
    return f"{len(checked)} variables have their checksums."


# ---- what is written -------------------------------------------------------------------------------------


def _size(model: Model) -> int:
    parts = [model] if model.generator is None else [model, model.generator]
    return sum(total_size(part.tensors) for part in parts) + _SMALL_FILES


def _write_transformers(model: Model, folder: Path, words: list[str], lower_case: bool | None) -> None:
    source, outer = model.source, folder
    folder = outer / source.home
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config)
    write_safetensors(folder / SAFETENSORS, _named_for(model))
    if model.generator is not None:
        _write_transformers(model.generator, folder / "generator", words, lower_case)
    files = source.files
    copies = {folder / name: path for name, path in files.items()}
    copies |= {outer / name: path for name, path in source.beside.items()}
    for target, path in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if MODULES in source.beside and not source.home:
        put_encoder_at_root(outer / MODULES)
    if source.pooling is not None:
        _write_pooling(model, folder)
    if _OWN_TOKENIZER & files.keys():
        return
    if _SENTENCEPIECE in files or "vocab.txt" in files:
        kind = "AlbertTokenizer" if _SENTENCEPIECE in files else "BertTokenizer"
        write_json(folder / "tokenizer_config.json", {"do_lower_case": lower_case, "tokenizer_class": kind})
    elif words:
        longest = model.config["max_position_embeddings"]
        try:
            tokenizer = Tokenizer.from_words(words, lowercase=lower_case, model_max_length=longest)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from error
        tokenizer.save_pretrained(folder)


def _write_pooling(model: Model, folder: Path) -> None:
    """What sentence-transformers reads, so that it makes the source's vectors too."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    config = model.config
    lengths = {"max_seq_length": config["max_position_embeddings"], "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", lengths)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": config["hidden_size"]}
    pooling |= {f"pooling_mode_{mode}": mode.startswith(model.source.pooling) for mode in ("cls_token", "mean_tokens")}
    write_json(folder / "1_Pooling" / "config.json", pooling)


def _named_for(model: Model) -> dict[str, Any]:
    """The weights under the names that the config's class gives them: an encoder alone has no prefix."""
    prefix = model.config["model_type"] + "."
    if not model.config["architectures"][0].endswith("Model"):
        return model.tensors
    return {name.removeprefix(prefix): t for name, t in model.tensors.items()}
