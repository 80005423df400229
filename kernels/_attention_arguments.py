"""The arguments of an attention call in groups. Both the operators and the kernels take the same arguments ungrouped.

The fields are in the order of the operators' schemas (`attention.py`). NAMES are the kernels' names for them, in the
kernels' order (`_attention_common.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _device

UNBOUNDED = 1 << 29  # no window; sums with a position stay within int32


class Sequences(NamedTuple):
    """Queries, keys and values, and where their sequences are."""

    q: Tensor
    k: Tensor
    v: Tensor
    spans_q: Tensor
    spans_k: Tensor

    NAMES = "q_ptr k_ptr v_ptr spans_q_ptr spans_k_ptr"


class Tiles(NamedTuple):
    """A list of tiles. parts: the number of long entries, of medium entries, and a bound for the longest sequence."""

    entries: Tensor
    parts: tuple[int, int, int]

    NAMES = "schedule_ptr"


class Saved(NamedTuple):
    """The results of the forward pass and their gradients, contiguous."""

    o: Tensor
    lse: Tensor
    do: Tensor
    dlse: Tensor | None

    NAMES = "o_ptr lse_ptr do_ptr dlse_ptr"


class Options(NamedTuple):
    """All other arguments of a call."""

    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    seed: Tensor | None
    sequence_ids: Tensor | None
    window_left: int
    window_right: int
    dropout_p: float
    stream: int
    scale: float

    NAMES = "bias_ptr mask_ptr slopes_ptr cos_ptr sin_ptr seed_ptr sequence_ids_ptr"
    NAMES_OF_DROPOUT = "seed_ptr sequence_ids_ptr"
    WINDOW = "window_left window_right"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of NAMES."""
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        return self.bias, mask, self.alibi_slopes, self.cos, self.sin, self.seed, self.sequence_ids

    def traits(self, q: Tensor, k: Tensor) -> Traits:
        return Traits(
            _device.arch(q.device.index), q.dtype, q.shape[-2], k.shape[-2], q.shape[-1], q.dim() == 4,
            None if self.bias is None else _broadcast_strides(self.bias),
            None if self.mask is None else _broadcast_strides(self.mask),
            self.alibi_slopes is not None,
            None if self.cos is None else (self.cos.stride(0), self.sin.stride(0)),
            min(self.window_left, self.window_right) < UNBOUNDED,
            self.dropout_p, self.sequence_ids is not None, self.scale,
        )  # fmt: skip


class Traits(NamedTuple):
    """All that launch plans depend on, except the strides of q, k and v. The same for all batches of a model."""

    arch: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    padded: bool
    bias: tuple[int, ...] | None  # strides
    mask: tuple[int, ...] | None
    alibi: bool
    rotary: tuple[int, int] | None
    window: bool
    dropout_p: float
    ids: bool
    scale: float

    def of_config(self) -> frozenset[str]:
        """The `traits` argument of `attention_config`."""
        modifiers = sum(map(bool, (self.bias, self.mask, self.alibi, self.window, self.rotary)))
        has = {
            "modified": modifiers > 0, "many": modifiers > 2, "dropout": self.dropout_p > 0.0,
            "grouped": self.heads > self.kv_heads,
        }  # fmt: skip
        return frozenset(trait for trait, present in has.items() if present)

    def is_plain(self) -> bool:
        """Whether the kernels of `_attention_short.py` support the call: packed, scores unmodified, one key head for
        each query head."""
        return not self.padded and self.of_config() <= {"dropout"}


def _broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of bias or mask [B, H, Sq, Sk]: a dimension of one is shared by all sequences or heads.

    A single column gets the stride of several, since Triton compiles another kernel for a stride of one.
    """
    steps = [0 if n == 1 else step for n, step in zip(t.shape, t.stride(), strict=True)]
    return *steps[:3], 1 if t.shape[3] == 1 else steps[3]


def row_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Strides of sequence, token and head of each. The sequence stride of packed tensors is 0."""
    of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    if len(of_q) == 4:
        return *of_q[:3], *of_k[:3], *of_v[:3]
    return 0, *of_q[:2], 0, *of_k[:2], 0, *of_v[:2]


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The tensors, or copies where the last stride is not 1: kernels use the strides of tokens and heads only."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
