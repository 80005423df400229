"""keras-hub's presets: config.json, model.weights.h5, task.weights.h5 with a head, and the tokenizer beside them.

Also the single file of encoder and head that `save_weights` of such a model writes. Reading needs h5py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..storage import CheckpointError, read_json
from .families import KERAS_HUB
from .source import Source, find_case, find_words
from .variable import Variable

WEIGHTS = "model.weights.h5"
_TASK_WEIGHTS = "task.weights.h5"
_ENDING = ".weights.h5"
_BACKBONE = "BertBackbone"
_CONFIG_KEYS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "num_segments": "type_vocab_size",
}


def is_weights(path: Path) -> bool:
    return path.is_file() and path.name.endswith(_ENDING)


def read(folder: Path) -> Source:
    """A preset's folder. Raises CheckpointError, also where h5py is not installed."""
    files = [path for path in (folder / WEIGHTS, folder / _TASK_WEIGHTS) if path.is_file()]
    return _source(folder, _config(folder), files)


def read_file(file: Path) -> Source:
    """A file of `save_weights`, with the config and tokenizer of a preset beside it, if any. Raises CheckpointError."""
    return _source(file, _config(file.parent) if (file.parent / "config.json").is_file() else {}, [file])


def _source(path: Path, config: dict[str, Any], files: list[Path]) -> Source:
    folder = path if path.is_dir() else path.parent
    assets = folder / "assets" / "tokenizer"
    return Source(
        path,
        KERAS_HUB.title,
        KERAS_HUB.activation,
        config,
        lambda: {name: variable for file in files for name, variable in _variables(file).items()},
        lambda _: KERAS_HUB,
        find_words(assets if assets.is_dir() else folder),
        _lower_case(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    """The config of a preset under transformers' keys. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    if config.get("class_name") != _BACKBONE:
        raise CheckpointError(f"{folder} holds keras-hub's {config.get('class_name')!r}; only {_BACKBONE} is read")
    numbers = config.get("config") or {}
    if absent := _CONFIG_KEYS.keys() - numbers.keys():
        raise CheckpointError(f"{folder / 'config.json'} lacks {', '.join(sorted(absent))}")
    ours: dict[str, Any] = {name: numbers[theirs] for theirs, name in _CONFIG_KEYS.items()}
    ours["hidden_dropout_prob"] = ours["attention_probs_dropout_prob"] = numbers.get("dropout", 0.1)
    return ours


def _lower_case(folder: Path) -> bool | None:
    """Whether the model lower-cases: from keras-hub's tokenizer.json, else from the folder's name."""
    if (folder / "tokenizer.json").is_file():
        said = (read_json(folder / "tokenizer.json").get("config") or {}).get("lowercase")
        if isinstance(said, bool):
            return said
    return find_case(folder)


def _variables(path: Path) -> dict[str, Variable]:
    """The arrays, named by their layer's name, the path inside the layer, and their number there.

    Groups of layers are numbered by class ("layers/transformer_encoder_1"); a layer's own name is the attribute `name`
    of its group `vars`. In older versions of keras the groups have that name.
    """
    try:
        import h5py
    except ImportError:
        raise CheckpointError(f"{path} needs h5py: pip install h5py") from None
    found: dict[str, Variable] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            ours = _by_layers(file, name)
            if ours in found:
                raise CheckpointError(f"{path} has two layers with the variable {ours}")
            found[ours] = _variable(path, ours, name, item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # the types that h5py raises for HDF5's errors
        raise CheckpointError(f"{path} is truncated, damaged or not an HDF5 file ({error})") from error
    return found


def _by_layers(file: Any, dataset: str) -> str:
    """The name of an array, with the layers' own names in its path."""
    parts, ours = dataset.split("/"), []
    for at, part in enumerate(parts):
        group = file["/".join(parts[: at + 1])]
        if at and parts[at - 1] == "layers" and "vars" in group:
            part = group["vars"].attrs.get("name") or part
        if part not in ("layers", "vars"):
            ours.append(part)
    return "/".join(ours)


def _variable(path: Path, name: str, dataset: str, item: Any) -> Variable:
    kind = str(item.dtype)
    # HDF5 has no bfloat16: keras writes these two bytes as an opaque type
    opaque = item.dtype.kind == "V" and item.dtype.itemsize == 2
    kinds = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    dtype = torch.bfloat16 if opaque else kinds.get(kind)

    def read() -> torch.Tensor:
        import h5py

        if dtype is None:
            raise CheckpointError(f"{path}: {name} is of {kind}, which is not read")
        try:
            with h5py.File(path, "r") as file:
                array = file[dataset][()]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {name} cannot be read ({error})") from error
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16) if opaque else torch.from_numpy(array)

    return Variable(name, tuple(item.shape), "bfloat16" if opaque else kind, dtype, read)
