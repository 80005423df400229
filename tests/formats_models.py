"""Checkpoints as other frameworks wrote them, and what is asked of all of them."""

import shutil
from pathlib import Path

import numpy as np
import torch

from fastbert.formats import open_model
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


def weights() -> dict[str, torch.Tensor]:
    """The weights that all fixtures hold, under transformers' names."""
    return {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / "weights_hf_names.npz").items()}


def folder_with(tmp_path: Path, name: str, *files: str) -> Path:
    """A fixture's files, and others, in one folder as people have them."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    for file in files:
        shutil.copy(FIXTURES / file, folder)
    return folder


def assert_same_weights(path: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = open_model(path).state_dict()
    assert tensors.keys() == expected.keys()
    for name, t in expected.items():
        assert tensors[name].is_contiguous(), name
        assert torch.equal(tensors[name], t), name


def encoder_of(state: dict[str, torch.Tensor], *, pooler: bool = True) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if n.startswith("bert.") and (pooler or "pooler" not in n)}


def google_variables() -> dict[str, torch.Tensor]:
    return {name: v.read() for name, v in read_bundle(FIXTURES / "google_tf1" / "bert_model.ckpt").items()}


def write_google_folder(folder: Path, variables: dict[str, torch.Tensor], prefix: str = "bert_model.ckpt") -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(FIXTURES / "bert_config.json", folder)
    shutil.copy(FIXTURES / "vocab.txt", folder)
    write_bundle(folder / prefix, variables.items())
    return folder
