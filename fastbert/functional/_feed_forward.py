"""Linear layers, linear layers with an activation, and the feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import native, reference
from ..kernels._checks import ACTIVATIONS
from ..kernels._invariance import is_batch_invariant
from ._choice import Impl, choose_impl, resolve
from ._expect import expect_one_device

__all__ = ["activate", "feed_forward", "linear", "linear_act", "products_beside"]


def expect_linear(op: str, name: str, x_width: int, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != x_width:
        raise ValueError(
            f"{op}: {name} must be [out, {x_width}] for input of width {x_width}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{op}: the bias of {name} must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def _expect_activation(op: str, activation: str, rows: int) -> int:
    """The width after the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation != "geglu":
        return rows
    if rows % 2 != 0:
        raise ValueError(f"{op}: geglu needs an even number of weight rows, got {rows}")
    return rows // 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl | None = None) -> Tensor:
    """x weight^T + bias: x [..., C], weight [N, C], bias [N] -> [..., N].

    By default this is the vendor library's product on a GPU, and "native" on a CPU, which has its own products where
    they are faster. Within `batch_invariant()` it is our own GEMM, or on a CPU the vendor's in blocks of one size.
    impl="triton" is our own GEMM.
    """
    expect_linear("linear", "weight", x.shape[-1], weight, bias)
    # with a weight on the meta device, torch would multiply CPU tensors by uninitialised memory
    expect_one_device("linear", x=x, weight=weight, bias=bias)
    chosen = "native" if impl is None and not is_batch_invariant() else choose_impl(impl, x.device)
    if chosen == "triton":
        from ..kernels._gemm import linear as by_our_gemm

        return by_our_gemm(x, weight, bias)
    if chosen == "native" and x.device.type == "cpu":
        return native.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def products_beside(impl: Impl | None) -> Impl | None:
    """The `impl` of `linear` in a model whose other operators use `impl`: None, the default, instead of "triton"."""
    return None if impl == "triton" else impl


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation alone, in plain torch: x [..., F] -> [..., F], or [..., F / 2] for geglu.

    For layers whose linear layer is called, so that `linear_act` and `feed_forward` do not apply.
    """
    _expect_activation("activate", activation, x.shape[-1])
    return reference.activate(x, activation)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, impl: Impl | None = None
) -> Tensor:
    """act(x weight^T + bias) in one GEMM with an epilogue: x [..., C], weight [F, C], bias [F] -> [..., F].

    activation: gelu (exact), gelu_tanh, relu, silu, or geglu: weight [2F, C], gelu(first F) * second F.
    """
    expect_linear("linear_act", "weight", x.shape[-1], weight, bias)
    expect_one_device("linear_act", x=x, weight=weight, bias=bias)
    _expect_activation("linear_act", activation, weight.shape[0])
    return resolve("linear_act", impl, x)(x, weight, bias, activation)


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    recompute: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """act(x up^T + up_bias) down^T + down_bias: x [..., C] -> [..., C].

    Args:
        up_weight: [F, C] (geglu: [2F, C]); up_bias: its rows, or None.
        down_weight: [C, F]; down_bias: [C] or None (then fold it into the `x_bias` of `add_layer_norm`).
        activation: as in `linear_act`.
        recompute: training only: recompute the pre-activation in the backward pass instead of saving it.
            Saves T x F elements of memory for one more GEMM of the first layer's size.
    """
    expect_linear("feed_forward", "up_weight", x.shape[-1], up_weight, up_bias)
    inner = _expect_activation("feed_forward", activation, up_weight.shape[0])
    expect_linear("feed_forward", "down_weight", inner, down_weight, down_bias)
    expect_one_device(
        "feed_forward", x=x, up_weight=up_weight, up_bias=up_bias, down_weight=down_weight, down_bias=down_bias
    )
    return resolve("feed_forward", impl, x)(
        x, up_weight, up_bias, down_weight, down_bias, activation, recompute=recompute
    )
