"""Executes compiled kernels without a GPU: Triton compiles for an architecture, numpy runs the PTX.

    with emulated("sm_90"):
        F.attention(q, k, v, cu_seqlens, max_seqlen, impl="triton")     # CPU tensors

Unlike an interpreter of the source, this covers layouts, shared memory, barriers, asynchronous copies, matrix
instructions, masks, specialisation, and the launch itself. Faults that a GPU would not report are errors here
(`fastbert.emulator.errors`): an access outside its tensor, a missing wait, a barrier that not all threads reach.

`driver` replaces Triton's driver; `launch` passes a launch to `execute`, which runs it: `ptx` and `flow` read the text,
`translate` turns blocks into numpy, and the other modules implement the instructions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def emulated(arch: str) -> Iterator:
    """Inside the block Triton's kernels run on CPU tensors, compiled for `arch`: sm_80, sm_90, sm_100 or sm_120.

    Raises: ValueError on an unknown architecture; RuntimeError if TRITON_INTERPRET is set; for a faulty kernel an
    EmulatorError of the fault's class.
    """
    from .driver import offline
    from .launch import execute

    with offline(arch, on_launch=execute) as driver:
        yield driver


def emulate(arch: str) -> None:
    """`emulated` for the rest of the process."""
    from .driver import activate
    from .launch import execute

    activate(arch, on_launch=execute)
