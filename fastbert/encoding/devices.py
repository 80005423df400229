"""The device, dtype and implementation of the operators that an Encoder uses."""

from __future__ import annotations

import torch

from .. import functional as F
from ..inference.eight_bits import why_not as why_not_int8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"  # how products are computed; a model has no such dtype


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no CUDA device")
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": the first of these that the hardware multiplies fast: bfloat16 (AVX512-BF16 or AMX; compute capability
    8.0, AMD's cards), float16 (compute capability 7.0), float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, {INT8}, got {dtype!r}")
        return DTYPES[dtype]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    has_512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # and ATEN_CPU_CAPABILITY allows its use
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_512 and fast else torch.float32


def expect_int8(device: torch.device, impl: F.Impl | None) -> None:
    """Raises ValueError with the reason if int8 is not available."""
    reason = why_not_int8()
    if device.type != "cpu":
        reason = f"it is for CPUs, and the device is {device}"
    elif F.choose_impl(impl, device) != "native":
        reason = f'impl "{F.choose_impl(impl, device)}" has no 8-bit products, "native" has'
    if reason is not None:
        raise ValueError(f"dtype int8 is not available here: {reason}")


def describe_operators(device: torch.device, impl: F.Impl | None = None) -> dict[str, tuple[str, str]]:
    """operator -> (implementation that would run it on this device, why)."""
    chosen = F.choose_impl(impl, device)
    if impl is not None:
        reason = "asked for"
    elif chosen == "native":
        reason = F.why_not_triton(device)
    else:
        reason = "a CUDA device" if device.type == "cuda" else "TRITON_INTERPRET=1"
    return dict.fromkeys(F.TRITON_MODULES, (chosen, reason))
