"""Linear layers for training on a CPU: products, activations and all gradients in C++.

    h = x W^T + b,  y = act(h)         x [..., K], W [N, K], b [N] or None
    dh = dy act'(h)                    part of the product that computes dy, where that product is one of these
    dx = dh W                          without transposing W
    dW = dh^T x,  db = sums of dh      summed in float32, and for float32 weights never rounded

Under autocast products are bfloat16 and weights stay float32. Each pass rounds a weight block by block while it loads
the block, so there is no rounded copy of the weight. x, in its own dtype, and h are saved; the backward pass computes
act(h) again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._invariance import is_batch_invariant
from .._library import by_torch, plain_gradients
from ..reference import activate
from . import operators as cpp
from .library import WIDTH
from .pointers import PLAIN, address, address_or_none, strided_address

FLOATS = (torch.float32, torch.bfloat16)


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype in which a product of x is computed: autocast's, or x's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def takes(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str | None = None,
    later: Sequence[Tensor] = (),
) -> bool:  # fmt: skip
    """Whether these layers of x are computed here: a gradient is needed, and the C++ supports the dtypes and sizes.
    False under a dispatch mode, which has to see single operators.

    later: further weights of the same autograd node, which may need a gradient too.
    """
    if not (torch.is_grad_enabled() and cpp.runs_now(x)):
        return False
    parameters = [*weights, *(bias for bias in biases if bias is not None)]
    if not any(t.requires_grad for t in (x, *parameters, *later)) or torch._C._len_torch_dispatch_stack():
        return False
    dtype, of_weights = dtype_of(x), weights[0].dtype
    if dtype not in cpp.dtypes() or not cpp.multiplies(dtype) or is_batch_invariant():
        return False
    # Mixed dtypes outside of autocast are left to torch, which refuses them with its own message.
    fit = FLOATS if torch.is_autocast_enabled("cpu") else (dtype,)
    return (
        type(x) in PLAIN
        and x.dtype in fit
        and of_weights in fit
        and x.numel() > 0
        and activation in (None, *cpp.ACTIVATION_NUMBERS)
        and all(type(t) in PLAIN and t.is_cpu and t.dtype is of_weights and t.is_contiguous() for t in parameters)
        and all(_fits(weight, x.shape[-1], dtype) and weight.shape == weights[0].shape for weight in weights)
    )


def _fits(weight: Tensor, inner: int, dtype: torch.dtype) -> bool:
    return (
        weight.dim() == 2
        and weight.shape[1] == inner
        and weight.shape[0] % WIDTH == 0
        and inner % (WIDTH * 4 // dtype.itemsize) == 0
    )


def takes_feed_forward(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> bool:
    """Whether `feed_forward` supports these: `takes` for up, and the same conditions for down."""
    second = [t for t in (down, down_bias) if t is not None]
    return (
        takes(x, (up,), (up_bias,), activation)
        and all(type(t) in PLAIN and t.is_cpu and t.dtype is up.dtype and t.is_contiguous() for t in second)
        and _fits(down, len(up), dtype_of(x))
    )


# ---- the products ----------------------------------------------------------------------------------------


def _expect_sizes(function: str, columns: int, inner: int, dtype: torch.dtype) -> None:
    cpp.expect_multiple(function, "the number of columns", columns)
    cpp.expect_multiple(function, "the inner size", inner, WIDTH * 4 // dtype.itemsize)


def _ran(failed: int | None, inner: int) -> None:
    if failed:
        raise MemoryError(f"linear: no memory for 64 columns of {inner} rows")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor | None = None, activation: str | None = None
) -> None:
    """Fills h [M, N] with x weight^T + bias, and y [M, N], whose rows may have any stride, with activation(h).

    x [M, K], y and h have the product's dtype; weight [N, K] and bias [N] or None have that or float32.
    """
    (rows, inner), columns, dtype, of_weight = x.shape, len(weight), x.dtype, weight.dtype
    _expect_sizes("linear_forward", columns, inner, dtype)
    failed = cpp.call(
        "linear_forward", dtype, address("x", x, dtype, rows * inner),
        address("weight", weight, of_weight, columns * inner), address_or_none("bias", bias, of_weight, columns),
        cpp.is_wide("weight", of_weight, dtype), strided_address("y", y, dtype, (rows, columns)), y.stride(0),
        address_or_none("h", h, dtype, rows * columns), rows, columns, inner,
        cpp.ACTIVATION_NUMBERS.get(activation, 0),
    )  # fmt: skip
    _ran(failed, inner)


def input_gradient(
    dy: Tensor, weights: Sequence[Tensor], dx: Tensor, h: Tensor | None = None, a: Tensor | None = None,
    activation: str | None = None,
) -> None:  # fmt: skip
    """Fills dx [M, K] with dy weight, summed over `weights` [N, K], where each weight has its columns of
    dy [M, sum of N]. With h [M, K], multiplies dx by activation'(h) and fills a [M, K] with activation(h). weights and
    dx have dy's dtype or float32."""
    rows, count, (columns, inner), dtype = len(dy), len(weights), weights[0].shape, dy.dtype
    of_weights, size = weights[0].dtype, rows * inner
    _expect_sizes("linear_input_gradient", columns, inner, dtype)
    where = array("Q", [address("weight", weight, of_weights, columns * inner) for weight in weights])
    failed = cpp.call(
        "linear_input_gradient", dtype, strided_address("dy", dy, dtype, (rows, count * columns)), dy.stride(0),
        where.buffer_info()[0], count, cpp.is_wide("weight", of_weights, dtype), address("dx", dx, dx.dtype, size),
        cpp.is_wide("dx", dx.dtype, dtype), False, address_or_none("h", h, dtype, size),
        address_or_none("a", a, dtype, size), rows, columns, inner, cpp.ACTIVATION_NUMBERS.get(activation, 0),
    )  # fmt: skip
    _ran(failed, count * columns)


