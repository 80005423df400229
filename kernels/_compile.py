"""Calls of operators whose launches the offline compiler compiles; each kernel module lists its own.

The calls run through the real launchers, with a driver that needs no GPU. So the compiled kernels are those that the
launchers use: the same types, constants, divisibility by 16, warps and stages. See
`benchmarks.inspection.compile_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class CompileCall:
    """Runs `function(*args, **kwargs)` without gradients (`inference`), then with gradients and its backward pass.

    A module lists its calls in `compile_calls()`. Shapes need only be large enough for every kernel to be launched.
    """

    name: str  # of the form, e.g. "bf16,dropout,D=64"; a kernel's case is then "attention_fwd[bf16,dropout,D=64]"
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    grads: Sequence[int | str] | None  # the arguments, by place or name, that get gradients; None: all float tensors
    fast: bool  # its kernels belong to the fixed subset that continuous integration compiles
    wide_loads: Sequence[Any]  # kernels that must load 128 bits a lane at once (NVIDIA)
    inference: bool  # False: only with gradients, if the form without needs fewer registers at the same config

    def run(self) -> None:
        given = {**dict(enumerate(self.args)), **self.kwargs}
        wanted = [n for n, value in given.items() if (_is_float(value) if self.grads is None else n in self.grads)]
        if self.inference or not wanted:
            with torch.no_grad():
                self.function(*self.args, **self.kwargs)
        if not wanted:
            return
        given |= {name: given[name].detach().requires_grad_() for name in wanted}
        out = self.function(*(given[n] for n in range(len(self.args))), **{name: given[name] for name in self.kwargs})
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def compile_call(
    function: Callable, name: str, *args: Any, grads: Sequence[int | str] | None = None, fast: bool = False,
    wide_loads: Sequence[Any] = (), inference: bool = True, **kwargs: Any,
) -> CompileCall:  # fmt: skip
    """The `CompileCall` of these arguments."""
    return CompileCall(name, function, args, kwargs, grads, fast, wide_loads, inference)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor for a call; its contents are not used. (Indices are zeros, since torch may sort them or look them
    up.)"""
    make = torch.empty if dtype.is_floating_point else torch.zeros
    return make(shape, dtype=dtype, device="cpu")
