"""Freed memory stays in a training process, so that its next step needs no new pages."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")

PROGRAM = """
import resource
import torch
from fastbert.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20, dtype=torch.float32, device="cpu")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without, kept = faults(), keep_freed_memory()
for _ in range(12):  # the heap grows to what such steps need
    faults()
print(kept, without, faults())
"""


def run(**environment: str) -> tuple[str, int, int]:
    """(result of `keep_freed_memory`, page faults of five buffers of 64 MB before it, and after it)."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=own | environment, capture_output=True, text=True, check=True
    )
    kept, without, after = done.stdout.split()
    return kept, int(without), int(after)


def test_large_buffers_stay():
    kept, without, after = run()
    assert kept == "True"
    assert after < without / 20


def test_settings_of_the_environment_are_respected():
    kept, without, after = run(MALLOC_ARENA_MAX="4")
    assert kept == "False"
    assert after > without / 2
