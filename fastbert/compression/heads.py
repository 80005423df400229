"""Attention heads by name, `0:1,3;2:5`, and the importance of heads and feed-forward columns.

A head's importance is how much the loss changes with its output o (Michel et al., arXiv:1905.10650). With a factor of 1
on o for each example it is

    importance = mean over examples of |d loss / d factor| = mean |sum over its tokens of o * d loss / d o|

divided by the root of the sum of squares over its layer, so that layers can be compared. The importance of a
feed-forward column is the same for its element of act(up(x)).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..training.features import Window
from ..training.predicting import pack

Heads = dict[int, list[int]]  # layer -> numbers of some of its heads


def parse_heads(text: str) -> Heads:
    """ "0:1,3;2:5" means heads 1 and 3 of layer 0, and head 5 of layer 2. Raises: ValueError."""
    heads: Heads = {}
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
        if not match:
            raise ValueError(f"expected heads as LAYER:HEAD,...;LAYER:HEAD,... such as 0:1,3;2:5, got {text!r}")
        of_layer = heads.setdefault(int(match[1]), [])
        of_layer.extend(int(head) for head in match[2].split(","))
    return {layer: sorted(set(of_layer)) for layer, of_layer in heads.items()}


def shown_heads(heads: Mapping[int, Sequence[int]]) -> str:
    """The text that `parse_heads` reads as these heads."""
    return ";".join(f"{layer}:{','.join(map(str, numbers))}" for layer, numbers in sorted(heads.items()))


def remaining_heads(config: BertConfig) -> Heads:
    """layer -> the numbers of its heads that are not pruned, in the order of its weights' rows."""
    gone = config.pruned_heads or {}
    return {
        layer: [head for head in range(config.num_attention_heads) if head not in gone.get(layer, ())]
        for layer in range(config.num_hidden_layers)
    }


def expect_heads(heads: Heads, config: BertConfig) -> None:
    """Raises ValueError, in one line, if there is no such head, or if no head of any layer would be left."""
    left = remaining_heads(config)
    for layer, numbers in heads.items():
        if layer not in left:
            raise ValueError(f"there is no layer {layer}: the model has layers 0 to {config.num_hidden_layers - 1}")
        for head in numbers:
            if head >= config.num_attention_heads:
                raise ValueError(
                    f"there is no head {head} in layer {layer}: it has heads 0 to {config.num_attention_heads - 1}"
                )
            if head not in left[layer]:
                raise ValueError(f"head {head} of layer {layer} was pruned before")
    if sum(map(len, heads.values())) == sum(map(len, left.values())):
        raise ValueError("all heads of all layers would be gone: attention needs one at least")


def least_heads(importance: Sequence[Tensor], share: float, config: BertConfig) -> Heads:
    """This share of all heads that are not pruned, those of least importance.

    importance: [heads] of each layer. Raises: ValueError if the share is no head, or all of them.
    """
    left = remaining_heads(config)
    named = [(layer, head) for layer, numbers in left.items() for head in numbers]
    count = round(share * len(named))
    if count == 0:
        raise ValueError(f"a share of {share} of {len(named)} heads rounds to none")
    order = torch.argsort(torch.cat(list(importance)), stable=True)[:count].tolist()
    heads: Heads = {}
    for layer, head in sorted(named[place] for place in order):
        heads.setdefault(layer, []).append(head)
    expect_heads(heads, config)
    return heads


# ---- importance ------------------------------------------------------------------------------------------


def importance_of(
    model: nn.Module, task: Any, windows: Sequence[Window], batches: Sequence[Sequence[int]], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """(importance [heads] of the heads of each layer, importance [F] of its columns), float32 on the CPU.

    Args:
        model: a model with the task's head, in evaluation mode.
        batches: numbers of the windows that are computed together.
    """
    layers = list(model.bert.encoder["layer"])
    sums: list[Tensor] = []
    for rows in batches:
        chosen = [windows[row] for row in rows]
        batch = pack(chosen, rows, device)
        with _factors(layers, batch) as factors:
            loss = model(batch, num_items_in_batch=1, **task.arguments(chosen, device)).loss
            gradients = torch.autograd.grad(loss, factors)
        found = [gradient.abs().sum(0).float().cpu() for gradient in gradients]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    count = sum(map(len, batches))
    heads, columns = iter(sums[: len(sums) - len(layers)]), sums[len(sums) - len(layers) :]
    of_heads = [next(heads) if layer.heads else torch.zeros(0, dtype=torch.float32, device="cpu") for layer in layers]
    return [_by_layer(t / count) for t in of_heads], [_by_layer(t / count) for t in columns]


def _by_layer(importance: Tensor) -> Tensor:
    return importance / importance.square().sum().sqrt().clamp_min(torch.finfo(importance.dtype).tiny)


@contextmanager
def _factors(layers: Sequence[nn.Module], batch: Any) -> Iterator[list[Tensor]]:
    """A block in which factors of 1 multiply the inputs of the linear layers after attention and after the activation:
    [B, heads] of each layer that has heads, then [B, F] of each layer."""
    device, count = batch.positions.device, batch.batch_size
    owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int64, device=device), batch.cu_seqlens.diff())
    attention = [(layer.attention["output"]["dense"], layer.heads) for layer in layers if layer.heads]
    inner = [(layer.output["dense"], layer.output["dense"].in_features) for layer in layers]
    factors = []
    with ExitStack() as hooks:
        for linear, groups in attention + inner:
            ones = torch.ones(count, groups, dtype=torch.float32, device=device, requires_grad=True)
            factors.append(ones)
            hooks.callback(linear.register_forward_pre_hook(_multiplied(ones, owners)).remove)
        yield factors


def _multiplied(factors: Tensor, owners: Tensor) -> Any:
    def multiply(linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        # if the model's head reads first tokens only, the last layer has one row for each sequence
        of_rows = factors[owners] if len(x) == len(owners) else factors
        grouped = x.unflatten(-1, (factors.shape[1], -1))
        return ((grouped * of_rows[..., None].to(x.dtype)).flatten(-2),)

    return multiply
