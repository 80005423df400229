"""Compiled kernels, executed without a card: Triton compiles for an architecture, numpy runs the PTX.

    with emulated("sm_90"):
        F.attention(q, k, v, cu_seqlens, max_seqlen, impl="triton")     # CPU tensors

Everything that an interpreter of the source cannot see takes part: layouts, shared memory, barriers, asynchronous
copies, matrix instructions, masks, specialisation, the launch itself. What a card would do in silence is an error here
(`fastbert.emulator.errors`): an access outside its tensor, a missing wait, a barrier that not all threads reach.

`driver` stands where Triton's driver stands; `launch` hands a launch to `execute`, which runs it: `ptx` and `flow` read
the text, `translate` turns blocks into numpy, and the rest say what the instructions do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def emulated(arch: str) -> Iterator:
    """Inside the block Triton's kernels run on CPU tensors, compiled for `arch`: sm_80, sm_90, sm_100 or sm_120.

    Raises: ValueError on an unknown architecture; RuntimeError where TRITON_INTERPRET is set; on a faulty kernel an
    EmulatorError of the class of the fault.
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
