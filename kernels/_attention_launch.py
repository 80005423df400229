"""Attention's list of tiles, and which kernel is launched over which part of it with what arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _device
from ._attention_bwd import (
    _attention_bwd_bias_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_short_kernel,
)
from ._attention_config import SHORT, TILE, AttentionConfig, attention_config
from ._attention_fwd import _attention_fwd_kernel
from ._attention_short import (
    _attention_bwd_heads_kernel,
    _attention_bwd_tile_kernel,
    _attention_fwd_heads_kernel,
    _attention_fwd_tile_kernel,
)
from ._random import keep_threshold

LOG2_E = 1.4426950408889634
UNBOUNDED = 1 << 29  # no window; sums with a position stay within int32


# ---- schedule ------------------------------------------------------------------------------------------------


def schedule_tiles(spans: Tensor, other_spans: Tensor | None, size: int, padded: bool) -> Tensor:
    """The tiles of q (or of k) as [n, 2] int32 entries (sequence, tile), longest sequence first. No synchronisation.

    First come the tiles of long sequences, then one entry for each short one (at most SHORT rows in q and in k);
    (-1, 0) fills both parts up to a length that the host knows. spans: cu_seqlens [B + 1] and size = total tokens, or
    padded: lengths [B] and size = width, where tiles of padding count too, since someone has to write their zeros.
    other_spans: those of k (or of q) in cross-attention.
    """
    n_long, n_short = schedule_sizes(spans, other_spans, size, padded)
    if n_short == 0:
        return spans.new_full((n_long, 2), -1)
    lengths, order = (spans if padded else spans.diff()).sort(descending=True, stable=True)
    is_short = lengths <= SHORT
    if other_spans is not None:
        is_short &= (other_spans if padded else other_spans.diff())[order] <= SHORT

    tiles = torch.full_like(lengths, triton.cdiv(size, TILE)) if padded else (lengths + (TILE - 1)) // TILE
    tiles = tiles.masked_fill(is_short, 0)
    ends = tiles.cumsum(0)
    index = torch.arange(n_long, device=spans.device)
    rank = torch.searchsorted(ends, index, right=True)  # whose tile this is; past the last one: a surplus entry
    surplus = rank == n_short
    rank = rank.clamp(max=n_short - 1)
    sequence, tile = order[rank].masked_fill(surplus, -1), (index - (ends - tiles)[rank]).masked_fill(surplus, 0)

    short = torch.stack((order.masked_fill(~is_short, -1), torch.zeros_like(order)), dim=1)
    return torch.cat((torch.stack((sequence, tile), dim=1), short)).to(torch.int32)


def schedule_sizes(spans: Tensor, other_spans: Tensor | None, size: int, padded: bool) -> tuple[int, int]:
    """Entries for tiles of long sequences, at least as many as there can be, and for short sequences."""
    if padded:
        return spans.shape[0] * ((size + TILE - 1) // TILE), spans.shape[0]
    batch = spans.shape[0] - 1
    n_long = size // TILE + batch  # as if the last tile of each held one token
    if other_spans is None:
        n_long = torch.sym_min(n_long, size // SHORT)  # but a long sequence has over SHORT tokens for each of its tiles
    # never one entry in all: on a size of one torch.compile would specialise
    return n_long + 1, batch


# ---- launchers -----------------------------------------------------------------------------------------------


def _batch(q: Tensor, spans: Tensor) -> int:
    """Number of sequences: spans are lengths where q is padded, else cu_seqlens."""
    return spans.shape[0] if q.dim() == 4 else spans.shape[0] - 1


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The kernels step freely over rows and heads, but read a row's elements one after another."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _shared_arguments(
    q, k, v, spans_q, spans_k, bias, mask, alibi_slopes, cos, sin, seed, sequence_ids,
    window_left, window_right, dropout_p, stream, scale,
) -> dict:  # fmt: skip
    """What every kernel here takes: inputs, their strides, sizes and flags, by name."""
    padded = q.dim() == 4
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "spans_q_ptr": spans_q, "spans_k_ptr": spans_k,
        "bias_ptr": bias, "mask_ptr": None if mask is None else mask.view(torch.uint8), "slopes_ptr": alibi_slopes,
        "cos_ptr": cos, "sin_ptr": sin, "seed_ptr": seed, "sequence_ids_ptr": sequence_ids,
        "stride_cos": 0 if cos is None else cos.stride(0), "stride_sin": 0 if sin is None else sin.stride(0),
        "n_heads": q.shape[-2], "width_q": q.shape[-3],
        "scale_log2": scale * LOG2_E, "keep_scale": 1.0 / (1.0 - dropout_p),
        "stream_id": stream, "threshold": keep_threshold(dropout_p),
        "window_left": window_left, "window_right": window_right,
        "PADDED": padded, "GROUP": q.shape[-2] // k.shape[-2],
        "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_WINDOW": min(window_left, window_right) < UNBOUNDED, "HAS_ROTARY": cos is not None,
        "HAS_DROPOUT": dropout_p > 0.0, "HAS_IDS": sequence_ids is not None,
        "HEAD_DIM": q.shape[-1], "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # means nothing for 16-bit types
    }  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        # packed tensors have no sequence stride: cu_seqlens says where a sequence begins
        arguments[f"stride_{name}b"] = t.stride(0) if padded else 0
        arguments[f"stride_{name}t"], arguments[f"stride_{name}h"] = t.stride(-3), t.stride(-2)
    for name, t in (("bias", bias), ("mask", mask)):
        # a dimension of one is shared by all sequences or heads
        strides = [0] * 4 if t is None else [0 if n == 1 else step for n, step in zip(t.shape, t.stride(), strict=True)]
        arguments.update(zip((f"stride_{name}_{axis}" for axis in "bhqk"), strides, strict=True))
    return arguments


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run, or to be compiled without a device (`compile_cases`)."""

    kernel: triton.runtime.JITFunction
    n_programs: int
    config: AttentionConfig
    arguments: dict

    def run(self) -> None:
        if self.n_programs == 0:
            return
        self.kernel[(self.n_programs,)](
            **self.arguments,
            BLOCK_M=self.config.block_m,
            BLOCK_N=self.config.block_n,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            **self.config.options,
        )


