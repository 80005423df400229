"""Test set-up: on a machine without a GPU the Triton kernels run through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def _gpu_present() -> bool:
    """Asked in another process: torch must not be imported here before TRITON_INTERPRET is settled."""
    question = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


if "TRITON_INTERPRET" not in os.environ and "FASTBERT_TEST_NATIVE" not in os.environ and not _gpu_present():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels under test run: the GPU, or CPU tensors under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of one small layer whose words are the letters."""
    from fastbert import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """`torch.empty` is NaN (or a large integer) in tests, so an element nobody wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _seeded():
    """Fresh but repeatable random numbers in every test."""
    torch.manual_seed(0)
