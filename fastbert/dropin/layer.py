"""The layers of transformers' encoders, packed: given what they share they run on [T, C], post-norm or pre-norm."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch.nn as nn
from torch import Tensor

from ..kernels import _prepack
from ..layers import JoinedLinears
from . import facts as table
from .forward import Forward
from .pieces import (
    Shared,
    add_norm,
    at,
    feed_forward,
    fused_activation,
    has,
    linear_without_bias,
    norm_and_sum,
    norm_only,
    probability,
    project,
    why_not_plain,
)


def not_plain(layer: nn.Module, facts: table.Layer) -> dict[str, str]:
    """The parts that are called rather than taken apart: path -> why."""
    reasons = {
        path: why_not_plain(at(layer, path), nn.Linear) for path in (*facts.qkv, facts.out, facts.up, facts.down)
    }
    reasons |= {
        path: why_not_plain(at(layer, path), nn.LayerNorm)
        for path in (facts.out_norm, facts.down_norm)
        if not isinstance(at(layer, path), nn.Identity)
    }
    activation = at(layer, facts.activation)
    name = fused_activation(activation)
    if name is None or (facts.gated and name != "gelu"):
        reasons[facts.activation] = f"{type(activation).__name__} is not among the fused activations"
    return {path: reason for path, reason in reasons.items() if reason is not None}


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
        facts = self.facts
        for path in (*facts.qkv, facts.out, facts.up, facts.down):
            if has(self.module, f"{path}.weight") and isinstance(weight := at(self.module, f"{path}.weight"), Tensor):
                _prepack.unmark(weight)

    def __call__(self, *args, **kwargs):
        if not (len(args) == 3 and isinstance(args[1], Shared)):
            return self.original(*args, **kwargs)
        layer, (x, shared, index) = self.module, args
        run = partial(self.pre_norm if self.facts.pre_norm else self.post_norm, shared=shared, index=index)
        # most versions of transformers checkpoint in the layer's __call__, around this; the newest in its forward
        outside = type(layer).__call__ is not nn.Module.__call__
        if getattr(layer, "gradient_checkpointing", False) and layer.training and not outside:
            return layer._gradient_checkpointing_func(run, x)
        return run(x)

    def attention(self, x: Tensor, shared: Shared, index: int, kind: Hashable = None) -> tuple[Tensor, Tensor | None]:
        """(attention of x [T, C] through its output layer, that layer's bias where it is still to be added)."""
        layer, facts = self.module, self.facts
        q, k, v = project(x, [at(layer, path) for path in facts.qkv], self.joined, at(layer, facts.head_dim), shared)
        dropout = at(layer, facts.probs_dropout)
        p = probability(dropout) if isinstance(dropout, nn.Module) else dropout * layer.training
        o = shared.attend(q, k, v, p, index + 1, kind)
        return linear_without_bias(at(layer, facts.out), o, layer.training, shared)

    def feed_forward(self, x: Tensor, shared: Shared, fold: bool) -> tuple[Tensor, Tensor | None]:
        layer, facts = self.module, self.facts
        return feed_forward(
            x, at(layer, facts.up), at(layer, facts.activation), at(layer, facts.down), shared,
            gated=facts.gated, inner_dropout=self.probability(facts.inner_dropout), fold=fold,
        )  # fmt: skip

    def probability(self, path: str | None) -> float:
        return 0.0 if path is None else probability(at(self.module, path))

    def post_norm(self, x: Tensor, shared: Shared, index: int) -> Tensor:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""
        layer, facts = self.module, self.facts
        y, bias = self.attention(x, shared, index)
        x = add_norm(
            y, bias, x, at(layer, facts.out_norm), self.probability(facts.out_dropout), shared, stream=2 * index + 1
        )
        y, bias = self.feed_forward(x, shared, fold=layer.training)
        return add_norm(
            y, bias, x, at(layer, facts.down_norm), self.probability(facts.down_dropout), shared, stream=2 * index + 2
        )

    def pre_norm(self, x: Tensor, shared: Shared, index: int) -> Tensor:
        """x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""
        layer, facts = self.module, self.facts
        kind = at(layer, facts.attention_type)
        y, bias = self.attention(norm_only(x, at(layer, facts.out_norm), shared), shared, index, kind)
        h, x = norm_and_sum(
            y, bias, x, at(layer, facts.down_norm), self.probability(facts.out_dropout), shared, stream=2 * index + 1
        )
        return x + self.feed_forward(h, shared, fold=False)[0]