def _launch(kernel, n_programs: int, config: AttentionConfig | None, arguments: dict) -> Launch:
    """A launch with those of the arguments that the kernel takes."""
    taken = set(kernel.arg_names)
    return Launch(kernel, n_programs, config, {name: value for name, value in arguments.items() if name in taken})


def _traits(arguments: dict) -> frozenset[str]:
    """What `attention_config` has to know of a launch's options."""
    is_modified = any(arguments[f"HAS_{option}"] for option in ("BIAS", "MASK", "ALIBI", "WINDOW", "ROTARY"))
    has = {"modified": is_modified, "dropout": arguments["HAS_DROPOUT"], "grouped": arguments["GROUP"] > 1}
    return frozenset(trait for trait, present in has.items() if present)


def _parts(schedule: Tensor, batch: int, longest: int, has_short: bool) -> tuple[dict, int, dict, int]:
    """(where, number of entries) for the kernels with loops, then for those of short sequences, if there are such."""
    n_long = schedule.shape[0] - batch
    long = {"schedule_ptr": schedule, "first_entry": 0, "TILE": TILE}
    if not has_short:
        return long, schedule.shape[0], {}, 0
    short = {"schedule_ptr": schedule, "first_entry": n_long, "TILE": SHORT}
    return long, n_long if longest > SHORT else 0, short, batch


def _is_plain(arguments: dict) -> bool:
    """Whether the kernels of `_attention_short.py` take it: packed, scores as they are, a key head a query head."""
    return not arguments["PADDED"] and _traits(arguments) <= {"dropout"}


