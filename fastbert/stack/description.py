"""What a layer is made of: one description, which every walk through a layer reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from ..inference.snapshot import Snapshot
from ..inference.weights import CONTAINERS, HOOKS, JoinedLinears, is_untouched


class NormKind(NamedTuple):
    """How a norm that is not torch's LayerNorm computes, and under which names its class keeps its numbers.

    Attributes:
        classes: the names that transformers' class for it may have.
        rms: it divides by the root of the mean square alone: no mean is taken off, and there is no bias.
        eps: the attribute with the number that is added to the variance, or to the mean square.
        offset: what is added to the weight.
    """

    classes: tuple[str, ...]
    rms: bool = True
    eps: str = "eps"
    offset: float = 0.0


class Part(NamedTuple):
    """A module, and how it is used.

    Attributes:
        module: or whatever has its weight and bias, where it is plain.
        plain: it is taken apart.
        whole: it is called on [B, S, C] with nothing left out, since it may look at more than a token.
        norm: of a norm that is not torch's LayerNorm.
    """

    module: Any
    plain: bool
    whole: bool = False
    norm: NormKind | None = None


class Distances(NamedTuple):
    """What projects the table of distances between tokens of a layer that looks at them: to keys, which queries meet,
    and to queries, which keys meet. None: the layer has no such term."""

    key: Part | None
    query: Part | None


class Joined(NamedTuple):
    """The weight [3A, C] and bias [3A] of query, key and value in one, where they are no module."""

    weight: Tensor
    bias: Tensor | None


def part_of(module: nn.Module, kind: type[nn.Module]) -> Part:
    """A module of our own models: plain where it is still exactly `kind`, and nobody listens to it."""
    return Part(module, is_untouched(module, kind))


class Layer(NamedTuple):
    """A layer: attention and a feed-forward network, each in a block with a residual and a LayerNorm.

        post-norm:  x = norm(attention(x) + x);  x = norm(feed_forward(x) + x)
        pre-norm:   x = attention(norm(x)) + x;  x = feed_forward(norm(x)) + x
        both sides: x = norm(attention(norm(x))) / divisor + x, and so the feed-forward block

    Attributes:
        qkv: the projections to query, key and value: three parts, or one that makes them together.
        out, out_norm: the linear layer after attention, and the LayerNorm of that block.
        up, activation, down, down_norm: the same of the feed-forward block.
        activation_name: the operators' name for the activation; None: they do not have it.
        head_dim: the width of a head.
        joined: keeps the weights of `qkv` as one, where it may.
        pre_norm: the LayerNorms come first in their blocks rather than last.
        gated: `up` makes two halves, act(first) * second.
        kind: with rotary positions, which rotation and window of the pass the layer has.
        gate: of a gated block whose halves are two linear layers, the first: act(gate(x)) * up(x).
        distances: attention looks at distances between tokens, by the table of the pass.
        has_heads: False where all heads were pruned: attention is then the bias of `out` alone.
        q_norm, k_norm: norms of q and k before they are rotated.
        norms_heads: these look at each head by itself, rather than at all heads of a token together.
        scale: the factor of the scores; None: the inverse root of the head's width.
        after_out, after_down: pre-norm alone: norms of what each block adds to x.
        divisor: pre-norm alone: what each block adds to x is divided by it.
        bias: gives the layer's own bias of the scores, [1, H, S, S] for S tokens.
    """

    qkv: tuple[Part, ...]
    out: Part
    out_norm: Part
    up: Part
    activation: Part
    down: Part
    down_norm: Part
    activation_name: str | None
    head_dim: int
    joined: JoinedLinears
    pre_norm: bool = False
    gated: bool = False
    kind: Hashable = None
    gate: Part | None = None
    distances: Distances | None = None
    has_heads: bool = True
    q_norm: Part | None = None
    k_norm: Part | None = None
    norms_heads: bool = True
    scale: float | None = None
    after_out: Part | None = None
    after_down: Part | None = None
    divisor: float = 1.0
    bias: Callable[[int], Tensor] | None = None

    def tensors(self) -> list[Tensor] | None:
        """What `functional.LayerWeights` holds, or None where a part is not taken apart, or has no parameters now."""
        parts = (*self.qkv, self.out, self.out_norm, self.up, self.down, self.down_norm)
        for part in parts:
            if not part.plain:
                return None
        try:  # by way of the dictionaries: nn.Module's own attributes take ten times as long
            if len(self.qkv) == 3:
                return [part.module._parameters[name] for part in parts for name in ("weight", "bias")]
            rest = [part.module._parameters[name] for part in parts[1:] for name in ("weight", "bias")]
        except KeyError:
            return None
        joined = self.qkv[0].module
        biases = (None,) * 3 if joined.bias is None else joined.bias.chunk(3)
        return [t for pair in zip(joined.weight.chunk(3), biases, strict=True) for t in pair] + rest


class Drops(NamedTuple):
    """Probabilities of a layer's dropouts at the moment: of attention's probabilities, before the first residual, after
    the activation, before the second residual, and of the table of distances."""

    probs: float = 0.0
    out: float = 0.0
    inner: float = 0.0
    down: float = 0.0
    table: float = 0.0


class Kept:
    """What was made of a module and of all below it, until one of them has other children or hooks, another class or
    `config`, or a `forward` of its own: all that a description of it depends on."""

    def __init__(self):
        self._last: _Made | None = None

    def of(self, root: nn.Module, make: Callable[[], Any], *given: Hashable) -> Any:
        """make(), or what it gave before. given: what else the result depends on."""
        last = self._last  # another thread may put its own there meanwhile
        if last is None or not last.is_same(root, given):
            last = self._last = _Made(root, make, given)
        return last.value

    def __getstate__(self) -> dict:
        """A pickled or deep-copied one makes its own."""
        return {"_last": None}


class _Made:
    def __init__(self, root: nn.Module, make: Callable[[], Any], given: tuple[Hashable, ...]):
        self.root, self.given = root, given
        modules = list(root.modules())
        called = [module.__dict__ for module in modules if type(module) not in CONTAINERS]
        tables = [module._modules for module in modules if module._modules]
        tables += [own[name] for own in called for name in HOOKS]
        tables += [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]
        places = [(own, name) for own in called for name in ("forward", "config", *HOOKS)]
        places += [(module.__dict__, "_modules") for module in modules]  # another dictionary may be put in place
        self.snapshot = Snapshot(modules, places, tables=tables)
        self.value = make()

    def is_same(self, root: nn.Module, given: tuple[Hashable, ...]) -> bool:
        return root is self.root and given == self.given and self.snapshot.is_same()
