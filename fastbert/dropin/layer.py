"""The `forward` of a layer of transformers' encoders, which runs on packed tokens [T, C]."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from ..inference.weights import JoinedLinears, release
from ..stack.description import Drops, Layer
from ..stack.layer import run, run_for_first
from ..stack.shared import Pass
from ..stack.steps import probability
from . import facts as table
from .facts import at, has
from .forward import Forward
from .parts import layer_of, probability_at


class LayerForward(Forward):
    """A layer. Called as layer(x, shared, number) with a `Pass` it takes x [T, C] and returns [T, C], or with
    `Pass.first_only` the rows of the first tokens [B, C]. Called otherwise it runs the original's code."""

    def __init__(self, layer: nn.Module, facts: table.Layer):
        super().__init__(layer)
        self.facts = facts
        self.joined = JoinedLinears()

    def for_replica(self, replica: nn.Module) -> LayerForward:
        forward = super().for_replica(replica)
        forward.joined = JoinedLinears()  # the replica has weights of its own
        return forward

    def release(self) -> None:
        paths = (f"{path}.weight" for path in self.facts.linears)
        weights = (at(self.module, path) for path in paths if has(self.module, path))
        release(weight for weight in weights if isinstance(weight, Tensor))

    def call(self, *args, **kwargs):
        return self.original(*args, **kwargs)

    def call_packed(self, x: Tensor, shared: Pass, index: int) -> Tensor:
        layer = self.module
        description = self.described() if shared.layers is None else shared.layers[layer]

        def through(x: Tensor) -> Tensor:
            walk = run_for_first if shared.first_only else run
            return walk(x, description, self.drops(), shared, index, layer.training)

        # Most versions of transformers checkpoint in the layer's __call__, which calls this; the newest in its forward.
        outside = type(layer).__call__ is not nn.Module.__call__
        if getattr(layer, "gradient_checkpointing", False) and layer.training and not outside:
            return layer._gradient_checkpointing_func(through, x)
        return through(x)

    def described(self) -> Layer:
        return layer_of(self.module, self.facts, self.joined)

    def drops(self) -> Drops:
        """The dropouts that are on. If transformers' attention is a function of its interface, the training mode of the
        attention module decides about the probabilities; its dropout module only holds the number."""
        layer, facts = self.module, self.facts
        dropout = at(layer, facts.probs_dropout)
        if facts.probs_switch is None:
            probs = probability(dropout)
        else:
            p = dropout.p if isinstance(dropout, nn.Dropout) else dropout if isinstance(dropout, (int, float)) else 0.0
            probs = p if at(layer, facts.probs_switch).training else 0.0
        paths = (facts.out_dropout, facts.inner_dropout, facts.down_dropout)
        paths += (None if facts.distances is None else facts.distances.dropout,)
        return Drops(probs, *(0.0 if path is None else probability_at(layer, path) for path in paths))
