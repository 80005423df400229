"""The steps of a layer. For a plain part an operator reads the module's parameters; other modules are called."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..inference import weights
from ..inference.weights import JoinedLinears
from .description import Part
from .shared import Pass


def probability(dropout: nn.Module | float | None) -> float:
    """The probability of a dropout module if it is in training mode, else 0."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def usable(weight: Tensor | None) -> bool:
    """Whether this is None or an ordinary tensor: not quantised, sharded or sparse."""
    return weight is None or (type(weight) in (nn.Parameter, Tensor) and weight.layout is torch.strided)


def call(part: Part, x: Tensor, shared: Pass) -> Tensor:
    """part(x) for x [T, C]. A `whole` part gets [B, S, C]; the batch then holds its padding."""
    if not part.whole:
        return part.module(x)
    return part.module(x.unflatten(0, shared.batch.padded_shape)).flatten(0, 1)


def lay_out(shared: Pass, *linears: nn.Linear) -> None:
    """In inference, marks weights of plain layers to be laid out for the CPU's vendor library at their first use."""
    if shared.infers:
        weights.ready(linears, promised=False)


def can_fuse(*parts: Part) -> bool:
    """Whether an operator may read the parameters of all these parts now. Those of sharded modules are complete only
    while the module is called."""
    return all(
        part.plain and usable(part.module.weight) and usable(getattr(part.module, "bias", None)) for part in parts
    )


def multiply(part: Part, x: Tensor, shared: Pass) -> Tensor:
    """linear(x)."""
    if not can_fuse(part):
        return call(part, x, shared)
    linear = part.module
    lay_out(shared, linear)
    return F.linear(x, linear.weight, linear.bias, impl=F.products_beside(shared.impl))


def project(x: Tensor, parts: tuple[Part, ...], joined: JoinedLinears, head_dim: int, shared: Pass) -> Iterable[Tensor]:
    """x [T, C] -> q [T, H, D], k, v [T, Hk, D], as views of one product if all parts are plain."""
    if len(parts) == 1:
        return multiply(parts[0], x, shared).unflatten(-1, (3, -1, head_dim)).unbind(1)
    linears = [part.module for part in parts]
    if can_fuse(*parts) and len({linear.bias is None for linear in linears}) == 1:
        lay_out(shared, *linears)
        y, widths = joined(x, linears, shared.impl), [linear.weight.shape[0] for linear in linears]
        if widths[0] == widths[1]:
            return y.unflatten(-1, (3, -1, head_dim)).unbind(1)
        return [t.unflatten(-1, (-1, head_dim)) for t in y.split(widths, -1)]
    return [call(part, x, shared).unflatten(-1, (-1, head_dim)) for part in parts]


def linear_without_bias(part: Part, x: Tensor, fold: bool, shared: Pass) -> tuple[Tensor, Tensor | None]:
    """(y, a bias still to be added, or None). With `fold` a plain layer leaves its bias to the LayerNorm after it."""
    if fold and can_fuse(part) and part.module.bias is not None:
        return F.linear(x, part.module.weight, impl=F.products_beside(shared.impl)), part.module.bias
    return multiply(part, x, shared), None


def normalise(x: Tensor, part: Part, shared: Pass) -> Tensor:
    """norm(x) for a norm that is plain."""
    module, kind = part.module, part.norm
    if kind is None:
        return F.add_layer_norm(x, None, module.weight, module.bias, module.eps, impl=shared.impl)
    weight, eps = module.weight, getattr(module, kind.eps)
    if kind.offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + kind.offset
    if kind.rms:
        return F.add_rms_norm(x, None, weight, eps, impl=shared.impl)
    return F.add_layer_norm(x, None, weight, module.bias, eps, impl=shared.impl)


def add_norm(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, part: Part, dropout_p: float, shared: Pass, stream: int
) -> Tensor:
    """norm(dropout(y + y_bias) + residual) for torch's LayerNorm or a called norm."""
    if can_fuse(part):
        norm = part.module
        return F.add_layer_norm(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    return call(part, shared.drop(y if y_bias is None else y + y_bias, dropout_p, stream) + residual, shared)


def norm_only(x: Tensor, part: Part, shared: Pass) -> Tensor:
    return normalise(x, part, shared) if can_fuse(part) else call(part, x, shared)


def norm_and_sum(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, part: Part, dropout_p: float, shared: Pass, stream: int
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) with z = dropout(y + y_bias) + residual."""
    if can_fuse(part) and part.norm is None:
        norm = part.module
        return F.add_layer_norm_sum(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    z = shared.drop(y if y_bias is None else y + y_bias, dropout_p, stream) + residual
    return norm_only(z, part, shared), z


def norm_of_heads(x: Tensor, part: Part, each: bool, shared: Pass) -> Tensor:
    """norm(x) for x [T, H, D], over the width of `each` head, or over all heads of a token."""
    if each:
        return norm_only(x, part, shared)
    return norm_only(x.flatten(1), part, shared).unflatten(1, x.shape[1:])


def feed_forward(
    x: Tensor, up: Part, activation: Part, name: str | None, down: Part, shared: Pass,
    *, gated: bool = False, gate: Part | None = None, inner_dropout: float = 0.0, fold: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(down(dropout(act(up(x)))), a bias still to be added, or None). name: the operators' name for the activation. In
    a gated block act(up(x)) is act(first half of up(x)) * second half, or act(gate(x)) * up(x) with a `gate`."""
    if gate is not None:
        h = call(activation, multiply(gate, x, shared), shared) * multiply(up, x, shared)
        return multiply(down, nn.functional.dropout(h, inner_dropout), shared), None
    if gated:
        name = {"gelu": "geglu"}.get(name)
    if name is not None and inner_dropout == 0.0 and can_fuse(up, down):
        first, second = up.module, down.module
        lay_out(shared, first, second)
        folded = second.bias if fold else None
        y = F.feed_forward(
            x, first.weight, first.bias, second.weight, None if folded is not None else second.bias, name,
            impl=shared.impl,
        )  # fmt: skip
        return y, folded
    if name is not None and can_fuse(up):
        lay_out(shared, up.module)
        h = F.linear_act(x, up.module.weight, up.module.bias, name, impl=shared.impl)
    elif gated:
        first, second = multiply(up, x, shared).chunk(2, dim=-1)
        h = call(activation, first, shared) * second
    else:
        h = call(activation, multiply(up, x, shared), shared)
    return multiply(down, nn.functional.dropout(h, inner_dropout), shared), None
