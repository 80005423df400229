"""Attention over packed and over padded sequences, and its schedule, which depends on their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import native
from ..kernels._checks import expect_lengths, expect_sequences
from . import _choice
from ._choice import Impl, choose_impl, resolve, triton_module
from ._expect import expect_cu_seqlens, expect_dropout, expect_integers, expect_one_device

__all__ = ["attention", "attention_entries", "attention_padded", "attention_schedule"]


def _expect_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim():
        raise ValueError(f"{op}: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions")
    if k.shape != v.shape:
        raise ValueError(f"{op}: k is {tuple(k.shape)}, v is {tuple(v.shape)}; they must agree")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q has head_dim {q.shape[-1]}, k has {k.shape[-1]}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads <= 0 or heads % kv_heads != 0:
        raise ValueError(f"{op}: q has {heads} heads, k has {kv_heads}; the first must be a multiple of the second")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    expect_one_device(op, q=q, k=k, v=v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    schedule: Any = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bidirectional attention of each packed sequence over itself, or over its own keys.

        s = scale * q k^T + bias - slope * |i - j|      -inf where the mask or the window forbids
        o = dropout(softmax(s)) v;   lse = logsumexp(s)

    Args:
        q: [Tq, H, D], any strides with the last dimension contiguous (a view of one fused qkv tensor is fine).
        k, v: [Tk, Hk, D]; H must be a multiple of Hk (grouped heads: query head h reads key head h * Hk // H).
        cu_seqlens: [B + 1] int32, starts at 0, ends at Tq; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the longest sequence's length; a bound for launches, not read from the device.
        cu_seqlens_k, max_seqlen_k: the same for k and v in cross-attention; by default those of q.
        bias: [1 | B, 1 | H, >= max_seqlen, >= max_seqlen_k], added to the scores; differentiable.
        mask: bool of bias's kind of shape, True where attention is allowed.
        alibi_slopes: [H] float32.
        window: (left, right): position i sees i - left to i + right, both included.
        rotary: (cos, sin), each [>= max_seqlen, D / 2], applied to q and k by position in the sequence.
        dropout_p, seed, stream: probabilities are dropped by (seed, stream, head, sequence id, row, column);
            seed is an int64 tensor with one element, stream tells call sites (layers) apart.
        sequence_ids: [B] int64 or int32 names of the sequences for dropout; by default 0 to B - 1.
        scale: softmax scale, by default D ** -0.5.
        return_lse: also return lse, [H, Tq] float32, natural logarithm (-inf where a row has no key).
        schedule: `attention_schedule(...)` of this batch and implementation, to share among layers.

    Returns: o [Tq, H, D] in q's dtype. A row that may attend to no key is zero, and so are its gradients.
    Raises: ValueError on shapes, dtypes or devices that do not fit. Lengths that do not fit raise it on a CPU, and on a
        GPU with FASTBERT_CHECK=1 in the environment.
    """
    if q.dim() != 3:
        raise ValueError(f"attention: q must be [T, H, D], got {tuple(q.shape)}; padded input is attention_padded")
    _expect_heads("attention", q, k, v)
    expect_dropout("attention", dropout_p, seed)
    expect_cu_seqlens("attention", cu_seqlens)
    if cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"attention: q has {q.shape[0]} tokens, k has {k.shape[0]}; cross-attention needs cu_seqlens_k"
            )
    else:
        if cu_seqlens_k.shape != cu_seqlens.shape or cu_seqlens_k.dtype != torch.int32:
            raise ValueError(
                f"attention: cu_seqlens_k must be int32 of shape {tuple(cu_seqlens.shape)}, "
                f"got {cu_seqlens_k.dtype} of shape {tuple(cu_seqlens_k.shape)}"
            )
        if max_seqlen_k is None:
            raise ValueError("attention: cu_seqlens_k needs max_seqlen_k")
        expect_sequences("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if schedule is None:  # otherwise `attention_schedule` has checked them
        expect_sequences("attention", "cu_seqlens", cu_seqlens, q.shape[0], max_seqlen)
    expect_integers("attention", "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)
    _expect_attention_options("attention", q, cu_seqlens.shape[0] - 1, bias, mask, alibi_slopes, window, rotary)
    return resolve("attention", impl, q)(
        q, k, v, cu_seqlens, max_seqlen,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, bias=bias, mask=mask, alibi_slopes=alibi_slopes,
        window=window, rotary=rotary, dropout_p=dropout_p, seed=seed, stream=stream, sequence_ids=sequence_ids,
        scale=scale, return_lse=return_lse, schedule=schedule,
    )  # fmt: skip


def _expect_attention_options(op, q, batch, bias, mask, alibi_slopes, window, rotary) -> None:
    heads, head_dim = q.shape[-2:]
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and (t.dim() != 4 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, heads)):
            raise ValueError(f"{op}: {name} must be [1 or {batch}, 1 or {heads}, Sq, Sk], got {tuple(t.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"{op}: bias must be floating-point, got {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise ValueError(f"{op}: alibi_slopes must be [{heads}], got {tuple(alibi_slopes.shape)}")
    if window is not None and (len(window) != 2 or min(window) < 0):
        raise ValueError(f"{op}: window must be (left, right) with both at least 0, got {window}")
    if rotary is not None:
        if head_dim % 2 != 0:
            raise ValueError(f"{op}: rotary needs an even head_dim, got {head_dim}")
        if len(rotary) != 2 or not all(t.dim() == 2 and t.shape[1] == head_dim // 2 for t in rotary):
            raise ValueError(
                f"{op}: rotary must be (cos, sin), each [S, {head_dim // 2}], got {[tuple(t.shape) for t in rotary]}"
            )
    cos, sin = rotary or (None, None)
    expect_one_device(op, q=q, bias=bias, mask=mask, alibi_slopes=alibi_slopes, cos=cos, sin=sin)


def attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    schedule: Any = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over padded views: q [B, Sq, H, D], k, v [B, Sk, Hk, D], right-padded, nothing copied.

    Args:
        seqlens: [B] int32, real rows of each sequence of q; by default all Sq.
        seqlens_k: [B] int32 for k and v; by default `seqlens` where Sk equals Sq, else all Sk.
        schedule: `attention_schedule(seqlens, Sq, padded=True)`, to share among layers.
        All others as in `attention`.

    Returns: o [B, Sq, H, D], zero past each length (and lse [B, H, Sq] float32, -inf there).
    Raises: ValueError on shapes, dtypes or devices that do not fit.
    """
    if q.dim() != 4:
        raise ValueError(f"attention_padded: q must be [B, S, H, D], got {tuple(q.shape)}")
    _expect_heads("attention_padded", q, k, v)
    expect_dropout("attention_padded", dropout_p, seed)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention_padded: q has {q.shape[0]} sequences, k has {k.shape[0]}")
    for name, t in (("seqlens", seqlens), ("seqlens_k", seqlens_k)):
        if t is not None and (t.shape != (q.shape[0],) or t.dtype != torch.int32):
            raise ValueError(f"attention_padded: {name} must be [{q.shape[0]}] int32, got {(t.dtype, tuple(t.shape))}")
        if t is not None:
            expect_lengths("attention_padded", name, t, (q if name == "seqlens" else k).shape[1])
    expect_integers("attention_padded", "sequence_ids", sequence_ids, q.shape[0])
    _expect_attention_options("attention_padded", q, q.shape[0], bias, mask, alibi_slopes, window, rotary)
    return resolve("attention_padded", impl, q)(
        q, k, v, seqlens, seqlens_k,
        bias=bias, mask=mask, alibi_slopes=alibi_slopes, window=window, rotary=rotary, dropout_p=dropout_p,
        seed=seed, stream=stream, sequence_ids=sequence_ids, scale=scale, return_lse=return_lse, schedule=schedule,
    )  # fmt: skip


def attention_schedule(
    cu_seqlens: Tensor,
    total_tokens: int,
    impl: Impl | None = None,
    *,
    spans_k: Tensor | None = None,
    padded: bool = False,
    lengths: Sequence[int] | None = None,
    entries: Tensor | None = None,
) -> Any:
    """The values that `attention` derives from a batch's lengths, made once for all layers of a forward pass.

    Opaque: pass it as `schedule=`, only with these lengths and this implementation.

    Args:
        cu_seqlens, total_tokens: of `attention`; padded: the seqlens [B] int32 and the width of `attention_padded`.
        spans_k: cu_seqlens_k or seqlens_k, in cross-attention.
        lengths: of the B packed sequences, if the host knows them and k has the same. Kernels that sequences of these
            lengths do not need are then not launched.
        entries: `attention_entries(lengths)` on the device of cu_seqlens; by default a kernel computes them.

    Raises: ValueError if lengths are not B numbers that add up to total_tokens. On a CPU, and on a GPU with
        FASTBERT_CHECK=1 in the environment, also if cu_seqlens does not rise from 0 to total_tokens.
    """
    impl = choose_impl(impl, cu_seqlens.device)
    if impl == "triton":
        if not padded:
            expect_sequences("attention", "cu_seqlens", cu_seqlens, total_tokens)
        return triton_module("attention").attention_schedule(
            cu_seqlens, total_tokens, spans_k, padded, lengths, entries
        )
    if impl == "reference" or padded or spans_k is not None:
        return None  # these need no schedule
    return native.attention_schedule(cu_seqlens, total_tokens, lengths)


def attention_entries(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The part of `attention_schedule` that has to be on `device`, made on the host: [n, 2] int32 on the CPU.

    None if no Triton kernels run on that device, since the other implementations do not use it.
    """
    return None if _choice.why_not_triton(device) else triton_module("attention").attention_entries(lengths)
