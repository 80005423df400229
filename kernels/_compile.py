"""What a kernel module tells the offline compiler about itself, so its machine code can be read without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one config that its ladder can return.

    A kernel module lists its own in `compile_cases(arch)`, arch being "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
    """

    name: str  # e.g. "attention_fwd[bf16,D=64,128x128]"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # run-time argument -> Triton type, e.g. "*bf16", "i32", "i64", "fp32"
    constexprs: dict[str, Any]  # compile-time argument -> value
    num_warps: int
    num_stages: int
    matrix: bool = False  # must contain matrix instructions
    bulk_copy: bool = False  # must contain bulk copies (tensor descriptors) where the architecture has them
    wide_loads: bool = False  # must load 128 bits a lane at once (NVIDIA)
    aligned: tuple[str, ...] = ()  # arguments known to be divisible by 16: pointers and sizes the launcher guarantees
    fast: bool = False  # belongs to the fixed subset that continuous integration compiles
    options: dict[str, Any] = field(default_factory=dict)  # further compiler options
