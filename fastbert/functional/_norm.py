"""LayerNorm and RMSNorm after a dropout and a residual; dropout alone."""

from __future__ import annotations

from torch import Tensor

from ..kernels import native, reference
from ._choice import Impl, choose_impl, resolve
from ._expect import expect_dropout, expect_integers, expect_one_device

__all__ = ["add_layer_norm", "add_layer_norm_sum", "add_rms_norm", "dropout"]


def _expect_norm(op, x, residual, weight, bias, x_bias, dropout_p, seed, row_ids) -> None:
    width = x.shape[-1]
    if not x.is_floating_point():  # scaling by 1 / (1 - p) would turn integers into torch's default dtype
        raise ValueError(f"{op}: x must be floating-point, got {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, residual is {tuple(residual.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{op}: {name} must be [{width}] like x's last dimension, got {tuple(t.shape)}")
    expect_dropout(op, dropout_p, seed)
    if row_ids is not None:
        expect_integers(op, "row_ids", row_ids, x.numel() // max(width, 1))
    expect_one_device(op, x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias, row_ids=row_ids)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual), the block end of post-norm BERT. Ba et al., arXiv:1607.06450.

    Args:
        x, residual: [..., N], one shape; residual may be None.
        weight, bias, x_bias: [N] or None. x_bias is the bias of the linear layer that made x.
        eps: added to the variance.
        dropout_p, seed, stream, row_ids: element (row, column) is dropped by (seed, stream, row_ids[row], column);
            row_ids is int64 or int32, one a row, by default the row's number; see `PackedBatch.row_ids`.

    Returns: [..., N] in x's dtype; statistics are float32.
    """
    _expect_norm("add_layer_norm", x, residual, weight, bias, x_bias, dropout_p, seed, row_ids)
    return resolve("add_layer_norm", impl, x)(
        x, residual, weight, bias, eps,
        x_bias=x_bias, dropout_p=dropout_p, seed=seed, stream=stream, row_ids=row_ids,
    )  # fmt: skip


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` for pre-norm blocks: (y, z) with z = dropout(x + x_bias) + residual, the next residual."""
    _expect_norm("add_layer_norm_sum", x, residual, weight, bias, x_bias, dropout_p, seed, row_ids)
    return resolve("add_layer_norm_sum", impl, x)(
        x, residual, weight, bias, eps,
        x_bias=x_bias, dropout_p=dropout_p, seed=seed, stream=stream, row_ids=row_ids,
    )  # fmt: skip


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """z = dropout(x + x_bias) + residual; z / sqrt(mean(z^2) + eps) * weight. Zhang, Sennrich, arXiv:1910.07467.

    Arguments as in `add_layer_norm`.
    """
    _expect_norm("add_rms_norm", x, residual, weight, None, x_bias, dropout_p, seed, row_ids)
    return resolve("add_rms_norm", impl, x)(
        x, residual, weight, eps,
        x_bias=x_bias, dropout_p=dropout_p, seed=seed, stream=stream, row_ids=row_ids,
    )  # fmt: skip


def dropout(
    x: Tensor, dropout_p: float, seed: Tensor | None, *, stream: int = 0, row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:  # fmt: skip
    """x [M, N] with elements dropped as in `add_layer_norm`, the others scaled by 1 / (1 - dropout_p). On a CPU in C++
    where that is built, else in plain torch."""
    if x.dim() != 2:
        raise ValueError(f"dropout: x must be [M, N], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"dropout: x must be floating-point, got {x.dtype}")
    expect_dropout("dropout", dropout_p, seed)
    if row_ids is not None:
        expect_integers("dropout", "row_ids", row_ids, x.shape[0])
    if choose_impl(impl, x.device) == "native":
        return native.dropout(x, dropout_p, seed, stream, row_ids)
    return reference.dropout(x, dropout_p, seed, stream, row_ids)
