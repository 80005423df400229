"""The parts of a layer: which of them fused operators compute from their parameters, and which are called.

A part is *fused*, so that an operator reads its parameters, only if it is exactly torch's own module and has no hooks.
Any other module is called: on packed tokens [T, C] if it is known to treat each token by itself (a LoRA adapter, a
parametrisation, a pruned weight), else on [B, S, C] with its padding, as the original does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..inference.weights import JoinedLinears
from ..stack.description import Distances, Layer, NormKind, Part
from ..stack.steps import probability
from . import distances
from . import facts as table
from .facts import at
from .kinds import kind_of, why_not_plain_norm
from .plain import by_token, fused_activation, why_not_plain

Verdict = tuple[bool, bool]  # `Part.plain` and `Part.whole` of a module


def verdict(module: Any, kind: type[nn.Module], norm: NormKind | None = None) -> Verdict:
    """How a module in the place of torch's `kind` is used. norm: the kind of a norm other than torch's LayerNorm."""
    plain = (why_not_plain(module, kind) if norm is None else why_not_plain_norm(module, norm)) is None
    return plain, not (plain or by_token(module))


def part(root: nn.Module, path: str, found: Verdict, norm: NormKind | None = None) -> Part:
    return Part(at(root, path), *found, norm)


def probability_at(root: nn.Module, path: str) -> float:
    """The probability of the dropout at a path, a module or a number, if it is on; else 0."""
    dropout = at(root, path)
    if isinstance(dropout, (int, float)):
        return float(dropout) if at(root, path.rpartition(".")[0]).training else 0.0
    return probability(dropout)


@torch.compiler.assume_constant_result
def verdicts(layer: nn.Module, facts: table.Layer) -> tuple[tuple[Verdict | None, ...], ...]:
    """The verdicts of the linear layers, of the norms, and of the projections of the table of distances."""
    linears = tuple(verdict(at(layer, path), nn.Linear) for path in facts.linears)
    norms = tuple(verdict(at(layer, path), nn.LayerNorm, facts.norm) for path in facts.norms)
    projections = distances.projections_of(layer, facts)
    return linears, norms, tuple(None if path is None else verdict(at(layer, path), nn.Linear) for path in projections)


@torch.compiler.assume_constant_result
def activation_verdict(layer: nn.Module, facts: table.Layer) -> tuple[bool, str | None]:
    """(`Part.whole` of the activation, the operators' name for it)."""
    activation = activation_of(layer, facts)
    name = facts.activation_name if facts.activation is None else fused_activation(activation)
    return not by_token(activation), name


def activation_of(layer: nn.Module, facts: table.Layer) -> Any:
    """The activation: a module or a function. If the layer's code calls a function of its own, torch's equal one."""
    if facts.activation is None:
        return getattr(nn.functional, facts.activation_name)
    return at(layer, facts.activation)


def layer_of(layer: nn.Module, facts: table.Layer, joined: JoinedLinears) -> Layer:
    """The description of a layer. joined: keeps its query, key and value projections as one weight."""
    linears, norms, projections = verdicts(layer, facts)
    whole, name = activation_verdict(layer, facts)
    parts = [part(layer, path, found) for path, found in zip(facts.linears, linears, strict=True)]
    gate = parts.pop() if facts.gate is not None else None
    *qkv, out, up, down = parts
    of_table = zip(distances.projections_of(layer, facts), projections, strict=True)
    of_table = [None if path is None else part(layer, path, found) for path, found in of_table]
    norm = {path: part(layer, path, found, facts.norm) for path, found in zip(facts.norms, norms, strict=True)}
    return Layer(
        tuple(qkv), out, norm[facts.out_norm], up, Part(activation_of(layer, facts), False, whole), down,
        norm[facts.down_norm], name, at(layer, facts.head_dim), joined, facts.pre_norm, facts.gated,
        kind_of(layer, facts), gate, Distances(*of_table) if of_table else None,
        q_norm=norm.get(facts.q_norm), k_norm=norm.get(facts.k_norm), norms_heads=facts.norms_heads,
        scale=at(layer, facts.scale) if facts.any_scale else None,
        after_out=norm.get(facts.after_out), after_down=norm.get(facts.after_down),
        divisor=1.0 if facts.divisor is None else at(layer, facts.divisor),
        bias=None if facts.bias is None else partial(bias_of, at(layer, facts.bias)),
    )  # fmt: skip


def bias_of(holder: nn.Module, width: int) -> Tensor:
    """[1, H, S, S], the bias that an attention module of T5's kind adds to its scores."""
    return holder.compute_bias(width, width)


def not_plain(layer: nn.Module, facts: table.Layer) -> dict[str, str]:
    """The parts of a layer that are called rather than fused: path -> reason."""
    reasons = {path: why_not_plain(at(layer, path), nn.Linear) for path in facts.linears}
    reasons |= {
        path: why_not_plain_norm(at(layer, path), facts.norm)
        for path in facts.norms
        if not isinstance(at(layer, path), nn.Identity)
    }
    activation = None if facts.activation is None else at(layer, facts.activation)
    name = facts.activation_name if activation is None else fused_activation(activation)
    if name is None or (facts.gated and (name != "gelu" or facts.gate is not None)):
        reasons[facts.activation] = f"{type(activation).__name__} is not among the fused activations"
    return {path: reason for path, reason in reasons.items() if reason is not None}


def plain_table(module: nn.Module) -> bool:
    """Whether a module is torch's nn.Embedding, without hooks, and with dense gradients."""
    return why_not_plain(module, nn.Embedding) is None and not module.sparse


def layers_of(encoder: nn.Module, facts: table.Family) -> Iterator[tuple[int, nn.Module]]:
    """(number of the run, layer) in the order of execution. A shared layer occurs once for each of its runs."""
    layers = at(encoder, facts.layers)
    if not facts.groups:
        yield from enumerate(layers)
        return
    config, index = encoder.config, 0
    for i in range(config.num_hidden_layers):
        for layer in layers[int(i / (config.num_hidden_layers / config.num_hidden_groups))].albert_layers:
            yield index, layer
            index += 1
