"""Recognises the format of the checkpoint at a path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..checkpoint import PICKLE, PICKLE_INDEX, SAFETENSORS, SAFETENSORS_INDEX
from ..storage import CheckpointError
from . import gguf, keras_hub, paddle, pytorch, tensorflow
from .source import Source


def find_source(path: Path) -> Source | None:
    """The checkpoint at a path; None for a folder of transformers, and if there is no model.

    Raises: CheckpointError for a format that is not supported, and errors of the format's reader.
    """
    reader = find_reader(path)
    return None if reader is None else reader()


def find_reader(path: Path) -> Callable[[], Source] | None:
    """A function that reads the checkpoint at a path, or None. Until it is called, no file is read, except one that
    says which of several checkpoints is meant.

    Raises: CheckpointError for a format that is not supported, and for several models.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return partial(gguf.read, path)
    if keras_hub.is_weights(path):
        return partial(keras_hub.read_file, path)
    if (file := paddle.file_in(path)) is not None:
        return partial(paddle.read, file)
    if path.suffix == ".index" and path.is_file():
        path = path.with_suffix("")
    if path.with_name(path.name + ".index").is_file():
        return partial(tensorflow.read, path)
    if tensorflow.is_v1(path):
        raise CheckpointError(f"{path} is a TensorFlow checkpoint of the V1 format of 2016, which is not read")
    return None


def _in_folder(folder: Path) -> Callable[[], Source] | None:
    if pytorch.is_old(folder):
        return partial(pytorch.read_old, folder)
    if (folder / "config.json").is_file() and _has_weights_of_transformers(folder):
        return None
    if (folder / keras_hub.WEIGHTS).is_file():
        return partial(keras_hub.read, folder)
    if (file := paddle.file_in(folder)) is not None:
        return partial(paddle.read, file)
    if files := sorted(folder.glob("*.gguf")):
        if len(files) > 1:
            raise CheckpointError(f"{folder} has several models: name one of {', '.join(p.name for p in files)}")
        return partial(gguf.read, files[0])
    prefix = tensorflow.prefix_in(folder)
    return None if prefix is None else partial(tensorflow.read, prefix)


def _has_weights_of_transformers(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX))
