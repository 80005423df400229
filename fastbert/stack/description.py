"""The description of a layer: its modules, and how each one is used. All code that runs layers reads it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from ..inference.snapshot import Snapshot
from ..inference.weights import CONTAINERS, HOOKS, JoinedLinears, is_untouched


class NormKind(NamedTuple):
    """A kind of norm other than torch's LayerNorm.

    Attributes:
        classes: the names that transformers' class may have.
        rms: whether it is an RMSNorm, which subtracts no mean and has no bias.
        eps: name of the attribute with the number that is added to the variance or the mean square.
        offset: the number that is added to the weight.
    """

    classes: tuple[str, ...]
    rms: bool = True
    eps: str = "eps"
    offset: float = 0.0


class Part(NamedTuple):
    """A module, and how it is used.

    Attributes:
        module: the module; if `plain`, any object with its weight and bias.
        plain: an operator reads its parameters; otherwise the module is called.
        whole: it is called on [B, S, C] with its padding, since it may look at more than one token.
        norm: the kind of a norm other than torch's LayerNorm.
    """

    module: Any
    plain: bool
    whole: bool = False
    norm: NormKind | None = None


class Distances(NamedTuple):
    """The projections of the table of distances between tokens to keys (for the content-to-position term) and to
    queries (for position-to-content). None: the layer lacks that term."""

    key: Part | None
    query: Part | None


class Joined(NamedTuple):
    """The joint weight [3A, C] and bias [3A] of query, key and value in modules that hold them as tensors."""

    weight: Tensor
    bias: Tensor | None


def part_of(module: nn.Module, kind: type[nn.Module]) -> Part:
    """A module of our own models: plain if it is exactly a `kind` without hooks."""
    return Part(module, is_untouched(module, kind))


class Layer(NamedTuple):
    """A layer: attention and a feed-forward network, each in a block with a residual and a LayerNorm.

        post-norm:  x = norm(attention(x) + x);  x = norm(feed_forward(x) + x)
        pre-norm:   x = attention(norm(x)) + x;  x = feed_forward(norm(x)) + x
        both sides: x = norm(attention(norm(x))) / divisor + x, and so the feed-forward block

    Attributes:
        qkv: the projections to query, key and value: three parts, or one that makes them together.
        out, out_norm: the linear layer after attention, and the LayerNorm of that block.
        up, activation, down, down_norm: the same for the feed-forward block.
        activation_name: the operators' name for the activation; None if they do not have it.
        head_dim: the width of a head.
        joined: joins the weights of `qkv`, and keeps the joint weight if that is allowed.
        pre_norm: whether the LayerNorms come first in their blocks rather than last.
        gated: whether `up` makes two halves, act(first) * second.
        kind: with rotary positions, the key of the layer's rotation and window in the pass.
        gate: in a gated block with two linear layers, the one of the activation: act(gate(x)) * up(x).
        distances: attention depends on distances between tokens, by a table in the pass.
        has_heads: False if all heads were pruned. Attention then gives the bias of `out`.
        q_norm, k_norm: norms of q and k before they are rotated.
        norms_heads: whether these normalise each head by itself, or all heads of a token together.
        scale: the factor of the scores; None for 1 / sqrt(head_dim).
        after_out, after_down: in pre-norm layers, norms of a block's result before it is added to x.
        divisor: in pre-norm layers, a number by which a block's result is divided.
        bias: returns the layer's own bias of the scores, [1, H, S, S] for S tokens.
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
        """The tensors of `functional.LayerWeights`; None if a part is not plain, or has no parameters now."""
        parts = (*self.qkv, self.out, self.out_norm, self.up, self.down, self.down_norm)
        for part in parts:
            if not part.plain:
                return None
        try:  # reading an attribute of an nn.Module takes ten times as long as its dictionary
            if len(self.qkv) == 3:
                return [part.module._parameters[name] for part in parts for name in ("weight", "bias")]
            rest = [part.module._parameters[name] for part in parts[1:] for name in ("weight", "bias")]
        except KeyError:
            return None
        joined = self.qkv[0].module
        biases = (None,) * 3 if joined.bias is None else joined.bias.chunk(3)
        return [t for pair in zip(joined.weight.chunk(3), biases, strict=True) for t in pair] + rest


class Drops(NamedTuple):
    """Current probabilities of a layer's dropouts: on attention's probabilities, before the first residual, after the
    activation, before the second residual, and on the table of distances."""

    probs: float = 0.0
    out: float = 0.0
    inner: float = 0.0
    down: float = 0.0
    table: float = 0.0


class Kept:
    """A cached value that was made from a module and all modules below it. It is made again if one of them has other
    children, hooks, class, `config` or `forward`, which is all that a description of a layer depends on."""

    def __init__(self):
        self._last: _Made | None = None

    def of(self, root: nn.Module, make: Callable[[], Any], *given: Hashable) -> Any:
        """The cached value, or make(). given: other values that the result depends on."""
        last = self._last  # another thread may replace it meanwhile
        if last is None or not last.is_same(root, given):
            last = self._last = _Made(root, make, given)
        return last.value

    def __getstate__(self) -> dict:
        """Pickles and deep copies leave out the value."""
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
        places += [(module.__dict__, "_modules") for module in modules]  # another dictionary may replace it
        self.snapshot = Snapshot(modules, places, tables=tables)
        self.value = make()

    def is_same(self, root: nn.Module, given: tuple[Hashable, ...]) -> bool:
        return root is self.root and given == self.given and self.snapshot.is_same()
