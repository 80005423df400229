"""The values that all layers of one forward pass share: the packed batch, attention's tables, and the dropout seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import functional as F
from ..packing import PackedBatch
from .description import Layer

UNBOUNDED = 1 << 29  # the side of an attention window without a bound: more tokens than any text has


@dataclass(frozen=True)
class Pass:
    """The values that the layers of one forward pass share, and attention, which needs most of them.

    Attributes:
        batch: the packed batch.
        schedule: its `functional.attention_schedule`; None if the batch is `padded`.
        impl: the implementation of every operator.
        seed: [1] int64; None if no dropout is on.
        row_ids: [T], the rows' numbers for dropout.
        padded: whether the batch still holds its padding.
        mask: [1 | B, 1 | H, S, S] bool, True where attention is allowed.
        bias: [1 | B, 1 | H, S, S], added to every layer's scores.
        bias_width: S, if every layer has a bias of its own, [1, H, S, S].
        rotary: `Layer.kind` -> (cos, sin).
        windows: `Layer.kind` -> (left, right), or None for no window.
        infers: whether this pass is inference, so that weights on a CPU may be read from copies with another layout.
        layers: the description of each layer; None if each layer describes itself.
        twice: whether second derivatives may follow, which only the plain form of SDPA has.
        keys: [Tk], the rows that are keys, if other rows are queries only.
        cu_seqlens_k: [B + 1] int32, for the keys what `batch.cu_seqlens` is for the queries.
        spans: (first query, queries, first key, keys) of each sequence, for implementations without cu_seqlens_k.
        distances: the table of distances between tokens, in models whose attention depends on them.
        first_only: the layer that gets this pass computes only the row of each sequence's first token.
    """

    batch: PackedBatch
    schedule: Any
    impl: F.Impl | None
    seed: Tensor | None = None
    row_ids: Tensor | None = None
    padded: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    bias_width: int | None = None
    rotary: dict[Hashable, tuple[Tensor, Tensor]] | None = None
    windows: dict[Hashable, tuple[int, int] | None] | None = None
    infers: bool = False
    layers: dict[nn.Module, Layer] | None = None
    twice: bool = False
    keys: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    spans: list[tuple[int, int, int, int]] | None = None
    distances: Any = None
    first_only: bool = False

    def is_plain(self) -> bool:
        """Whether this is a packed batch in which tokens see all tokens of their sequence, without position tables."""
        looks_up = (self.mask, self.bias, self.bias_width, self.rotary, self.keys, self.distances)
        return not self.padded and all(found is None for found in looks_up)

    def real(self) -> Tensor | None:
        """[B, S] bool, True at tokens of a batch that holds its padding; None if it has none."""
        return None if self.mask is None else self.mask[:, 0, 0]

    def over_keys(self, real: Tensor, keys: list[int], impl: F.Impl) -> Pass:
        """The pass in which only the rows at `real` [B, S] are keys, and the others only queries. keys: their number in
        each sequence. The batch must know its lengths."""
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

    def scheduled(self) -> Pass:
        """The pass with attention's schedule."""
        return replace(self, schedule=self.batch.schedule(self.impl))

    def dropping(self) -> Pass:
        """The pass with dropout: with a seed drawn from torch's generator, and numbers of the rows."""
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=self.batch.cu_seqlens.device)
        return replace(self, seed=seed, row_ids=self.batch.row_ids())

    def dropout(self, p: float, stream: int) -> dict[str, Any]:
        """Dropout arguments of an operator on hidden states. stream: a different number at each call site."""
        if self.seed is None or p == 0.0:
            return {}
        return {"dropout_p": p, "seed": self.seed, "stream": stream, "row_ids": self.row_ids}

    def drop(self, x: Tensor, p: float, stream: int) -> Tensor:
        """dropout(x) for x [T, C] beside a module that is called, with the mask that an operator would draw."""
        options = self.dropout(p, stream)
        return F.dropout(x, **options, impl=self.impl) if options else x

    def dropout_of_probabilities(self, p: float, stream: int) -> dict[str, Any]:
        """Dropout arguments of attention."""
        if not (options := self.dropout(p, stream)):
            return {}
        del options["row_ids"]
        return options | {"sequence_ids": self.batch.sequence_ids}

    def of_first(self) -> Pass:
        """The pass for dropouts on the rows of each sequence's first token."""
        return self if self.row_ids is None else replace(self, row_ids=self.row_ids[self.batch.first_tokens])

    def attend_for_first(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, stream: int) -> Tensor:
        """q [B, H, D] of each sequence's first token, k and v [T, H, D] of all -> [B, H * D]. Needs a plain pass."""
        batch, impl = self.batch, self.impl
        options = self.dropout_of_probabilities(dropout_p, stream)
        one_each = torch.arange(batch.batch_size + 1, dtype=torch.int32, device=q.device)
        schedule = F.attention_schedule(one_each, batch.batch_size, impl, spans_k=batch.cu_seqlens)
        return F.attention(
            q, k, v, one_each, 1, cu_seqlens_k=batch.cu_seqlens, max_seqlen_k=batch.max_seqlen, schedule=schedule,
            impl=impl, **options,
        ).flatten(1)  # fmt: skip

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, stream: int, kind: Hashable = None,
        scale: float | None = None, own_bias: Callable[[int], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """q [T, H, D], k, v [T, Hk, D] -> [T, H * D]. own_bias: the layer's own bias, [1, H, S, S] for S tokens."""
        options = self.dropout_of_probabilities(dropout_p, stream)
        bias = self.bias if own_bias is None else own_bias(self.bias_width)
        if bias is not None:
            options["bias"] = bias.to(q.dtype)
        if scale is not None:
            options["scale"] = scale
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
                options["sequence_ids"] = self.batch.sequence_names[number : number + 1]
            of_one = (
                t[start : start + count][None] for t, start, count in ((q, row, rows), (k, key, keys), (v, key, keys))
            )
            outputs.append(F.attention_padded(*of_one, impl=impl, **options)[0])
        return torch.cat(outputs)

    def state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x [T, C] as a hidden state to return, padded if the input was; x computed from that state, so that a loss on
        the state has a gradient)."""
        batch = self.batch
        if batch.padded_shape is None:
            return x, x
        state = batch.pad(x)
        return state, batch.unpad(state) if torch.is_grad_enabled() and x.requires_grad else x
