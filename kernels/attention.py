"""Bidirectional attention over packed or padded sequences, forward and backward, without a score matrix in memory.

Forward, per sequence and head (q [Sq, D], k, v [Sk, D]; grouped heads share k and v):

    s   = scale * rot(q) rot(k)^T + bias - slope * |i - j|      [Sq, Sk], -inf where mask or window forbids
    lse = logsumexp(s)                                          [Sq] fp32, natural log: all that is saved beside o
    p   = exp(s - lse)                                          recomputed in the backward pass
    o   = (p * keep / (1 - dropout_p)) v                        [Sq, D]

Backward, with p~ = p * keep / (1 - dropout_p) and the gradients do, dlse:

    delta = rowsum(o * do) - dlse                               [Sq] fp32
    dv    = p~^T do
    ds    = p * (keep / (1 - dropout_p) * (do v^T) - delta)     [Sq, Sk];  dbias sums it over what bias broadcasts
    dq    = scale * rot^-1(ds rot(k));   dk = scale * rot^-1(ds^T rot(q))

Online softmax: Milakov, Gimelshein, arXiv:1805.02867. Tiling and recomputation: Dao et al., arXiv:2205.14135.

Work is a list of real tiles, longest sequence first (`attention_schedule`). Each tile belongs to one sequence
and is reduced in a fixed order without atomics, so a sequence gets the same bits whatever shares its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _device
from ._attention_fwd import _attention_fwd_kernel
from ._library import register
from ._random import keep_threshold

LOG2_E = 1.4426950408889634
TILE = 128  # rows of one entry of a schedule; kernels with smaller blocks run several programs an entry
MAX_HEAD_DIM = 256
UNBOUNDED = 1 << 29  # no window; sums with a position stay within int32


# ---- configuration -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionConfig:
    """How one kernel is launched. block_m counts query rows, block_n keys; both divide TILE."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attention_config(head_dim: int, dtype: torch.dtype, arch: str, direction: str) -> AttentionConfig:
    """The launch of one kernel: direction is "fwd", "bwd_dq", "bwd_dkv" or "bwd_bias". Depends on nothing else."""
    if dtype == torch.float32:
        return AttentionConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)
    if head_dim <= 64:
        return AttentionConfig(block_m=128, block_n=64, num_warps=4, num_stages=3)
    if head_dim <= 128:
        return AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return AttentionConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)