def weight_gradients(
    dy: Tensor, x: Tensor, want_weights: Sequence[bool], want_biases: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The float32 gradients of the weights [N, K] and biases [N] that x was multiplied with: part^T x and the column
    sums of part, where part [M, N] are a weight's columns of dy [M, sum of N]. None for one that is not wanted.

    x [M, K] has dy's dtype, or is float32 and rounded to it. dy's rows may have any stride.
    """
    count, (rows, width), inner, dtype = len(want_weights), dy.shape, x.shape[1], dy.dtype
    columns = width // count
    _expect_sizes("linear_weight_gradient", columns, inner, dtype)
    dweights, dbiases = (
        [torch.empty(shape, dtype=torch.float32, device="cpu") if wanted else None for wanted in wants]
        for wants, shape in ((want_weights, (columns, inner)), (want_biases, (columns,)))
    )
    of_weights, of_biases = (
        array("Q", [address_or_none(name, t, torch.float32, size) or 0 for t in tensors])
        for name, tensors, size in (("dweight", dweights, columns * inner), ("dbias", dbiases, columns))
    )
    failed = cpp.call(
        "linear_weight_gradient", dtype, strided_address("dy", dy, dtype, (rows, count * columns)), dy.stride(0),
        address("x", x, x.dtype, rows * inner), cpp.is_wide("x", x.dtype, dtype), of_weights.buffer_info()[0],
        of_biases.buffer_info()[0], None, count, rows, columns, inner,
    )  # fmt: skip
    _ran(failed, rows)
    return dweights, dbiases


# ---- with gradients --------------------------------------------------------------------------------------


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The products of x [..., K] with each weight [N, K], concatenated to [..., sum of N]. The caller has checked
    `takes`."""
    return _Linears.apply(dtype_of(x), x, *weights, *biases)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x weight^T + bias) [..., N]. The caller has checked `takes`."""
    return _LinearAct.apply(dtype_of(x), activation, x, weight, bias)


def feed_forward(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> Tensor:
    """activation(x up^T + up_bias) down^T + down_bias; up [F, C], down [C, F]. The caller has checked
    `takes_feed_forward`."""
    return _FeedForward.apply(dtype_of(x), activation, x, up, up_bias, down, down_bias)


def _rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as [M, K], contiguous and in the product's dtype."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _input_gradient(dy: Tensor, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The gradient of x, in its shape and dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    input_gradient(dy, weights, dx.view(-1, x.shape[-1]))
    return dx


def _weight_gradients(
    dy: Tensor, x: Tensor, dtype: torch.dtype, want_weights: Sequence[bool], want_biases: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the weights, then of the biases, in their `dtype`. x: [..., K], not yet cast."""
    if any(want_weights):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        dweights, dbiases = weight_gradients(dy, rows, want_weights, want_biases)
    else:
        dweights, parts = [None] * len(want_weights), dy.chunk(len(want_biases), dim=1)
        dbiases = [
            part.sum(0, dtype=torch.float32) if wanted else None
            for part, wanted in zip(parts, want_biases, strict=True)
        ]
    return _cast(dtype, *dweights, *dbiases)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(x, *parameters)
        count, rows = len(parameters) // 2, _rows_of(x, dtype)
        width = len(parameters[0])
        y = torch.empty(*x.shape[:-1], count * width, dtype=dtype, device="cpu")
        parts = y.view(-1, count * width).split(width, dim=1)
        for weight, bias, part in zip(parameters[:count], parameters[count:], parts, strict=True):
            forward(rows, weight, bias, part)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, *parameters), dtype, (_, *wanted) = ctx.saved_tensors, ctx.dtype, ctx.needs_input_grad
        count = len(parameters) // 2
        weights = parameters[:count]

        if by_torch(dy):

            def function(x: Tensor, *parameters: Tensor | None) -> Tensor:
                x, *cast = _cast(dtype, x, *parameters)
                pairs = zip(cast[:count], cast[count:], strict=True)
                return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], -1)

            return None, *plain_gradients(function, (x, *parameters), wanted, dy)

        dy = _rows_of(dy, dtype)
        dx = _input_gradient(dy, weights, x) if wanted[0] else None
        return None, dx, *_weight_gradients(dy, x, weights[0].dtype, wanted[1 : 1 + count], wanted[1 + count :])


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, dtype: torch.dtype, activation: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        rows = _rows_of(x, dtype)
        y = torch.empty(*x.shape[:-1], len(weight), dtype=dtype, device="cpu")
        h = torch.empty(len(rows), len(weight), dtype=dtype, device="cpu")
        forward(rows, weight, bias, y.view(h.shape), h, activation)
        ctx.dtype, ctx.activation = dtype, activation
        ctx.save_for_backward(x, weight, bias, h)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias, h), dtype = ctx.saved_tensors, ctx.dtype
        wanted = ctx.needs_input_grad[2:]
        if by_torch(dy):

            def function(*tensors: Tensor | None) -> Tensor:
                return activate(F.linear(*_cast(dtype, *tensors)), ctx.activation)

            return None, None, *plain_gradients(function, (x, weight, bias), wanted, dy)

        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (dh,) = torch.autograd.grad(activate(leaf, ctx.activation), leaf, _rows_of(dy, dtype))
        dx = _input_gradient(dh, [weight], x) if wanted[0] else None
        return None, None, dx, *_weight_gradients(dh, x, weight.dtype, wanted[1:2], wanted[2:])


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, dtype: torch.dtype, activation: str, x: Tensor, up: Tensor, up_bias: Tensor | None,
        down: Tensor, down_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = _rows_of(x, dtype)
        a, h = (torch.empty(len(rows), len(up), dtype=dtype, device="cpu") for _ in range(2))
        forward(rows, up, up_bias, a, h, activation)
        y = torch.empty(*x.shape[:-1], len(down), dtype=dtype, device="cpu")
        forward(a, down, down_bias, y.view(-1, len(down)))
        ctx.dtype, ctx.activation = dtype, activation
        ctx.save_for_backward(x, up, up_bias, down, down_bias, h)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, up, up_bias, down, down_bias, h), dtype = ctx.saved_tensors, ctx.dtype
        wanted = ctx.needs_input_grad[2:]
        want_x, want_up, want_up_bias, want_down, want_down_bias = wanted
        if by_torch(dy):

            def function(*tensors: Tensor | None) -> Tensor:
                x, up, up_bias, down, down_bias = _cast(dtype, *tensors)
                return F.linear(activate(F.linear(x, up, up_bias), ctx.activation), down, down_bias)

            return None, None, *plain_gradients(function, (x, up, up_bias, down, down_bias), wanted, dy)

        dy = _rows_of(dy, dtype)
        dh, a = torch.empty_like(h), torch.empty_like(h) if want_down else None
        input_gradient(dy, [down], dh, h, a, ctx.activation)
        ddown, ddown_bias = _weight_gradients(dy, a, down.dtype, [want_down], [want_down_bias])
        dup, dup_bias = _weight_gradients(dh, x, up.dtype, [want_up], [want_up_bias])
        dx = _input_gradient(dh, [up], x) if want_x else None
        return None, None, dx, dup, dup_bias, ddown, ddown_bias
