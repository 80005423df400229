"""Steps of a layer, from the modules somebody else made: each taken apart, or called, as `parts` found it."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import functional as F
from ..inference import weights
from ..inference.weights import JoinedLinears
from ..models.bert import Pass
from .parts import LayerParts, Part
from .plain import usable


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
        parts: of each layer, or None: each looks at its own.
        twice: second derivatives may follow, which SDPA has in its plain form alone.
        keys: [Tk], the rows that are keys, where some rows are queries only.
        cu_seqlens_k: [B + 1] int32, the same for them as `batch.cu_seqlens` for the queries.
        spans: (first query, queries, first key, keys) of each sequence, where no kernel goes by cu_seqlens.
    """

    padded: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    rotary: dict[Hashable, tuple[Tensor, Tensor]] | None = None
    windows: dict[Hashable, tuple[int, int] | None] | None = None
    infers: bool = False
    parts: dict[nn.Module, LayerParts] | None = None
    twice: bool = False
    keys: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    spans: list[tuple[int, int, int, int]] | None = None

    def is_plain(self) -> bool:
        """Is it a packed batch whose tokens see all of their sequence, and nothing but its tokens?"""
        return not self.padded and self.mask is self.bias is self.rotary is self.keys is None

    def over_keys(self, real: Tensor, keys: list[int], impl: F.Impl) -> Shared:
        """With the rows of the tokens that are `real` [B, S] as keys, `keys` of each sequence, and all others as
        queries only. The batch must know its lengths."""
        batch = self.batch
        flat = real.flatten()
        places = (flat if batch.indices is None else flat[batch.indices]).nonzero_static(size=sum(keys)).squeeze(1)
        cu_seqlens_k = torch.zeros_like(batch.cu_seqlens)
        torch.cumsum(real.sum(1), 0, out=cu_seqlens_k[1:])
        if impl == "triton":
            schedule = F.attention_schedule(batch.cu_seqlens, batch.total_tokens, impl, spans_k=cu_seqlens_k)
            return replace(self, keys=places, cu_seqlens_k=cu_seqlens_k, schedule=schedule)
        first_query, first_key = (itertools.accumulate(counts[:-1], initial=0) for counts in (batch.lengths, keys))
        spans = list(zip(first_query, batch.lengths, first_key, keys, strict=True))
        return replace(self, keys=places, cu_seqlens_k=cu_seqlens_k, spans=spans)

    def scheduled(self) -> Shared:
        """With what attention derives from the lengths."""
        return replace(self, schedule=self.batch.schedule(self.impl))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, stream: int, kind: Hashable = None) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]."""
        options = self.dropout(dropout_p, stream)
        options.pop("row_ids", None)
        if self.bias is not None:
            options["bias"] = self.bias.to(q.dtype)
        if self.mask is not None:
            options["mask"] = self.mask
        if kind is not None:
            options |= {"rotary": self.rotary[kind], "window": self.windows[kind]}
        with sdpa_kernel(SDPBackend.MATH) if self.twice else nullcontext():
            return self._attend(q, k, v, options).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        batch, impl = self.batch, self.impl
        if self.padded:
            q, k, v = (t.unflatten(0, batch.padded_shape) for t in (q, k, v))
            return F.attention_padded(q, k, v, impl=impl, **options).flatten(0, 1)
        schedule = self.schedule
        if self.keys is None:
            return F.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, schedule=schedule, impl=impl, **options)
        k, v, longest = k[self.keys], v[self.keys], batch.max_seqlen
        if self.spans is None:
            over = {"cu_seqlens_k": self.cu_seqlens_k, "max_seqlen_k": longest, "schedule": schedule}
            return F.attention(q, k, v, batch.cu_seqlens, longest, impl=impl, **over, **options)
        outputs = []
        for number, (row, rows, key, keys) in enumerate(self.spans):
            if "seed" in options:
                options["sequence_ids"] = torch.tensor([number], dtype=torch.int64, device=q.device)
            of_one = (
                t[start : start + count][None] for t, start, count in ((q, row, rows), (k, key, keys), (v, key, keys))
            )
            outputs.append(F.attention_padded(*of_one, impl=impl, **options)[0])
        return torch.cat(outputs)


class OnlyOnce(torch.autograd.Function):
    """x, whose gradient has none itself: the Triton kernels' backward passes are not differentiable, and torch would go
    on without them, with no more than a warning."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastbert: second derivatives (create_graph=True) do not go through its Triton kernels; "
                'fastbert.restore(model), or fastbert.accelerate(model, impl="native"), for these calls'
            )
        return dy


def only_once(x: Tensor, impl: F.Impl | None) -> Tensor:
    """The output of a pass, behind `OnlyOnce` where kernels made it."""
    if torch.is_grad_enabled() and x.requires_grad and F.choose_impl(impl, x.device) == "triton":
        return OnlyOnce.apply(x)
    return x