def _arch(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = _device.capability(device.index)
    return f"sm_{major}{minor}"


# ---- schedule ------------------------------------------------------------------------------------------------


def _schedule(spans: Tensor, size: int, padded: bool) -> Tensor:
    """The list of tiles as [n, 2] int32 (sequence, tile), longest sequence first; (-1, 0) fills up. No sync.

    Packed: spans = cu_seqlens, size = total tokens. Padded: spans = lengths, size = padded width; there every tile
    is listed, padding too, since someone has to write its zeros.
    """
    lengths = spans if padded else spans.diff()
    order = lengths.argsort(descending=True, stable=True)
    index = torch.arange(_schedule_size(spans, size, padded), device=spans.device)
    if padded:
        tiles = max(1, triton.cdiv(size, TILE))
        return torch.stack((order[index // tiles], index % tiles), dim=1).to(torch.int32)
    if lengths.shape[0] == 0:
        return index.to(torch.int32).new_full((index.shape[0], 2), -1)
    tiles = (lengths[order] + (TILE - 1)) // TILE
    ends = tiles.cumsum(0)
    rank = torch.searchsorted(ends, index, right=True)  # whose tile this is; past the last one: a surplus entry
    surplus = rank == lengths.shape[0]
    rank = rank.clamp(max=lengths.shape[0] - 1)
    sequence, tile = order[rank], index - (ends - tiles)[rank]
    return torch.stack((sequence.masked_fill(surplus, -1), tile.masked_fill(surplus, 0)), dim=1).to(torch.int32)


def _schedule_size(spans: Tensor, size: int, padded: bool) -> int:
    """How many entries: known on the host, at least the number of tiles there can be."""
    if padded:
        return spans.shape[0] * triton.cdiv(size, TILE)
    return size // TILE + spans.shape[0] - 1


_schedule_op = register(
    "attention_schedule(Tensor spans, SymInt size, bool padded) -> Tensor",
    launch=_schedule,
    fake=lambda spans, size, padded: spans.new_empty((_schedule_size(spans, size, padded), 2), dtype=torch.int32),
)


def attention_schedule(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """The list of tiles of a packed batch, [n, 2] int32, to be shared by all layers as `schedule=`."""
    return _schedule_op(cu_seqlens, total_tokens, False)


# ---- launchers -----------------------------------------------------------------------------------------------


def _strides(t: Tensor | None, padded: bool) -> tuple[int, int, int]:
    """(sequence, row, head) strides; packed tensors have no sequence stride."""
    return tuple(t.stride()[:3]) if padded else (0, t.stride(0), t.stride(1))


def _broadcast_strides(t: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of [1 | B, 1 | H, Sq, Sk], zero where it broadcasts."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _launch_forward(
    q, k, v, spans_q, spans_k, schedule, bias, mask, alibi_slopes, cos, sin, seed, sequence_ids,
    window_left, window_right, dropout_p, stream, scale,
):  # fmt: skip
    padded = q.dim() == 4
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    heads, head_dim = q.shape[-2:]
    o, lse = _forward_outputs(q)
    config = attention_config(head_dim, q.dtype, _arch(q.device), "fwd")
    n_programs = schedule.shape[0] * (TILE // config.block_m) * heads
    if n_programs == 0 or q.numel() == 0:
        return o, lse
    # triton launches on the current device
    stride_q, stride_k, stride_v = (_strides(t, padded) for t in (q, k, v))
    stride_o = _strides(o, padded)
    bias_strides, mask_strides = _broadcast_strides(bias), _broadcast_strides(mask)
    _attention_fwd_kernel[(n_programs,)](
        q_ptr=q, k_ptr=k, v_ptr=v,
        spans_q_ptr=spans_q, spans_k_ptr=spans_k, schedule_ptr=schedule,
        bias_ptr=bias, mask_ptr=None if mask is None else mask.view(torch.uint8), slopes_ptr=alibi_slopes,
        cos_ptr=cos, sin_ptr=sin, seed_ptr=seed, sequence_ids_ptr=sequence_ids,
        o_ptr=o, lse_ptr=lse,
        stride_qb=stride_q[0], stride_qt=stride_q[1], stride_qh=stride_q[2],
        stride_kb=stride_k[0], stride_kt=stride_k[1], stride_kh=stride_k[2],
        stride_vb=stride_v[0], stride_vt=stride_v[1], stride_vh=stride_v[2],
        stride_ob=stride_o[0], stride_ot=stride_o[1],
        stride_lb=lse.stride(0) if padded else 0, stride_lh=lse.stride(-2),
        stride_bias_b=bias_strides[0], stride_bias_h=bias_strides[1],
        stride_bias_q=bias_strides[2], stride_bias_k=bias_strides[3],
        stride_mask_b=mask_strides[0], stride_mask_h=mask_strides[1],
        stride_mask_q=mask_strides[2], stride_mask_k=mask_strides[3],
        stride_cos=0 if cos is None else cos.stride(0), stride_sin=0 if sin is None else sin.stride(0),
        n_heads=heads, width_q=q.shape[1], scale_log2=scale * LOG2_E, keep_scale=1.0 / (1.0 - dropout_p),
        stream=stream, threshold=keep_threshold(dropout_p), window_left=window_left, window_right=window_right,
        PADDED=padded, GROUP=heads // k.shape[-2],
        HAS_BIAS=bias is not None, HAS_MASK=mask is not None, HAS_ALIBI=alibi_slopes is not None,
        HAS_WINDOW=min(window_left, window_right) < UNBOUNDED, HAS_ROTARY=cos is not None,
        HAS_DROPOUT=dropout_p > 0.0, HAS_IDS=sequence_ids is not None,
        HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), TILE=TILE,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, lse


def _forward_outputs(q, *_):
    """o like q but contiguous; lse [H, Tq] or [B, H, Sq] in fp32."""
    *rows, heads, _ = q.shape
    lse_shape = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


_forward_op = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor spans_q, Tensor spans_k, Tensor schedule, Tensor? bias, "
    "Tensor? mask, Tensor? alibi_slopes, Tensor? cos, Tensor? sin, Tensor? seed, Tensor? sequence_ids, "
    "SymInt window_left, SymInt window_right, float dropout_p, SymInt stream, float scale) -> (Tensor, Tensor)",
    launch=_launch_forward,
    fake=_forward_outputs,
)


# ---- public --------------------------------------------------------------------------------------------------


def attention(
    q, k, v, cu_seqlens, max_seqlen=None, *, cu_seqlens_k=None, max_seqlen_k=None, bias=None, mask=None,
    alibi_slopes=None, window=None, rotary=None, dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None,
    return_lse=False, schedule=None,
):  # fmt: skip
    spans_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if schedule is None:
        schedule = attention_schedule(cu_seqlens, q.shape[0])
    return _attend(
        q, k, v, cu_seqlens, spans_k, schedule, bias, mask, alibi_slopes, window, rotary,
        dropout_p, seed, stream, sequence_ids, scale, return_lse,
    )  # fmt: skip


def attention_padded(
    q, k, v, seqlens=None, seqlens_k=None, *, bias=None, mask=None, alibi_slopes=None, window=None, rotary=None,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, return_lse=False,
):  # fmt: skip
    batch, width_q = q.shape[:2]
    width_k = k.shape[1]

    def full(width):
        return torch.full((batch,), width, dtype=torch.int32, device=q.device)

    if seqlens_k is None:
        seqlens_k = seqlens if seqlens is not None and width_q == width_k else full(width_k)
    seqlens = full(width_q) if seqlens is None else seqlens
    schedule = _schedule_op(seqlens, width_q, True)
    return _attend(
        q, k, v, seqlens, seqlens_k, schedule, bias, mask, alibi_slopes, window, rotary,
        dropout_p, seed, stream, sequence_ids, scale, return_lse,
    )  # fmt: skip


def _attend(
    q, k, v, spans_q, spans_k, schedule, bias, mask, alibi_slopes, window, rotary,
    dropout_p, seed, stream, sequence_ids, scale, return_lse,
):  # fmt: skip
    cos, sin = (None, None) if rotary is None else rotary
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else (min(w, UNBOUNDED) for w in window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = _forward_op(
        q, k, v, spans_q, spans_k, schedule, bias, mask, alibi_slopes, cos, sin, seed, sequence_ids,
        left, right, dropout_p, stream, scale,
    )  # fmt: skip
    return (o, lse) if return_lse else o
