"""Freed memory stays in a training process, so that its next step needs no new pages."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")

TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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


LARGE = r"""
import re
import sys
from pathlib import Path
import torch
from fastbert.training import memory

if sys.argv[1] == "strict":
    memory._counts_unwritten = lambda: True
memory.keep_freed_memory()
held = [torch.ones(1 << 20, dtype=torch.float32, device="cpu") for _ in range(32)]
areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
asked = [area for area in areas if "[heap]" in area and " hg" in area.partition("VmFlags:")[2]]
print(sum(int(re.search(r"Rss: +([0-9]+)", area)[1]) for area in asked))
"""


def in_large_pages(*arguments: str) -> int:
    """KB that a process with tensors of 128 MB holds where it asked for large pages."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", LARGE, *arguments]
    return int(subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    not TRANSPARENT.exists() or "[madvise]" not in TRANSPARENT.read_text(),
    reason="the system gives no large pages, or gives them to all programs",
)
def test_large_pages_are_asked_for():
    assert in_large_pages("") >= 128 << 10
    assert in_large_pages("strict") == 0


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
