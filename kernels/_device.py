"""What the machine at hand can run, asked once."""

import functools
import importlib.util
import os

# Found, not imported: importing Triton costs a quarter of a second.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Does Triton run kernels on CPU tensors in this process? Triton itself reads the variable once, at import.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def capability(index: int | None = None) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device; (9, 0) under the interpreter, to run the same configs."""
    if INTERPRETING:
        return (9, 0)
    import torch

    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int | None = None) -> int:
    """Number of multiprocessors of a CUDA device; a small number under the interpreter, so persistent grids loop."""
    if INTERPRETING:
        return 4
    import torch

    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def arch(index: int | None = None) -> str:
    """Name of a device's architecture as compilers call it: "sm_90", "gfx942"; "sm_90" under the interpreter."""
    import torch

    if torch.version.hip is not None and not INTERPRETING:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = capability(index)
    return f"sm_{major}{minor}"
