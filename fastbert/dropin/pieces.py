"""Steps of a layer, from the modules somebody else made.

A module is taken apart, and its parameters given to a fused operator, only where it is exactly torch's own and nobody
listens to it. Whatever else stands in its place (a LoRA adapter, a quantised layer, a parametrisation) is called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..kernels import _prepack
from ..layers import JoinedLinears, activation_name
from ..models.bert import Pass


def at(module: Any, path: str) -> Any:
    """The attribute of an attribute: at(layer, "attention.self.query")."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def has(module: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def listeners(module: nn.Module) -> list:
    """Everything that wants to see or change what goes through this module."""
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None where `module` is torch's `kind` and no more, so that its parameters say all; else what it is."""
    if type(module) is not kind:
        cls = type(module)
        return f"a {cls.__name__}" + (f" of {cls.__module__}" if cls.__name__ == kind.__name__ else "")
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(p is not None and type(p) not in (nn.Parameter, Tensor) for p in module._parameters.values()):
        return f"its weight is a {type(module.weight).__name__}"
    return "it has hooks" if listeners(module) else None


def plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    return why_not_plain(module, kind) is None


def fused_activation(activation: Callable) -> str | None:
    """The operators' name of an activation that nobody listens to, or None."""
    return None if isinstance(activation, nn.Module) and listeners(activation) else activation_name(activation)


def probability(dropout: nn.Module | float | None) -> float:
    """What a dropout module drops at the moment."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


@dataclass(frozen=True)
class Shared(Pass):
    """What the layers of one forward pass share; and attention, which needs most of it.

    Attributes:
        padded: the batch still holds its padding.
        mask: [1 | B, 1 | H, S, S] bool, True where attention is allowed.
        bias: [1 | B, 1 | H, S, S] added to every layer's scores.
        rotary: kind of layer -> (cos, sin).
        windows: kind of layer -> (left, right), or None.
        infers: nothing of this pass is trained, so weights on a CPU may be multiplied from copies laid out for it.
    """

    padded: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    rotary: dict[Hashable, tuple[Tensor, Tensor]] | None = None
    windows: dict[Hashable, tuple[int, int] | None] | None = None
    infers: bool = False

    def scheduled(self) -> Shared:
        """With what attention derives from the lengths."""
        batch = self.batch
        return replace(self, schedule=F.attention_schedule(batch.cu_seqlens, batch.total_tokens, self.impl))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, stream: int, kind: Hashable = None) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]."""
        batch = self.batch
        options = self.dropout(dropout_p, stream)
        options.pop("row_ids", None)
        if self.bias is not None:
            options["bias"] = self.bias.to(q.dtype)
        if self.mask is not None:
            options["mask"] = self.mask
        if kind is not None:
            options |= {"rotary": self.rotary[kind], "window": self.windows[kind]}
        if not self.padded:
            o = F.attention(
                q, k, v, batch.cu_seqlens, batch.max_seqlen, schedule=self.schedule, impl=self.impl, **options
            )
        else:
            q, k, v = (t.unflatten(0, batch.padded_shape) for t in (q, k, v))
            o = F.attention_padded(q, k, v, impl=self.impl, **options).flatten(0, 1)
        return o.flatten(1)


def readied(shared: Shared, *linears: nn.Linear) -> None:
    """Lays out the weights of plain layers for the products of inference, at their first use."""
    if shared.infers:
        for linear in linears:
            _prepack.mark(linear.weight)


def multiply(linear: nn.Module, x: Tensor, shared: Shared) -> Tensor:
    """linear(x)."""
    if not plain(linear):
        return linear(x)
    readied(shared, linear)
    return F.linear(x, linear.weight, linear.bias, impl=shared.impl)


def project(
    x: Tensor, linears: list[nn.Module], joined: JoinedLinears, head_dim: int, shared: Shared
) -> Iterable[Tensor]:
    """x [T, C] -> q, k, v [T, H, D], as views of one product where the linear layers allow it."""
    if len(linears) == 1:
        return multiply(linears[0], x, shared).unflatten(-1, (3, -1, head_dim)).unbind(1)
    if all(plain(linear) for linear in linears) and len({linear.bias is None for linear in linears}) == 1:
        readied(shared, *linears)
        return joined(x, linears, shared.impl).unflatten(-1, (3, -1, head_dim)).unbind(1)
    return [linear(x).unflatten(-1, (-1, head_dim)) for linear in linears]


def linear_without_bias(linear: nn.Module, x: Tensor, fold: bool, shared: Shared) -> tuple[Tensor, Tensor | None]:
    """(y, the bias still to be added): with `fold` a plain layer leaves its bias to the LayerNorm that follows."""
    if fold and linear.bias is not None and plain(linear):
        return F.linear(x, linear.weight, impl=shared.impl), linear.bias
    return multiply(linear, x, shared), None


def add_norm(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, norm: nn.Module, dropout_p: float, shared: Shared, stream: int
) -> Tensor:
    """norm(dropout(y + y_bias) + residual)."""
    if plain(norm, nn.LayerNorm):
        return F.add_layer_norm(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    return norm(nn.functional.dropout(y if y_bias is None else y + y_bias, dropout_p) + residual)


def norm_only(x: Tensor, norm: nn.Module, shared: Shared) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    if plain(norm, nn.LayerNorm):
        return F.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps, impl=shared.impl)
    return norm(x)


def norm_and_sum(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, norm: nn.Module, dropout_p: float, shared: Shared, stream: int
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) with z = dropout(y + y_bias) + residual."""
    if plain(norm, nn.LayerNorm):
        return F.add_layer_norm_sum(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    z = nn.functional.dropout(y if y_bias is None else y + y_bias, dropout_p) + residual
    return norm(z), z


def feed_forward(
    x: Tensor, up: nn.Module, activation: Callable, down: nn.Module, shared: Shared,
    *, gated: bool = False, inner_dropout: float = 0.0, fold: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(down(dropout(act(up(x)))), the bias still to be added)."""
    name = fused_activation(activation)
    if gated:
        name = {"gelu": "geglu"}.get(name)
    if name is not None and inner_dropout == 0.0 and plain(up) and plain(down):
        readied(shared, up, down)
        folded = down.bias if fold else None
        y = F.feed_forward(
            x, up.weight, up.bias, down.weight, None if folded is not None else down.bias, name, impl=shared.impl
        )
        return y, folded
    h = up(x)
    if gated:
        first, second = h.chunk(2, dim=-1)
        h = activation(first) * second
    else:
        h = activation(h)
    return down(nn.functional.dropout(h, inner_dropout)), None


def look_up(table: nn.Module, ids: Tensor) -> Tensor:
    return table(ids)


def plain_table(table: nn.Module) -> bool:
    """An nn.Embedding whose gradient is an ordinary one."""
    return plain(table, nn.Embedding) and table.max_norm is None and not (table.sparse or table.scale_grad_by_freq)


def frozen_row(table: nn.Embedding) -> Tensor:
    """The weight of a table, without a gradient for the row `padding_idx`."""
    if table.padding_idx is None or not (torch.is_grad_enabled() and table.weight.requires_grad):
        return table.weight
    rows = torch.arange(table.weight.shape[0], device=table.weight.device)
    return torch.where((rows == table.padding_idx)[:, None], table.weight.detach(), table.weight)
