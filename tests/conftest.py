"""Test set-up: what the Triton kernels run on.

A GPU, where there is one; else Triton's interpreter, which runs the kernels' source. FASTBERT_TEST_ARCH=sm_90 (sm_80,
sm_100, sm_120) runs them compiled for that architecture instead, their PTX executed by `fastbert.emulator`.
"""

import os
import subprocess
import sys
from pathlib import Path


def _gpu_present() -> bool:
    """Asked in another process: torch must not be imported here before TRITON_INTERPRET is settled."""
    question = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


EMULATED = os.environ.get("FASTBERT_TEST_ARCH")
if EMULATED:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests then take CPU tensors, and so does the emulator
elif "TRITON_INTERPRET" not in os.environ and "FASTBERT_TEST_NATIVE" not in os.environ and not _gpu_present():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

if EMULATED:
    from fastbert.emulator import emulate

    emulate(EMULATED)


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


@pytest.fixture(scope="session")
def kernels_of():
    """kernels_of(f): the kernels that f() would launch, each told apart by all that it is compiled for. None runs."""
    from fastbert.kernels import _device

    if _device.INTERPRETING:
        pytest.skip("the interpreter compiles no kernels")
    from fastbert.emulator.driver import offline

    def kernels_of(f) -> set[tuple]:
        launches = []
        with offline("sm_90", launches.append, compiles=False):
            f()
        return {launch.variant for launch in launches}

    return kernels_of


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