def call(part: Part, x: Tensor, shared: Shared) -> Tensor:
    """part(x) of x [T, C]. What may look at more than a token gets [B, S, C], which is then all of the batch."""
    if not part.whole:
        return part.module(x)
    return part.module(x.unflatten(0, shared.batch.padded_shape)).flatten(0, 1)


def readied(shared: Shared, *linears: nn.Linear) -> None:
    """Lays out the weights of plain layers for the products of inference, at their first use."""
    if shared.infers:
        weights.ready(linears, promised=False)


def apart(*parts: Part) -> bool:
    """Can all of them be taken apart now? A sharded module holds other weights outside of its call than within."""
    return all(part.plain and usable(part.module.weight) and usable(part.module.bias) for part in parts)


def multiply(part: Part, x: Tensor, shared: Shared) -> Tensor:
    """linear(x)."""
    if not apart(part):
        return call(part, x, shared)
    linear = part.module
    readied(shared, linear)
    return F.linear(x, linear.weight, linear.bias, impl=F.products_beside(shared.impl))


def project(
    x: Tensor, parts: tuple[Part, ...], joined: JoinedLinears, head_dim: int, shared: Shared
) -> Iterable[Tensor]:
    """x [T, C] -> q, k, v [T, H, D], as views of one product where the linear layers allow it."""
    if len(parts) == 1:
        return multiply(parts[0], x, shared).unflatten(-1, (3, -1, head_dim)).unbind(1)
    linears = [part.module for part in parts]
    if apart(*parts) and len({linear.bias is None for linear in linears}) == 1:
        readied(shared, *linears)
        return joined(x, linears, shared.impl).unflatten(-1, (3, -1, head_dim)).unbind(1)
    return [call(part, x, shared).unflatten(-1, (-1, head_dim)) for part in parts]


def linear_without_bias(part: Part, x: Tensor, fold: bool, shared: Shared) -> tuple[Tensor, Tensor | None]:
    """(y, the bias still to be added): with `fold` a plain layer leaves its bias to the LayerNorm that follows."""
    if fold and apart(part) and part.module.bias is not None:
        return F.linear(x, part.module.weight, impl=F.products_beside(shared.impl)), part.module.bias
    return multiply(part, x, shared), None


def add_norm(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, part: Part, dropout_p: float, shared: Shared, stream: int
) -> Tensor:
    """norm(dropout(y + y_bias) + residual)."""
    if apart(part):
        norm = part.module
        return F.add_layer_norm(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    return call(part, nn.functional.dropout(y if y_bias is None else y + y_bias, dropout_p) + residual, shared)


def norm_only(x: Tensor, part: Part, shared: Shared) -> Tensor:
    if apart(part):
        norm = part.module
        return F.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps, impl=shared.impl)
    return call(part, x, shared)


def norm_and_sum(
    y: Tensor, y_bias: Tensor | None, residual: Tensor, part: Part, dropout_p: float, shared: Shared, stream: int
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) with z = dropout(y + y_bias) + residual."""
    if apart(part):
        norm = part.module
        return F.add_layer_norm_sum(
            y, residual, norm.weight, norm.bias, norm.eps, x_bias=y_bias,
            impl=shared.impl, **shared.dropout(dropout_p, stream),
        )  # fmt: skip
    z = nn.functional.dropout(y if y_bias is None else y + y_bias, dropout_p) + residual
    return call(part, z, shared), z


def feed_forward(
    x: Tensor, up: Part, activation: Part, name: str | None, down: Part, shared: Shared,
    *, gated: bool = False, inner_dropout: float = 0.0, fold: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(down(dropout(act(up(x)))), the bias still to be added). name: the operators' for the activation."""
    if gated:
        name = {"gelu": "geglu"}.get(name)
    if name is not None and inner_dropout == 0.0 and apart(up, down):
        first, second = up.module, down.module
        readied(shared, first, second)
        folded = second.bias if fold else None
        y = F.feed_forward(
            x, first.weight, first.bias, second.weight, None if folded is not None else second.bias, name,
            impl=shared.impl,
        )  # fmt: skip
        return y, folded
    h = multiply(up, x, shared)
    if gated:
        first, second = h.chunk(2, dim=-1)
        h = call(activation, first, shared) * second
    else:
        h = call(activation, h, shared)
    return multiply(down, nn.functional.dropout(h, inner_dropout), shared), None


def frozen_row(table: nn.Embedding) -> Tensor:
    """The weight of a table, without a gradient for the row `padding_idx`."""
    if table.padding_idx is None or not (torch.is_grad_enabled() and table.weight.requires_grad):
        return table.weight
    rows = torch.arange(table.weight.shape[0], dtype=torch.int64, device=table.weight.device)
    return torch.where((rows == table.padding_idx)[:, None], table.weight.detach(), table.weight)
