"""Checks of arguments that several operators have."""

from __future__ import annotations

import torch
from torch import Tensor


def expect_one_device(op: str, **tensors: Tensor | None) -> None:
    device = next(iter(tensors.values())).device
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: all tensors must be on one device, but {name} is on {t.device}, not {device}")


def expect_cu_seqlens(op: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens must be [B + 1] int32, got {found}")


def expect_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and (not isinstance(seed, Tensor) or seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(
            f"{op}: dropout needs seed, an int64 tensor with one element, got "
            + (f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed))
        )


def expect_integers(op: str, name: str, t: Tensor | None, count: int) -> None:
    """`t` must hold one integer for each of `count` rows or sequences."""
    if t is not None and (t.numel() != count or t.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"{op}: {name} must be {count} int64 or int32, got {t.dtype} of shape {tuple(t.shape)}")
