"""Which implementation `impl` means on a device, and which engine computes it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import kernels
from ..kernels import _device as machine
from ..kernels import native, reference
from ..kernels._invariance import is_batch_invariant
from ..kernels.cpu import operators as cpp

Impl = Literal["triton", "native", "reference"]
IMPLS = ("triton", "native", "reference")

OPERATORS = tuple(native.ENGINES)
# operator -> the kernel module that holds its Triton form
TRITON_MODULES = {op: module for op, (module, *_) in native.ENGINES.items() if module is not None}

# The kernels need bfloat16 matrix units and copies to shared memory that bypass registers, and tests compile them for
# this capability and newer ones. For older cards Triton would compile some kernels and fail on others.
OLDEST_CAPABILITY = (8, 0)


def why_not_triton(device: torch.device) -> str | None:
    """None if Triton kernels run on this device, else the reason why not."""
    if not machine.HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        return _why_too_old(device.index)
    if machine.triton_on_cpu():
        return None
    return f"Triton needs a CUDA device (this one is {device.type}) or TRITON_INTERPRET=1"


def _why_too_old(index: int | None) -> str | None:
    """Why a CUDA device is too old for the kernels, or None. On ROCm the capability is the number of AMD's target
    (9.4 for gfx942), which cannot be compared with NVIDIA's."""
    if torch.version.hip is not None or (found := machine.capability(index)) >= OLDEST_CAPABILITY:
        return None
    return f"the kernels need compute capability {_dotted(OLDEST_CAPABILITY)}, and this card has {_dotted(found)}"


# This is what `torch.compiler.assume_constant_result` sets; importing torch's compiler for it would take a second.
_why_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def describe_cpp() -> str:
    """The instructions that the C++ operators of `native` use on this CPU, or why there are no such operators."""
    reason = why_not_cpp()
    if reason is not None:
        return f"none; {reason}"
    allowed = os.environ.get("ATEN_CPU_CAPABILITY")
    by = [f"{name} by {cpp.instructions(dtype)}" for dtype, name in cpp.NAMES.items() if dtype in cpp.dtypes()]
    return ", ".join(by) + (f" (ATEN_CPU_CAPABILITY={allowed})" if allowed else "")


def why_not_cpp() -> str | None:
    """None if `native` has its C++ operators on a CPU, else the reason why not."""
    return cpp.load()[1]


def choose_impl(impl: str | None, device: torch.device) -> Impl:
    """The implementation that `impl` means on this device. Raises: ValueError for an unknown `impl`, RuntimeError if an
    explicit one cannot run here."""
    if impl is None:
        impl = "native" if why_not_triton(device) else "triton"
    elif impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS} or None, got {impl!r}")
    elif impl == "triton" and (reason := why_not_triton(device)):
        raise RuntimeError(f'impl="triton" cannot run here: {reason}')
    if is_batch_invariant() and impl != "triton" and (impl, device.type) != ("native", "cpu"):
        reason = why_not_triton(device)
        raise RuntimeError(
            f'batch_invariant() needs impl "triton", or "native" on a CPU; got "{impl}" on {device.type}'
            + (f" ({reason})" if reason else "")
        )
    return cast(Impl, impl)


def engine(op: str, dtype: torch.dtype, device: torch.device, impl: str | None = None) -> str:
    """What computes an operator of `OPERATORS` in this dtype on this device, in words; "native" has several engines.

    Raises: as `choose_impl`.
    """
    chosen = choose_impl(impl, device)
    if op == "linear" and impl is None and chosen == "triton" and not is_batch_invariant():
        chosen = "native"  # `linear` uses the vendor library unless our own product is asked for
    if chosen == "native":
        return native.engine(op, dtype, device)
    return "our Triton kernel" if chosen == "triton" else "plain torch"


def triton_module(name: str) -> Any:
    """A kernel module, imported on first use: importing one needs triton."""
    if not hasattr(kernels, name):
        _import(name)
    return getattr(kernels, name)


def _import(name: str) -> None:
    import_module(f"{kernels.__name__}.{name}")  # type: ignore[attr-defined]


# torch.compile cannot trace `import_module`, so it runs this function while tracing.
_import._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, impl: str | None, x: Tensor) -> Any:
    impl = choose_impl(impl, x.device)
    if impl == "triton":
        return getattr(triton_module(TRITON_MODULES[op]), op)
    return getattr(native if impl == "native" else reference, op)
