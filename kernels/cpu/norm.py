"""LayerNorm(dropout(x + x_bias) + residual), RMSNorm(x) and dropout(x) in C++ with gradients. norm.cpp and rms.cpp have
the equations.

Under autocast x is the bfloat16 result of a product; residual, parameters and result are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._library import by_torch, plain_gradients
from .._random import keep_mask, keep_threshold
from . import operators as cpp
from .library import WIDTH
from .pointers import address


def row_keys(seed: Tensor, stream: int, rows: Tensor) -> Tensor:
    """`_random.row_keys` at once: keys [T] int64 for rows [T] of an integer dtype. seed: a tensor of one integer."""
    rows = rows.to(torch.int64).contiguous()
    count, keys = rows.numel(), torch.empty(rows.shape, dtype=torch.int64, device="cpu")
    cpp.call(
        "row_keys", torch.float32, int(seed), stream, address("rows", rows, torch.int64, count),
        address("keys", keys, torch.int64, count), count,
    )  # fmt: skip
    return keys


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keys: Tensor | None, dropout_p: float,
    x_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(x + x_bias) + residual) [..., N], with or without gradients. The caller has checked
    `cpp.takes_add_layer_norm`. keys: the rows' keys, or None for no dropout."""
    given = [x, residual, weight, bias] if x_bias is None else [x, residual, weight, bias, x_bias]
    if not cpp.want_gradients(*given):
        return cpp.add_layer_norm(x, residual, weight, bias, eps, keys, dropout_p, x_bias)
    return _AddLayerNorm.apply(x, residual, weight, bias, x_bias, eps, keys, dropout_p)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
        keys: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, residual, weight, bias, x_bias, keys)
        ctx.eps, ctx.dropout_p = eps, dropout_p
        return cpp.add_layer_norm(x, residual, weight, bias, eps, keys, dropout_p, x_bias)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, x_bias, keys = ctx.saved_tensors
        if not by_torch(dy):
            grads = cpp.add_layer_norm_backward(dy, x, residual, weight, ctx.eps, keys, ctx.dropout_p, x_bias)
            return *grads, None, None, None

        def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> Tensor:
            z = x if x_bias is None else x + x_bias
            if keys is not None:
                keep = keep_mask(keys, x.shape[-1], ctx.dropout_p).view(x.shape)
                z = torch.where(keep, z / (1.0 - ctx.dropout_p), 0.0)
            return F.layer_norm(z + residual, z.shape[-1:], weight, bias, ctx.eps)

        # A second derivative may be wanted, which only torch's operators have.
        inputs = (x, residual, weight, bias, x_bias)
        return *plain_gradients(function, inputs, ctx.needs_input_grad[:5], dy), None, None, None


def takes_dropout(x: Tensor) -> bool:
    """Whether `dropout` supports x [M, N]."""
    return cpp.knows(x) and x.is_contiguous() and x.numel() > 0 and x.shape[-1] % WIDTH == 0


def dropout(x: Tensor, dropout_p: float, keys: Tensor) -> Tensor:
    """x [M, N] with elements dropped by the rows' keys, the rest divided by 1 - dropout_p, with or without gradients.
    The caller has checked `takes_dropout`."""
    return _Dropout.apply(x, dropout_p, keys) if cpp.want_gradients(x) else _dropped(x, dropout_p, keys)


def _dropped(x: Tensor, dropout_p: float, keys: Tensor) -> Tensor:
    rows, width = cpp.rows_and_width("dropout", x)
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    cpp.call(
        "dropout", x.dtype, address("x", x, x.dtype, x.numel()), address("keys", keys, torch.int64, rows),
        address("y", y, x.dtype, x.numel()), rows, width, keep_threshold(dropout_p), 1.0 - dropout_p,
    )  # fmt: skip
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dropout_p: float, keys: Tensor) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.dropout_p = dropout_p
        return _dropped(x, dropout_p, keys)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        (keys,) = ctx.saved_tensors
        if not by_torch(dy):
            return _dropped(dy.contiguous(), ctx.dropout_p, keys), None, None
        keep = keep_mask(keys, dy.shape[-1], ctx.dropout_p)
        return torch.where(keep, dy / (1.0 - ctx.dropout_p), 0.0), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) [..., N], with or without gradients. The caller has checked `cpp.takes_rms_norm`."""
    if not cpp.want_gradients(x, weight):
        return cpp.rms_norm(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return cpp.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not by_torch(dy):
            return *cpp.rms_norm_backward(dy, x, weight, ctx.eps), None

        def function(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], weight, ctx.eps)

        # A second derivative may be wanted, which only torch's operators have.
        return *plain_gradients(function, (x, weight), ctx.needs_input_grad[:2], dy), None
