"""The assembler that makes NVIDIA machine code for Triton. Some versions made wrong code for sm_90
(benchmarks/log/gpu.md)."""

from __future__ import annotations

import functools
import re
import subprocess


def assembler(arch: str) -> str:
    """The ptxas that Triton runs for an architecture, as "ptxas 12.8.93 (/path/to/ptxas)". ImportError without Triton.

    Triton's wheel has two. The newer one is for compute capability 10.0 and later, from Triton 3.9 on for 9.0 too.
    TRITON_PTXAS_PATH replaces the older one and TRITON_PTXAS_BLACKWELL_PATH the newer one, if that file runs.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(int(re.fullmatch(r"sm_(\d+)[af]?", arch)[1])).path
    return f"ptxas {_version(path)} ({path})"


@functools.cache
def _version(path: str) -> str:
    said = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"\bV(\d+(?:\.\d+)+)", said)[1]