def plan_forward(arch, o, lse, q, k, v, spans_q, spans_k, schedule, longest, *options) -> list[Launch]:
    heads, head_dim = q.shape[-2:]
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, *options)
    arguments |= {"o_ptr": o, "lse_ptr": lse, "SHORT": SHORT}
    traits, plain = _traits(arguments), _is_plain(arguments)
    config, of_short, of_tile = (
        attention_config(head_dim, q.dtype, arch, direction, traits)
        for direction in ("fwd", "fwd_heads" if plain else "fwd_short", "fwd_tile")
    )
    of_tile = of_tile if plain else None
    long, n_long, short, n_short = _parts(schedule, _batch(q, spans_q), longest, of_short is not None)
    arguments["SKIP"] = TILE if of_tile else 0
    n_loop = n_long * (TILE // config.block_m) * heads if of_tile is None or longest > TILE else 0
    short_kernel = _attention_fwd_heads_kernel if plain else _attention_fwd_kernel
    return [
        _launch(_attention_fwd_kernel, n_loop, config, arguments | long),
        _launch(_attention_fwd_tile_kernel, n_long * heads if of_tile else 0, of_tile, arguments | long),
        _launch(short_kernel, n_short * heads, of_short, arguments | short),
    ]


def plan_backward(
    arch, dq, dk, dv, delta, do, dlse, o, lse, q, k, v, spans_q, spans_k, schedule_q, schedule_k, longest, *options
) -> list[Launch]:
    """dq before dk and dv: it also writes delta, which they read."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, *options)
    arguments |= {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "scale": options[-1], "SHORT": SHORT}
    arguments |= {"o_ptr": o, "dlse_ptr": dlse, "HAS_DLSE": dlse is not None}
    arguments |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "width_k": k.shape[-3]}

    traits, plain = _traits(arguments), _is_plain(arguments)
    of_dq, of_dkv, of_short, of_tile = (
        attention_config(head_dim, q.dtype, arch, direction, traits)
        for direction in ("bwd_dq", "bwd_dkv", "bwd_heads" if plain else "bwd_short", "bwd_tile")
    )
    of_tile = of_tile if plain else None
    batch = _batch(q, spans_q)
    long_q, n_long_q, short, n_short = _parts(schedule_q, batch, longest, of_short is not None)
    long_k, n_long_k, _, _ = _parts(schedule_k, batch, longest, of_short is not None)
    arguments["SKIP"] = TILE if of_tile else 0
    # Does any sequence need the kernels with loops? Keys without rows do too, which only cross-attention can have.
    is_cross = schedule_q.data_ptr() != schedule_k.data_ptr()
    is_longer = of_tile is None or longest > TILE or is_cross
    n_dq = n_long_q * (TILE // of_dq.block_m) * heads if is_longer else 0
    n_dkv = n_long_k * (TILE // of_dkv.block_n) * kv_heads if is_longer else 0
    short_kernel = _attention_bwd_heads_kernel if plain else _attention_bwd_short_kernel
    return [
        _launch(_attention_bwd_dq_kernel, n_dq, of_dq, arguments | long_q),
        _launch(_attention_bwd_dkv_kernel, n_dkv, of_dkv, arguments | long_k),
        _launch(_attention_bwd_tile_kernel, n_long_q * heads if of_tile else 0, of_tile, arguments | long_q),
        _launch(short_kernel, n_short * kv_heads, of_short, arguments | short),
    ]


def plan_backward_bias(arch, dbias, do, lse, delta, q, k, v, spans_q, spans_k, bias, *options) -> Launch:
    planes_b, planes_h, rows, cols = bias.shape
    arguments = _shared_arguments(q, k, v, spans_q, spans_k, bias, *options)
    config = attention_config(q.shape[-1], q.dtype, arch, "bwd_bias", _traits(arguments))
    return Launch(
        _attention_bwd_bias_kernel,
        planes_b * planes_h * triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),
        config,
        arguments
        | {"lse_ptr": lse, "do_ptr": do, "delta_ptr": delta, "dbias_ptr": dbias}
        | {"bias_rows": rows, "bias_cols": cols, "batch": _batch(q, spans_q)}
        | {"OF_BATCH": planes_b == 1, "OF_HEADS": planes_h == 1},
    )


def launch_forward(q, k, v, *rest):
    o, lse = forward_outputs(q)
    for launch in plan_forward(_device.arch(q.device.index), o, lse, *unit_stride(q, k, v), *rest):
        launch.run()
    return o, lse


def forward_outputs(q, *_):
    """o like q but contiguous; lse [H, Tq] or [B, H, Sq] in fp32."""
    *rows, heads, _ = q.shape
    lse_shape = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def launch_backward(do, dlse, o, lse, q, k, v, *rest):
    outputs = backward_outputs(do, dlse, o, lse, q, k, v)
    do, dlse = do.contiguous(), None if dlse is None else dlse.contiguous()
    for launch in plan_backward(_device.arch(q.device.index), *outputs, do, dlse, o, lse, *unit_stride(q, k, v), *rest):
        launch.run()
    return outputs


def backward_outputs(do, dlse, o, lse, q, k, v, *_):
    """dq, dk, dv contiguous; delta like lse."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


def launch_backward_bias(do, lse, delta, q, k, v, spans_q, spans_k, bias, *options):
    dbias = bias.new_empty(bias.shape)
    plan_backward_bias(
        _device.arch(q.device.index),
        dbias,
        do.contiguous(),
        lse,
        delta,
        *unit_stride(q, k, v),
        spans_q,
        spans_k,
        bias,
        *options,
    ).run()
    return dbias
