"""The layers of transformers' encoders, packed: given what they share they run on [T, C], post-norm or pre-norm."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..inference.weights import JoinedLinears, release
from . import facts as table
from .forward import Forward
from .parts import LayerParts, at, has, parts_of
from .pieces import (
    Shared,
    add_norm,
    feed_forward,
    linear_without_bias,
    norm_and_sum,
    norm_only,
    probability,
    project,
)


class LayerForward(Forward):
    """One layer: given what the layers share it runs on [T, C], given anything else it is the original."""

    def __init__(self, layer: nn.Module, facts: table.Layer):
        super().__init__(layer)
        self.facts = facts
        self.joined = JoinedLinears()

    def over(self, replica: nn.Module) -> LayerForward:
        forward = super().over(replica)
        forward.joined = JoinedLinears()  # of the replica's weights
        return forward

    def remove(self) -> None:
        super().remove()
        paths = (f"{path}.weight" for path in self.facts.linears)
        weights = (at(self.module, path) for path in paths if has(self.module, path))
        release(weight for weight in weights if isinstance(weight, Tensor))

    def __call__(self, *args, **kwargs):
        if not (len(args) == 3 and isinstance(args[1], Shared)):
            return self.original(*args, **kwargs)
        layer, (x, shared, index) = self.module, args
        parts = parts_of(layer, self.facts) if shared.parts is None else shared.parts[layer]
        run = partial(self.pre_norm if self.facts.pre_norm else self.post_norm, parts=parts, shared=shared, index=index)
        # most versions of transformers checkpoint in the layer's __call__, around this; the newest in its forward
        outside = type(layer).__call__ is not nn.Module.__call__
        if getattr(layer, "gradient_checkpointing", False) and layer.training and not outside:
            return layer._gradient_checkpointing_func(run, x)
        return run(x)

    # ---- dropout ----

    def probs(self) -> float:
        """What is dropped of the attention probabilities. Where transformers' attention is a function of an interface,
        the mode of the attention module turns it on, and not that of the dropout module, which only holds a number."""
        layer, facts = self.module, self.facts
        dropout = at(layer, facts.probs_dropout)
        if facts.probs_switch is None:
            return probability(dropout)
        p = dropout.p if isinstance(dropout, nn.Dropout) else dropout if isinstance(dropout, (int, float)) else 0.0
        return p if at(layer, facts.probs_switch).training else 0.0

    def probability(self, path: str | None) -> float:
        return 0.0 if path is None else probability(at(self.module, path))

    def drops(self) -> bool:
        facts = self.facts
        paths = (facts.out_dropout, facts.inner_dropout, facts.down_dropout)
        return self.probs() > 0.0 or any(self.probability(path) > 0.0 for path in paths)

    # ---- the pass ----

    def attention(
        self, x: Tensor, parts: LayerParts, shared: Shared, index: int, kind: Hashable = None
    ) -> tuple[Tensor, Tensor | None]:
        """(attention of x [T, C] through its output layer, that layer's bias where it is still to be added)."""
        q, k, v = project(x, parts.qkv, self.joined, parts.head_dim, shared)
        o = shared.attend(q, k, v, self.probs(), index + 1, kind)
        return linear_without_bias(parts.out, o, self.module.training, shared)

    def feed_forward(self, x: Tensor, parts: LayerParts, shared: Shared, fold: bool) -> tuple[Tensor, Tensor | None]:
        facts = self.facts
        return feed_forward(
            x, parts.up, parts.activation, parts.name, parts.down, shared,
            gated=facts.gated, inner_dropout=self.probability(facts.inner_dropout), fold=fold,
        )  # fmt: skip

    def post_norm(self, x: Tensor, parts: LayerParts, shared: Shared, index: int) -> Tensor:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""
        whole = self.as_one_operator(x, parts, shared, index)
        if whole is not None:
            return whole
        first, facts = 2 * index + 1, self.facts
        y, bias = self.attention(x, parts, shared, index)
        x = add_norm(y, bias, x, parts.out_norm, self.probability(facts.out_dropout), shared, stream=first)
        y, bias = self.feed_forward(x, parts, shared, fold=self.module.training)
        return add_norm(y, bias, x, parts.down_norm, self.probability(facts.down_dropout), shared, stream=first + 1)

    def as_one_operator(self, x: Tensor, parts: LayerParts, shared: Shared, index: int) -> Tensor | None:
        """`post_norm` by `F.encoder_layer`; None where that does not stand for this layer."""
        facts, first = self.facts, 2 * index + 1
        if torch.compiler.is_compiling() or F.choose_impl(shared.impl, x.device) != "triton":
            return None
        tensors = parts.tensors()
        if tensors is None or parts.name is None or facts.gated or not shared.is_plain():
            return None
        if self.probability(facts.inner_dropout) > 0.0:
            return None
        drops = self.probs(), self.probability(facts.out_dropout), self.probability(facts.down_dropout)
        options = F.LayerOptions(
            parts.qkv[0].module.out_features // parts.head_dim, parts.name,
            parts.out_norm.module.eps, parts.down_norm.module.eps, *drops, index + 1, first, first + 1,
            fold=self.module.training,
        )  # fmt: skip
        linears = [part.module for part in parts.qkv]
        return F.encoder_layer(
            x, F.LayerWeights(*tensors), shared.batch.cu_seqlens, shared.batch.max_seqlen, options,
            schedule=shared.schedule, seed=shared.seed, row_ids=shared.row_ids, impl=shared.impl,
            qkv=partial(self.joined.joined, linears),
        )  # fmt: skip

    def pre_norm(self, x: Tensor, parts: LayerParts, shared: Shared, index: int) -> Tensor:
        """x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""
        first, facts = 2 * index + 1, self.facts
        kind = at(self.module, facts.attention_type)
        y, bias = self.attention(norm_only(x, parts.out_norm, shared), parts, shared, index, kind)
        p = self.probability(facts.out_dropout)
        h, x = norm_and_sum(y, bias, x, parts.down_norm, p, shared, stream=first)
        return x + self.feed_forward(h, parts, shared, fold=False)[0]
