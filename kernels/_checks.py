"""Checks of the values in tensors. CPU tensors are always checked; GPU tensors, where a check waits for the device,
only with FASTBERT_CHECK=1.

A wrong length or index would become an address outside of a tensor. Lengths are checked once per batch:
`functional.attention_schedule` checks them, and layers that share its schedule do not check again.
"""

import operator
import os

import torch
from torch import Tensor

# The activations of a feed-forward layer.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "geglu")

# Reading a GPU tensor waits for all work on that device, so checks of GPU tensors are off by default.
CHECKS_DEVICES = os.environ.get("FASTBERT_CHECK") == "1"


def can_look(t: Tensor) -> bool:
    """Whether the values of t may be read now. False for tensors that are traced, transformed or without memory, and,
    unless FASTBERT_CHECK=1, for tensors on a device."""
    if type(t) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level():
        return False
    if t.is_cpu:
        return True
    if not CHECKS_DEVICES or t.is_meta:
        return False
    # Only CUDA records streams; a torch without CUDA would raise here.
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def expect_sequences(op: str, name: str, cu_seqlens: Tensor, rows: int, longest: int | None = None) -> list[int] | None:
    """Raises ValueError unless cu_seqlens [B + 1] rises from 0 to `rows`, and by no more than `longest` at a step.

    Returns: the numbers; None if they may not be read (`can_look`).
    """
    if not can_look(cu_seqlens):
        return None
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"{op}: {name} must be [B + 1] int32, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    starts = cu_seqlens.tolist()
    if starts[:1] != [0] or starts[-1] != rows or any(map(operator.gt, starts, starts[1:])):
        raise ValueError(f"{op}: {name} must start at 0, never fall and end at {rows}, got {_some(starts)}")
    if longest is not None and max(map(operator.sub, starts[1:], starts), default=0) > longest:
        raise ValueError(f"{op}: max_seqlen is {longest}, but {name} has a longer sequence: {_some(starts)}")
    return starts


def expect_lengths(op: str, name: str, lengths: Tensor, longest: int) -> None:
    """Raises ValueError unless each of `lengths` lies in 0 to `longest`."""
    if can_look(lengths) and (found := lengths.tolist()) and not 0 <= min(found) <= max(found) <= longest:
        raise ValueError(f"{op}: {name} must lie in 0 to {longest}, got {_some(found)}")


def expect_indices(op: str, name: str, indices: Tensor, size: int, ignored: int | None = None) -> None:
    """Raises ValueError unless all indices lie in 0 to `size` - 1, or are `ignored`."""
    if not can_look(indices) or indices.numel() == 0:
        return
    low, high = map(int, indices.aminmax())
    if ignored is not None and (low == ignored or high == ignored):
        return expect_indices(op, name, indices[indices != ignored], size)
    if low < 0 or high >= size:
        raise ValueError(f"{op}: {name} must lie in 0 to {size - 1}, got {low} to {high}")


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"[{shown}, ... {len(numbers)} in all]" if len(numbers) > 8 else f"[{shown}]"
