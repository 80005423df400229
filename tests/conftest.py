"""Test set-up: on a machine without a GPU the Triton kernels run through Triton's interpreter."""

import os
import subprocess
import sys


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
