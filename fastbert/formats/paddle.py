"""PaddleNLP's .pdparams: a pickle of numpy arrays, read by an unpickler that can only make arrays."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..storage import CheckpointError, read_json
from .families import PADDLE
from .source import Source, find_case, find_words
from .variable import Variable

_CONFIGS = ("config.json", "model_config.json")
_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own names of the parameters
_PARTED = "UnpackBigParamInfor@@"  # arrays of over 1 GB, which pickle protocols 2 and 3 store in parts
# The functions that a pickle of arrays calls. numpy 2 moved the first two.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}
_ALONE = ("embeddings.", "encoder.", "pooler.")  # prefixes of names if the encoder was saved without a head


def file_in(path: Path) -> Path | None:
    """The parameters at a path: the file itself, or the one in a folder. Raises CheckpointError for several."""
    if path.is_file():
        return path if path.suffix == ".pdparams" else None
    found = sorted(path.glob("*.pdparams"))
    if len(found) > 1:
        raise CheckpointError(f"{path} has several parameter files: name one of {', '.join(p.name for p in found)}")
    return found[0] if found else None


def read(file: Path) -> Source:
    """The parameters in a file, with the config and the vocabulary beside it. Raises CheckpointError."""
    folder = file.parent
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        if (folder / name).is_file():
            config = _numbers(read_json(folder / name))
            break
    words, case = find_words(folder), find_case(folder)
    return Source(
        file, PADDLE.title, PADDLE.activation, config, lambda: _variables(file), lambda _: PADDLE, words, case
    )


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The encoder's config; older files nest it in the arguments of the head's and of the encoder's constructor."""
    while isinstance(config.get("init_args"), (list, tuple)) and config["init_args"]:
        first = config["init_args"][0]
        if not isinstance(first, dict):
            break
        config = first
    return {key: value for key, value in config.items() if key not in ("init_args", "init_class", "architectures")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def _variables(file: Path) -> dict[str, Variable]:
    try:
        state = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file} is truncated or not a pickle of plain arrays ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} must hold a dict of arrays, got {type(state).__name__}")
    if _PARTED in state:
        raise CheckpointError(f"{file} has arrays cut in parts (pickle protocol 2 or 3), which is not read")
    arrays = {name: value for name, value in state.items() if name != _NAME_TABLE}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise CheckpointError(f"{file}: {name} must be an array, got {type(value).__name__}")
    alone = not any(name.startswith("bert.") for name in arrays)
    return {
        name: _variable(file, name, array)
        for name, array in (
            (f"bert.{name}" if alone and name.startswith(_ALONE) else name, array) for name, array in arrays.items()
        )
    }


def _variable(file: Path, name: str, array: np.ndarray) -> Variable:
    if array.dtype == np.uint16:  # numpy has no bfloat16, so Paddle stores its bits as uint16
        return Variable.of_tensor(name, torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise CheckpointError(f"{file}: {name} is of {array.dtype}, which is not read")
    return Variable.of_tensor(name, torch.from_numpy(np.ascontiguousarray(array)))
