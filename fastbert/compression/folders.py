"""Reads a model's folder, and writes a changed model with the other files of that folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import save_state_dict
from ..config import BertConfig
from ..formats import open_model, opened
from ..formats.sentence_folder import folder_of_config, has_modules
from ..models.loading import read_model
from ..storage import CheckpointError, new_folder, read_json, write_json

HISTORY = "compression.json"  # one record for each command that changed the model
_BESIDE = (".json", ".txt", ".model")  # endings of the files that are copied, apart from config and weights
_OF_A_RUN = ("report.json", HISTORY)  # files about the run that made the model, which do not apply to the new one
_FOLDERS_OF_OTHERS = ("checkpoints", "onnx", "openvino", "tensorboard")


@dataclass
class Model:
    """A model in a folder.

    Attributes:
        name: the path or id that the user gave.
        path: its folder. home: the folder with config and weights, which sentence-transformers may put below it.
        config, state: the configuration and the weights.
    """

    name: str
    path: Path
    home: Path
    config: BertConfig
    state: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.nbytes for t in self.state.values())

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.state.values() if t.is_floating_point())


@contextmanager
def reading(id_or_path: str | Path) -> Iterator[Model]:
    """The model in a folder or of a hub id. Raises: CheckpointError, in one line, also for other formats."""
    with opened(id_or_path) as path:
        if open_model(path) is not None:
            raise CheckpointError(f"{id_or_path} is of another format: fastbert convert makes a folder of it")
        config, state, integers = read_model(path)
        if integers:
            raise CheckpointError(f"{id_or_path} is in 8 bits already: give the model that it was made of")
        yield Model(str(id_or_path), path, folder_of_config(path), config, state)


def expect_free(out: Path) -> None:
    """Raises CheckpointError if a model cannot be written into `out`. To be called before the work begins."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists, and is no empty folder")


def write(model: Model, out: Path, record: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Writes the model as a folder, atomically: config, weights, the other files of its folder, and HISTORY with
    `record` added.

    config: content of config.json; None for `model.config`.
    Raises: CheckpointError.
    """
    history = steps_of(model.path)
    with new_folder(Path(os.path.abspath(out)), model.nbytes) as folder:
        copy_beside(model.path, folder, model.home)
        home = folder / model.home.relative_to(model.path)
        home.mkdir(parents=True, exist_ok=True)
        write_json(home / "config.json", model.config.to_dict() if config is None else config)
        save_state_dict(home, model.state)
        write_json(folder / HISTORY, {"steps": [*history, record]})


def add_step(model: str | Path, out: Path, record: dict[str, Any]) -> None:
    """Writes HISTORY into `out`: that of `model` with `record` added."""
    write_json(out / HISTORY, {"steps": [*history_of(model), record]})


def continue_steps(model: str | Path, out: Path, record: dict[str, Any]) -> None:
    """As `add_step`, if `model` has a HISTORY with records."""
    if history_of(model):
        add_step(model, out, record)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, in their order."""
    digest = sha256()
    for t in state.values():
        digest.update(t.cpu().contiguous().numpy())
    return digest.hexdigest()


def steps_of(path: Path) -> list[dict[str, Any]]:
    """The records in HISTORY of a folder, the first command first. Raises: CheckpointError if it has other content."""
    steps = read_json(path / HISTORY).get("steps", []) if (path / HISTORY).is_file() else []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{path / HISTORY} must hold a list of steps, each a JSON object")
    return steps


def history_of(model: str | Path) -> list[dict[str, Any]]:
    """`steps_of` the folder of a path or id. Commands that train call it before they begin, so that an error costs
    nothing."""
    with opened(model) as path:
        return steps_of(path)


def copy_beside(path: Path, folder: Path, home: Path) -> None:
    """Copies the other files of a model's folder: tokenizer, task, and the modules of sentence-transformers."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            if has_modules(path) and entry.name not in _FOLDERS_OF_OTHERS and not entry.name.startswith("."):
                shutil.copytree(entry, folder / entry.name, ignore=lambda at, names: _weights(at, names, home))
        elif entry.suffix in _BESIDE and entry.name not in (*_OF_A_RUN, *_weights(path, [entry.name], home)):
            shutil.copyfile(entry, folder / entry.name)


def _weights(at: str | Path, names: list[str], home: Path) -> list[str]:
    """The files of a folder that are not copied: config and weights, if the folder is `home`."""
    if Path(at) != home:
        return []
    ends = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".onnx")
    return [name for name in names if name == "config.json" or name.endswith(ends)]
