"""Which assembler makes NVIDIA machine code for Triton: whether code for sm_90 is right has depended on it
(benchmarks/log/gpu.md)."""

from __future__ import annotations

import functools
import re
import subprocess


def assembler(arch: str) -> str:
    """The ptxas that Triton runs for "sm_90", say: "ptxas 12.8.93 (/path/to/ptxas)". ImportError without Triton.

    Triton brings one for compute capability 10.0 and up and an older one for the others, and takes TRITON_PTXAS_PATH
    or TRITON_PTXAS_BLACKWELL_PATH instead where that is set and runs.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(int(re.fullmatch(r"sm_(\d+)[af]?", arch)[1])).path
    return f"ptxas {_version(path)} ({path})"


@functools.cache
def _version(path: str) -> str:
    said = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"\bV(\d+(?:\.\d+)+)", said)[1]
