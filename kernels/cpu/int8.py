"""Products in 8-bit integers, for inference on a CPU that multiplies them in hardware (VNNI or AMX).

    s = max |x| / 127      q = round(x / s)      [M, 1] fp32, [M, K] int8    a scale a row, anew for every x
    t = max |W| / 127      Q = round(W / t)      [N] fp32, [N, K] int8       a scale a row, once
    y = s (q Q^T) t + bias                       [M, N]                      sums in int32, exact

With a scale for each row of x, not one for all, a text's vector does not depend on what shares its batch, and because
integer sums are exact not even in its last bit. The product is torch's own for x86, `onednn::qlinear_pointwise`; what
stands before and after it is C++ where `operators.py` has that, else a dozen operators of torch.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor

from .. import reference
from . import operators as cpp

# the instructions that multiply 8-bit integers and add them up in 32 bits, as torch.cpu.get_capabilities spells them
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
LARGEST = 127
# torch's product takes activations of 0 to 255; these are moved there, and their zero with them
ZERO = 128
# rows at once, so that what lies between the passes stays in the cache: of three passes in C++, of many by torch
BLOCK, TORCH_BLOCK = 512, 256
SMALLEST_SCALE = 1e-30  # of a row of zeros


@cache
def why_not() -> str | None:
    """Why this machine has no such products; None where it has."""
    if not (hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()):
        return "this build of PyTorch has no oneDNN"
    if hasattr(torch.cpu, "get_capabilities"):
        there = any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS)
    else:
        there = torch.cpu._is_vnni_supported()
    if not there:
        return f"this CPU ({platform.machine()}) has neither VNNI nor AMX"
    return None


class Int8Weight:
    """A weight [N, K] in 8 bits, laid out for oneDNN."""

    def __init__(self, weight: Tensor):
        weight = weight.detach().float()
        self.scales = weight.abs().amax(1).clamp_min_(SMALLEST_SCALE).div_(LARGEST)  # [N]
        integers = weight.div(self.scales[:, None]).round_().to(torch.int8)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
        self.blocked = torch.ops.onednn.qlinear_prepack(integers, None)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        """activation(x weight^T + bias) in x's dtype; bias and activation, one that keeps the width, in float32."""
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(rows), len(self.scales))
        in_cpp = cpp.takes_int8(rows, len(self.scales), bias, activation)
        block = BLOCK if in_cpp else TORCH_BLOCK
        for some, out in zip(rows.split(block), y.split(block), strict=True):
            if in_cpp:
                q, scales = cpp.quantise_rows(some, SMALLEST_SCALE)
                cpp.scale_rows(self._product(q), scales, bias, activation, out)
            else:
                self._by_torch(some, bias, activation, out)
        return y.view(*x.shape[:-1], -1)

    def _by_torch(self, x: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None:
        q, scales = quantise_rows(x)
        y = self._product(q).mul_(scales)
        if bias is not None:
            y.add_(bias)
        out.copy_(y if activation is None else reference.activate(y, activation))

    def _product(self, q: Tensor) -> Tensor:
        """[M, K] uint8 -> [M, N] float32, the weight's scales in it."""
        return torch.ops.onednn.qlinear_pointwise(
            q, 1.0, ZERO, self.blocked, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> round(x / s) + ZERO [M, K] uint8, s [M, 1] float32. A row with a NaN gets the scale NaN."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp_min_(SMALLEST_SCALE).div_(LARGEST)
    integers = x.mul(scales.reciprocal()).round_().to(torch.int8)
    # by way of int8, which torch converts to eight times as fast; flipping the sign bit adds 128
    return integers.view(torch.uint8).bitwise_xor_(ZERO), scales
