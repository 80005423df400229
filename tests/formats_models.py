"""Checkpoints as other frameworks wrote them, and the checks that all of them must pass."""

import shutil
from pathlib import Path

import numpy as np
import torch

from fastbert.convert import convert
from fastbert.formats import open_model
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle

FIXTURES = Path(__file__).parent / "fixtures" / "formats"
GOOGLE_FILES = ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001")


def weights() -> dict[str, torch.Tensor]:
    """The weights that all fixtures hold, under transformers' names."""
    return {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / "weights_hf_names.npz").items()}


def folder_with(tmp_path: Path, name: str, *files: str) -> Path:
    """A fixture's files, and others, in one folder, as users have them."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    for file in files:
        shutil.copy(FIXTURES / file, folder)
    return folder


def google_without_a_name(tmp_path: Path) -> Path:
    """Google's layout, in a folder whose name does not say whether the model is cased."""
    return folder_with(tmp_path, "google_tf1", "bert_config.json", "vocab.txt").rename(tmp_path / "bert")


def as_transformers_writes(google: Path) -> Path:
    """The same checkpoint as transformers saves it, in a folder beside it whose name does not say it either."""
    convert(google, google.parent / "hf", lower_case=False, say=lambda line: None)
    return google.parent / "hf"


def flip(path: Path, at: int) -> None:
    """Flips a bit of the byte `at`."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def names_in(folder: Path, *but: str) -> set[str]:
    return {p.name for p in folder.iterdir()} - set(but)


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
